"""What a compiler may specialise on in one value, as a token that values alike in it have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_STRIDED = torch.strided


def meta_key(value: Any) -> Any:
    """Dtype, device, sizes (symbols by name), strides and what else a compiler may specialise on, of one value."""
    if isinstance(value, torch.Tensor):
        return _tensor_key(value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return _size(value.node.expr) if isinstance(value, torch.SymInt) else (type(value), str(value.node.expr))
    return constant(value)


def fake_key(value: Any) -> Any:
    """meta_key of a plain FakeTensor, which is what nearly all values are."""
    if value._has_symbolic_sizes_strides or value.layout is not _STRIDED:
        return _tensor_key(value)
    offset = value.storage_offset()
    return FakeTensor, value.dtype, value.fake_device, value.shape, value.stride(), offset, value.requires_grad


def _tensor_key(value: Any) -> Any:
    kind: Any = type(value)
    if kind is not FakeTensor and is_traceable_wrapper_subclass(value):
        # What its own sizes do not tell, such as a DTensor's placements.
        names, context = value.__tensor_flatten__()
        try:
            hash(context)
        except TypeError:
            context = id(value)  # symbolic sizes in it: such a value is like no other
        kind = (kind, context, *((n, meta_key(getattr(value, n))) for n in names))
    if value.layout != torch.strided:
        return (kind, value.dtype, value.device, value.layout, _sizes(value.shape), value.requires_grad)
    shape, stride, (offset,) = (_sizes(s) for s in (value.shape, value.stride(), (value.storage_offset(),)))
    return (kind, value.dtype, value.device, shape, stride, offset, value.requires_grad)


def _sizes(sizes: Iterable[Any]) -> tuple[Any, ...]:
    return tuple([s if type(s) is int else _size(s.node.expr) for s in sizes])


def _size(expr: Any) -> Any:
    # A SymInt may hold a plain number; it means the same as the int.
    return int(expr) if expr.is_number else str(expr)


def symbols_in(value: Any) -> tuple[set[Any], set[Any]]:
    """Symbols that are a size by themselves, and all symbols in sizes and strides."""
    if isinstance(value, torch.Tensor):
        shape: Iterable[Any] = value.shape
        sizes = [s.node.expr for s in shape if isinstance(s, torch.SymInt)]
        if not sizes:
            return set(), set()
        strides = [s.node.expr for s in _strides(value) if isinstance(s, torch.SymInt)]
    elif isinstance(value, torch.SymInt):
        sizes, strides = [value.node.expr], []
    else:
        return set(), set()
    return {e for e in sizes if e.is_symbol}, set().union(*(e.free_symbols for e in sizes + strides))


def _strides(value: torch.Tensor) -> Iterable[Any]:
    return value.stride() if value.layout == torch.strided else ()


def constant(value: Any) -> Any:
    """A hashable token that is equal only for constants that mean the same."""
    kind = type(value)
    if kind in (bool, float, complex):
        return (kind, repr(value))
    if isinstance(value, torch.Tensor | torch.nn.Module):
        return (kind, id(value))
    try:
        hash(value)
    except TypeError:
        return (kind, id(value))
    return (kind, value)
