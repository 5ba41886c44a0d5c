"""opreg::gated_delta_rule by transformers' chunk function, and the other forms that this package has."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cpu import gdn_rule, gdn_rule_torch

_GRADS = ("grad_out", "grad_state")


def transformers(call: Mapping[str, Any]) -> Callable[[], Any] | str:
    """`torch_chunk_gated_delta_rule` of Qwen3-Next: key heads repeated, results [b, t, hv, v] and [b, hv, k, v]."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if any(call[name].dim() == 4 for name in ("decay", "erase", "write")):
        return "it has one decay and one beta a head"
    if not (call["erase"] is call["write"] or torch.equal(call["erase"], call["write"])):
        return "it has one number for erase and write"
    if call.get("scale") is not None:
        return "its scale is k ** -0.5"
    qwen = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    ratio = call["v"].shape[2] // call["k"].shape[2]
    start = call.get("initial_state")

    def run() -> tuple[Tensor, Tensor]:
        q, k = (call[name].repeat_interleave(ratio, 2) for name in ("q", "k"))
        found: tuple[Tensor, Tensor] = qwen.torch_chunk_gated_delta_rule(
            q,
            k,
            call["v"],
            g=call["decay"],
            beta=call["write"],
            initial_state=None if start is None else start.mT,
            output_final_state=True,
        )
        return found

    return run


def transformers_backward(call: Mapping[str, Any]) -> Callable[[], Any] | str:
    """Autograd through the same, whose forward pass ran before and is not timed."""
    inner = {name: x for name, x in call.items() if name not in _GRADS}
    leaves = {name: x.detach().requires_grad_() for name, x in inner.items() if isinstance(x, Tensor)}
    leaves["erase"] = leaves["write"]
    forward = transformers({**inner, **leaves})
    if isinstance(forward, str):
        return forward
    with torch.enable_grad():  # benchmarks run without
        out, state = forward()
    wanted = [leaves[name] for name in ("q", "k", "v", "decay", "write")]
    grads = (call["grad_out"], call["grad_state"].mT)
    return partial(torch.autograd.grad, (out, state), wanted, grads, retain_graph=True)


def tokens(call: Mapping[str, Any]) -> Callable[[], Any] | str:
    """The C++ kernel token by token."""
    return _why_not_cpp(call) or partial(gdn_rule.forward, False, **call)


def tokens_backward(call: Mapping[str, Any]) -> Callable[[], Any] | str:
    """The gradients by the C++ kernel token by token."""
    return _why_not_cpp(call) or partial(gdn_rule.backward, False, **call)


def _why_not_cpp(call: Mapping[str, Any]) -> str | None:
    return gdn_rule.why_not() if call["v"].is_cpu else "it is a kernel for the CPU"


def chunks(call: Mapping[str, Any]) -> Callable[[], Any] | str:
    """The torch kernel in chunks."""
    return partial(gdn_rule_torch.gated_delta_rule_chunks, **call)


def chunks_backward(call: Mapping[str, Any]) -> Callable[[], Any] | str:
    """The gradients by the torch kernel in chunks."""
    return partial(gdn_rule_torch.gated_delta_rule_backward_chunks, **call)
