"""Training through pieces that write in place: which values cross a border without a gradient, and which as a copy.

To autograd a compiled piece is a single operation. Its backward runs for all of its results at once, and it keeps what
its compiler likes, its inputs and results included, where eager code keeps what the formula of each op needs. So
- a value whose gradient no result of the graph needs crosses a border detached: else the backward of what made it would
  run with zeros, and ask for tensors that were rightly written in the meantime;
- what a piece that is trained takes or gives, and a later piece writes, is a copy in one of the two;
- what such a piece takes and writes itself it gets as a copy and gives back, to be written from outside: AOTAutograd
  keeps the old value for the backward and has it overwritten, with an error or, where it wants no gradient, without.
A graph without a write, or without a gradient, needs neither and is not looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import BuiltinFunctionType
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opreg.graph_alias import Classes, is_view, nodes_in
from opreg.graph_kinds import Kinds, wants_gradient
from opreg.graph_ops import FACTORIES, RESHAPING, SET_GRAD, name_of, storages, value_of
from opreg.graph_pieces import Piece, Plan


class Gradients:
    """Facts about the values of one graph, found in one pass over it from its end to its start.

    Values that share storage which is written count as one; all others stand for themselves."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.plain = True
        self._opaque: dict[Any, bool] = {}
        self._owner: dict[Any, Any] = {}
        # value -> the last piece at whose start its gradient matters; the graph's results count as a piece.
        self._until: dict[Any, int] = {}
        # value -> the last piece that writes it, and all pieces that write which value.
        self._written: dict[Any, int] = {}
        self._writers: set[tuple[int, Any]] = set()
        # Values that a write may give a gradient, and the last piece that gives it one and writes it through a view as
        # well, which may be older. (Every compiled piece makes its views again.)
        self._given: set[Any] = set()
        self._given_under: dict[Any, int] = {}
        self._writes: dict[Any, list[Any]] = {}
        # Pieces in which the gradient of anything matters.
        self._live: set[int] = set()
        self._outside: dict[int, list[Any]] = {}
        self._group()
        end = len(plan.pieces)
        # What comes from outside can be seen there afterwards.
        self._mark([*plan.placeholders, *plan.attributes], end)
        self._mark(plan.output.all_input_nodes if plan.output is not None else (), end)
        for step in reversed(plan.tail):
            self._visit(step, end)
        for piece in reversed(plan.pieces):
            for step in reversed(piece.steps):
                self._visit(step, piece.index)

    def _group(self) -> None:
        """Find what shares storage with what is written, and who writes it."""
        classes, owner = Classes(), self._owner
        giving: set[tuple[int, Any]] = set()
        through: set[tuple[int, Any]] = set()
        for node, written in self.plan.mutations:
            targets = self._writes.setdefault(node, [])
            targets += nodes_in(written)
            gives = any(wants_gradient(value_of(a)) for a in _inputs_of(node) if a not in targets)
            index = self.plan.piece_of.get(node, -1)
            for target in targets:
                if target not in owner:
                    root = classes.find(target)[0]
                    for other in [root, *self._aliases(root)]:
                        owner.update(dict.fromkeys(classes.members(other), root))
                    owner.setdefault(target, root)
                known = owner[target]
                if target is not known:
                    through.add((index, known))
                if gives:
                    giving.add((index, known))
                self._written[known] = max(index, self._written.get(known, -1))
                self._writers.add((index, known))
        self._given = {known for _, known in giving}
        for index, known in giving & through:
            self._given_under[known] = max(index, self._given_under.get(known, -1))

    def _aliases(self, root: Any) -> list[Any]:
        """The inputs of the graph that share storage with `root`, if that is one."""
        if root.op != "placeholder":
            return []
        if not self._outside:
            for node in self.plan.placeholders:
                for storage in storages(value_of(node)):
                    self._outside.setdefault(storage, []).append(node)
        return [node for storage in storages(value_of(root)) for node in self._outside[storage]]

    def _mark(self, nodes: Iterable[Any], index: int) -> None:
        owner, until = self._owner, self._until
        for node in nodes:
            until.setdefault(owner.get(node, node), index)

    def _visit(self, step: Any, index: int) -> None:
        args = _inputs_of(step)
        if args and self._matters(step):
            self._live.add(index)
            self._mark(args, index)

    def _matters(self, step: Any) -> bool:
        """Whether the gradient of something a step computes or writes is needed, so that those of its inputs are."""
        value = value_of(step)
        if type(value) is FakeTensor:
            wants = value.requires_grad
        elif value is None:
            # Dynamo leaves no value on `x[i] = y`, which returns nothing.
            if step not in self._writes and "example_value" not in step.meta and "val" not in step.meta:
                return True
            wants = False
        else:
            # What a subclass holds is not in its storage, and its views cannot be told.
            self.plain = self.plain and not is_traceable_wrapper_subclass(value)
            wants = wants_gradient(value)
        if wants and self._owner.get(step, step) in self._until:
            return True
        if any(self._owner[target] in self._until for target in self._writes.get(step, ())):
            return True
        if step.op != "call_function":
            return bool(step.op == "call_module")
        opaque = self._opaque.get(step.target)
        if opaque is None:
            opaque = self._opaque[step.target] = _is_opaque(step.target)
        return opaque

    def ends_before(self, node: Any, index: int) -> bool:
        """Whether a value has a gradient that does not matter any more at the start of piece `index`."""
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return False
        known = self._owner.get(node, node)
        if self._given_under.get(known, -1) >= index:
            return False  # autograd refuses to write a view of what had no gradient before it was written
        return self._until.get(known, -1) < index

    def detach(self, piece: Piece) -> None:
        """Choose the inputs of a compiled piece that go in without a gradient."""
        dead = piece.index not in self._live
        piece.detached = frozenset(
            n for n in piece.inputs if self.ends_before(n, piece.index) or (dead and wants_gradient(value_of(n)))
        )

    def is_written(self, node: Any) -> bool:
        """Whether anything writes a value, and may give it a gradient."""
        return self._owner.get(node, node) in self._written

    def cut(self, piece: Piece) -> None:
        """Choose the results of a compiled piece that come out without a gradient."""
        found = frozenset(n for n in piece.exports if self.ends_before(n, piece.index + 1))
        if found:
            # Not of results that share storage: AOTAutograd makes such views again, and may miscount where one of them
            # is detached and `contiguous` had nothing to do. Who takes them detaches them.
            count = Counter(storage for n in piece.exports for storage in storages(value_of(n)))
            found = frozenset(n for n in found if all(count[storage] == 1 for storage in storages(value_of(n))))
        piece.cut = found

    def copy(self, piece: Piece) -> None:
        """Choose what a compiled piece takes or gives as a copy, because it may have kept what it or another writes."""
        taken, given = ([self._owner.get(n, n) for n in nodes] for nodes in (piece.inputs, piece.exports))
        written = {known for known in (*taken, *given) if self._written.get(known, -1) >= piece.index}
        if not written or not self._is_trained(piece):
            return
        # A view that the piece gives must stay one.
        copied = [
            node
            for node, known in zip(piece.inputs, taken, strict=True)
            if known in written and known not in given and (piece.index, known) not in self._writers
        ]
        piece.renewed = tuple(
            node
            for node, known in zip(piece.inputs, taken, strict=True)
            if (piece.index, known) in self._writers
            and known not in given
            and taken.count(known) == 1
            and self._reads(node, piece)
        )
        piece.cut |= frozenset(n for n in piece.renewed if self.ends_before(n, piece.index + 1))
        written = {known for known in written if self._written[known] > piece.index}
        copied += [
            node
            for node, known in zip(piece.exports, given, strict=True)
            if known in written and known not in taken and given.count(known) == 1 and not self._is_buffer(node, piece)
        ]
        piece.copied = frozenset(copied)

    def _reads(self, node: Any, piece: Piece) -> bool:
        """Whether a piece, which writes a value, may also keep what it was before."""
        known = self._owner[node]
        users = [step for step in piece.steps if any(self._owner.get(a) is known for a in _inputs_of(step))]
        first = users[0]
        if first.target in ("copy_", "zero_", "fill_") and first.args[0] is node:
            # What is written may be kept and written again. With a gradient that nobody needs, whose backward would
            # run all the same, it must not come out.
            return len(users) > 1 and known in self._given and self.ends_before(node, piece.index + 1)
        # Counting, as in `steps.add_(1)`, keeps nothing.
        return wants_gradient(value_of(node)) or any(step not in self._writes or step.users for step in users)

    def _is_trained(self, piece: Piece) -> bool:
        """Whether a piece has a backward."""
        written = (n for n in piece.inputs if (piece.index, self._owner.get(n, n)) in self._writers)
        results = [n for n in piece.exports if n not in piece.cut] + [n for n in written if n not in piece.detached]
        return any(wants_gradient(value_of(n)) for n in results)

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


def gradients_of(plan: Plan, kinds: Kinds) -> Gradients | None:
    """The facts of a graph that is trained and writes in place, else None; `kinds` are those of the pieces' inputs."""
    if not plan.mutations or len(plan.pieces) < 2:
        return None
    if not torch.is_grad_enabled() and not any(n.target is SET_GRAD and n.args[0] is True for n in plan.regions):
        return None
    if any(name_of(node.target) in RESHAPING for node, _ in plan.mutations):
        return None  # the storage a value has after it is not the one it had
    if not kinds.gradient:
        return None
    found = Gradients(plan)
    return found if found.plain else None


def kept(value: torch.Tensor) -> torch.Tensor:
    """A differentiable copy with the same strides, in the order a compiled piece expects them."""
    # Between pieces the mode is that outside of all regions, which need not be the one that the value comes from.
    with torch.enable_grad():
        copy = value.clone()
        if copy.stride() == value.stride() or not value.numel():
            return copy
        extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        return value.as_strided((extent,), (1,)).clone().as_strided(value.shape, value.stride(), 0)


def renew(value: torch.Tensor, new: torch.Tensor) -> None:
    """Write `new` into `value`, for autograd as well."""
    with torch.enable_grad():
        value.copy_(new)


def _inputs_of(step: Any) -> list[Any]:
    return step.all_input_nodes if isinstance(step, Node) else nodes_in(step.args)


def _is_opaque(target: Any) -> bool:
    """Whether a function may write any of its arguments, or want their gradients, for all that is known of it."""
    if isinstance(target, HigherOrderOperator):
        return True
    if isinstance(target, OpOverload | OpOverloadPacket | BuiltinFunctionType) or target is SET_GRAD:
        return False
    home = str(getattr(target, "__module__", None))
    return home.startswith("torch.autograd") or home.partition(".")[0] not in ("torch", "_operator", "math", "builtins")
