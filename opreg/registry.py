"""The table of ops: who registered what, look-up with suggestions, and third parties' ops through entry points."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from . import library
from .errors import DuplicateOpError, RegistrationError, UnknownOpError, listing, nearest

if TYPE_CHECKING:
    from .op import Op

GROUP = "opreg.ops"
"""Entry-point group: one line in a package's metadata makes its ops appear."""

_OPS: dict[str, Op] = {}
recorded = library.RECORDED
_DEFERRED: ContextVar[bool] = ContextVar("opreg_deferred", default=False)
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


def qualify(name: str | None, fn: Callable[..., Any]) -> str:
    """The operator name that was given, checked, or "<top package>::<function>"."""
    if name is None:
        name = f"{fn.__module__.split('.')[0].strip('_') or 'main'}::{fn.__name__}"
    namespace, _, tail = name.partition("::")
    if not (tail.isidentifier() and namespace.isidentifier()):
        raise RegistrationError(f"'{name}' is no operator name; write 'namespace::name', both Python identifiers")
    return name


def add(op: Op) -> Op:
    """Enter an op, or return the one that is there if it is the same declaration again (a module imported twice)."""
    define(op.name)
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


@contextmanager
def deferred() -> Iterator[None]:
    """Let register_op record ops inside the `with` block and register each at its first use (deferred.py)."""
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


def is_deferred() -> bool:
    """Whether register_op is to record only."""
    return _DEFERRED.get()


def defined_ops() -> list[Op]:
    """Every op that torch knows: all but those that are deferred and unused."""
    with _LOCK:
        return [_OPS[name] for name in sorted(_OPS)]


def all_ops() -> list[Op]:
    """Every registered op, by name, deferred ones included, which are registered now."""
    for name in list(recorded):
        define(name)
    return defined_ops()


def get(name: str) -> Op:
    """The op of a qualified name 'ns::op', or of a short name that only one namespace has."""
    define(name)
    if name not in _OPS:
        with _LOCK:
            names = list({**_OPS, **recorded})
        short = [known for known in names if known.split("::")[-1] == name]
        if len(short) > 1:
            raise UnknownOpError(f"'{name}' is ambiguous: {listing(short)}; write the namespace too")
        if not short:
            raise UnknownOpError(
                f"no op '{name}' is registered; registered are {listing(sorted(names))}.{nearest(name, names)}"
            )
        name = short[0]
        define(name)
    return _OPS[name]


def packages() -> list[EntryPoint]:
    """Installed entry points of the group: opreg's own first, so that nobody takes its names, then by name."""
    return sorted(entry_points(group=GROUP), key=lambda point: (point.name != "opreg", point.name))


def load_packages(deferred: bool = False) -> dict[str, BaseException | None]:
    """Import every installed op package once. {name: None or the exception}: one broken plug-in hides no other.

    deferred: for a process that uses few of the ops: each is registered at its first use.
    """
    context = _DEFERRED.set(deferred)
    try:
        return _load_packages()
    finally:
        _DEFERRED.reset(context)


def _load_packages() -> dict[str, BaseException | None]:
    for point in packages():
        if point.name not in _LOADED:
            try:
                point.load()
            except (Exception, SystemExit) as error:  # a third party's module may raise anything; reported, never lost
                _LOADED[point.name] = error
            else:
                _LOADED[point.name] = None
    return dict(_LOADED)


def record(name: str, op: library.Recorded) -> bool:
    """Enter an op to be registered at its first use; False if the name is taken."""
    if name in _OPS or recorded.setdefault(name, op) is not op:  # one step to other threads
        return False
    namespace = name.partition("::")[0]
    if namespace not in library.WATCHED:
        library.watch(namespace)
    return True


def define(name: str) -> None:
    """Register the op of this name if it has only been recorded."""
    op = recorded.get(name)
    if op is not None:
        op.define()


def discard(op: Op) -> None:
    """Take an op out whose definition failed, so that a corrected one can be registered."""
    with _LOCK:
        if _OPS.get(op.name) is op:
            del _OPS[op.name]
