"""Workloads of gdn_attention for `opreg bench`: Qwen3-Next's heads, one prompt or one decode step of many sequences."""

from collections.abc import Iterator
from typing import Any

import torch

from .gdn_attention_inputs import Heads, make_call

HEADS = Heads(16, 32, 128, 128, 4)
CHUNK = 64
BASELINES = {"transformers": "opreg.kernels.baselines.gdn:transformers"}


def gdn_attention(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16
) -> Iterator[dict[str, Any]]:
    """One sequence of T tokens, from nothing where T > 1, and one token each of 64 sequences; float32 state."""
    for name, lens in (("T=1", [1]), ("T=64", [64]), ("T=512", [512]), ("T=2048", [2048]), ("decode64", [1] * 64)):
        fresh = lens[0] > 1
        call = make_call(
            lens,
            HEADS,
            device=device,
            dtype=dtype,
            bias=False,
            initial=[False] if fresh else None,
            spare_slots=0,
            generator=generator,
        )
        call["dt_bias"] = call["dt_bias"].float()
        yield {
            "name": name,
            "inputs": call,
            "baselines": BASELINES,
            "bytes": moved(call, fresh),
            "flops": sum(lens) * flops_per_token(HEADS, min(CHUNK, lens[0])),
        }


def moved(call: dict[str, Any], fresh: bool) -> int:
    """Bytes read and written at least: projections, outputs, weights, and the states once each way."""
    once = ("projected_states_qkvz", "projected_states_ba", "core_attn_out", "z", "conv_weights")
    states = ("conv_state", "ssm_state")
    size: dict[str, int] = {name: call[name].numel() * call[name].element_size() for name in (*once, *states)}
    return sum(size[n] for n in once) + (1 if fresh else 2) * sum(size[n] for n in states)


def flops_per_token(heads: Heads, chunk: int) -> int:
    """The chunked form solved directly, triangles counted as halves, and the convolution."""
    k, v = heads.k_dim, heads.v_dim
    states = heads.v_heads * 6 * k * v  # K S, Q S, and the update
    inside = heads.v_heads * 2 * chunk * v + heads.k_heads * 2 * chunk * k  # solve and Q K^T X; K K^T and Q K^T
    return states + inside + 2 * heads.width * heads.conv_dim
