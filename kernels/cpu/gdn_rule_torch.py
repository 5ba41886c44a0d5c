"""The gated delta rule and its gradients in chunks of 64 tokens, vectorised torch for any device.

With g the log decay, E = erase * k, S0 the state [v, k] before a chunk, and a sum over tokens written (j, i] where it
excludes j and includes i (Yang et al. 2025, section 3.2, solved for X directly, with a decay for each channel):

    A_ij = sum over channels of E_i k_j exp(sum of g over (j, i]), j < i;   P_ij = the same of q_i k_j, j <= i
    (I + A) X = write * V - (E exp(sum of g up to i)) S0^T
    O = (Q exp(sum of g up to i)) S0^T + P X
    S1 = S0 diag(exp(sum of g)) + X^T (K exp(sum of g behind j))

No exponent is a difference of two sums: each is the sum of what lies between, 0 or less, so nothing overflows, no slow
decay loses its digits behind a fast one, and a decay of -inf (a reset) is no special case. Where a decay is one number
a head it multiplies the products of keys; where it is a vector it cannot, and a chunk is halved again and again:
at each border the tokens behind it are scaled by the decay since the border, those before it by the decay up to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from ..reference.gdn_rule_check import check_rule
from .gdn_rule_pairs import SOLVED, Inner, Rule, inner_back, inner_of, over_channels

CHUNK = 64
FROM = 8
"""Tokens from which chunks are used."""
_AT_ONCE = 1 << 21
"""Numbers in [heads, tokens, channels] whose products are formed at once: few enough to stay in a CPU's cache."""
_AT_ONCE_ELSEWHERE = 1 << 25


@cache
def _read_once() -> None:
    """Torch 2.9 says at the first look, once per process, that there are newer settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.get_float32_matmul_precision()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 in float32: TF32 and sums of bfloat16 parts are what the user chose for other operators."""
    _read_once()
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gated_delta_rule_chunks_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> str | None:
    """Refuse calls of a few tokens, for which a chunk is more work than the tokens one by one."""
    return _few(v)


def gated_delta_rule_backward_chunks_why_not(
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
    """Refuse calls of a few tokens, for which a chunk is more work than the tokens one by one."""
    return _few(v)


def _few(v: Tensor) -> str | None:
    if v.shape[1] < FROM:
        return f"{v.shape[1]} tokens; below {FROM} they are faster one by one"
    return None


def gated_delta_rule_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the rule chunk by chunk; the arguments are those of `opreg::gated_delta_rule`."""
    check_rule(q, k, v, decay, erase, write, initial_state)
    with _full_precision():
        return forward(torch.float32, q, k, v, decay, erase, write, initial_state, scale)


def gated_delta_rule_backward_chunks(
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
    """Gradients, as `opreg::gated_delta_rule_backward`; one state per 64 tokens is kept, the rest computed again."""
    check_rule(q, k, v, decay, erase, write, initial_state)
    with _full_precision():
        return backward(torch.float32, grad_out, grad_state, q, k, v, decay, erase, write, initial_state, scale)


def forward(
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The rule with all sums in `dtype`."""
    rule = _rule(dtype, q, k, v, decay, erase, write, scale)
    state = _start(rule, initial_state)
    out = torch.empty_like(rule.wv)
    tokens = rule.k.shape[2]
    for first, last in _segments(rule):
        part = rule.part(first, last)
        inner = inner_of(part)
        for c in range(last - first):
            from_state, x, state = _step(part, inner, c, state)
            torch.baddbmm(from_state[:, tokens:], inner.pairs[:, c, tokens:], x, out=out[:, first + c])
    return _tokens(out, v).to(v.dtype), state.reshape(v.shape[0], v.shape[2], v.shape[3], k.shape[3])


def backward(
    dtype: torch.dtype,
    grad_out: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients with all sums in `dtype`."""
    rule = _rule(dtype, q, k, v, decay, erase, write, scale)
    state = _start(rule, initial_state)
    segments, tokens = list(_segments(rule)), rule.k.shape[2]
    marks = state.new_empty((rule.k.shape[1], *state.shape))
    inner = None
    for first, last in segments:
        part = rule.part(first, last)
        inner = inner_of(part)
        for c in range(last - first):
            marks[first + c] = state
            if first + c + 1 < len(marks):
                state = _step(part, inner, c, state)[2]
    back = grad_state.to(dtype).reshape(state.shape)
    dout = _chunks(grad_out.to(dtype), tokens)
    dleft, dk, dwv, dg = (torch.empty_like(x) for x in rule)
    for first, last in reversed(segments):
        part = rule.part(first, last)
        if last < len(marks) or inner is None:  # of the last segment they are still there
            inner = inner_of(part)
        dpairs, dgrown, dkept = (torch.empty_like(x) for x in (inner.pairs, inner.grown, inner.kept))
        dwhole = torch.empty_like(inner.whole)
        for c in reversed(range(last - first)):
            before = marks[first + c]
            _, x, _ = _step(part, inner, c, before)
            dx = torch.baddbmm(
                torch.bmm(inner.kept[:, c], back.mT), inner.pairs[:, c, tokens:].mT, dout[:, first + c]
            )  # fmt: skip
            dy = torch.bmm(inner.inverse[:, c].mT, dx)
            dwv[:, first + c] = dy
            both = torch.cat((-dy, dout[:, first + c]), 1)
            torch.bmm(both, x.mT, out=dpairs[:, c])
            torch.bmm(both, before, out=dgrown[:, c])
            torch.bmm(x, back, out=dkept[:, c])
            decayed = back * inner.whole[:, c]
            dwhole[:, c] = over_channels(decayed * before, inner.whole).sum(1, keepdim=True)
            back = torch.baddbmm(decayed, both.mT, inner.grown[:, c])
        inner_back(
            part, inner, dpairs, dgrown, dkept, dwhole, dleft[:, first:last], dk[:, first:last], dg[:, first:last]
        )
    return _gradients(q, k, v, decay, erase, write, scale, (dleft, dk, dwv, dg), back)


def _step(rule: Rule, inner: Inner, c: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(grown left times the state, X, the state after) of chunk c."""
    from_state = torch.bmm(inner.grown[:, c], state.mT)
    x = torch.bmm(inner.inverse[:, c], rule.wv[:, c] - from_state[:, : rule.k.shape[2]])
    return from_state, x, torch.baddbmm(state * inner.whole[:, c], x.mT, inner.kept[:, c])


def _segments(rule: Rule) -> Iterator[tuple[int, int]]:
    n, chunks, tokens, channels = rule.k.shape
    most = _AT_ONCE if rule.k.device.type == "cpu" else _AT_ONCE_ELSEWHERE
    size = max(1, most // max(1, n * tokens * channels))
    for first in range(0, chunks, size):
        yield first, min(first + size, chunks)


def _rule(
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    scale: float | None,
) -> Rule:
    length = v.shape[1]
    tokens = SOLVED
    while tokens < min(length, CHUNK):
        tokens *= 2
    factor = k.shape[3] ** -0.5 if scale is None else scale
    ratio = v.shape[2] // k.shape[2]
    keys, queries = (x.to(dtype).repeat_interleave(ratio, 2) for x in (k, q))
    erased = keys * _wide(erase.to(dtype))
    left = torch.cat([_chunks(x, tokens) for x in (erased, queries * factor)], 2)
    return Rule(
        left,
        _chunks(keys, tokens),
        _chunks(v.to(dtype) * _wide(write.to(dtype)), tokens),
        _chunks(_wide(decay.to(dtype)), tokens),
    )


def _wide(gate: Tensor) -> Tensor:
    return gate if gate.dim() == 4 else gate.unsqueeze(-1)


def _start(rule: Rule, initial_state: Tensor | None) -> Tensor:
    n, channels, values = rule.k.shape[0], rule.k.shape[3], rule.wv.shape[3]
    if initial_state is None:
        return rule.k.new_zeros(n, values, channels)
    return initial_state.to(rule.k.dtype, copy=True).reshape(n, values, channels)


def _chunks(x: Tensor, tokens: int) -> Tensor:
    """[b, t, h, d] as [b h, chunks, tokens, d]; behind the end there are zeros, which change no state."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % tokens))
    chunks: Tensor = padded.unflatten(1, (-1, tokens)).permute(0, 3, 1, 2, 4)
    return chunks.flatten(0, 1).contiguous()


def _tokens(x: Tensor, v: Tensor) -> Tensor:
    """Back to [b, t, h, d]."""
    b, t, h = v.shape[:3]
    heads: Tensor = x.unflatten(0, (b, h))
    return heads.flatten(2, 3)[:, :, :t].transpose(1, 2).contiguous()


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    scale: float | None,
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    back: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per value head and channel to what each argument has: key heads summed over value heads, gates over channels."""
    dleft, dk, dwv, dg = found
    tokens, dtype = dk.shape[2], dk.dtype
    de, dq = (_tokens(x, v) for x in (dleft[:, :, :tokens], dleft[:, :, tokens:]))
    dk, dwv, dg = (_tokens(x, v) for x in (dk, dwv, dg))
    keys = k.to(dtype).repeat_interleave(v.shape[2] // k.shape[2], 2)
    dk = dk + de * _wide(erase.to(dtype))

    def over_heads(x: Tensor) -> Tensor:
        summed: Tensor = x.unflatten(2, (k.shape[2], -1)).sum(3)
        return summed

    def per_gate(x: Tensor, like: Tensor) -> Tensor:
        return (x if like.dim() == 4 else x.sum(-1)).to(like.dtype)

    return (
        over_heads(dq * (k.shape[3] ** -0.5 if scale is None else scale)).to(q.dtype),
        over_heads(dk).to(k.dtype),
        (dwv * _wide(write.to(dtype))).to(v.dtype),
        per_gate(dg, decay),
        per_gate(de * keys, erase),
        per_gate(dwv * v.to(dtype), write),
        back.reshape(v.shape[0], v.shape[2], v.shape[3], k.shape[3]),
    )
