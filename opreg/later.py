"""Objects that are made when they are first looked at: what a registration need not pay for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")

_CLASSES: dict[type, type] = {}
_LOCK = threading.RLock()


def later(cls: type[T], make: Callable[[], T]) -> T:
    """An instance of `cls` that becomes what `make` returns, in place, when one of its attributes is first asked for.

    For classes whose instances keep everything in their __dict__. Until then `type()` of it is a subclass of `cls`.
    """
    made = object.__new__(_CLASSES.get(cls) or _awaiting(cls))
    made.__dict__["_opreg_make"] = make
    return cast(T, made)


def become(awaiting: Any, made: Any) -> None:
    """Let `awaiting` be what `made` is, which nobody else may hold."""
    awaiting.__dict__.update(made.__dict__)
    awaiting.__dict__.pop("_opreg_make", None)
    awaiting.__class__ = type(made)


def _awaiting(cls: type) -> type:
    def __getattr__(self: Any, name: str) -> Any:
        with _LOCK:
            make = self.__dict__.get("_opreg_make")
            if make is not None:
                made = make()
                if made is not self:  # `make` may have let it become by itself
                    become(self, made)
        return getattr(self, name)

    made = type(cls.__name__, (cls,), {"__getattr__": __getattr__, "__module__": cls.__module__})
    return _CLASSES.setdefault(cls, made)
