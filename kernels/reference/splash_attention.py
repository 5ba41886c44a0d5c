"""Attention with its gradients, one row of one head at a time in float32: the truth for other kernels."""

import math

import torch
from torch import Tensor

from .splash_attention_check import check, scale_of


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
    check(q, k, (q_segments, kv_segments), window, soft_cap)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=wide, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)
    for b, h, i, keys in _rows(q, k, q_segments, kv_segments, causal, window):
        g = h // (q.shape[1] // k.shape[1])
        scores, _ = _scores(q[b, h, i], k[b, g, keys], soft_cap, scale_of(q, scale))
        weights = (scores - scores.max()).exp()
        out[b, h, i] = weights @ v[b, g, keys].to(wide) / weights.sum()
        lse[b, h, i] = scores.max() + weights.sum().log()
    return out.to(q.dtype), lse


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
    check(q, k, (q_segments, kv_segments), window, soft_cap)
    factor = scale_of(q, scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    for b, h, i, keys in _rows(q, k, q_segments, kv_segments, causal, window):
        g = h // (q.shape[1] // k.shape[1])
        scores, slope = _scores(q[b, h, i], k[b, g, keys], soft_cap, factor)
        weights = (scores - lse[b, h, i]).exp()
        grad = grad_out[b, h, i].to(wide)
        through_out = v[b, g, keys].to(wide) @ grad - (out[b, h, i].to(wide) * grad).sum()
        dscores = weights * (through_out + grad_lse[b, h, i]) * slope * factor
        dq[b, h, i] = dscores @ k[b, g, keys].to(wide)
        dk[b, g, keys] += dscores[:, None] * q[b, h, i].to(wide)
        dv[b, g, keys] += weights[:, None] * grad
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _rows(
    q: Tensor, k: Tensor, q_segments: Tensor | None, kv_segments: Tensor | None, causal: bool, window: int | None
) -> list[tuple[int, int, int, Tensor]]:
    """(batch, head, row, the keys that it sees) for every row that sees any."""
    found = []
    columns = torch.arange(k.shape[2], device=q.device)
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            place = i + k.shape[2] - q.shape[2]
            seen = torch.ones_like(columns, dtype=torch.bool)
            if causal:
                seen &= columns <= place
            if window is not None:
                seen &= (columns - place).abs() < window
            if q_segments is not None and kv_segments is not None:
                seen &= kv_segments[b] == q_segments[b, i]
            if seen.any():
                found += [(b, h, i, seen.nonzero()[:, 0]) for h in range(q.shape[1])]
    return found


def _scores(row: Tensor, keys: Tensor, soft_cap: float | None, factor: float) -> tuple[Tensor, Tensor]:
    """A row's scores, and the slope of the cap at each."""
    wide = torch.promote_types(row.dtype, torch.float32)
    scores = keys.to(wide) @ row.to(wide) * factor
    if soft_cap is None:
        return scores, torch.ones_like(scores)
    capped = torch.tanh(scores / soft_cap)
    return soft_cap * capped, 1 - capped**2
