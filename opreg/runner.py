"""The per-device runner of an op: contract check, profiling run of a layer op, fills, kernel."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from . import context, fake, select, versions
from .errors import ContractError
from .shapes import Dim, Shape
from .spec import REQUIRED, ArgSpec, OpSpec

if TYPE_CHECKING:
    from .op import Op


def parameters(spec: OpSpec, defaults: dict[str, Any] | None = None) -> str:
    """'x, w, eps=_d_eps, *, k=_d_k' and the defaults' values put into `defaults`; without it 'x, w, eps, *, k'."""
    parts: list[str] = []
    for arg in spec.args:
        if arg.keyword_only and "*" not in parts:
            parts.append("*")
        if arg.default is REQUIRED or defaults is None:
            parts.append(arg.name)
        else:
            defaults[f"_d_{arg.name}"] = arg.default
            parts.append(f"{arg.name}=_d_{arg.name}")
    return ", ".join(parts)


def arguments(spec: OpSpec) -> str:
    """'x, w, eps, k=k': how the op's arguments are passed on."""
    return ", ".join(f"{arg.name}={arg.name}" if arg.keyword_only else arg.name for arg in spec.args)


def _compile(name: str, source: str, names: dict[str, Any], spec: OpSpec) -> FunctionType:
    namespace: dict[str, Any] = {**names, "_tuple": _tuple}
    exec(compile(source, f"<opreg {spec.name} {name}>", "exec"), namespace)
    fn: FunctionType = namespace[name]
    names["_globals"] = namespace
    return fn


def gather(spec: OpSpec, many: Callable[[tuple[Any, ...]], Any]) -> FunctionType:
    """A function with the op's signature that calls `many` with all arguments, in order, as one tuple."""
    names: dict[str, Any] = {"_many": many}
    everything = "".join(f"{arg.name}, " for arg in spec.args)
    lines = [*_to_tuples(spec), f"return _many(({everything}))"]
    source = f"def gather({parameters(spec, names)}):\n" + "".join(f"    {line}\n" for line in lines)
    return _compile("gather", source, names, spec)


def chooser(
    spec: OpSpec,
    choices: Sequence[tuple[Callable[..., str | None] | None, Callable[..., Any]]],
    chosen: Callable[[int], bool],
    refused: Callable[[int, str], None],
    nothing: Callable[[tuple[Any, ...]], Exception],
) -> FunctionType:
    """A function with the op's signature that calls the first kernel of `choices`, (predicate or None, kernel), whose
    predicate gives no reason against it. 0.1 us beside what the predicates take.

    chosen: told of a kernel before it is called, until it returns True. refused: told of a kernel's reasons, once each.
    nothing: the error for a call that no kernel takes.
    """
    names: dict[str, Any] = {"_refused": refused, "_nothing": nothing}
    lines = [*_to_tuples(spec)]
    for index, (predicate, kernel) in enumerate(choices):
        call = [f"if _new{index}: _chosen{index}()", f"return _kernel{index}({arguments(spec)})"]
        names.update({f"_new{index}": True, f"_chosen{index}": _until_known(names, index, chosen)})
        names[f"_kernel{index}"] = kernel
        if predicate is None:
            lines += call
            break
        names.update({f"_why{index}": predicate, f"_known{index}": set()})
        lines += [
            f"_refusal = _why{index}({arguments(spec)})",
            "if _refusal is None:",
            *(f"    {line}" for line in call),
            f"if _refusal not in _known{index}:",
            f"    _known{index}.add(_refusal)",
            f"    _refused({index}, _refusal)",
        ]
    else:
        lines.append(f"raise _nothing(({''.join(f'{arg.name}, ' for arg in spec.args)}))")
    source = f"def choose({parameters(spec, names)}):\n" + "".join(f"    {line}\n" for line in lines)
    return _compile("choose", source, names, spec)


def _until_known(names: dict[str, Any], index: int, chosen: Callable[[int], bool]) -> Callable[[], None]:
    def told() -> None:
        names["_globals"][f"_new{index}"] = not chosen(index)

    return told


def call_with(spec: OpSpec, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call `fn`, which has the op's signature, with all arguments given in order."""
    split = next((i for i, arg in enumerate(spec.args) if arg.keyword_only), len(args))
    keywords = {arg.name: value for arg, value in zip(spec.args[split:], args[split:], strict=True)}
    return fn(*args[:split], **keywords)


def _to_tuples(spec: OpSpec) -> list[str]:
    """Statements that turn the dispatcher's lists into the tuples that the signature speaks of."""
    return [
        f"if {f'{arg.name} is not None and ' if arg.optional else ''}type({arg.name}) is not tuple: "
        f"{arg.name} = _tuple({spec.name!r}, {arg.name!r}, {arg.name})"
        for arg in spec.args
        if arg.as_tuple
    ]


def _tuple(op: str, name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ContractError(f"{op}: {name} is {value!r}; it must be a tuple or a list")
    return tuple(value)


class _Checks:
    """Writes the statements that compare a call's sizes and dtypes with the contract and report a difference.

    About 0.1 us per tensor. It only decides; the sentence is worded by fake.bind, which knows the whole language.
    """

    def __init__(self, spec: OpSpec) -> None:
        self.fail = f"_mismatch(({''.join(f'{arg.name}, ' for arg in spec.args)}))"
        self.known = {arg.name: arg.name for arg in spec.args if arg.type == "SymInt"}
        self.maybe: set[str] = set()  # variables that hold None until an optional tensor gave them a size
        self.lines: list[str] = []
        # Optional tensors last, so that names which required ones define are certain to be defined.
        for arg in sorted(spec.args, key=lambda arg: arg.optional):
            self._argument(arg)

    def _argument(self, arg: ArgSpec) -> None:
        if arg.choices is not None:
            self.lines.append(f"if {arg.name} not in _c_{arg.name}: {self.fail}")
        if arg.length is not None:
            given = f"{arg.name} is not None and " if arg.optional else ""
            self.lines.append(f"if {given}len({arg.name}) != {arg.length}: {self.fail}")
        if (arg.shape is None and arg.dtype is None) or arg.type not in ("Tensor", "Tensor?"):
            return  # lists of tensors are compared at trace time and by `opreg check`
        own = [f"if {arg.name}.dtype is not _t_{arg.name}: {self.fail}"] if arg.dtype is not None else []
        before: list[str] = []
        if arg.shape is not None:
            own += self._shape(arg, arg.shape, before)
        if arg.optional:
            own = [*before, f"if {arg.name} is not None:", *(f"    {line}" for line in own)]
        self.lines += own

    def _shape(self, arg: ArgSpec, shape: Shape, before: list[str]) -> list[str]:
        sizes, rank, star = f"_s_{arg.name}", len(shape.dims), shape.star
        wrong_rank = f"len({sizes}) != {rank}" if star is None else f"len({sizes}) < {rank - 1}"
        lines = [f"{sizes} = {arg.name}.shape", f"if {wrong_rank}: {self.fail}"]
        for index, dim in enumerate(shape.dims):
            if star is None or index < star:
                size = f"{sizes}[{index}]"
            elif index == star:
                size = f"{sizes}[{star}:len({sizes}) - {rank - 1 - star}]"
            else:
                size = f"{sizes}[{index - rank}]"
            lines += self._dim(dim, size, arg.optional, before)
        return lines

    def _dim(self, dim: Dim, size: str, optional: bool, before: list[str]) -> list[str]:
        if dim.kind == "any" or (dim.kind == "star" and not dim.names):
            return []
        if dim.kind == "size":
            return [f"if {size} != {dim.text}: {self.fail}"]
        if dim.kind == "expr":
            if any(self.known[name] in self.maybe for name in dim.names):
                return []  # computed from an optional tensor's size; compared at trace time
            value = re.sub(r"[A-Za-z_]\w*", lambda found: self.known[found.group()], dim.text)
            return [f"if {size} != {value}: {self.fail}"]
        name = dim.names[0]
        if name not in self.known:
            variable = self.known[name] = f"_n{len(self.known)}"
            if not optional:
                return [f"{variable} = {size}"]
            before.append(f"{variable} = None")
            self.maybe.add(variable)
        variable = self.known[name]
        if variable in self.maybe:
            return [f"if {variable} is None: {variable} = {size}", f"elif {size} != {variable}: {self.fail}"]
        return [f"if {size} != {variable}: {self.fail}"]


def make_runner(op: Op, device_type: str, checked: bool = True) -> Callable[..., Any]:
    """What computes the op on one device: contract check, profiling run of a layer op, kernel. Only the kernel if that
    is all."""
    spec = op.spec
    kernel = select.runner(op, device_type)
    check = _Checks(spec).lines if checked else []
    fills = _fills(spec)
    tuples = _to_tuples(spec)
    contiguous = fake.fake_source(op) == "contract"
    noted = [arg for arg in spec.args if arg.mutated and not arg.layer] if checked else []
    if not (check or fills or tuples or contiguous or noted) and spec.layer_arg is None:
        return kernel
    names: dict[str, Any] = {"_kernel": kernel, "_current": context._get, "_find_layer": context.find_layer}
    names.update(
        {f"_c_{arg.name}": (*arg.choices, *((None,) if arg.optional else ())) for arg in spec.args if arg.choices}
    )
    names.update({f"_t_{arg.name}": arg.dtype for arg in spec.args if isinstance(arg.dtype, torch.dtype)})

    def mismatch(args: tuple[Any, ...]) -> None:
        fake.bind(spec, args)
        raise ContractError(
            f"{spec.name}: the arguments break the contract, but the full check finds no fault; "
            "this is a defect of opreg, please report it with the shapes of the call"
        )

    names["_mismatch"] = mismatch
    lines = [f"def run({parameters(spec, names)}):", *(f"    {line}" for line in [*tuples, *check])]
    if spec.layer_arg is not None:
        name = spec.layer_arg.name
        lines += [
            f"    if type({name}) is not str:",
            f"        {name} = _layer_name({name})",
            "    try:",
            f"        _metadata = _current()[{name}][1]",
            "    except KeyError:",
            f"        _metadata = _find_layer({name})[1]",
            "    if _metadata is None:",
        ]
        names["_layer_name"] = context.layer_name
        undefined = [arg for arg in spec.args if arg.mutated and not arg.layer and arg.start != "state"]
        lines += [f"        {_fill(arg, '')}" for arg in undefined]
        everything = "".join(f"{arg.name}, " for arg in spec.args)
        lines.append(f"        return _zeros(({everything}))" if spec.returns else "        return None")
        names["_zeros"] = functools.partial(_zero_outputs, op)
    lines += [f"    {line}" for line in fills]
    if noted:
        # A kernel that writes memory itself does not tell autograd, and a value that a backward needs would be
        # overwritten without its error. Compiled graphs see to that themselves, and without grad mode nothing is saved.
        lines.append(f"    {versions.count(noted, names)}")
    if contiguous and not spec.returns_tuple:
        # A kernel such as `x * 2` follows the strides of its input; compiled graphs rely on those that the contract's
        # fake gave (HAZARDS 8). 40 ns for the question; a copy only where they differ.
        lines += [
            f"    _made = _kernel({arguments(spec)})",
            "    return _made if _made.is_contiguous() else _copy(_made)",
        ]
        names["_copy"] = torch.Tensor.contiguous
    elif contiguous:
        lines.append(f"    return tuple([_copy(_made) for _made in _kernel({arguments(spec)})])")
        names["_copy"] = torch.Tensor.contiguous
    else:
        lines.append(f"    return _kernel({arguments(spec)})")
    return _compile("run", "\n".join(lines) + "\n", names, spec)


def _fill(arg: ArgSpec, rows: str) -> str:
    """'out[rows].zero_()' for one tensor, an optional one or a list."""
    if arg.is_list:
        return f"for _out in {arg.name}{' or ()' if arg.optional else ''}: _out{rows}.zero_()"
    return f"{f'if {arg.name} is not None: ' if arg.optional else ''}{arg.name}{rows}.zero_()"


def _fills(spec: OpSpec) -> list[str]:
    """What is zeroed before the kernel: arguments that start as "zeros", and of a "tail" the rows past the tokens."""
    lines = [_fill(arg, "") for arg in spec.args if arg.start == "zeros"]
    tails = [_fill(arg, "[_tokens:]") for arg in spec.args if arg.start == "tail"]
    if tails:
        given = any(arg.name == "num_actual_tokens" for arg in spec.args)
        lines.append("_tokens = num_actual_tokens" if given else "_tokens = _metadata.num_actual_tokens")
        lines.append("if _tokens is not None:")
        lines += [f"    {line}" for line in tails]
    return lines


def _zero_outputs(op: Op, args: tuple[Any, ...]) -> Any:
    """Outputs of a functional layer op in a profiling run: zeros of the shapes its fake gives."""
    made = op.call_with(fake.Fake(op), args)
    return tree_map_only(torch.Tensor, torch.Tensor.zero_, made)
