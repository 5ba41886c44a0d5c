"""What a plan is made of: the pieces of a graph, the steps of a piece, and the plan that has them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node


class Step:
    """A call the splitter adds itself; has the attributes of an fx Node that key and build read."""

    # As in a Node, `args` is a property over a slot; passes over all nodes read the slot, at a fifth of the cost.
    __slots__ = ("_args", "_kwargs", "meta", "name", "op", "target", "users")

    def __init__(self, name: str, target: Any, args: tuple[Any, ...]) -> None:
        self.op = "call_function"
        self.name = name
        self.target = target
        self._args = args
        self._kwargs: dict[str, Any] = {}
        self.meta: dict[str, Any] = {}
        self.users: dict[Any, None] = {}

    @property
    def args(self) -> tuple[Any, ...]:
        return self._args

    @property
    def kwargs(self) -> dict[str, Any]:
        return self._kwargs


class Piece:
    """Nodes that run together. `steps` is what runs: views made again, regions entered, the nodes, regions left."""

    __slots__ = tuple("copied cut detached exports index inputs key lifts nodes renewed split spots steps".split())

    def __init__(self, index: int, split: bool) -> None:
        self.index = index
        self.split = split
        self.nodes: list[Any] = []
        self.steps: list[Any] = []
        self.inputs: list[Any] = []
        self.exports: list[Any] = []
        # Constants of registered ops, as (node, position or keyword).
        # Which became inputs: {node: (target, {at: input})}.
        self.spots: list[tuple[Any, Any]] = []
        self.lifts: dict[Any, tuple[Any, dict[Any, Any]]] = {}
        self.key: Any = None
        # Where gradients are wanted: inputs that come in without one, results that go out without one, both kinds of
        # values that cross as a copy, and inputs whose new value goes out, to be written where the old one was.
        self.detached: frozenset[Any] = frozenset()
        self.cut: frozenset[Any] = frozenset()
        self.copied: frozenset[Any] = frozenset()
        self.renewed: tuple[Any, ...] = ()


class Plan:
    """The cut of one graph: pieces in order, and how values cross borders otherwise than as plain outputs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.pieces: list[Piece] = []
        self.piece_of: dict[Any, int] = {}
        self.placeholders: list[Node] = []
        self.attributes: list[Node] = []
        self.output: Node | None = None
        self.symbols: dict[Any, Node] = {}
        # Instead of crossing: another node, a literal (with nodes inside), or the node computed again where it is used.
        self.instead: dict[Any, Any] = {}
        self.replays: dict[int, dict[Any, None]] = {}
        self.again: dict[Any, set[int]] = {}
        self.mutations: list[tuple[Node, list[Any]]] = []
        self.sizes: list[Node] = []
        # Calls that give a tuple, and whether their value says so.
        self.tuples: dict[Node, bool] = {}
        self.regions: list[Node] = []
        self.modules: list[Node] = []
        self.notes: list[str] = []
        self.matched: set[str] = set()
        self.tail: list[Any] = []

    def index_of(self, user: Any) -> int:
        """The piece of a user; the output counts as the piece after the last."""
        return self.piece_of.get(user, len(self.pieces))

    def scalar(self, value: Any) -> Any:
        """A literal, or the placeholder that carries a symbol, or None when the value must cross by itself."""
        if isinstance(value, torch.SymInt):
            return self.symbols.get(value.node.expr)
        return None if isinstance(value, torch.SymFloat | torch.SymBool) else value

    def elsewhere(self, node: Any) -> set[int]:
        """The other pieces that use a node's value, those that make one of its users again included."""
        found = {self.index_of(user) for user in node.users}
        for user in node.users:
            found.update(self.again.get(user, ()))
        found.discard(self.piece_of.get(node, -1))
        return found

    def crosses(self, node: Any) -> bool:
        """Whether another piece than a node's own uses its value: whether `elsewhere` has anything."""
        at, home, end = self.piece_of.get, self.piece_of.get(node, -1), len(self.pieces)
        for user in node.users:
            if at(user, end) != home:
                return True
        return any(self.again.get(user, set()) - {home} for user in node.users) if self.again else False

    def make_again(self, nodes: Iterable[Any], index: int) -> None:
        """Run `nodes` again at the start of piece `index` (the number of pieces means: before the output)."""
        for node in nodes:
            self.replays.setdefault(index, {})[node] = None
            self.again.setdefault(node, set()).add(index)
