"""splitting_ops() and split_graph(): cut an FX graph at attention-like ops, and find which pieces are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

from opreg import registry
from opreg.garbage import rare_collections
from opreg.graph_build import Stitcher, build_piece, shape_text
from opreg.graph_key import Keys
from opreg.graph_lift import lift_constants
from opreg.graph_ops import name_of, targets_of, value_of
from opreg.graph_pieces import Piece, Plan
from opreg.graph_plan import make_plan
from opreg.graph_report import PieceReport, Report, distance, why


def splitting_ops() -> list[str]:
    """Names of the registered ops at which a graph is split: those with `kind="attention"`, in order of name."""
    return sorted(op.spec.name for op in registry.all_ops() if op.spec.kind == "attention")


class SplitGraph:
    """A graph cut into pieces. Calling it runs the pieces in order and gives what the graph gave.

    `pieces` lists all of them; pieces with the same `key` share one module; `modules` holds the distinct ones that are
    worth compiling, by the index of the first piece of each kind. `use(index, fn)` puts a compiled callable in place of
    one."""

    def __init__(
        self, gm: GraphModule, targets: dict[Any, str], lift: Callable[[torch.Tensor], Any] | None = None
    ) -> None:
        self.root = gm
        self.targets = targets
        with rare_collections():
            with torch._C.DisableTorchFunctionSubclass():
                # Asked with torch functions off, a fake tensor gives its sizes in half the time.
                self.plan: Plan = make_plan(gm.graph, targets)
                self.keys = Keys(self.plan, gm)
                self.keys.run()
            self.lifted: list[str] = [] if lift is None else lift_constants(self.plan, lift)
            self.same: list[int] = []
            first: dict[Any, int] = {}
            for piece in self.pieces:
                self.same.append(piece.index if piece.split else first.setdefault(piece.key, piece.index))
            # Of which several pieces are instances.
            self._shared = {same for i, same in enumerate(self.same) if same != i}
            self.modules: dict[int, GraphModule] = {i: self.build(i) for i in dict.fromkeys(first.values())}
        self._runs: dict[int, Callable[..., Any]] = dict(self.modules)
        self._function: Callable[..., Any] | None = None

    @property
    def pieces(self) -> list[Piece]:
        """All pieces, in the order they run."""
        return self.plan.pieces

    def build(self, index: int) -> GraphModule:
        """A new module for piece `index`; compilers own and change the modules they are given."""
        return build_piece(self.keys, self.pieces[index], self.root, index in self._shared)

    def runs(self, others: Mapping[int, Callable[..., Any]] | None = None) -> dict[int, Callable[..., Any]]:
        """What runs each piece that is not splitting; `others` in place of some distinct pieces."""
        distinct = {**self._runs, **(others or {})}
        return {p.index: distinct[self.same[p.index]] for p in self.pieces if not p.split}

    def function_of(self, runs: dict[int, Callable[..., Any]]) -> Callable[..., Any]:
        """A function that runs every piece that is not splitting by what `runs` has for it."""
        return Stitcher(self.plan, self.keys, self.root).function(runs)

    def build_all(self) -> dict[int, GraphModule]:
        """A module for every piece that is not splitting, for tools that want them apart."""
        with rare_collections():
            return {p.index: build_piece(self.keys, p, self.root, False) for p in self.pieces if not p.split}

    def use(self, index: int, run: Callable[..., Any]) -> None:
        """Run `run(*inputs) -> tuple of outputs` instead of the module of distinct piece `index`."""
        self._runs[index] = run
        self._function = None

    def function(self) -> Callable[..., Any]:
        """The generated function that runs the pieces."""
        if self._function is None:
            self._function = self.function_of(self.runs())
        return self._function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function()(*args, **kwargs)

    def report(self) -> Report:
        """Pieces, ops, shapes, what is the same and why the rest is not."""
        found: list[PieceReport] = []
        earlier: list[Piece] = []
        for piece in self.pieces:
            same = self.same[piece.index]
            reason = ""
            if not piece.split and same == piece.index:
                if earlier:
                    # The last few are enough to explain by, and keep a report of many distinct pieces linear.
                    distances = [distance(piece.key, other.key) for other in reversed(earlier[-8:])]
                    near = earlier[-1 - distances.index(min(distances))]
                    reason = why(piece.key, near.key, near.index)
                earlier.append(piece)
            found.append(
                PieceReport(
                    index=piece.index,
                    splitting=piece.split,
                    ops=tuple(op_text(n, self.targets) for n in piece.nodes),
                    inputs=tuple(shape_text(n) for n in piece.inputs),
                    outputs=tuple(shape_text(n) for n in piece.exports),
                    digest=self.keys.digest_of(piece),
                    same_as=None if same == piece.index else same,
                    why_distinct=reason,
                )
            )
        matched = self.plan.matched
        asked = dict.fromkeys(self.targets.values())
        return Report(
            pieces=tuple(found),
            split_at=tuple(asked),
            unmatched=tuple(n for n in asked if n not in matched),
            notes=tuple(self.plan.notes),
            lifted=tuple(self.lifted),
        )


def op_text(node: Any, targets: dict[Any, str]) -> str:
    """What a report calls a node: the name the user split at, else the short name of the target."""
    return targets[node.target] if node.op == "call_function" and node.target in targets else name_of(node.target)


def split_graph(gm: GraphModule, on: Any = None, *, lift: bool = False) -> SplitGraph:
    """Cut `gm` before and after each of the ops `on`, without changing what it computes.

    on: names ("ns::op" or "ns::op.overload"), OpOverloads, packets or what register_op returned, one or an iterable of
        them; None means splitting_ops(). Neighbouring splitting ops share a piece, also across views, allocations and
        getitem.
    lift: make names and ids of registered ops inputs of a piece where pieces differ in nothing else; those pieces are
        then the same, and call a stand-in of the op.
    Returns a SplitGraph: call it like `gm`; `.report()` tells what was cut; `gm` itself is not changed.
    Raises UnknownOpError for a name that no operator has, with the nearest one, and TypeError for what is no
        GraphModule."""
    if not isinstance(gm, GraphModule):
        raise TypeError(
            f"split_graph: 'gm' is of type {type(gm).__name__}, not a torch.fx.GraphModule. Trace it first, with "
            'torch.fx.symbolic_trace or make_fx; torch.compile(model, backend="opreg") splits what Dynamo traces.'
        )
    return SplitGraph(gm, targets_of(splitting_ops() if on is None else on), fake_handle(gm) if lift else None)


def fake_handle(gm: GraphModule) -> Callable[[torch.Tensor], Any]:
    """Makes the value of a lifted constant's input: fake where the graph's values are fake."""
    for node in gm.graph.nodes:
        value = value_of(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode.from_tensor
        if node.op != "placeholder":
            break
    return lambda tensor: tensor
