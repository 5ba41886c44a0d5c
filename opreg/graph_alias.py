"""Views of storage that is written later: only the storage's first tensor crosses a border, views are made again.

A compiler may return a view as a copy; as long as nobody writes that is invisible. Where a later piece writes, every
piece must therefore reach the same storage, so the tensor that owns it crosses and each piece views it for itself."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.fx import Node

from opreg.graph_ops import INPLACE_OPERATORS, RESHAPING, TUPLE_VIEWS, VIEWS, name_of, schema_of, storages, value_of
from opreg.graph_pieces import Plan


def is_view(node: Any) -> bool:
    """Whether a node can be computed again instead of being passed on: it reads no data and writes none."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target is operator.getitem:
        index = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        return not any(isinstance(p, Node | list) for p in parts)
    name = str(node.args[1]) if node.target is getattr else _name(node)
    return name in VIEWS or name in ("contiguous", "to", "chunk")


def _returns_argument(node: Any) -> bool:
    """In-place calls return the tensor they wrote."""
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    name = _name(node)
    return node.target in INPLACE_OPERATORS or (
        name.endswith("_") and not name.endswith("__") and name not in RESHAPING
    )


def _is_tuple(node: Any) -> bool:
    value = value_of(node)
    if value is not None:
        return isinstance(value, tuple | list)
    schema = schema_of(node.target) if node.op == "call_function" else None
    return len(schema.returns) != 1 if schema is not None else node.op != "placeholder" and _name(node) in TUPLE_VIEWS


def _name(node: Any) -> str:
    return name_of(node.target).rpartition("::")[2].partition(".")[0]


class Classes:
    """Roots, and the chain of views from the root, of nodes that share storage; each node is looked at once."""

    def __init__(self) -> None:
        # node -> (root, chain, same): chain is a linked list (rest, view) or None, False when it cannot be made again;
        # same is the earlier node that stands for the same tensor.
        self.known: dict[Any, tuple[Any, Any, Any]] = {}
        # node -> identity of the storage of its value, or of several, None where the graph has no value for it.
        self._storages: dict[Any, int | frozenset[int] | None] = {}

    def _storage_of(self, node: Any) -> int | frozenset[int] | None:
        try:
            return self._storages[node]
        except KeyError:
            value = value_of(node)
            found: int | frozenset[int] | None
            if type(value) is FakeTensor and value.layout is torch.strided:
                found = value.untyped_storage()._cdata
            else:
                found = None if value is None else storages(value)
            self._storages[node] = found
            return found

    def shares(self, node: Any, other: Any) -> bool:
        """Whether two nodes' values share storage; by fake values, or by the op's name where there are none."""
        mine, theirs = self._storage_of(node), self._storage_of(other)
        if mine is None or theirs is None:
            source = node.kwargs.get("out", node.args[0] if node.args else None)
            return source is other and (is_view(node) or _returns_argument(node))
        if isinstance(mine, int):
            return mine == theirs if isinstance(theirs, int) else mine in theirs
        return theirs in mine if isinstance(theirs, int) else not mine.isdisjoint(theirs)

    def parent(self, node: Any) -> Any:
        """The node whose storage this node's value shares, or None for the tensor that owns it."""
        if node.op not in ("call_function", "call_method", "call_module"):
            return None
        out = node._kwargs.get("out")
        for arg in [out] if isinstance(out, Node) else node.all_input_nodes:
            if self.shares(node, arg):
                # An element of a tuple of fresh tensors owns its storage; an element of a tuple of views does not.
                return None if _is_tuple(arg) and self.parent(arg) is None else arg
        return None

    def members(self, root: Any) -> list[Any]:
        """All nodes whose value shares the storage of `root`, in the order found."""
        found = {root: None}
        stack = [root]
        while stack:
            node = stack.pop()
            for user in node.users:
                if user not in found and user.op != "output" and self.shares(user, node):
                    found[user] = None
                    stack.append(user)
        return list(found)

    def find(self, node: Any) -> tuple[Any, Any, Any]:
        path: list[Any] = []
        while node not in self.known:
            parent = self.parent(node)
            if parent is None:
                self.known[node] = (node, None, node)
                break
            path.append((node, parent))
            node = parent
        for child, parent in reversed(path):
            root, chain, same = self.known[parent]
            if is_view(child):
                self.known[child] = (root, False if chain is False else (chain, child), child)
            elif _returns_argument(child):
                self.known[child] = (root, chain, same)
            else:
                self.known[child] = (root, False, child)
        return self.known[path[0][0] if path else node]


def replay_views(plan: Plan) -> None:
    """Find storages that are written and seen through several tensors across borders, and make their views again."""
    classes = Classes()
    done: set[Any] = set()
    for node, written in plan.mutations:
        for arg in nodes_in(written):
            root = classes.find(arg)[0]
            if root in done:
                continue
            done.add(root)
            members = classes.members(root)
            crossing = [m for m in members if plan.crosses(m)]
            if len(crossing) < 2:
                continue
            reshaped = any(m.op == "call_method" and m.target in RESHAPING for m in members)
            for member in () if reshaped else members:
                # What an in-place call returned crosses as the tensor it wrote, also where only a view made again
                # uses it: as a value of its own a compiler might return it as a copy.
                _, chain, same = classes.find(member)
                if chain is not False and same is not member:
                    plan.instead[member] = same
            for member in crossing:
                if member is not root and member in plan.piece_of:
                    _replay(plan, node, member, False if reshaped else classes.find(member))


def _replay(plan: Plan, writer: Any, member: Any, found: Any) -> None:
    home = plan.piece_of[member]
    # A piece that is not compiled gives views as they are. Compilers are at their worst with inputs that share storage
    # and are written (AOTAutograd's synthetic bases fail with gradients), so compiled pieces make those again, too.
    split = plan.pieces[home].split
    if found is False or found[1] is False:
        if split:
            return
        plan.notes.append(
            f"{writer.name} writes storage that {member.name} shares with other tensors, and {member.name} crosses the "
            f"border after piece {home} although it cannot be made again; a copy there would hide the write"
        )
        return
    _, link, same = found
    chain: list[Any] = []
    while link is not None:
        link, view = link
        chain.append(view)
    plan.instead[member] = same
    for index in plan.elsewhere(member):
        if not split or (index < len(plan.pieces) and not plan.pieces[index].split):
            plan.make_again(chain, index)


def nodes_in(value: Any) -> list[Any]:
    """All nodes in a nest of tuples and lists."""
    if isinstance(value, Node):
        return [value]
    if isinstance(value, tuple | list):
        return [n for v in value for n in nodes_in(v)]
    return []
