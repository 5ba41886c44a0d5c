"""What makes two pieces the same: their calls, constants, and the metadata of what goes in; never names of nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node

from opreg.graph_gradients import Gradients, gradients_of
from opreg.graph_kinds import Kinds
from opreg.graph_meta import constant, meta_key, symbols_in
from opreg.graph_ops import OpFacts, name_of, storages, value_of
from opreg.graph_pieces import Piece, Plan, Step


class Mark:
    """A token that equals nothing but itself, so that no constant of a graph can be mistaken for structure."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


# Where a call begins: one of these, or the function that is called, which no argument's token is.
METHOD, MODULE, ATTR = Mark("method"), Mark("module"), Mark("attr")
TUPLE, LIST, DICT, SLICE, END, KWARGS, HOLE = (Mark(t) for t in ("(", "[", "{", "slice", ")", "**", "?"))
_LOCAL: list[Mark] = []
_INPUT: list[Mark] = []
_CUT: list[Mark] = []


def _marks(kept: list[Mark], letter: str, count: int) -> list[Mark]:
    """Marks are shared by all keys ever made in this process: `%3` in one piece equals `%3` in another."""
    while len(kept) < count:
        kept.append(Mark(f"{letter}{len(kept)}"))
    return kept


class Body:
    """The calls of a piece and the metadata of its inputs; pieces of one graph that agree in them have the same object,
    so that keys are compared without looking at the calls again."""

    __slots__ = ("_digest", "metas", "tokens")

    def __init__(self, tokens: tuple[Any, ...], metas: tuple[Any, ...]) -> None:
        self.tokens = tokens
        self.metas = metas
        self._digest = ""

    @property
    def digest(self) -> str:
        """A name that is the same in every process."""
        if not self._digest:
            self._digest = hashlib.sha256(_text((self.tokens, self.metas)).encode()).hexdigest()
        return self._digest


class Keys:
    """Walks the arguments of every piece once; finds inputs and exports, and the key of each piece."""

    def __init__(self, plan: Plan, root: Any) -> None:
        self.plan = plan
        self.root = root
        self.needed: set[Any] = set()  # values that cross a border
        self._bodies: dict[Any, Body] = {}
        self.kinds = Kinds(self.attribute)
        self._facts: dict[Any, bool] = {}
        self._symbols: dict[Any, tuple[set[Any], set[Any]]] = {}
        self.gradients: Gradients | None = None
        self._writers = {plan.piece_of.get(node) for node, _ in plan.mutations}

    def run(self) -> None:
        """Fill `inputs` and `exports` of every piece, and the keys of those that are compiled."""
        plan = self.plan
        drafts: list[Any] = []
        for piece in plan.pieces:
            if piece.split:
                self._take(piece)
            drafts.append(None if piece.split else self._draft(piece))
        self.gradients = gradients_of(plan, self.kinds)
        self.outside([plan.output.args] if plan.output is not None else [], plan.tail)
        exports: list[list[Any]] = [[] for _ in drafts]
        home_of = plan.piece_of
        for node in self.needed:
            home = home_of.get(node)
            if home is not None:
                exports[home].append(node)
        for piece, draft, found in zip(plan.pieces, drafts, exports, strict=True):
            # To keep the places of all nodes from the drafts would cost more than to look these few up again.
            steps = piece.steps
            at = steps.index if len(found) < 5 else {step: i for i, step in enumerate(steps)}.__getitem__
            places = sorted([at(node) for node in found])
            piece.exports = [steps[i] for i in places]
            if draft is None:
                continue
            tokens, kinds, holes = draft
            if self.gradients is not None:
                self.gradients.detach(piece)
                if piece.detached:
                    kinds = self.kinds.numbers(piece.inputs, piece.detached)
            ends: list[Any] = [_LOCAL[i] for i in places]
            if self.gradients is not None:
                self.gradients.cut(piece)
                self.gradients.copy(piece)
                if piece.cut:
                    cuts = _marks(_CUT, "detached %", max(places, default=-1) + 1)
                    ends = [cuts[i] if steps[i] in piece.cut else _LOCAL[i] for i in places]
                ends += [(_INPUT[piece.inputs.index(node)], node in piece.cut) for node in piece.renewed]
            piece.key = (self._body(piece, tokens, kinds), tuple(ends), holes)

    def digest_of(self, piece: Piece) -> str:
        """A name for a piece that is the same in every process."""
        if piece.key is None:
            holes: list[Any] = []
            tokens = self._tokens(piece, [], holes)
            ends = tuple([_LOCAL[piece.steps.index(node)] for node in piece.exports])
            piece.key = (Body(tokens, ()), ends, tuple(holes))
        body, ends, holes = piece.key
        return hashlib.sha256((body.digest + _text((ends, holes))).encode()).hexdigest()[:16]

    def outside(self, values: Iterable[Any], tail: Iterable[Any]) -> None:
        """Mark what the graph's output, and the views made again for it, need from the pieces."""
        made = set(tail)
        for value in [*values, *(s.args for s in made), *(s.kwargs for s in made)]:
            for node in nodes_in(value):
                for found in nodes_in(self.cross(node)):
                    if found not in made:
                        self.needed.add(found)

    def cross(self, node: Any) -> Any:
        """What stands for `node` outside of its piece: itself, another node, or a literal with nodes inside."""
        instead = self.plan.instead
        while node in instead:
            other = instead[node]
            if other is node:
                return node
            if not isinstance(other, Node | Step):
                return other
            node = other
        if node.op not in ("placeholder", "get_attr"):
            value = value_of(node)
            if value is not None and not isinstance(value, torch.Tensor):
                known = self.plan.scalar(value)
                if isinstance(known, Node | int | float | bool | str):
                    return known
        return node

    def _take(self, piece: Piece) -> None:
        """What goes into a piece that runs as it is, whose key only a report wants."""
        inputs: list[Any] = []
        known = set(piece.steps)
        for step in piece.steps:
            for arg in step._input_nodes if type(step) is Node else nodes_in(step._args):
                if arg not in known:
                    self._find(arg, known, inputs)
        piece.inputs = inputs

    def _find(self, arg: Any, known: set[Any], inputs: list[Any]) -> None:
        if arg.op != "placeholder":
            other = self.cross(arg)
            if other is not arg:
                for node in nodes_in(other):
                    if node not in known:
                        self._find(node, known, inputs)
                return
            self.needed.add(arg)
        known.add(arg)
        inputs.append(arg)

    def _draft(self, piece: Piece) -> tuple[tuple[Any, ...], tuple[int, ...], tuple[Any, ...]]:
        """What a compiled piece calls, what kinds of values go into it, and the constants of registered ops."""
        inputs: list[Any] = []
        holes: list[Any] = []
        tokens = self._tokens(piece, inputs, holes)
        if self.plan.symbols:
            inputs += self._unbound(inputs)
        piece.inputs = inputs
        return tokens, self.kinds.numbers(inputs), tuple(holes)

    def _body(self, piece: Piece, tokens: tuple[Any, ...], kinds: tuple[int, ...]) -> Body:
        # A compiler treats inputs that share storage apart where one of them is written.
        shared = _shared(piece.inputs) if piece.index in self._writers else None
        content = (tokens, kinds, shared)
        body = self._bodies.get(content)
        if body is None:
            metas = [self.kinds.metas[kind] for kind in kinds]
            body = self._bodies[content] = Body(tokens, (*metas, *([] if shared is None else [shared])))
        return body

    def _tokens(self, piece: Piece, inputs: list[Any], holes: list[Any]) -> tuple[Any, ...]:
        """What the piece calls; what goes in is appended to `inputs`, and constants of registered ops to `holes`."""
        tokens: list[Any] = []
        known: dict[Any, Mark] = {}
        add, token_of, walk, facts, marks = tokens.append, known.get, self._walk, self._facts, _INPUT
        for step, mark in zip(piece.steps, _marks(_LOCAL, "%", len(piece.steps)), strict=False):
            op, target = step.op, step.target
            if op == "call_function":
                add(target)
            elif op == "call_method":
                add(METHOD)
                add(target)
            elif op == "call_module":
                add(MODULE)
                add(constant(self.attribute(target)))
            else:
                add(ATTR)
                add(module_key(self.attribute(target)))
            custom = facts.get(target)
            if custom is None:
                custom = self.is_custom(step)
            kwargs = step._kwargs
            if custom:
                for at, a in [*enumerate(step._args), *kwargs.items()]:
                    if type(at) is str:
                        add(at)
                    # Constants of registered ops are kept apart: where only they differ, they can become inputs.
                    if type(a) in (str, int, float, bool):
                        add(HOLE)
                        holes.append(constant(a))
                        piece.spots.append((step, at))
                    else:
                        walk(a, known, inputs, add)
            else:
                for a in step._args:
                    # What walk() would do, for what almost all arguments are: values of this piece, its inputs, and
                    # numbers.
                    if type(a) is Node:
                        token = token_of(a)
                        if token is None:
                            if a.op != "placeholder":
                                walk(a, known, inputs, add)
                                continue
                            try:
                                token = marks[len(inputs)]
                            except IndexError:
                                token = _marks(marks, "<", len(inputs) + 1)[-1]
                            known[a] = token
                            inputs.append(a)
                        add(token)
                    elif type(a) is int:
                        add(a)
                    else:
                        walk(a, known, inputs, add)
                if kwargs:
                    add(KWARGS)
                    for k, a in kwargs.items():
                        add(k)
                        walk(a, known, inputs, add)
            known[step] = mark
        return tuple(tokens)

    def _walk(self, arg: Any, known: dict[Any, Mark], inputs: list[Any], add: Callable[[Any], None]) -> None:
        """The tokens of one argument. (No closure of _tokens, which would hold itself and be garbage in cycles.)"""
        kind = type(arg)
        if kind is Node or kind is Step:
            token = known.get(arg)
            if token is None:
                if arg.op != "placeholder" and (other := self.cross(arg)) is not arg:
                    self._walk(other, known, inputs, add)
                    return
                at = len(inputs)
                token = known[arg] = _INPUT[at] if at < len(_INPUT) else _marks(_INPUT, "<", at + 1)[at]
                inputs.append(arg)
                self.needed.add(arg)
            add(token)
        elif kind is int or kind is str or arg is None:
            add(arg)
        elif isinstance(arg, tuple | list):
            add(LIST if isinstance(arg, list) else TUPLE)
            for a in arg:
                self._walk(a, known, inputs, add)
            add(END)
        elif kind is float and arg and arg == arg:
            add((float, arg))
        elif kind is bool or kind is float or kind is complex:
            # 1, True and 1.0 are equal in Python, 0.0 equals -0.0, and nan equals nothing.
            add((kind, repr(arg)))
        elif isinstance(arg, dict):
            add(DICT)
            for k, v in arg.items():
                add(k)
                self._walk(v, known, inputs, add)
            add(END)
        elif kind is slice:
            add(SLICE)
            self._walk(arg.start, known, inputs, add)
            self._walk(arg.stop, known, inputs, add)
            self._walk(arg.step, known, inputs, add)
        else:
            add(constant(arg))

    def _unbound(self, inputs: Iterable[Any]) -> list[Any]:
        """Placeholders of symbols that inputs' sizes use and none of them is: a compiler could not solve for them."""
        bound: set[Any] = set()
        free: set[Any] = set()
        for node in inputs:
            found = self._symbols.get(node)
            if found is None:
                found = self._symbols[node] = symbols_in(value_of(node))
            bound |= found[0]
            free |= found[1]
        found_for = {self.plan.symbols[s] for s in free - bound if s in self.plan.symbols}
        return sorted(found_for.difference(inputs), key=lambda n: n.name)

    def is_custom(self, step: Any) -> bool:
        """Whether a step calls an operator that is not torch's own."""
        if step.target not in self._facts:
            self._facts[step.target] = step.op == "call_function" and OpFacts(step.op, step.target).custom
        return self._facts[step.target]

    def attribute(self, path: str) -> Any:
        """The object a get_attr or call_module node names."""
        owner = self.root
        for part in path.split("."):
            owner = getattr(owner, part)
        return owner


def _shared(inputs: Iterable[Any]) -> tuple[int, ...]:
    """For each input the first one that shares its storage."""
    first: dict[int, int] = {}
    found: list[int] = []
    for i, node in enumerate(inputs):
        owners = storages(value_of(node))
        found.append(first.setdefault(next(iter(owners)), i) if len(owners) == 1 else i)
    return tuple(found)


def module_key(value: Any) -> Any:
    """A sub-graph (the body of a checkpoint or a while loop) is its structure; anything else is itself."""
    if not isinstance(value, GraphModule):
        return constant(value)
    order = {node: i for i, node in enumerate(value.graph.nodes)}
    lines: list[Any] = []
    for node in order:
        if node.op == "get_attr":
            lines.append(("get_attr", module_key(getattr(value, str(node.target), None))))
            continue
        target = node.target if node.op == "call_function" else (node.op if node.op == "placeholder" else node.target)
        flat: list[Any] = []
        _flatten((node.args if node.op != "placeholder" else (), node.kwargs), order, flat)
        lines.append((node.op, target, tuple(flat), meta_key(value_of(node)) if node.op == "placeholder" else None))
    return tuple(lines)


def _flatten(value: Any, order: dict[Any, int], flat: list[Any]) -> None:
    if isinstance(value, Node):
        flat.append((HOLE, order[value]))
    elif isinstance(value, tuple | list):
        flat.append(LIST if isinstance(value, list) else TUPLE)
        for v in value:
            _flatten(v, order, flat)
        flat.append(END)
    elif isinstance(value, dict):
        flat.append(DICT)
        for k, v in value.items():
            flat.append(k)
            _flatten(v, order, flat)
        flat.append(END)
    elif isinstance(value, slice):
        _flatten(("slice", value.start, value.stop, value.step), order, flat)
    else:
        flat.append(constant(value))


def nodes_in(value: Any) -> list[Any]:
    """All nodes in a nest of tuples, lists, dicts and slices."""
    if isinstance(value, Node | Step):
        return [value]
    if isinstance(value, tuple | list):
        return [n for v in value for n in nodes_in(v)]
    if isinstance(value, dict):
        return [n for v in value.values() for n in nodes_in(v)]
    if isinstance(value, slice):
        return nodes_in((value.start, value.stop, value.step))
    return []


def _text(token: Any) -> str:
    if isinstance(token, tuple):
        return "(" + ",".join(_text(t) for t in token) + ")"
    if isinstance(token, OpOverload | OpOverloadPacket):
        return name_of(token)
    if isinstance(token, type) or callable(token):
        return f"{getattr(token, '__module__', '')}.{getattr(token, '__qualname__', token)}"
    return f"{type(token).__name__}:{token!r}"
