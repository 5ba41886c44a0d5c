"""Attention with its gradients in plain torch: blocks of query rows, each against the keys that it can see.

A block of 128 rows bounds the memory to 128 x m scores per head, and the keys outside a causal triangle or a window
are not touched, which halves the work of the former and makes that of the latter linear.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.splash_attention_check import check, scale_of

ROWS = 128


class _Block(NamedTuple):
    """Query rows of all heads, the keys that some of them see, and which row sees which."""

    rows: slice
    keys: slice
    hidden: Tensor | None


class _Problem(NamedTuple):
    """A call with query heads grouped by the key head that they read: q [b, g, r, n, d], k and v [b, g, 1, m, d]."""

    q: Tensor
    k: Tensor
    v: Tensor
    segments: tuple[Tensor | None, Tensor | None]
    causal: bool
    window: int | None
    soft_cap: float | None
    factor: float

    def blocks(self) -> Iterator[_Block]:
        n, m = self.q.shape[3], self.k.shape[3]
        for start in range(0, n, ROWS):
            rows = slice(start, min(start + ROWS, n))
            first, last = rows.start + m - n, rows.stop - 1 + m - n
            reach = m if self.window is None else self.window - 1
            low = max(first - reach, 0)
            high = min(last + 1 if self.causal else last + reach + 1, m)
            if low < high:
                yield _Block(rows, slice(low, high), self._hidden(rows, slice(low, high), first))

    def _hidden(self, rows: slice, keys: slice, first: int) -> Tensor | None:
        device = self.q.device
        place = torch.arange(first, first + rows.stop - rows.start, device=device)[:, None]
        column = torch.arange(keys.start, keys.stop, device=device)
        hidden: Tensor | None = None
        if self.causal:
            hidden = column > place
        if self.window is not None:
            outside = (column - place).abs() >= self.window
            hidden = outside if hidden is None else hidden | outside
        q_segments, kv_segments = self.segments
        if q_segments is not None and kv_segments is not None:
            other = q_segments[:, None, None, rows, None] != kv_segments[:, None, None, None, keys]
            hidden = other if hidden is None else hidden | other
        return hidden

    def scores(self, block: _Block) -> Tensor:
        """Capped scores of a block, -inf where nothing is seen."""
        scores = self.q[..., block.rows, :] @ self.k[..., block.keys, :].mT
        scores *= self.factor
        if self.soft_cap is not None:
            scores = torch.tanh(scores / self.soft_cap) * self.soft_cap
        return scores if block.hidden is None else scores.masked_fill_(block.hidden, -math.inf)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: tuple[Tensor | None, Tensor | None],
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
) -> _Problem:
    check(q, k, segments, window, soft_cap)
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = k.shape[1]
    keys, values = (x.to(wide).unsqueeze(2) for x in (k, v))
    queries = q.to(wide).unflatten(1, (groups, q.shape[1] // groups))
    return _Problem(queries, keys, values, segments, causal, window, soft_cap, scale_of(q, scale))


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
    """(out, lse) by the block."""
    call = _problem(q, k, v, (q_segments, kv_segments), causal, window, soft_cap, scale)
    out = call.q.new_zeros(*call.q.shape[:-1], v.shape[3])
    lse = call.q.new_full(call.q.shape[:-1], -math.inf)
    for block in call.blocks():
        scores = call.scores(block)
        total = scores.logsumexp(-1)
        lse[..., block.rows] = total
        # A row that sees nothing has a sum of -inf; with 0 in its place its weights are exp(-inf) = 0.
        weights = scores.sub_(total.masked_fill(total == -math.inf, 0)[..., None]).exp_()
        out[..., block.rows, :] = weights @ call.v[..., block.keys, :]
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


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
    """(dq, dk, dv) by the block, from what the forward pass returned."""
    call = _problem(q, k, v, (q_segments, kv_segments), causal, window, soft_cap, scale)
    wide, heads = call.q.dtype, call.q.shape[1:3]
    dq, dk, dv = (torch.zeros_like(x) for x in (call.q, call.k, call.v))
    grads = grad_out.to(wide).unflatten(1, heads)
    through_lse = (grad_lse.to(wide) - (out.to(wide) * grad_out.to(wide)).sum(-1)).unflatten(1, heads)
    total = lse.to(wide).masked_fill(lse == -math.inf, 0).unflatten(1, heads)
    for block in call.blocks():
        scores = call.scores(block)
        weights = (scores - total[..., block.rows, None]).exp()
        grad = grads[..., block.rows, :]
        dscores = grad @ call.v[..., block.keys, :].mT
        dscores.add_(through_lse[..., block.rows, None]).mul_(weights)
        if soft_cap is not None:
            slope = 1 - (scores / soft_cap) ** 2
            dscores *= slope if block.hidden is None else slope.masked_fill_(block.hidden, 0)
        dscores *= call.factor
        dq[..., block.rows, :] = dscores @ call.k[..., block.keys, :]
        dk[..., block.keys, :] += (dscores.mT @ call.q[..., block.rows, :]).sum(2, keepdim=True)
        dv[..., block.keys, :] += (weights.mT @ grad).sum(2, keepdim=True)
    return dq.flatten(1, 2).to(q.dtype), dk.squeeze(2).to(k.dtype), dv.squeeze(2).to(v.dtype)
