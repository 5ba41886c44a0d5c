"""Workloads of gated_delta_rule for `opreg bench`: Qwen3-Next's heads, one sequence, forward and backward."""

from collections.abc import Iterator
from typing import Any

import torch

from .gated_delta_rule import make_rule_call

LENGTHS = (64, 512, 2048)
CHUNK = 64
HK, HV, K, V = 16, 32, 128, 128
RULES = {"gdn": (False, False, False), "kda": (True, False, False)}
BASELINES = {
    "transformers": "opreg.kernels.baselines.gdn_rule:transformers",
    "token by token": "opreg.kernels.baselines.gdn_rule:tokens",
    "torch chunks": "opreg.kernels.baselines.gdn_rule:chunks",
}


def gated_delta_rule(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[dict[str, Any]]:
    """T tokens with one decay a head (gdn), and with a vector (kda), which transformers has not."""
    for rule, length in ((rule, length) for rule in RULES for length in LENGTHS):
        call = _call(rule, length, device, generator, dtype)
        out = length * HV * V * call["v"].element_size() + 4 * HV * V * K
        yield {
            "name": f"{rule} T={length}",
            "inputs": call,
            "baselines": BASELINES,
            "bytes": _size(call) + out,
            "flops": length * flops_per_token(),
        }


def gated_delta_rule_backward(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[dict[str, Any]]:
    """Its gradients. transformers' are autograd's, of a forward pass whose intermediate results are there already."""
    names = {name: f"{where}_backward" for name, where in BASELINES.items()}
    for rule, length in ((rule, length) for rule in RULES for length in LENGTHS):
        call = _call(rule, length, device, generator, dtype)
        grads = {
            "grad_out": torch.randn(call["v"].shape, generator=generator, device=generator.device).to(call["v"]),
            "grad_state": torch.randn(1, HV, V, K, generator=generator, device=generator.device).to(device),
        }
        yield {
            "name": f"{rule} T={length}",
            "inputs": {**grads, **call},
            "baselines": names,
            "bytes": 2 * _size(call) + _size(grads) + 4 * HV * V * K,
            "flops": 3 * length * flops_per_token(),  # the forward pass again, and two products for each of its own
        }


def _call(
    rule: str, length: int, device: torch.device, generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Any]:
    sizes = (1, length, HK, HV, K, V)
    call = make_rule_call(sizes, RULES[rule], state=False, device=device, dtype=dtype, generator=generator)
    return {**call, "erase": call["write"]}


def _size(call: dict[str, Any]) -> int:
    return sum(x.numel() * x.element_size() for x in call.values() if isinstance(x, torch.Tensor))


def flops_per_token() -> int:
    """The chunked form solved directly, triangles counted as halves."""
    return HV * (6 * K * V + 2 * CHUNK * V) + HK * 2 * CHUNK * K
