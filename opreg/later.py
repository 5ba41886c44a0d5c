"""Objects that are made when they are first looked at: what a registration need not pay for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_CLASSES: dict[type, type] = {}
_MAKE = "_opreg_make"
_new, _set = object.__new__, object.__setattr__
LOCK = threading.RLock()
"""Held while anything is made."""


def later(cls: type[T], make: Callable[[Any], T]) -> T:
    """An instance of `cls` that becomes what `make`, given the instance, returns, when an attribute is first asked for.

    For classes whose instances keep everything in their __dict__. Until then `type()` of it is a subclass of `cls`.
    `make` may fill the instance itself and return it. Its exception goes to who asked, and anew to who asks next.
    """
    made: Any = _new(_CLASSES.get(cls) or _awaiting(cls))
    _set(made, _MAKE, make)  # without the instance's __dict__, which Python makes when it is first asked for
    return made  # type: ignore[no-any-return]


def become(awaiting: Any, made: Any) -> None:
    """Let `awaiting` be what `made` is, which nobody else may hold."""
    awaiting.__dict__.pop(_MAKE, None)
    awaiting.__dict__.update(made.__dict__)
    _set(awaiting, "__class__", type(made))


def _awaiting(cls: Any) -> type:
    def look(self: Any) -> None:
        with LOCK:
            make = self.__dict__.pop(_MAKE, None)
            if make is None:
                return  # being made, or another thread has done it
            try:
                made = make(self)
            except BaseException:
                self.__dict__[_MAKE] = make
                raise
            if made is self:
                _set(self, "__class__", cls)
            else:
                become(self, made)

    def __getattr__(self: Any, name: str) -> Any:
        look(self)
        return object.__getattribute__(self, name)

    def __eq__(self: Any, other: object) -> Any:
        look(self)
        return cls.__eq__(self, other)

    def __hash__(self: Any) -> int:
        look(self)
        return int(cls.__hash__(self))

    methods = {"__getattr__": __getattr__, "__eq__": __eq__, "__hash__": __hash__, "__module__": cls.__module__}
    return _CLASSES.setdefault(cls, type(cls.__name__, (cls,), methods))
