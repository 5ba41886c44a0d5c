"""HAZARDS 8, 12, 14: what an op returns and takes beyond single tensors: named, optional, counted, in tuples."""

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from opreg import register_op

from .case import Case


class Attended(NamedTuple):
    """An output and the log-sum-exp of its row."""

    out: Annotated[Tensor, "t d"]
    lse: Annotated[Tensor, "t"]


def _softmax(x: Tensor) -> Attended:
    lse = x.logsumexp(-1)
    return Attended((x - lse[:, None]).exp(), lse)


def fields_swapped(ns: str) -> Any:
    """The kernel returns the fields in the other order; of one column both have a number of elements in common."""
    op = fields_in_order(ns)
    op.register_kernel("cpu", swapped)
    return op


def swapped(x: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _softmax(x)
    return lse, out


def fields_in_order(ns: str) -> Any:
    @register_op(f"{ns}::softmax")
    def softmax(x: Annotated[Tensor, "t d"]) -> Attended:
        return _softmax(x)

    return softmax


def always_says_yes(ns: str) -> Any:
    """The weights come back only on request; the fake has them always."""
    op = says_when(ns)

    @op.register_fake
    def _(x: Tensor, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        return torch.empty_like(x), torch.empty_like(x)

    return op


def says_when(ns: str) -> Any:
    @register_op(f"{ns}::route")
    def route(x: Annotated[Tensor, "t d"], return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        weights = x.softmax(-1)
        return weights * x, weights if return_weights else None

    return route


def kernel_keeps_it_back(ns: str) -> Any:
    """The kernel forgets that the weights may be asked for."""
    op = says_when(ns)
    op.register_kernel("cpu", never)
    return op


def never(x: Tensor, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    return x.softmax(-1) * x, None


def counts_differently(ns: str) -> Any:
    """The kernel counts the padding, too."""
    op = counts(ns)
    op.register_kernel("cpu", with_padding)
    return op


def with_padding(x: Tensor, block: int = 4) -> tuple[Tensor, int]:
    return x.relu(), -(-x.shape[0] // block) * block


def counts(ns: str) -> Any:
    @register_op(f"{ns}::pack")
    def pack(x: Annotated[Tensor, "t d"], block: int = 4) -> tuple[Tensor, int]:
        return x.relu(), x.shape[0]

    return pack


# Unusual and right.


def fixed_tuples(ns: str) -> Any:
    """Tuples of numbers and of tensors, used as such: as a key, and unpacked."""

    @register_op(f"{ns}::rotate")
    def rotate(
        x: Annotated[Tensor, "t d"],
        cos_sin: Annotated[tuple[Tensor, Tensor], "t d"],
        scale: tuple[float, float] = (1.0, 1.0),
        order: tuple[int, ...] | None = None,
    ) -> Annotated[Tensor, "t d"]:
        cos, sin = cos_sin
        factor = {scale: scale[0] * scale[1]}[scale]
        return x * cos * factor + (sin if order is None else sin * len(order))

    return rotate


def optional_list(ns: str) -> Any:
    """Residuals that need not be there."""

    @register_op(f"{ns}::add_all")
    def add_all(
        x: Annotated[Tensor, "t d"], residuals: Annotated[list[Tensor], "t d"] | None = None
    ) -> Annotated[Tensor, "t d"]:
        return x.clone() if residuals is None else x + sum(residuals)

    return add_all


def optional_buffers(ns: str) -> Any:
    """Buffers that are written, if there are any."""

    @register_op(f"{ns}::keep", mutates_args={"buffers": "state"})
    def keep(x: Annotated[Tensor, "t d"], buffers: Annotated[list[Tensor] | None, "t d"] = None) -> None:
        for buffer in buffers or ():
            buffer.copy_(x)

    return keep


def optional_result(ns: str) -> Any:
    """One result, which may be None."""

    @register_op(f"{ns}::bias")
    def bias(x: Annotated[Tensor, "t d"], wanted: bool = True) -> Tensor | None:
        return x.mean(0) if wanted else None

    return bias


CASES = (
    Case(12, "fields in another order", "kernel results/swapped", fields_swapped, fields_in_order),
    Case(8, "fake of an optional result", "fake", always_says_yes, says_when),
    Case(12, "forgets an optional result", "kernel results/never", kernel_keeps_it_back, says_when),
    Case(12, "another number", "kernel results/with_padding", counts_differently, counts),
)

UNUSUAL = (fixed_tuples, optional_list, optional_buffers, optional_result)
