"""What crosses from piece to piece: no tuple, no address that only one of them has, gradients where one is wanted."""

import operator
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from opreg.graph import SplitGraph, split_graph
from opreg.graph_kinds import Kinds, wants_gradient

LIB = torch.library.Library("opreg_crossing", "DEF")
LIB.define("attn(Tensor q, Tensor(a!) out) -> ()")
LIB.define("pair(Tensor x) -> (Tensor, Tensor)")
LIB.impl("attn", lambda q, out: (out.copy_(q + 1), None)[1], "CompositeExplicitAutograd")
LIB.impl("pair", lambda x: (x + 1, x * 2), "CompositeExplicitAutograd")
torch.library.register_fake("opreg_crossing::attn", lambda q, out: None, lib=LIB)
torch.library.register_fake("opreg_crossing::pair", lambda x: (torch.empty_like(x), torch.empty_like(x)), lib=LIB)
ns = torch.ops.opreg_crossing
ON = ["opreg_crossing::attn", "opreg_crossing::pair"]
X = torch.arange(12.0).reshape(4, 3)


def compiled(fn: Any, *args: Any, dynamic: bool = False) -> tuple[SplitGraph, list[str]]:
    """The split graph, after a call of it, and the types of what its pieces took and gave that are no tensors."""
    found: list[SplitGraph] = []
    others: list[str] = []

    def look(run: Any) -> Any:
        def looked_at(*given: Any) -> Any:
            results = run(*given)
            others.extend(type(v).__name__ for v in (*given, *results) if not isinstance(v, torch.Tensor))
            return results

        return looked_at

    def backend(gm: GraphModule, inputs: Any) -> Any:
        split = split_graph(gm, on=ON)
        for index, module in split.modules.items():
            split.use(index, look(module))
        found.append(split)
        return split

    torch._dynamo.reset()
    if isinstance(fn, GraphModule):
        got = backend(fn, None)(*args)
    else:
        got = torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    torch.testing.assert_close(got, fn(*args), rtol=0, atol=0)
    return found[0], others


PARTS = pytest.mark.parametrize("part", [slice(None), slice(1, 3)], ids=["whole", "part"])


@PARTS
@pytest.mark.parametrize("dynamic", [False, True])
def test_tuples_cross_as_their_elements(dynamic: bool, part: slice) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        parts = (x * 2).chunk(4, 0)
        a, _ = ns.pair(x)
        return torch.cat(parts[part]) + a.sum()

    split, others = compiled(fn, X, dynamic=dynamic)
    assert [p.split for p in split.pieces] == [False, True, False]
    assert set(others) <= {"int", "SymInt"}


@PARTS
def test_tuples_are_made_again_where_nothing_is_known_of_their_elements(part: slice) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    parts = graph.call_method("chunk", (graph.call_function(torch.mul, (x, 2)), 4, 0))
    a = graph.call_function(operator.getitem, (graph.call_function(ns.pair.default, (x,)), 0))
    if part != slice(None):
        parts = graph.call_function(operator.getitem, (parts, part))
    graph.output(
        graph.call_function(torch.add, (graph.call_function(torch.cat, (parts,)), graph.call_method("sum", (a,))))
    )
    split, others = compiled(GraphModule({}, graph), X)
    assert [p.split for p in split.pieces] == [False, True, False]
    assert not others


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_size_that_only_a_view_made_again_uses_crosses_as_numbers(dynamic: bool) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        shape = (x + 1).size()
        out = torch.zeros_like(x)
        seen = out.view(-1).view(shape)
        ns.attn(x, out)
        seen.mul_(2)
        return out + 1

    split, others = compiled(fn, X, dynamic=dynamic)
    assert [p.split for p in split.pieces] == [False, True, False]
    assert set(others) <= {"int", "SymInt"}


def test_an_address_is_said_to_be_fixed_only_in_a_piece_that_runs_in_one_place() -> None:
    graph = Graph()
    x, *weights = (graph.placeholder(n) for n in ("x", "w0", "w1", "w2"))
    for node in weights:
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    for node in (*weights[:2], weights[2]):
        x = graph.call_function(torch.mul if node is not weights[2] else torch.add, (x, node))
        x = graph.call_function(torch._C._nn.linear, (x, node))
        x = graph.call_function(ns.pair.default, (x,))
        x = graph.call_function(operator.getitem, (x, 0))
    graph.output(x)
    split = split_graph(GraphModule({}, graph), on=ON)
    said = {i: [n.name for n in m.graph.nodes if "tensor_dict" in n.meta] for i, m in split.modules.items()}
    assert list(split.same) == [0, 1, 0, 3, 4, 5]
    assert said == {0: [], 4: ["w2"]}


def test_kinds_know_whether_a_gradient_is_wanted() -> None:
    graph = Graph()
    node = graph.placeholder("x")
    weight = torch.nn.Parameter(X.clone())
    for value, wanted in ((X, False), (weight, True), ([X, (weight,)], True), ([X], False), (weight.detach(), False)):
        node.meta["val"] = value
        kinds = Kinds(lambda path: None)
        kinds.numbers([node])
        assert kinds.gradient is wanted is wants_gradient(value)
