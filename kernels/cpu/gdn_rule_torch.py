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
from typing import NamedTuple

import torch
from torch import Tensor

from .gdn_rule import check_rule

CHUNK = 64
_SOLVED = 16  # tokens whose triangle is solved row by row; pairs of such blocks are merged
FROM = 8
"""Tokens from which chunks are used."""
_AT_ONCE = 1 << 21
"""Numbers in [heads, tokens, channels] whose products are formed at once: few enough to stay in a CPU's cache."""
_AT_ONCE_ELSEWHERE = 1 << 25


class Rule(NamedTuple):
    """A call as [n, chunks, tokens of a chunk, channels], n = batch times value heads, one dtype, q scaled.

    left: erase * k of a chunk, then q, [n, chunks, 2 tokens, k]. wv: write * v. g: log decay, of 1 or of k channels.
    """

    left: Tensor
    k: Tensor
    wv: Tensor
    g: Tensor

    def part(self, first: int, last: int) -> Rule:
        return Rule(*(x[:, first:last] for x in self))


class Inner(NamedTuple):
    """What does not depend on the state.

    pairs: A, then P, [n, chunks, 2 tokens, tokens]. inverse: (I + A)^-1. since: exp(sum of g up to i). until:
    exp(sum of g behind j). whole: exp(sum of g). grown: left scaled by `since`. kept: k scaled by `until`.
    """

    pairs: Tensor
    inverse: Tensor
    since: Tensor
    until: Tensor
    whole: Tensor
    grown: Tensor
    kept: Tensor


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
        inner = _inner(part)
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
        inner = _inner(part)
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
            inner = _inner(part)
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
            dwhole[:, c] = _channels(decayed * before, inner.whole).sum(1, keepdim=True)
            back = torch.baddbmm(decayed, both.mT, inner.grown[:, c])
        _inner_back(
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


def _inner(rule: Rule) -> Inner:
    g, tokens = rule.g, rule.k.shape[2]
    since, until = g.cumsum(2).exp(), _behind(g).exp()
    whole = since[:, :, -1:]
    pairs = _products(rule) if g.shape[3] == 1 else _products_by_halves(rule)
    inverse = _invert(pairs[:, :, :tokens])
    grown = rule.left * torch.cat((since, since), 2)
    return Inner(pairs, inverse, since, until, whole, grown, rule.k * until)


def _inner_back(
    rule: Rule,
    inner: Inner,
    dpairs: Tensor,
    dgrown: Tensor,
    dkept: Tensor,
    dwhole: Tensor,
    dleft: Tensor,
    dk: Tensor,
    dg: Tensor,
) -> None:
    """From gradients of what _inner made to dleft, dk and dg, which are written."""
    torch.mul(dgrown, torch.cat((inner.since, inner.since), 2), out=dleft)
    torch.mul(dkept, inner.until, out=dk)
    # A sum up to i holds each g before i, one behind j each g after j: no difference of sums here either.
    up = _channels(dgrown * inner.grown, rule.g)
    tokens = rule.k.shape[2]
    dg.copy_(_from(up[:, :, :tokens] + up[:, :, tokens:]))
    dg += _before(_channels(dkept * inner.kept, rule.g))
    dg += dwhole
    if rule.g.shape[3] == 1:
        _products_back(rule, inner, dpairs, dleft, dk, dg)
    else:
        _products_by_halves_back(rule, dpairs, dleft, dk, dg)


def _channels(x: Tensor, like: Tensor) -> Tensor:
    """Summed over channels where a decay has one."""
    return x.sum(-1, keepdim=True) if like.shape[-1] == 1 else x


def _behind(x: Tensor) -> Tensor:
    """Sums over the tokens after each one (dimension -2)."""
    return torch.nn.functional.pad(x[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def _from(x: Tensor) -> Tensor:
    """Sums over each token and those after it."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _before(x: Tensor) -> Tensor:
    """Sums over the tokens before each one."""
    return torch.nn.functional.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def _between(g: Tensor) -> Tensor:
    """exp(sum of g over (j, i]) for j < i, then for j <= i, zero elsewhere: [n, chunks, 2 tokens, tokens]."""
    tokens = g.shape[2]
    after = torch.ones(tokens, tokens, dtype=torch.bool, device=g.device).tril(-1)
    decays = torch.where(after, g, 0.0).cumsum(2).exp().tril()
    return torch.cat((decays.tril(-1), decays), 2)


def _products(rule: Rule) -> Tensor:
    return torch.matmul(rule.left, rule.k.mT).mul_(_between(rule.g))


def _products_back(rule: Rule, inner: Inner, dpairs: Tensor, dleft: Tensor, dk: Tensor, dg: Tensor) -> None:
    tokens = rule.k.shape[2]
    found = dpairs * inner.pairs
    found = found[:, :, :tokens] + found[:, :, tokens:]
    # Every g at t with j < t <= i.
    dg += torch.nn.functional.pad(found.cumsum(3)[..., :-1], (1, 0)).tril().sum(2)[..., None]
    products = dpairs * _between(rule.g)
    dleft += torch.matmul(products, rule.k)
    dk += torch.matmul(products.mT, rule.left)


def _halves(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The first and the second m tokens of every block of 2 m: [n, chunks, blocks, m, channels]."""
    first, second = x.unflatten(2, (-1, 2, m)).unbind(3)
    return first, second


def _corners(pairs: Tensor, m: int) -> Tensor:
    """Where rows lie in the second and columns in the first half of one block of 2 m: a view [.., m, m, blocks]."""
    blocks: Tensor = pairs.unflatten(-2, (-1, 2, m))[:, :, :, 1].unflatten(-1, (-1, 2, m))[..., 0, :]
    return blocks.diagonal(dim1=2, dim2=4)


def _sides(rule: Rule, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the borders inside blocks of 2 m: decay from there and up to there, and E, q and k scaled by it."""
    tokens = rule.k.shape[2]
    first, second = _halves(rule.g, m)
    since, until = second.cumsum(3).exp(), _behind(first).exp()
    e, q = (_halves(x, m)[1] * since for x in (rule.left[:, :, :tokens], rule.left[:, :, tokens:]))
    return since, until, e, q, _halves(rule.k, m)[0] * until


def _products_by_halves(rule: Rule) -> Tensor:
    n, chunks, tokens, _ = rule.k.shape
    pairs = rule.k.new_zeros(n, chunks, 2 * tokens, tokens)
    a, p = pairs[:, :, :tokens], pairs[:, :, tokens:]
    p.diagonal(dim1=2, dim2=3).copy_((rule.left[:, :, tokens:] * rule.k).sum(-1))
    m = tokens // 2
    while m:
        _, _, e, q, k = _sides(rule, m)
        for into, left in ((a, e), (p, q)):
            _corners(into, m).copy_(torch.matmul(left, k.mT).movedim(2, -1))
        m //= 2
    return pairs


def _products_by_halves_back(rule: Rule, dpairs: Tensor, dleft: Tensor, dk: Tensor, dg: Tensor) -> None:
    tokens = rule.k.shape[2]
    same = dpairs[:, :, tokens:].diagonal(dim1=2, dim2=3)[..., None]
    dleft[:, :, tokens:] += same * rule.k
    dk += same * rule.left[:, :, tokens:]
    m = tokens // 2
    while m:
        since, until, e, q, k = _sides(rule, m)
        da, dp = (_corners(x, m).movedim(-1, 2) for x in (dpairs[:, :, :tokens], dpairs[:, :, tokens:]))
        de, dq = torch.matmul(da, k), torch.matmul(dp, k)
        dkm = torch.matmul(da.mT, e) + torch.matmul(dp.mT, q)
        for into, found in ((dleft[:, :, :tokens], de), (dleft[:, :, tokens:], dq)):
            _halves(into, m)[1].add_(found * since)
        _halves(dk, m)[0].add_(dkm * until)
        first, second = _halves(dg, m)
        second.add_(_from(de * e + dq * q))
        first.add_(_before(dkm * k))
        m //= 2


def _invert(a: Tensor) -> Tensor:
    """(I + A)^-1 of strictly lower A [.., tokens, tokens]: blocks of 16 by substitution, then pairs of blocks.

    The inverse of [[P, 0], [R, U]] is [[P', 0], [-U' R P', U']]; every factor is the inverse for some run of tokens,
    with entries of the size of its own. Powers of A, as in a Neumann series, grow without bound for equal keys.
    """
    tokens = a.shape[-1]
    blocks = a.unflatten(-2, (-1, _SOLVED)).unflatten(-1, (-1, _SOLVED)).diagonal(dim1=2, dim2=4).movedim(-1, 2)
    blocks = blocks.contiguous()
    x = torch.eye(_SOLVED, dtype=a.dtype, device=a.device).expand_as(blocks).contiguous()
    for i in range(1, _SOLVED):
        x[..., i, :i] = -(blocks[..., i, :i, None] * x[..., :i, :i]).sum(-2)
    out = torch.zeros_like(a, memory_format=torch.contiguous_format)
    into = out.unflatten(-2, (-1, _SOLVED)).unflatten(-1, (-1, _SOLVED)).diagonal(dim1=2, dim2=4)
    into.copy_(x.movedim(2, -1))
    m = _SOLVED
    while m < tokens:
        for at in range(0, tokens, 2 * m):
            first, second = slice(at, at + m), slice(at + m, at + 2 * m)
            below = torch.matmul(out[..., second, second], a[..., second, first])
            out[..., second, first] = -torch.matmul(below, out[..., first, first])
        m *= 2
    return out


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
    tokens = _SOLVED
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

    def over_channels(x: Tensor, like: Tensor) -> Tensor:
        return (x if like.dim() == 4 else x.sum(-1)).to(like.dtype)

    return (
        over_heads(dq * (k.shape[3] ** -0.5 if scale is None else scale)).to(q.dtype),
        over_heads(dk).to(k.dtype),
        (dwv * _wide(write.to(dtype))).to(v.dtype),
        over_channels(dg, decay),
        over_channels(de * keys, erase),
        over_channels(dwv * v.to(dtype), write),
        back.reshape(v.shape[0], v.shape[2], v.shape[3], k.shape[3]),
    )
