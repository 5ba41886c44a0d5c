"""Training through pieces that write in place: which values cross a border without a gradient, and which as a copy.

To autograd a compiled piece is a single operation. Its backward runs for all of its results at once, and it keeps what
its compiler likes, its inputs and results included, where eager code keeps what the formula of each op needs. So
- a value whose gradient no result of the graph needs crosses a border detached: else the backward of what made it would
  run with zeros, and ask for tensors that were rightly written in the meantime;
- what a piece that is trained takes or gives, and a later piece writes, is a copy in one of the two.
A graph without a write, or without a gradient, needs neither and is not looked at."""

from __future__ import annotations

from types import BuiltinFunctionType
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opreg.graph_alias import is_view
from opreg.graph_ops import FACTORIES, RESHAPING, SET_GRAD, name_of, storages, value_of
from opreg.graph_plan import Piece, Plan


class Gradients:
    """Facts about the storages of one graph, each found in one pass over it from its end to its start."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._owners: dict[Any, frozenset[int] | None] = {}
        # storage -> the last piece at whose start the gradient of what it holds matters; results count as a piece.
        self._until: dict[int, int] = {}
        # storage -> the last piece that writes it, and all pieces that write which storage.
        self._written: dict[int, int] = {}
        self._writers: set[tuple[int, int]] = set()
        self._writes: dict[Any, list[Any]] = {}
        for node, written in plan.mutations:
            targets = _nodes_in(written)
            self._writes.setdefault(node, []).extend(targets)
            index = plan.piece_of.get(node, -1)
            for storage in self._storages(targets):
                self._written[storage] = max(index, self._written.get(storage, -1))
                self._writers.add((index, storage))
        end = len(plan.pieces)
        # What comes from outside can be seen there afterwards.
        self._mark([n for n in plan.graph.nodes if n.op in ("placeholder", "get_attr")], end)
        self._mark(plan.output.all_input_nodes if plan.output is not None else [], end)
        for step in reversed(plan.tail):
            self._visit(step, end)
        for piece in reversed(plan.pieces):
            for step in reversed(piece.steps):
                self._visit(step, piece.index)

    def owners(self, node: Any) -> frozenset[int] | None:
        """The storages of a node's value; None where the graph has no value for it."""
        found = self._owners.get(node, False)
        if found is False:
            value = value_of(node)
            known = value is not None or node.op not in ("get_attr", "placeholder")
            found = self._owners[node] = storages(value) if known else None
        return found  # type: ignore[return-value]

    def _storages(self, nodes: list[Any]) -> set[int]:
        return {s for node in nodes for s in self.owners(node) or ()}

    def _mark(self, nodes: list[Any], index: int) -> None:
        for node in nodes:
            for storage in self.owners(node) or ():
                self._until.setdefault(storage, index)

    def _visit(self, step: Any, index: int) -> None:
        args = step.all_input_nodes if isinstance(step, Node) else _nodes_in(step.args)
        if args and self._matters(step, args):
            self._mark(args, index)

    def _matters(self, step: Any, args: list[Any]) -> bool:
        """Whether the gradient of something a step computes or writes is needed, so that those of its inputs are."""
        until = self._until
        if str(getattr(step.target, "__module__", None)).startswith("torch.autograd"):
            return True
        touched: list[Any] = self._writes.get(step, [])
        if _is_opaque(step):
            touched = [*touched, *args]
        for node in touched:
            owners = self.owners(node)
            if owners is None or any(s in until for s in owners):
                return True
        value = value_of(step)
        if value is None:
            return "example_value" not in step.meta and "val" not in step.meta
        if not _wants_gradient(value):
            return False
        owners = storages(value)
        return not owners or any(s in until for s in owners)

    def ends_before(self, node: Any, index: int) -> bool:
        """Whether a value has a gradient that does not matter any more at the start of piece `index`."""
        owners = self.owners(node)
        value = value_of(node)
        if not owners or not isinstance(value, torch.Tensor) or not value.requires_grad:
            return False
        return all(self._until.get(s, -1) < index for s in owners)

    def detach(self, piece: Piece) -> None:
        """Choose the inputs of a compiled piece that go in without a gradient."""
        piece.detached = frozenset(n for n in piece.inputs if self.ends_before(n, piece.index))

    def cut(self, piece: Piece) -> None:
        """Choose the results of a compiled piece that come out without a gradient."""
        piece.cut = frozenset(n for n in piece.exports if self.ends_before(n, piece.index + 1))

    def copy(self, piece: Piece) -> None:
        """Choose what a compiled piece takes or gives as a copy, because a later one writes what it may have kept."""
        if not self._is_trained(piece):
            return
        given = [self.owners(n) or frozenset() for n in piece.exports]
        taken = self._storages(piece.inputs)
        out = frozenset().union(*given)
        piece.copied = frozenset(
            node
            for node in piece.inputs
            for owners in [self.owners(node) or frozenset()]
            # What the piece itself writes its compiler has kept apart, and a view that it gives must stay one.
            if self._written_after(owners, piece)
            and not any((piece.index, s) in self._writers or s in out for s in owners)
        )
        piece.copied |= frozenset(
            node
            for node, owners in zip(piece.exports, given, strict=True)
            if self._written_after(owners, piece)
            and taken.isdisjoint(owners)
            and sum(not owners.isdisjoint(other) for other in given) == 1
            and not self._is_buffer(node, piece)
        )

    def _written_after(self, owners: frozenset[int], piece: Piece) -> bool:
        return any(self._written.get(s, -1) > piece.index for s in owners)

    def _is_trained(self, piece: Piece) -> bool:
        """Whether a piece has a backward."""
        written = [n for n in piece.inputs if any((piece.index, s) in self._writers for s in self.owners(n) or ())]
        results = [n for n in piece.exports if n not in piece.cut] + [n for n in written if n not in piece.detached]
        return any(_wants_gradient(value_of(n)) for n in results)

    def _is_buffer(self, node: Any, piece: Piece) -> bool:
        """Whether a piece only allocates what it gives: memory for the results of another."""
        while node.op != "placeholder":
            if any(self.plan.piece_of.get(u) == piece.index and not is_view(u) for u in node.users):
                return False
            if name_of(node.target).rpartition("::")[2].partition(".")[0] in FACTORIES:
                return True
            if not is_view(node) or not isinstance(node.args[0], Node):
                return False
            node = node.args[0]
        return False


def gradients_of(plan: Plan) -> Gradients | None:
    """The facts of a graph that is trained and writes in place, else None."""
    if not plan.mutations or len(plan.pieces) < 2:
        return None
    if not torch.is_grad_enabled() and not any(n.target is SET_GRAD and n.args[0] is True for n in plan.regions):
        return None
    if any(name_of(node.target) in RESHAPING for node, _ in plan.mutations):
        return None  # the storage a value has after it is not the one it had
    trained = False
    for node in plan.graph.nodes:
        value = value_of(node)
        trained = trained or _wants_gradient(value)
        if isinstance(value, torch.Tensor) and type(value) is not FakeTensor and is_traceable_wrapper_subclass(value):
            return None  # what it holds is not in its storage
    return Gradients(plan) if trained else None


def kept(value: torch.Tensor) -> torch.Tensor:
    """A differentiable copy with the same strides, in the order a compiled piece expects them."""
    # Between pieces the mode is that outside of all regions, which need not be the one that the value comes from.
    with torch.enable_grad():
        copy = value.clone()
        if copy.stride() == value.stride() or not value.numel():
            return copy
        extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        return value.as_strided((extent,), (1,)).clone().as_strided(value.shape, value.stride(), 0)


def _wants_gradient(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    return isinstance(value, tuple | list) and any(_wants_gradient(v) for v in value)


def _is_opaque(step: Any) -> bool:
    """Whether a call may write any of its arguments, for all that is known of it."""
    if step.op in ("call_method", "get_attr"):
        return False
    target = step.target
    if step.op == "call_module" or isinstance(target, HigherOrderOperator):
        return True
    if isinstance(target, OpOverload | OpOverloadPacket | BuiltinFunctionType) or target is SET_GRAD:
        return False
    home = str(getattr(target, "__module__", None))
    return home.partition(".")[0] not in ("torch", "_operator", "math", "builtins")


def _nodes_in(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [n for v in value for n in _nodes_in(v)]
    return [value] if hasattr(value, "all_input_nodes") or hasattr(value, "users") else []
