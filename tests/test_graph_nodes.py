"""Graphs filled by opreg.graph_nodes are what create_node would have made, as far as anyone can ask."""

import operator
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from opreg.graph_nodes import NO_KWARGS, adder


def filled(add: Any, graph: Graph) -> Graph:
    """sum(cat([x + y, x * 2])), its mean by keyword, in names that collide."""
    x, y = add("placeholder", "x", (), NO_KWARGS, "x"), add("placeholder", "y", (), NO_KWARGS, "y")
    total = add("call_function", operator.add, (x, y), NO_KWARGS, "add")
    twice = add("call_function", operator.mul, (x, 2), NO_KWARGS, "x")
    both = add("call_function", torch.cat, ([total, twice],), {"dim": 0}, "max")
    mean = add("call_method", "mean", (both,), {"dim": 0, "keepdim": True}, "a.b")
    last = add("call_function", operator.add, (mean, slice(None)), NO_KWARGS, "add")
    last.args = (mean, total)
    graph.output((last,))
    return graph


@pytest.fixture
def graphs() -> tuple[Graph, Graph]:
    mine, theirs = Graph(), Graph()
    made = filled(adder(mine), mine)
    return made, filled(
        lambda op, target, args, kwargs, name: theirs.create_node(op, target, args, kwargs, name), theirs
    )


def test_nodes_names_users_and_order_are_those_of_create_node(graphs: tuple[Graph, Graph]) -> None:
    def facts(graph: Graph) -> list[Any]:
        return [(n.name, n.op, n.target, repr(n.args), repr(n.kwargs), [u.name for u in n.users]) for n in graph.nodes]

    mine, theirs = graphs
    assert facts(mine) == facts(theirs)
    assert [n.name for n in mine.nodes] == ["x", "y", "add", "x_1", "max_1", "a_b", "add_1", "output"]
    assert len(mine.nodes) == len(theirs.nodes) == 8
    nodes: list[Node] = list(mine.nodes)
    assert sorted(nodes) == nodes  # by their sort keys
    mine.lint()


def test_nodes_are_found_erased_and_named_as_usual(graphs: tuple[Graph, Graph]) -> None:
    for graph in graphs:
        first, last = graph.find_nodes(op="call_function", target=operator.add)
        assert [n.name for n in graph.find_nodes(op="placeholder")] == ["x", "y"]
        assert [n.name for n in graph.find_nodes(op="call_method", target="mean")] == ["a_b"]
        last.replace_all_uses_with(first)
        graph.erase_node(last)
        assert graph.find_nodes(op="call_function", target=operator.add) == [first]
        with graph.inserting_after(first):
            new = graph.call_function(operator.add, (first, first))
        assert new.name not in {n.name for n in graph.nodes if n is not new}
        assert new.name == "add_2"
        first._rename("total")
        assert [n.name for n in new.args] == ["total", "total"]
        graph.lint()


def test_graphs_run_the_same(graphs: tuple[Graph, Graph]) -> None:
    x, y = torch.rand(2, 3), torch.rand(2, 3)
    (mine,), (theirs,) = (GraphModule({}, graph)(x, y) for graph in graphs)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    torch.testing.assert_close(mine, torch.cat([x + y, x * 2]).mean(0, keepdim=True) + (x + y))
