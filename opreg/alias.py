"""Keeps what an op reads apart from what it writes where Inductor made them one.

`y = x.clone(); op(out=y, x)` with x an intermediate becomes `op(out=x, x)` under Inductor: the clone goes first, and
later nobody notices that the op reads x while it overwrites it (pytorch #198031). Here, when the call is lowered, a
read argument that shares memory with a written one is copied. The copy is made in the graph and only where the two do
share memory, so other calls cost nothing when they run. OPREG_ALIAS_GUARD=0 switches it off.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .op import Op


def enabled() -> bool:
    return os.environ.get("OPREG_ALIAS_GUARD", "") != "0"


def separate(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The lowered call's arguments, read ones copied where they overlap a written one. For Inductor's lowering."""
    specs = {arg.name: arg for arg in op.spec.args}
    if not op.spec.mutates or not enabled():
        return args, kwargs
    positional = [arg for arg in op.spec.args if not arg.keyword_only][: len(args)]
    named = {**{arg.name: value for arg, value in zip(positional, args, strict=True)}, **kwargs}
    written = [t for name, value in named.items() if specs[name].mutated for t in _boxes(value)]

    def apart(name: str, value: Any) -> Any:
        if specs[name].mutated:
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(apart(name, item) for item in value)
        if _boxes(value) and any(_overlap(value, other) for other in written):
            from torch._inductor import ir

            return ir.ExternKernel.copy_input(value)
        return value

    new = {name: apart(name, value) for name, value in named.items()}
    return tuple(new[arg.name] for arg in positional), {name: new[name] for name in kwargs}


def _boxes(value: Any) -> list[Any]:
    from torch._inductor import ir

    if isinstance(value, ir.TensorBox):
        return [value]
    return [box for item in value for box in _boxes(item)] if isinstance(value, (list, tuple)) else []


def _overlap(one: Any, other: Any) -> bool:
    """Whether two lowered tensors may have an element in common; True where it cannot be told."""
    one.realize()
    other.realize()
    if one.get_name() != other.get_name():
        return False
    a, b = one.maybe_get_layout(), other.maybe_get_layout()
    if a is None or b is None:
        return True
    facts = [(list(layout.size), list(layout.stride), layout.offset) for layout in (a, b)]
    if not all(_is_number(n) for size, stride, offset in facts for n in (*size, *stride, offset)):
        return True
    return not _disjoint(*facts[0], *facts[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or bool(getattr(value, "is_number", False))


def _disjoint(
    size: list[int], stride: list[int], offset: int, other_size: list[int], other_stride: list[int], other_offset: int
) -> bool:
    """Whether two strided windows of one buffer surely have no element in common.

    Either one ends before the other begins, or both are column blocks of one matrix: equal leading strides, and within
    a row one ends before the other begins (q, k and v split from one projection).
    """
    first, last = _extent(size, stride, offset)
    other_first, other_last = _extent(other_size, other_stride, other_offset)
    if last < other_first or other_last < first:
        return True
    if not stride or not other_stride or stride[0] != other_stride[0] or stride[0] <= 0:
        return False
    row = stride[0]
    begin, end = _extent(size[1:], stride[1:], offset % row)
    other_begin, other_end = _extent(other_size[1:], other_stride[1:], other_offset % row)
    return end < row and other_end < row and (end < other_begin or other_end < begin)


def _extent(size: list[int], stride: list[int], offset: int) -> tuple[int, int]:
    if 0 in size:
        return offset, offset - 1
    return offset, offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
