"""Which graphs keep their rows apart, so that rows may be added to fill a recorded size and cut off again."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from opreg.graph import split_graph
from opreg.graph_ops import value_of
from opreg.graph_rows import why_not_row_wise

LIB = torch.library.Library("opreg_graph_rows", "DEF")
LIB.define("host(Tensor x) -> Tensor")
LIB.impl("host", lambda x: x + 1, "CompositeExplicitAutograd")
torch.library.register_fake("opreg_graph_rows::host", torch.empty_like, lib=LIB)
WIDTH = 6


def rows(count: int) -> Tensor:
    x = torch.randn(count, WIDTH)
    torch._dynamo.mark_static(x, 1)
    return x


H = torch.randn(WIDTH, WIDTH)
torch._dynamo.mark_static(H)
ROW_WISE: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("norm and product", lambda x: nn.functional.linear(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)), H)),
    ("layer_norm", lambda x: nn.functional.layer_norm(x, (WIDTH,))),
    ("heads", lambda x: x.view(x.size(0), 2, 3).transpose(1, 2).softmax(dim=-1).reshape(x.shape[0], -1) @ H),
    ("rows second", lambda x: x.t()[None].float() * 2),
    ("halves", lambda x: torch.cat((-x[..., 3:], x[:, :3]), dim=-1) + torch.zeros_like(x)),
    ("table", lambda x: H[x[:, 0].long().clamp(0, 5)] + nn.functional.embedding(x[:, 1].long().clamp(0, 5), H)),
    ("one row for all", lambda x: x + H[0].expand(x.size(0), WIDTH)),
]
JOINING: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("mean over rows", lambda x: x - x.mean(0), "mean joins rows"),
    ("sum over all", lambda x: x / x.sum(), "sum joins rows"),
    ("softmax over rows", lambda x: x.softmax(0), "softmax joins rows"),
    ("number of rows", lambda x: x / x.size(0), "computes with the number of rows"),
    ("products over rows", lambda x: x.t() @ x, "matmul"),
    ("rows paired with rows", lambda x: x @ x.t(), "has the size|matmul"),
    ("flattened", lambda x: x.reshape(-1) * 2, "has the size"),
    ("moved", lambda x: x.t().reshape(x.size(0), WIDTH), "reshape moves elements between rows"),
    ("shifted", lambda x: x.roll(1, 0), "roll is not known"),
    ("last", lambda x: x[-1] * 2, "getitem"),
    ("reversed by index", lambda x: x[torch.arange(x.size(0) - 1, -1, -1)], "."),
    ("sorted", lambda x: x.sort(0).values, "sort is not known"),
    ("behind", lambda x: torch.cat((x, x)), "has the size"),
    ("an op of others", torch.ops.opreg_graph_rows.host, "opreg_graph_rows::host is not known to keep rows apart"),
    ("written rows", lambda x: x.clone().index_fill_(0, torch.tensor([0]), 1.0), "index_fill_ is not known"),
    ("normalised over rows", lambda x: nn.functional.layer_norm(x.t().contiguous(), (x.size(0),)), "."),
]


def verdict(fn: Callable[[Tensor], Any]) -> str | None:
    found: list[str | None] = []

    def backend(gm: GraphModule, values: list[Any]) -> Any:
        split = split_graph(gm, on=[])
        sizes = [value_of(n) for n in split.plan.placeholders]
        (symbol,) = {s.node.expr for s in sizes if isinstance(s, torch.SymInt)}
        steps = [step for piece in split.pieces for step in piece.steps]
        found.append(why_not_row_wise(steps, split.plan.placeholders, symbol))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=True, fullgraph=True)(rows(5))
    return found[0]


@pytest.mark.parametrize(("what", "fn"), ROW_WISE)
def test_rows_that_see_no_other(what: str, fn: Callable[[Tensor], Any]) -> None:
    assert verdict(fn) is None


@pytest.mark.parametrize(("what", "fn", "reason"), JOINING)
def test_rows_that_see_others(what: str, fn: Callable[[Tensor], Any], reason: str) -> None:
    why = verdict(fn)
    assert why is not None
    assert re.search(reason, why), why
