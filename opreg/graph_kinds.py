"""The kinds of a graph's inputs and values: numbers for what a compiler may specialise on."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch._subclasses import FakeTensor

from opreg.graph_meta import fake_key, meta_key
from opreg.graph_ops import value_of


class Kinds:
    """A number for the metadata of each value that goes into a piece, so that little is kept of a graph's many.

    `metas` has the metadata by number, `of` the numbers found so far, and `gradient` says whether any of the values
    wants a gradient."""

    def __init__(self, attribute: Callable[[str], Any]) -> None:
        self.metas: list[Any] = []
        self.of: dict[Any, int] = {}
        self.gradient = False
        self._numbers: dict[Any, int] = {}
        self._attribute = attribute

    def numbers(self, nodes: Iterable[Any], detached: Container[Any] = ()) -> tuple[int, ...]:
        """The kinds of `nodes`, of those in `detached` as they are without a gradient."""
        of, known = self.of, self._numbers
        found: list[int] = []
        for node in nodes:
            if detached and node in detached:
                found.append(self._number(meta_key(value_of(node).detach())))
                continue
            number = of.get(node)
            if number is None:
                value = node.meta.get("example_value")
                if value is None:
                    value = node.meta.get("val")
                if type(value) is FakeTensor:
                    meta = fake_key(value)
                    number = known.get(meta)
                    if number is None:
                        number = self._number(meta)
                        self.gradient = self.gradient or value.requires_grad
                else:
                    number = self._other(node)
                of[node] = number
            found.append(number)
        return tuple(found)

    def _number(self, meta: Any) -> int:
        found = self._numbers.get(meta)
        if found is None:
            found = self._numbers[meta] = len(self.metas)
            self.metas.append(meta)
        return found

    def _other(self, node: Any) -> int:
        value = value_of(node)
        self.gradient = self.gradient or wants_gradient(value)
        if value is None and node.op == "get_attr":
            value = self._attribute(node.target)
        return self._number(meta_key(value))


def wants_gradient(value: Any) -> bool:
    """Whether a value, or a part of it, wants a gradient."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    return isinstance(value, tuple | list) and any(wants_gradient(v) for v in value)
