"""What one call gave: its results, what it wrote, and the layer's state afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .compare import difference
from .samples import tensors_of


@dataclass
class Outcome:
    """`result` is what the call returned; results are its tensors."""

    result: Any
    written: list[torch.Tensor]
    state: list[torch.Tensor]

    @property
    def results(self) -> list[torch.Tensor]:
        return tensors_of(self.result)

    @property
    def all(self) -> list[torch.Tensor]:
        """Everything there is to compare, returned numbers as tensors of float64 or int64."""
        return [*_values(self.result), *self.written, *self.state]


def form(result: Any) -> str:
    """'(Tensor, None)', '(Tensor, (Tensor, Tensor))': what a caller unpacks, be it a tuple or a list."""
    if isinstance(result, torch.Tensor):
        return "Tensor"
    if isinstance(result, (list, tuple)):
        return f"({', '.join(form(one) for one in result)})"
    if isinstance(result, (bool, torch.SymBool)):
        return "bool"
    if isinstance(result, (int, torch.SymInt)):
        return "int"
    if isinstance(result, (float, torch.SymFloat)):
        return "float"
    return "None" if result is None else type(result).__name__


def differ(expected: Outcome, actual: Outcome, rms: float) -> str | None:
    """None, or how the second differs from the first: another form, or values off by more than `rms`."""
    one, other = form(expected.result), form(actual.result)
    return f"gives {other} instead of {one}" if one != other else difference(expected.all, actual.all, rms)


def _values(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for one in result:
            yield from _values(one)
    elif isinstance(result, (int, float)):
        yield torch.tensor(result, dtype=torch.float64 if isinstance(result, float) else torch.int64)
