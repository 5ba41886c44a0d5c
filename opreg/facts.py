"""The base class of frozen facts in the modules that `import opreg` loads.

To who uses one it is a frozen dataclass. But @dataclass writes and compiles methods for each class, 0.7 ms of import a
class and half of opreg's; here all classes share theirs.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, TypeVar

from typing_extensions import dataclass_transform

F = TypeVar("F", bound="Fact")

_set = object.__setattr__


@dataclass_transform(frozen_default=True)
class Fact:
    """A class whose annotated attributes are given at once, by place or by name, and never change.

    Equal to one of the same class with equal attributes. apart, a class keyword: attributes that do not count in that.
    """

    _names: ClassVar[tuple[str, ...]] = ()
    _compared: ClassVar[tuple[str, ...]] = ()
    _every: ClassVar[frozenset[str]] = frozenset()
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, apart: tuple[str, ...] = ()) -> None:
        own = tuple(inspect.get_annotations(cls))
        if own:
            cls._defaults = {name: cls.__dict__[name] for name in own if name in cls.__dict__}
            for name in cls._defaults:
                delattr(cls, name)  # an attribute is the instance's, or not there yet (later.py)
            cls._names, cls._every, cls._compared = (
                own,
                frozenset(own),
                tuple(name for name in own if name not in apart),
            )

    def __init__(self, *values: Any, **named: Any) -> None:
        if not values and named.keys() == self._every:  # a registration makes one of 11, 1.5 us faster so
            for name, value in named.items():
                _set(self, name, value)
            return
        names, defaults = self._names, self._defaults
        if len(values) > len(names):
            raise TypeError(f"{type(self).__name__} has {len(names)} attributes, not {len(values)}")
        for name, value in zip(names, values, strict=False):
            _set(self, name, value)
        for name in names[len(values) :]:
            if name in named:
                _set(self, name, named.pop(name))
            elif name in defaults:
                _set(self, name, defaults[name])
            else:
                raise TypeError(f"{type(self).__name__} needs '{name}'")
        if named:
            raise TypeError(f"{type(self).__name__}: unknown or given twice: {', '.join(named)}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"'{name}' of a {type(self).__name__} cannot change; make another with replace()")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"'{name}' of a {type(self).__name__} cannot be deleted")

    def _facts(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in self._compared])

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__ or not isinstance(other, Fact):
            return NotImplemented
        return self._facts() == other._facts()

    def __hash__(self) -> int:
        return hash(self._facts())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)
        return f"{type(self).__qualname__}({shown})"


def replace(fact: F, **changes: Any) -> F:
    """One with other values for some attributes."""
    return type(fact)(**{**{name: getattr(fact, name) for name in fact._names}, **changes})
