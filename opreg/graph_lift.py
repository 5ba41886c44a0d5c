"""Names and ids inside pieces become inputs: pieces that differ only in such constants are then the same piece.

A compiler takes tensors, not strings. The constant goes into a table, its place in the table becomes a 0-d int64 CPU
tensor, and the op is called through a stand-in that takes this tensor where the op takes the constant."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from opreg import library
from opreg.graph_key import Mark
from opreg.graph_kinds import wants_gradient
from opreg.graph_meta import constant, meta_key
from opreg.graph_ops import name_of, value_of
from opreg.graph_pieces import Piece, Plan

LIFTED = Mark("lifted")
_TABLE: list[Any] = []
_PLACES: dict[Any, torch.Tensor] = {}


class Lifted:
    """An input of a piece that is no node of the graph: the handle of a constant."""

    __slots__ = ("meta", "name", "op", "tensor", "value")

    def __init__(self, value: Any, like: Any) -> None:
        self.op = "lifted"
        self.name = repr(value)
        self.value = value
        self.tensor = handle(value)
        self.meta: dict[str, Any] = {"example_value": like}


def handle(value: Any) -> torch.Tensor:
    """The 0-d tensor that stands for a constant in this process."""
    key = constant(value)
    if key not in _PLACES:
        _PLACES[key] = torch.tensor(len(_TABLE), dtype=torch.int64)
        _TABLE.append(value)
    return _PLACES[key]


def overload_of(target: Any) -> OpOverload | None:
    """The overload a call means; None for a packet of several, which the arguments would have to decide."""
    if isinstance(target, OpOverloadPacket):
        names: list[str] = target.overloads()
        return getattr(target, names[0]) if len(names) == 1 else None
    return target if isinstance(target, OpOverload) else None


def lift_constants(plan: Plan, fake: Callable[[torch.Tensor], Any]) -> list[str]:
    """Turn constants that alone tell pieces apart into inputs, in place; returns a line for the report per group.

    fake: makes the fake value of a handle."""
    groups: dict[Any, list[Piece]] = {}
    for piece in plan.pieces:
        if not piece.split and piece.spots:
            groups.setdefault(piece.key[:2], []).append(piece)
    lines: list[str] = []
    for pieces in groups.values():
        holes = [piece.key[2] for piece in pieces]
        differing = [i for i in range(len(holes[0])) if any(h[i] != holes[0][i] for h in holes)]
        if differing:
            reason = _obstacle(pieces, differing)
            if reason:
                plan.notes.append(f"{reason}; pieces {', '.join(str(p.index) for p in pieces[:6])} stay apart")
                continue
            lines += _lift(pieces, differing, fake)
    return lines


def _obstacle(pieces: list[Piece], differing: list[int]) -> str | None:
    """Why these constants cannot become inputs, or None."""
    for i in differing:
        node, at = pieces[0].spots[i]
        overload = overload_of(node.target)
        if overload is None:
            return f"{name_of(node.target)} has several overloads, so its constants stay in the graph"
        metas = {meta_key(value_of(piece.spots[i][0])) for piece in pieces if _plain(piece.spots[i][0])}
        if len(metas) > 1:
            return f"argument {_argument(overload, at)} of {name_of(node.target)} decides the shape of its result"
    if torch.is_grad_enabled() and any(wants_gradient(value_of(n)) for n in pieces[0].inputs):
        # The stand-in has no backward formula.
        return f"constant {_constant_at(pieces[0], differing[0])!r} is not lifted while gradients are wanted"
    return None


def _plain(node: Any) -> bool:
    return isinstance(value_of(node), torch.Tensor)


def _argument(overload: OpOverload, at: Any) -> str:
    return at if isinstance(at, str) else str(overload._schema.arguments[at].name)


def _lift(pieces: list[Piece], differing: list[int], fake: Callable[[torch.Tensor], Any]) -> list[str]:
    # One stand-in per node of the piece: {node's first spot: spots of the same node that are lifted}.
    by_node: dict[Any, list[int]] = {}
    for i in differing:
        by_node.setdefault(pieces[0].spots[i][0], []).append(i)
    lines: list[str] = []
    for spots in by_node.values():
        node = pieces[0].spots[spots[0]][0]
        overload = overload_of(node.target)
        if overload is None:
            continue
        names = tuple(_argument(overload, pieces[0].spots[i][1]) for i in spots)
        samples = tuple(_constant_at(pieces[0], i) for i in spots)
        target = stand_in(overload, names, samples)
        # One fake value per input of the first piece, the only one compiled: the same one twice would be an alias.
        fakes = [fake(handle(sample)) for sample in samples]
        for piece in pieces:
            given: dict[Any, Any] = {}
            for i, like in zip(spots, fakes, strict=True):
                lifted = Lifted(_constant_at(piece, i), like)
                piece.inputs.append(lifted)
                given[piece.spots[i][1]] = lifted
            piece.lifts[piece.spots[spots[0]][0]] = (target, given)
        lines.append(f"{', '.join(names)} of {name_of(node.target)} in {len(pieces)} pieces like {pieces[0].index}")
    for piece in pieces:
        body, ends, holes = piece.key
        piece.key = (body, ends, tuple(LIFTED if i in differing else h for i, h in enumerate(holes)))
    return lines


def _constant_at(piece: Piece, i: int) -> Any:
    node, at = piece.spots[i]
    return node.args[at] if isinstance(at, int) else node.kwargs[at]


def stand_in(op: OpOverload, names: tuple[str, ...], samples: tuple[Any, ...]) -> OpOverload:
    """An op like `op` whose arguments `names` are handles of constants. `samples` are constants its fake may use."""
    lifted = dict(zip(names, samples, strict=True))
    text = str(op._schema)
    signature = text[text.index("(") :]
    for name in names:
        signature = re.sub(rf"\b(?:str|SymInt|int|float|bool)\?? {name}\b(=[^,)]*)?", f"Tensor {name}", signature)
    # The sample is part of the name: an op may look its sample up for sizes, and those of another model are others.
    tail = hashlib.sha256(repr((text, names, samples)).encode()).hexdigest()[:12]
    qualname = f"opreg_lifted::{op._schema.name.replace('::', '_')}_{op._overloadname}_{tail}"
    if library.is_defined(qualname):
        return library.overload(qualname)
    made = library.define(qualname, signature, tuple(op.tags))

    def real(*args: Any, **kwargs: Any) -> Any:
        return _call(op, args, kwargs, lambda name, given: _TABLE[given.item()] if name in lifted else given)

    def fake(*args: Any, **kwargs: Any) -> Any:
        return _call(op, args, kwargs, lambda name, given: lifted.get(name, given))

    library.implement(qualname, real)
    library.fake(qualname, fake)
    return made


def _call(op: OpOverload, args: Any, kwargs: Any, change: Callable[[str, Any], Any]) -> Any:
    """Call `op` with every argument changed; arguments left at their default were not passed on, and are not here."""
    names = [a.name for a in op._schema.arguments]
    changed = [change(n, a) for n, a in zip(names, args, strict=False)]
    return op(*changed, **{n: change(n, a) for n, a in kwargs.items()})
