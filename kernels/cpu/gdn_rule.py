"""The gated delta rule and its gradients in C++, float32 inside; states are computed again on the way back."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import build, gdn

_Call = ctypes.c_int64 * 28  # the fields of struct Call in gdn_rule.cpp, in its order
OP = "opreg::gated_delta_rule"


@cache
def _kernels(name: str) -> Any:
    """The library for one instruction set."""
    return build.load(f"gdn_rule_{name}", {"gdn_rule.cpp": dict(gdn.INSTRUCTION_SETS)[name]})


@cache
def _why_not() -> str | None:
    reason = build.why_not()
    if reason is not None:
        return reason
    try:
        _kernels(gdn.instruction_set())
    except build.BuildError as e:
        return str(e)
    return None


def gated_delta_rule_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> str | None:
    """Say why there is no C++ kernel here (no compiler, or it failed), or None. Builds it at the first call."""
    return _why_not()


def gated_delta_rule_backward_why_not(
    grad_out: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> str | None:
    """Say why there is no C++ kernel here (no compiler, or it failed), or None. Builds it at the first call."""
    return _why_not()


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the rule token by token, heads in parallel; the arguments are those of `opreg::gated_delta_rule`."""
    inputs = _inputs(q, k, v, decay, erase, write, initial_state)
    out = torch.empty(v.shape, dtype=torch.float32)
    final = torch.empty((v.shape[0], v.shape[2], v.shape[3], k.shape[3]), dtype=torch.float32)
    library = _kernels(gdn.instruction_set())
    library.gdn_rule(ctypes.byref(_call(inputs, decay, erase, write, scale, (out, final))))
    return out.to(v.dtype), final


def gated_delta_rule_backward(
    grad_out: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients, with one state in memory per 32 tokens; as `opreg::gated_delta_rule_backward`."""
    inputs = _inputs(q, k, v, decay, erase, write, initial_state)
    grads = (_dense(grad_out), _dense(grad_state))
    shape = (*v.shape[:3], k.shape[3])
    dq, dk, de, dg = (torch.empty(shape, dtype=torch.float32) for _ in range(4))
    dwv = torch.empty(v.shape, dtype=torch.float32)
    back = torch.empty(grad_state.shape, dtype=torch.float32)
    outputs = (None, None, *grads, dq, dk, de, dg, dwv, back)
    library = _kernels(gdn.instruction_set())
    library.gdn_rule_backward(ctypes.byref(_call(inputs, decay, erase, write, scale, outputs)))
    _, keys, values, _, erases, writes, _ = inputs
    heads = k.shape[2]

    def per_head(gate: Tensor, dims: int) -> Tensor:
        return gate if dims == 4 else gate.unsqueeze(-1)

    def over_heads(x: Tensor) -> Tensor:
        summed: Tensor = x.unflatten(2, (heads, -1)).sum(3)
        return summed

    def over_channels(x: Tensor, like: Tensor) -> Tensor:
        return (x if like.dim() == 4 else x.sum(-1)).to(like.dtype)

    dk = dk + de * per_head(erases, erase.dim())
    return (
        over_heads(dq).to(q.dtype),
        over_heads(dk).to(k.dtype),
        (dwv * per_head(writes, write.dim())).to(v.dtype),
        over_channels(dg, decay),
        over_channels(de * keys.repeat_interleave(v.shape[2] // heads, 2), erase),
        over_channels(dwv * values, write),
        back,
    )


def _dense(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, erase: Tensor, write: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    if v.dtype == torch.float64:
        raise ValueError(f"{OP}: v is torch.float64, but all sums are float32; pass v.float()")
    if k.shape[2] == 0 or v.shape[2] % k.shape[2]:
        raise ValueError(f"{OP}: v has {v.shape[2]} heads, which is no multiple of the {k.shape[2]} heads of k")
    for name, gate, last in (("decay", decay, k), ("erase", erase, k), ("write", write, v)):
        wanted = (v.shape[:3], (*v.shape[:3], last.shape[3]))
        if tuple(gate.shape) not in wanted:
            channels = "v" if last is v else "k"
            raise ValueError(
                f"{OP}: {name} has shape {tuple(gate.shape)}, expected {tuple(wanted[0])} or {wanted[1]}: one number "
                f"a head, or one for each channel of {channels}"
            )
    for name, x in (
        ("q", q),
        ("k", k),
        ("decay", decay),
        ("erase", erase),
        ("write", write),
        ("initial_state", initial_state),
    ):
        if x is not None and not x.is_cpu:
            raise ValueError(f"{OP}: {name} is on {x.device}, but v on {v.device}; move it there")
    initial = None if initial_state is None else _dense(initial_state)
    return _dense(q), _dense(k), _dense(v), _dense(decay), _dense(erase), _dense(write), initial


def _call(
    inputs: Sequence[Tensor | None],
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    scale: float | None,
    outputs: Sequence[Tensor | None],
) -> Any:
    q, k, v = inputs[:3]
    if q is None or k is None or v is None:
        raise ValueError(f"{OP}: q, k and v must be given")
    factor = k.shape[3] ** -0.5 if scale is None else scale
    return _Call(
        v.shape[0],
        v.shape[1],
        k.shape[2],
        v.shape[2],
        k.shape[3],
        v.shape[3],
        decay.dim() == 4,
        erase.dim() == 4,
        write.dim() == 4,
        struct.unpack("<I", struct.pack("<f", factor))[0],
        torch.get_num_threads(),
        *(0 if x is None else x.data_ptr() for x in (*inputs, *outputs)),
    )
