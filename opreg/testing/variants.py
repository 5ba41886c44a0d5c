"""Calls made from other calls: the same values in other memory layouts, and other numbers of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from .. import fake
from ..errors import ContractError
from ..op import Op
from ..spec import ArgSpec
from .samples import Call, tensors_of

Layout = Callable[[torch.Tensor], torch.Tensor]


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Same values, the last two dims swapped in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor


def _sliced(tensor: torch.Tensor) -> torch.Tensor:
    """Same values, every second element of a buffer, from its second element on."""
    if tensor.dim() == 0:
        return tensor
    buffer = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]))
    buffer[..., 1::2] = tensor
    return buffer[..., 1::2]


def _odd(tensor: torch.Tensor) -> torch.Tensor:
    """Same values as a window of a wider buffer: odd strides, an offset, and memory of others beside each row."""
    if tensor.dim() == 0:
        return tensor
    buffer = tensor.new_zeros((*tensor.shape[:-1], tensor.shape[-1] + 3))
    buffer[..., 1:-2] = tensor
    return buffer[..., 1:-2]


LAYOUTS: dict[str, Layout] = {"transposed": _transposed, "sliced": _sliced, "odd strides": _odd}


def layouts(op: Op[Any, Any], call: Call, name: str, only: str | None = None) -> Call | None:
    """`call` with all its tensors (or only the argument `only`) in another layout; None if that changes nothing."""
    change = LAYOUTS[name]
    args, changed = [], False
    for arg, value in zip(op.spec.args, call.args, strict=True):
        if arg.layer or (only is not None and arg.name != only) or not tensors_of(value):
            args.append(value)
            continue
        new = _map(value, change)
        changed = changed or any(
            a.stride() != b.stride() or a.storage_offset() != b.storage_offset()
            for a, b in zip(tensors_of(new), tensors_of(value), strict=True)
        )
        args.append(new)
    label = f"{call.label}, {'all' if only is None else only} {name}"
    return replace(call, label=label, args=tuple(args), registered=False) if changed else None


def _map(value: Any, change: Layout) -> Any:
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            return change(value.detach()).requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    return value


def broadcast(op: Op[Any, Any], call: Call) -> Iterator[Call]:
    """`call` with one argument that is only read expanded from its first row (stride 0), for each such argument."""
    for index, (arg, value) in enumerate(zip(op.spec.args, call.args, strict=True)):
        if not isinstance(value, torch.Tensor) or arg.layer or arg.mutated or not value.is_floating_point():
            continue
        if value.dim() < 2 or value.shape[0] < 2:
            continue
        args = list(call.args)
        args[index] = value.detach()[:1].clone().expand_as(value)
        yield replace(call, label=f"{call.label}, {arg.name} broadcast", args=tuple(args), registered=False)


def rows(op: Op[Any, Any], call: Call, count: int) -> Iterator[Call]:
    """`call` cut to `count` rows, for each name that is some tensor's first dim; wherever the name occurs."""
    try:
        sizes = fake.bind(op.spec, call.args).sizes
    except ContractError:
        return
    for name in _leading(op):
        size = sizes.get(name)
        if isinstance(size, tuple):
            if not size or size[0] <= count:
                continue
            new: Any = (count, *size[1:])
        elif not isinstance(size, int) or size <= count or name in _integers(op):
            continue
        else:
            new = count
        args = [_cut(arg, value, {**sizes, name: new}) for arg, value in zip(op.spec.args, call.args, strict=True)]
        label = f"{call.label}, {name.lstrip('*')}={count}"
        yield replace(call, label=label, args=tuple(args), registered=False)


def _leading(op: Op[Any, Any]) -> list[str]:
    names = [arg.shape.dims[0].names[0] for arg in op.spec.args if arg.shape and arg.shape.dims and _plain(arg)]
    return list(dict.fromkeys(names))


def _plain(arg: ArgSpec) -> bool:
    return arg.shape is not None and arg.shape.dims[0].kind in ("name", "star") and bool(arg.shape.dims[0].names)


def _integers(op: Op[Any, Any]) -> set[str]:
    return {arg.name for arg in op.spec.args if arg.type in ("SymInt", "SymInt?")}


def options(op: Op[Any, Any], call: Call) -> Iterator[Call]:
    """`call` with one option changed: each flag and choice, and each number with a default where no inputs say more."""
    for index, (arg, value) in enumerate(zip(op.spec.args, call.args, strict=True)):
        if arg.default is _required() or arg.layer or tensors_of(value):
            continue
        others: tuple[Any, ...] = ()
        if arg.choices is not None:
            others = tuple(choice for choice in arg.choices if choice != value)
        elif isinstance(value, bool):
            others = (not value,)
        elif op.inputs is None and isinstance(value, float):
            others = (value * 0.5 + 0.25,)
        elif op.inputs is None and isinstance(value, int):
            others = (value + 1,)
        for other in others:
            args = (*call.args[:index], other, *call.args[index + 1 :])
            yield replace(call, label=f"{call.label}, {arg.name}={other!r}", args=args, registered=False)


def extremes(op: Op[Any, Any], call: Call) -> Iterator[Call]:
    """`call` with the first row of what is only read zero (padding), and with all of it a hundred times as large."""
    for what, edit in {"a row of zeros": _first_row_zero, "large values": _large}.items():
        args = tuple(
            value if arg.layer or arg.mutated else _map(value, edit)
            for arg, value in zip(op.spec.args, call.args, strict=True)
        )
        yield replace(call, label=f"{call.label}, {what}", args=args, registered=False)


def _large(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 100 if tensor.is_floating_point() else tensor


def _first_row_zero(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return tensor
    tensor = tensor.clone()
    tensor[:1] = 0
    return tensor


def _cut(arg: ArgSpec, value: Any, sizes: dict[str, Any]) -> Any:
    shape = arg.shape
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(arg, item, sizes) for item in value)
    if shape is None or not isinstance(value, torch.Tensor):
        return value
    cut, index = value.detach(), 0
    for dim in shape.dims:
        if dim.kind == "star":
            found = sizes[dim.names[0]] if dim.names else value.shape[index : value.dim() - len(shape.dims) + 1 + index]
            for size in found:
                cut, index = cut.narrow(index, 0, size), index + 1
            continue
        if dim.kind in ("name", "expr"):
            size = dim.size(sizes)
            if not 0 <= size <= cut.shape[index]:
                return value
            cut = cut.narrow(index, 0, size)
        index += 1
    return cut.clone().requires_grad_(value.requires_grad)


def from_contract(op: Op[Any, Any], device: str, dtype: torch.dtype, seed: int) -> Iterator[Call]:
    """Calls for an op without register_inputs, from its shape contract alone; nothing where a tensor has none.

    Names get small distinct sizes, floats are normal, integers are 0 or 1 (valid indices of nearly anything), optional
    arguments are once left out and once given. The last call is ragged: more rows than a block, a prime number of
    columns; an op that asks for even sizes need not take it.
    """
    generator = torch.Generator().manual_seed(seed)
    for round_, numbers in enumerate(((5, 4, 8, 3, 2, 6, 7), (3, 8, 4, 2, 6, 5, 9), (131, 13, 11, 7, 5, 3, 2))):
        args = _make(op, device, dtype, generator, round_ != 1, numbers)
        if args is None:
            return
        yield Call(f"input {round_}", args, certain=round_ < 2)


def _make(
    op: Op[Any, Any],
    device: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    optional: bool,
    numbers: tuple[int, ...],
) -> tuple[Any, ...] | None:
    sizes: dict[str, Any] = {}
    made: list[Any] = []

    def size_of(name: str) -> int:
        size: int = sizes.setdefault(name, numbers[len(sizes) % len(numbers)])
        return size

    for arg in op.spec.args:
        if arg.type in ("SymInt", "SymInt?", "int") and arg.default is _required() and arg.choices is None:
            sizes[arg.name] = numbers[len(sizes) % len(numbers)]
    for arg in op.spec.args:
        if arg.layer:
            return None
        if arg.type.startswith("Tensor") and not (arg.optional and not optional):
            shape: list[int] = []
            for dim in arg.shape.dims if arg.shape is not None else ():
                if dim.kind == "star":
                    shape.extend(sizes.setdefault(dim.names[0], (3, 2)) if dim.names else (2,))
                elif dim.kind == "any":
                    shape.append(4)
                else:
                    for name in dim.names:
                        size_of(name)
                    shape.append(dim.size(sizes))
            if arg.shape is None:
                shape = [4, 8]
            tensor = _values(shape, arg.dtype or dtype, generator).to(device)
            made.append(_many(arg, [tensor.clone() for _ in range(arg.length or 2)]) if arg.is_list else tensor)
        elif arg.default is not _required():
            made.append(arg.default)
        elif arg.choices is not None:
            made.append(arg.choices[0])
        else:
            seeded = torch.Generator(device).manual_seed(0) if arg.type == "Generator" else None
            known = {"SymInt": sizes.get(arg.name), "float": 0.5, "bool": True, "Generator": seeded}
            value = known.get(arg.type)
            if arg.is_list and not arg.optional:
                element = {**known, "SymInt": 1}.get(arg.type.partition("[")[0])
                value = None if element is None else _many(arg, [element] * (arg.length or 1))
            if value is None and not arg.optional:
                return None
            made.append(value)
    return tuple(made)


def _many(arg: ArgSpec, values: list[Any]) -> Any:
    return tuple(values) if arg.as_tuple else values


def _required() -> Any:
    from ..spec import REQUIRED

    return REQUIRED


def _values(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)
