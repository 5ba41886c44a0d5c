"""The fake implementation against the real results, and under symbolic sizes: no guard, no size pinned to a number."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from .. import fake, select
from ..op import Op
from ..spec import ArgSpec
from . import process
from .audit import is_machinery, user_line
from .eager import describe
from .outcome import Outcome, form
from .samples import Call, tensors_of

log = logging.getLogger("opreg")

_DUNDER = {"__bool__", "__int__", "__index__", "__float__", "__len__"}


def check_fake(op: Op[Any, Any], call: Call, real: Outcome) -> str | None:
    """How the fake's outputs differ from the real results of the same call: form, shape, dtype, stride, device."""
    # Sizes are numbers, except those that the fake says depend on values (new_dynamic_size, nonzero).
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    args = _convert(call.fresh(), mode.from_tensor)
    try:
        with mode, torch.no_grad():
            made = op.call_with(op.overload, args)
    except Exception as error:  # a fake may raise anything; reported
        return f"the fake raises {describe(error)}, but the real call works"
    if form(made) != form(real.result):
        return f"the fake gives {form(made)}, the real call {form(real.result)}"
    fakes, results = tensors_of(made), real.results
    for index, (one, true) in enumerate(zip(fakes, results, strict=True)):
        name = "the fake's result" if len(fakes) == 1 else f"the fake's result {index}"
        if not _same_sizes(one.shape, true.shape):
            return f"{name} has shape {list(one.shape)}, the real one {list(true.shape)}"
        if one.dtype != true.dtype:
            return f"{name} has {one.dtype}, the real one {true.dtype}"
        if one.device.type != true.device.type:
            return f"{name} is on {one.device}, the real one on {true.device}"
        if true.numel() and not _same_sizes(_strides(one, true), _strides(true, true)):
            return (
                f"{name} has strides {list(one.stride())}, the real one {list(true.stride())} of shape "
                f"{list(true.shape)}; return .contiguous(), or register a fake that gives these strides"
            )
        if one.storage_offset() != true.storage_offset():
            return (
                f"{name} starts at offset {one.storage_offset()} of its memory, the real one at {true.storage_offset()}"
            )
    return None


def _same_sizes(fakes: Sequence[Any], reals: Sequence[int]) -> bool:
    """Whether sizes or strides are equal; one that depends on values (an unbacked symbol) is as the real one is."""
    if len(fakes) != len(reals):
        return False
    return all(not _is_number(one) or one == real for one, real in zip(fakes, reals, strict=True))


def _is_number(size: Any) -> bool:
    return not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None


def _strides(tensor: torch.Tensor, real: torch.Tensor) -> list[int]:
    """Strides of the dims that have one: with a single element nothing is ever stepped over."""
    return [stride for size, stride in zip(real.shape, tensor.stride(), strict=True) if size > 1]


def depends_on_values(op: Op[Any, Any], call: Call) -> bool:
    """Whether the fake says that a size of the result depends on values (new_dynamic_size)."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    args = _convert(call.args, mode.from_tensor)
    try:
        with process.kept(), mode, torch.no_grad():
            made = tensors_of(op.call_with(op.overload, args))
    except Exception as error:  # check_fake reports it
        log.debug("%s: the fake raises %s", op.name, error)
        return False
    return not all(_is_number(size) for tensor in made for size in tensor.shape)


def check_device(op: Op[Any, Any], call: Call) -> str | None:
    """Which result of an explicit fake stays on the CPU when the arguments are elsewhere.

    Fake tensors on "meta" stand for any other device: a build of torch may abort at the name of one it lacks.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)

    def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    if op.explicit_fake is None or op.spec.first_tensor is None:
        return None
    plain = _convert(call.args, lambda tensor: tensor)
    with process.kept(), mode, torch.no_grad():
        args = _convert(plain, elsewhere, detach=False)
        try:
            made = tensors_of(op.call_with(fake.Fake(op), args))
        except Exception as error:  # a fake may raise anything
            return _mixed(error)
        wrong = next((i for i, tensor in enumerate(made) if tensor.device.type == "cpu"), None)
        if wrong is not None:
            return (
                f"the fake's result {wrong} is on the CPU where the arguments are on another device; make it with "
                "x.new_empty(...) or device=x.device"
            )
    return None


def _mixed(error: Exception) -> str | None:
    if "two different devices" not in str(error) and "same device" not in str(error):
        return None
    return f"the fake mixes devices where the arguments are not on the CPU: {describe(error)}; use device=x.device"


def _convert(
    args: tuple[Any, ...], convert: Callable[[torch.Tensor], torch.Tensor], detach: bool = True
) -> tuple[Any, ...]:
    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return convert(value.detach() if detach else value)
        if isinstance(value, (list, tuple)):
            return type(value)(one(item) for item in value)
        return value

    return tuple(one(value) for value in args)


def row_dims(op: Op[Any, Any], args: tuple[Any, ...]) -> list[Any]:
    """Per argument: a list with True for each dim that counts rows (a list of such lists for a list of tensors).

    That is a contract name that is some tensor's first dim; without contracts, the first dim of every tensor that has
    as many rows as the first tensor.
    """
    leading = {
        arg.shape.dims[0].names[0]
        for arg in op.spec.args
        if arg.shape is not None and arg.shape.dims and arg.shape.dims[0].kind in ("name", "star") and arg.shape.names
        if arg.shape.dims[0].names
    }
    first = next(
        (v for a, v in zip(op.spec.args, args, strict=True) if a.is_tensor and v is not None and v.dim()), None
    )
    found: list[Any] = []

    def marks_of(arg: ArgSpec, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and tensors_of(value):
            return [marks_of(arg, item) for item in value]
        if not isinstance(value, torch.Tensor) or arg.layer:
            return None
        if arg.shape is None:
            rows = first is not None and value.dim() > 0 and value.shape[0] == first.shape[0]
            return [rows, *[False] * (value.dim() - 1)] if value.dim() else []
        marks: list[bool] = []
        for dim in arg.shape.dims:
            if dim.kind == "star":
                count = value.dim() - len(arg.shape.dims) + 1
                marks += [bool(dim.names) and dim.names[0] in leading] * count
            else:
                marks.append(dim.kind == "name" and dim.names[0] in leading)
        return marks

    for arg, value in zip(op.spec.args, args, strict=True):
        found.append(marks_of(arg, value))
    return found


def check_unbacked(op: Op[Any, Any], call: Call) -> str | None:
    """The author's line at which the fake asks for the value of a row count, which a compiled graph cannot know."""
    source = fake.fake_source(op)
    if source not in ("register_fake", "body"):
        return None
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    symbols: dict[Any, Any] = {}
    marks = row_dims(op, call.args)

    def convert(value: torch.Tensor, dims: list[bool], names: list[Any]) -> torch.Tensor:
        shape: list[Any] = []
        for size, is_row, name in zip(value.shape, dims, names, strict=True):
            if not is_row:
                shape.append(size)
                continue
            if name not in symbols:
                symbols[name] = env.create_unbacked_symint()
                torch._check(symbols[name] >= 2)
            shape.append(symbols[name])
        return torch.empty(shape, dtype=value.dtype, device=value.device)

    with process.kept(), mode, torch.no_grad():

        def symbolic(arg: ArgSpec, value: Any, dims: Any) -> Any:
            if dims is None:
                return _convert((value,), mode.from_tensor)[0]
            if isinstance(value, (list, tuple)):
                return type(value)(symbolic(arg, *pair) for pair in zip(value, dims, strict=True))
            return convert(value, dims, _names(arg, value))

        args = [symbolic(*triple) for triple in zip(op.spec.args, call.args, marks, strict=True)]
        try:
            op.call_with(fake.Fake(op), tuple(args))
        except Exception as error:  # the fake is the author's; what it raises is reported below
            return _guard(error, source)
    return None


def _names(arg: Any, value: torch.Tensor) -> list[Any]:
    """What tells two dims to be the same size: the contract's name, else the number itself."""
    if arg.shape is None:
        return list(value.shape)
    names: list[Any] = []
    for dim in arg.shape.dims:
        if dim.kind == "star":
            names += [f"{dim.names}[{i}]" for i in range(value.dim() - len(arg.shape.dims) + 1)]
        else:
            names.append(dim.text)
    return names


def _guard(error: BaseException, source: str) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    authors = [i for i, frame in enumerate(frames) if not is_machinery(frame.filename)]
    if not authors:
        return None
    following = frames[authors[-1] + 1 :]
    asked = bool(following) and following[0].name in _DUNDER
    if asked or (source == "register_fake" and "GuardOnDataDependent" in type(error).__name__):
        return (
            f"the fake needs the value of a symbolic size at {user_line(frames)}: each size compiles anew; "
            "compute with sizes without comparing or converting them, or state the condition with torch._check"
        )
    return None


def check_pinned(op: Op[Any, Any], fn: Callable[..., Any], call: Call, what: str) -> str | None:
    """The author's line at which a row count becomes one number, when `fn` runs over symbolic row counts.

    Only rows are symbolic: that a kernel wants one head size is its right, and pins that size.
    """
    env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=env)

    def symbolic(value: Any, rows: Any, name: str) -> Any:
        if rows is None:
            return _convert((value,), mode.from_tensor)[0]
        if isinstance(value, (list, tuple)):
            pairs = enumerate(zip(value, rows, strict=True))
            return type(value)(symbolic(item, marks, f"{name}_{i}") for i, (item, marks) in pairs)
        sizes = [
            DimDynamic.DYNAMIC if row and size > 1 else DimDynamic.STATIC
            for size, row in zip(value.shape, rows, strict=True)
        ]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(value.detach(), symbolic_context=context, source=ConstantSource(name))

    pairs = enumerate(zip(call.args, row_dims(op, call.args), strict=True))
    args = [symbolic(value, rows, f"a{index}") for index, (value, rows) in pairs]
    try:
        with process.kept(), mode, torch.no_grad():
            op.call_with(fn, tuple(args))
    except Exception as error:  # other checks report what fails; here only guards are looked at
        log.debug("%s: %s over symbolic sizes: %s", op.name, what, error)
    for guard in env.guards:
        expression = guard.expr
        if not isinstance(expression, sympy.Eq):
            continue
        sides = expression.args
        if any(side.is_number for side in sides) and any(side.is_Symbol for side in sides):
            location: Any = guard.sloc.framework_loc
            where = "an unknown line" if location is None else user_line(traceback.StackSummary.from_list([location]))
            return (
                f"{what} turns a symbolic size into the number {sides[1]} at {where}: each size compiles anew; "
                "compute with the size itself (no int(), no range() over it)"
            )
    return None


def predicates(op: Op[Any, Any], device: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(kernel name, why_not) of the kernels that are for a device and installed, if it looks at calls."""
    for kernel in select.candidates(op, device):
        predicate = select.load_predicate(op, kernel)
        if predicate is not None and not select.asked_once(predicate):
            yield kernel.name, predicate
