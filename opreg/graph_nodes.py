"""Nodes for a new graph in half the time of Graph.create_node, for graphs that are copies of parts of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node
from torch.fx.graph import _illegal_names

NO_KWARGS: dict[str, Any] = {}


def adder(graph: Graph) -> Callable[[str, Any, tuple[Any, ...], dict[str, Any], str], Node]:
    """What appends a node to `graph`: `add(op, target, args, kwargs, name)`, arguments with nodes of `graph` inside.

    It does what create_node does, less the search of the arguments for raw symbols, which was made for the graph that
    is copied, and less the parsing of a name that is new here and an identifier, as almost all are.
    """
    namespace, table = graph._graph_namespace, graph._find_nodes_lookup_table.table
    used, names, insert = namespace._used_names, namespace._obj_to_name, graph._insert

    def add(op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Node:
        if name in used or name in _illegal_names or not name.isidentifier():
            name = namespace.create_name(name, None)
        else:
            used.add(name)
        node = Node(graph, name, op, target, args, kwargs)
        names[node] = name
        insert(node)
        table[op, target if op == "call_function" else None][node] = None
        graph._len += 1
        return node

    return add
