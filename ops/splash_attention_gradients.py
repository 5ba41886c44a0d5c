"""The gradients of opreg::splash_attention as one differentiable formula: what their own gradients are taken of."""

import math

import torch
from torch import Tensor


def gradients(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of opreg::splash_attention_backward with all scores in memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = (k.shape[1], q.shape[1] // max(k.shape[1], 1))
    queries, grad, result = (x.to(wide).unflatten(1, heads) for x in (q, grad_out, out))
    keys, values = (x.to(wide).unsqueeze(2) for x in (k, v))
    factor = q.shape[3] ** -0.5 if scale is None else scale
    scores = queries @ keys.mT * factor
    slope: Tensor | float = 1.0
    if soft_cap is not None:
        capped = torch.tanh(scores / soft_cap)
        scores, slope = capped * soft_cap, 1 - capped**2
    # Hidden before exp and not after it, where an inf would make the derivative nan.
    scores = scores.masked_fill(_hidden(q, k, q_segments, kv_segments, causal, window), -math.inf)
    total = lse.to(wide).masked_fill(lse == -math.inf, 0).unflatten(1, heads)[..., None]
    weights = (scores - total).exp()
    through = (
        grad @ values.mT - (grad * result).sum(-1, keepdim=True) + grad_lse.to(wide).unflatten(1, heads)[..., None]
    )
    dscores = weights * through * slope * factor
    dq = (dscores @ keys).flatten(1, 2)
    dk = (dscores.mT @ queries).sum(2)
    dv = (weights.mT @ grad).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _hidden(
    q: Tensor, k: Tensor, q_segments: Tensor | None, kv_segments: Tensor | None, causal: bool, window: int | None
) -> Tensor:
    """Which key a row does not see, broadcastable to [b, g, r, n, m]."""
    n, m = q.shape[2], k.shape[2]
    place = torch.arange(m - n, m, device=q.device)[:, None]
    column = torch.arange(m, device=q.device)
    hidden = torch.zeros(n, m, dtype=torch.bool, device=q.device)
    if causal:
        hidden = hidden | (column > place)
    if window is not None:
        hidden = hidden | ((column - place).abs() >= window)
    if q_segments is not None and kv_segments is not None:
        hidden = hidden | (q_segments[:, None, None, :, None] != kv_segments[:, None, None, None, :])
    return hidden
