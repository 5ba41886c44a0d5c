"""The gated delta rule and its gradients in C++, float32 inside, short calls token by token and others in chunks."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..reference.gdn_rule_check import OP, check_rule
from . import build, gdn

_Call = ctypes.c_int64 * 30  # the fields of struct Call in gdn_rule.cpp, in its order
CHUNKED_FROM = (32, 16)
"""Tokens from which chunks are used, forward and backward; fewer are faster one by one."""


@cache
def _kernels(name: str) -> Any:
    """The library for one instruction set."""
    return build.load(f"gdn_rule_{name}", {"gdn_rule.cpp": dict(gdn.INSTRUCTION_SETS)[name]})


@cache
def why_not() -> str | None:
    """Say why there is no C++ kernel here (no compiler, or it failed), or None. Builds it at the first call."""
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
    return why_not()


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
    return why_not()


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
    """Run the rule, heads in parallel, token by token or in chunks of 64; arguments as `opreg::gated_delta_rule`."""
    return forward(v.shape[1] >= CHUNKED_FROM[0], q, k, v, decay, erase, write, initial_state, scale)


def forward(
    chunked: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule in the form that is asked for."""
    inputs = _inputs(q, k, v, decay, erase, write, initial_state)
    out = torch.empty(v.shape, dtype=torch.float32)
    final = torch.empty((v.shape[0], v.shape[2], v.shape[3], k.shape[3]), dtype=torch.float32)
    library = _kernels(gdn.instruction_set())
    library.gdn_rule(ctypes.byref(_call(chunked, inputs, decay, erase, write, scale, (out, final))))
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
    """Gradients, with one state in memory per chunk; as `opreg::gated_delta_rule_backward`."""
    chunked = v.shape[1] >= CHUNKED_FROM[1]
    return backward(chunked, grad_out, grad_state, q, k, v, decay, erase, write, initial_state, scale)


def backward(
    chunked: bool,
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
    """The gradients in the form that is asked for."""
    inputs = _inputs(q, k, v, decay, erase, write, initial_state)
    grads = (_dense(grad_out), _dense(grad_state))
    shape = (*v.shape[:3], k.shape[3])
    dq, dk = torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.float32)
    own = [torch.empty(x.shape, dtype=torch.float32) for x in (v, decay, erase, write)]
    back = torch.empty(grad_state.shape, dtype=torch.float32)
    library = _kernels(gdn.instruction_set())
    outputs = (None, None, *grads, dq, dk, *own, back)
    library.gdn_rule_backward(ctypes.byref(_call(chunked, inputs, decay, erase, write, scale, outputs)))
    dq, dk = (_over_heads(x, k.shape[2]) for x in (dq, dk))
    dv, ddecay, derase, dwrite = (x.to(like.dtype) for x, like in zip(own, (v, decay, erase, write), strict=True))
    return dq.to(q.dtype), dk.to(k.dtype), dv, ddecay, derase, dwrite, back


def _over_heads(x: Tensor, heads: int) -> Tensor:
    """Value heads summed for each key head."""
    if x.shape[2] == heads:
        return x
    summed: Tensor = x.unflatten(2, (heads, -1)).sum(3)
    return summed


def _dense(x: Tensor) -> Tensor:
    return x.to(torch.float32).resolve_neg().contiguous()


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, erase: Tensor, write: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    check_rule(q, k, v, decay, erase, write, initial_state)
    initial = None if initial_state is None else _dense(initial_state)
    return _dense(q), _dense(k), _dense(v), _dense(decay), _dense(erase), _dense(write), initial


def _call(
    chunked: bool,
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
        chunked,
        *(0 if x is None else x.data_ptr() for x in (*inputs, *outputs)),
    )
