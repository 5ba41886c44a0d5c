"""Calls of gdn_attention for checks, tests and benchmarks: any mixture of sequences, slots in no particular order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """Head counts of the whole model, head sizes and convolution width; the defaults are small and of GQA ratio 2."""

    k_heads: int = 2
    v_heads: int = 4
    k_dim: int = 32
    v_dim: int = 32
    width: int = 4
    tp: int = 1

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution on one rank."""
        return (2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim) // self.tp


def make_call(
    lens: Sequence[int],
    heads: Heads | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    flat: bool = False,
    bias: bool = True,
    initial: Sequence[bool] | None = None,
    padding: int = 0,
    spare_conv_rows: int = 0,
    spare_slots: int = 3,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments of one call with sequences of `lens` tokens.

    `initial[i]` says whether sequence i continues from its slot (None: all do, and has_initial_state is None).
    Outputs, `padding` rows and slots without an initial state are filled with NaN: a kernel that leaves an output
    unwritten, or reads what it must not, shows it.
    """
    h = heads or Heads()
    g = generator or torch.Generator().manual_seed(0)
    hv, tokens, slots = h.v_heads // h.tp, sum(lens), len(lens) + spare_slots
    nan = float("nan")

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, device=g.device) * scale

    def to(x: Tensor, want: torch.dtype = dtype) -> Tensor:
        return x.to(device=device, dtype=want, copy=True)

    index = torch.randperm(slots, generator=g, device=g.device)[: len(lens)].to(torch.int32)
    qkvz, ba = rand(tokens + padding, h.conv_dim + hv * h.v_dim), rand(tokens + padding, 2 * hv)
    qkvz[tokens:], ba[tokens:] = nan, nan
    conv_state = rand(slots, h.width - 1 + spare_conv_rows, h.conv_dim)
    ssm_state = rand(slots, hv, h.v_dim, h.k_dim, scale=0.3)
    for i, known in enumerate(initial or ()):
        if not known:
            conv_state[index[i]], ssm_state[index[i]] = nan, nan
    out = torch.full((tokens + padding, hv, h.v_dim), nan)
    starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    prefills = sum(n > 1 for n in lens)
    return {
        "core_attn_out": to(out),
        "z": to(out),
        "projected_states_qkvz": to(qkvz),
        "projected_states_ba": to(ba),
        "num_k_heads": h.k_heads,
        "num_v_heads": h.v_heads,
        "head_k_dim": h.k_dim,
        "head_v_dim": h.v_dim,
        "conv_state": to(conv_state),
        "ssm_state": to(ssm_state, state_dtype),
        "conv_weights": to(rand(h.conv_dim, h.width, scale=h.width**-0.5)),
        "conv_bias": to(rand(h.conv_dim, scale=0.1)) if bias else None,
        "activation": "silu",
        # As trained models have them: decay per token between 0.9999 and about 0.2.
        "A_log": to(torch.rand(hv, generator=g, device=g.device).mul(16).clamp_min(1e-2).log(), torch.float32),
        "dt_bias": to(rand(hv) - 4.0),
        "num_prefills": prefills,
        "num_decodes": len(lens) - prefills,
        "has_initial_state": None if initial is None else torch.tensor(list(initial), dtype=torch.bool, device=device),
        "non_spec_query_start_loc": starts.to(device),
        "non_spec_state_indices_tensor": index.to(device),
        "num_actual_tokens": tokens if padding else None,
        "tp_size": h.tp,
        "reorder_input": flat,
    }


def clone_call(call: dict[str, Any]) -> dict[str, Any]:
    """Copy the tensors of a call that the op writes; the others are shared."""
    written = ("core_attn_out", "z", "conv_state", "ssm_state")
    return {k: v.clone() if k in written else v for k, v in call.items()}
