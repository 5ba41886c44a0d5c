"""The table of ops: who registered what, look-up with suggestions, and third parties' ops through entry points."""

from __future__ import annotations

import threading
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from .errors import DuplicateOpError, UnknownOpError, listing, nearest

if TYPE_CHECKING:
    from .op import Op

GROUP = "opreg.ops"
"""Entry-point group: one line in a package's metadata makes its ops appear."""

_OPS: dict[str, Op] = {}
_LOCK = threading.RLock()
_LOADED: dict[str, BaseException | None] = {}


_generation = 0


def generation() -> int:
    """A number that changes whenever an op is added, or something that compiled graphs rely on is added to one."""
    return _generation


def touch() -> None:
    """Count a change, see `generation`."""
    global _generation
    with _LOCK:
        _generation += 1


def add(op: Op) -> Op:
    """Enter an op, or return the one that is there if it is the same declaration again (a module imported twice)."""
    with _LOCK:
        known = _OPS.setdefault(op.name, op)
    if known is op:
        touch()
        return op
    if known.declaration != op.declaration:
        raise DuplicateOpError(
            f"{op.name} is already registered at {known.spec.source} with {_differences(known, op)}; this one is at "
            f"{op.spec.source}. Choose another name, or remove one of the two"
        )
    return known


def _differences(known: Op, new: Op) -> str:
    if known.spec.schema != new.spec.schema:
        return f"schema {known.spec.schema} (this one: {new.spec.schema})"
    if known.spec.kind != new.spec.kind:
        return f"kind {known.spec.kind!r} (this one: {new.spec.kind!r})"
    return "another contract or body"


def all_ops() -> list[Op]:
    """Every registered op, by name."""
    with _LOCK:
        return [_OPS[name] for name in sorted(_OPS)]


def get(name: str) -> Op:
    """The op of a qualified name 'ns::op', or of a short name that only one namespace has."""
    with _LOCK:
        if name in _OPS:
            return _OPS[name]
        short = [op for op in _OPS.values() if op.name.split("::")[-1] == name]
    if len(short) == 1:
        return short[0]
    if short:
        raise UnknownOpError(f"'{name}' is ambiguous: {listing(op.name for op in short)}; write the namespace too")
    raise UnknownOpError(f"no op '{name}' is registered; registered are {listing(sorted(_OPS))}.{nearest(name, _OPS)}")


def packages() -> list[EntryPoint]:
    """Installed entry points of the group: opreg's own first, so that nobody takes its names, then by name."""
    return sorted(entry_points(group=GROUP), key=lambda point: (point.name != "opreg", point.name))


def load_packages() -> dict[str, BaseException | None]:
    """Import every installed op package once. {name: None or the exception}: one broken plug-in hides no other."""
    for point in packages():
        if point.name not in _LOADED:
            try:
                point.load()
            except (Exception, SystemExit) as error:  # a third party's module may raise anything; reported, never lost
                _LOADED[point.name] = error
            else:
                _LOADED[point.name] = None
    return dict(_LOADED)


def discard(op: Op) -> None:
    """Take an op out whose definition failed, so that a corrected one can be registered."""
    with _LOCK:
        if _OPS.get(op.name) is op:
            del _OPS[op.name]
