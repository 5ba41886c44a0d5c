"""What chunks of the gated delta rule can do without the state: pairs of their tokens (see gdn_rule_torch.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SOLVED = 16  # tokens whose triangle is solved row by row; pairs of such blocks are merged


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


def inner_of(rule: Rule) -> Inner:
    g, tokens = rule.g, rule.k.shape[2]
    since, until = g.cumsum(2).exp(), _behind(g).exp()
    whole = since[:, :, -1:]
    pairs = _products(rule) if g.shape[3] == 1 else _products_by_halves(rule)
    inverse = _invert(pairs[:, :, :tokens])
    grown = rule.left * torch.cat((since, since), 2)
    return Inner(pairs, inverse, since, until, whole, grown, rule.k * until)


def inner_back(
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
    up = over_channels(dgrown * inner.grown, rule.g)
    tokens = rule.k.shape[2]
    dg.copy_(_from(up[:, :, :tokens] + up[:, :, tokens:]))
    dg += _before(over_channels(dkept * inner.kept, rule.g))
    dg += dwhole
    if rule.g.shape[3] == 1:
        _products_back(rule, inner, dpairs, dleft, dk, dg)
    else:
        _products_by_halves_back(rule, dpairs, dleft, dk, dg)


def over_channels(x: Tensor, like: Tensor) -> Tensor:
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
    blocks = a.unflatten(-2, (-1, SOLVED)).unflatten(-1, (-1, SOLVED)).diagonal(dim1=2, dim2=4).movedim(-1, 2)
    blocks = blocks.contiguous()
    x = torch.eye(SOLVED, dtype=a.dtype, device=a.device).expand_as(blocks).contiguous()
    for i in range(1, SOLVED):
        x[..., i, :i] = -(blocks[..., i, :i, None] * x[..., :i, :i]).sum(-2)
    out = torch.zeros_like(a, memory_format=torch.contiguous_format)
    into = out.unflatten(-2, (-1, SOLVED)).unflatten(-1, (-1, SOLVED)).diagonal(dim1=2, dim2=4)
    into.copy_(x.movedim(2, -1))
    m = SOLVED
    while m < tokens:
        for at in range(0, tokens, 2 * m):
            first, second = slice(at, at + m), slice(at + m, at + 2 * m)
            below = torch.matmul(out[..., second, second], a[..., second, first])
            out[..., second, first] = -torch.matmul(below, out[..., first, first])
        m *= 2
    return out
