"""Splash attention with its gradients in Triton, for cuda and xpu: what launches splash_attention_kernels."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..reference.splash_attention_check import check, scale_of
from .splash_attention_kernels import attend, grad_keys, grad_queries

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 256
"""Longest vector of a head: a block of rows, one of keys and one of values must fit in the registers together."""


def _options(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(sizes and numbers, constants) that all programs take."""
    check(q, k, (q_segments, kv_segments), window, soft_cap)
    n, m, d, e = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    numbers = (q.shape[1] // k.shape[1], n, m, d, e, window or 0, scale_of(q, scale), soft_cap or 1.0)
    wide = max(d, e) > 64
    constants = {
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "CAP": soft_cap is not None,
        "SEGMENTS": q_segments is not None,
        "ROWS": 32 if wide and q.dtype is torch.float32 else 64,
        "KEYS": 32 if wide else 64,
        "D": max(triton.next_power_of_2(d), 16),
        "E": max(triton.next_power_of_2(e), 16),
    }
    return numbers, constants


def _ids(segments: Tensor | None, other: Tensor) -> Tensor:
    """Segment ids as the programs read them; any tensor where there are none, for they do not look."""
    return other if segments is None else segments.resolve_neg().contiguous()


def splash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse); see opreg::splash_attention."""
    numbers, constants = _options(q, k, v, q_segments, kv_segments, causal, window, soft_cap, scale)
    batches, heads, n, _ = q.shape
    out = torch.zeros(batches, heads, n, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.full((batches, heads, n), -math.inf, dtype=torch.float32, device=q.device)
    if lse.numel() and k.shape[2]:
        q, k, v = (x.resolve_neg().contiguous() for x in (q, k, v))  # a negative view's memory holds other values
        grid = (triton.cdiv(n, constants["ROWS"]), batches * heads)
        ids = (_ids(q_segments, q), _ids(kv_segments, k))
        attend[grid](q, k, v, *ids, out, lse, heads, *numbers, **constants)
    return out, lse


def splash_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); see opreg::splash_attention_backward."""
    numbers, constants = _options(q, k, v, q_segments, kv_segments, causal, window, soft_cap, scale)
    (batches, heads, n, _), (_, groups, m, _) = q.shape, k.shape
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if batches and heads and n and m:
        q, k, v, grad = (x.resolve_neg().contiguous() for x in (q, k, v, grad_out.to(q.dtype)))
        through = grad_lse.float() - (out.float() * grad_out.float()).sum(-1)
        total = torch.where(lse == -math.inf, 0, lse).contiguous()
        ids = (_ids(q_segments, q), _ids(kv_segments, k))
        given = (q, k, v, grad, total, through, *ids)
        rows, keys = triton.cdiv(n, constants["ROWS"]), triton.cdiv(m, constants["KEYS"])
        grad_queries[(rows, batches * heads)](*given, dq, heads, *numbers, **constants)
        grad_keys[(keys, batches * groups)](*given, dk, dv, groups, *numbers, **constants)
    return dq, dk, dv


def _limits(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.dtype not in _DTYPES:
        return f"wants float32, float16 or bfloat16, but q is {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"wants one dtype, but q is {q.dtype}, k {k.dtype} and v {v.dtype}"
    widest = max(q.shape[3], v.shape[3])
    return f"heads of at most {_WIDEST}, but one has {widest}" if widest > _WIDEST else None


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
) -> str | None:
    """Other dtypes, of which float64 would be rounded to fp32, and heads too wide for the registers."""
    return _limits(q, k, v)


def why_not_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
) -> str | None:
    """The same for the gradients."""
    return _limits(q, k, v)
