"""How the ops to split at may be named, and what is said about names that no op has."""

from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from opreg.errors import UnknownOpError
from opreg.graph import SplitGraph, split_graph

LIB = torch.library.Library("opreg_graph_names", "DEF")
LIB.define("attn(Tensor q) -> Tensor")
LIB.define("pair(Tensor x) -> (Tensor, Tensor)")
LIB.define("pair.other(Tensor x, int n) -> (Tensor, Tensor)")
LIB.impl("pair", lambda x: (x + 1, x * 2), "CompositeExplicitAutograd")
torch.library.register_fake("opreg_graph_names::pair", lambda x: (torch.empty_like(x), torch.empty_like(x)), lib=LIB)
ns = torch.ops.opreg_graph_names
X = torch.arange(12.0).reshape(4, 3)


def trace(fn: Any, *args: Any, dynamic: bool | None = False) -> GraphModule:
    """The Dynamo graph of `fn`."""
    found: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        found.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    (gm,) = found
    return gm


def kinds(split: SplitGraph) -> str:
    """'ASA': compiled, splitting, compiled."""
    return "".join("S" if piece.split else "C" for piece in split.pieces)


def same(split: SplitGraph, gm: GraphModule, *args: Any) -> None:
    torch.testing.assert_close(split(*args), gm(*args), rtol=0, atol=0)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    gm = trace(lambda x: x + 1, X)
    with pytest.raises(UnknownOpError, match=r"no operator 'opreg_graph_names::atn'.*Did you mean '\w+::attn'"):
        split_graph(gm, on=["opreg_graph_names::atn"])
    with pytest.raises(UnknownOpError, match=r"opreg_graph_names::attn\.missing"):
        split_graph(gm, on=["opreg_graph_names::attn.missing"])
    with pytest.raises(UnknownOpError, match="'attn'"):
        split_graph(gm, on=["attn"])
    with pytest.raises(UnknownOpError, match="42, which is no operator"):
        split_graph(gm, on=[42])
    with pytest.raises(UnknownOpError, match="42, which is no operator"):
        split_graph(gm, on=42)


def test_what_is_no_graph_is_refused_with_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"'gm' is of type Linear, not a torch\.fx\.GraphModule\. Trace it first"):
        split_graph(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "on",
    ["opreg_graph_names::pair", "opreg_graph_names::pair.default", ns.pair, ns.pair.default],
    ids=lambda on: str(on),
)
def test_ops_can_be_named_in_every_way(on: Any) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        a, _ = ns.pair(x + 1)
        return a + 1

    gm = trace(fn, X)
    for given in (on, [on], (on,), {on}):
        split = split_graph(gm, on=given)
        assert kinds(split) == "CSC"
        same(split, gm, X)


def test_an_overload_that_is_not_called_is_not_split_at() -> None:
    split = split_graph(trace(lambda x: ns.pair.default(x + 1)[0] + 1, X), on=["opreg_graph_names::pair.other"])
    assert kinds(split) == "C"
    assert split.report().unmatched == ("opreg_graph_names::pair.other",)


def test_aten_names_match_what_dynamo_writes() -> None:
    split = split_graph(gm := trace(lambda x: torch.mm(x + 1, x.t()) + 1, X), on=["aten::mm"])
    assert kinds(split) == "CSC"
    same(split, gm, X)
