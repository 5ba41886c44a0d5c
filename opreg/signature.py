"""The front end: from a typed Python function to an OpSpec, or a message that names the parameter and the cure."""

from __future__ import annotations

import collections.abc
import dis
import enum
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Union

import torch

from . import consistency, hints, parameter_schema, returns, spellings
from .context import LayerNameMark
from .errors import RegistrationError, SignatureError, nearest
from .facts import Fact, replace
from .hints import Parameter
from .shapes import Shape, ShapeSyntaxError, parse
from .spec import KINDS, REQUIRED, STARTS, ArgSpec, Like, OpSpec, ReturnSpec

# A parameter with one of these names and a str or int type names a layer, and would bake it into the graph (HAZARDS 3).
_LAYER_NAMES = {"layer", "layer_name", "layer_id", "layer_idx", "layer_index", "layer_number", "layer_num", "prefix"}

_EMPTY = inspect.Parameter.empty


class Hint(Fact):
    """An annotation taken apart: the bare type for torch and what opreg reads from the metadata."""

    bare: Any
    shape: Shape | None = None
    dtype: torch.dtype | Like | None = None
    layer: bool = False
    choices: tuple[Any, ...] | None = None
    as_tuple: bool = False
    length: int | None = None


_TAKEN_APART: dict[Any, Hint] = {}
"""What is known of annotations: most parameters of a package have one of a few."""


class Front:
    """Reads one function. Every complaint starts with the op's name and the parameter."""

    def __init__(self, name: str, fn: Callable[..., Any]) -> None:
        self.name = name
        self.fn = fn
        self.parameters = hints.parameters(fn)

    def refuse(self, parameter: str, what: str, cure: str) -> SignatureError:
        return SignatureError(f"{self.name}: parameter '{parameter}' {what}; {cure}")

    def hints(self) -> dict[str, Any]:
        # Names of the enclosing function are visible to its annotations too, as they are to its body.
        cells = inspect.getclosurevars(self.fn).nonlocals if self.fn.__closure__ else {}
        try:
            return hints.type_hints(self.fn, dict(cells) or None)
        except NameError as error:
            raise SignatureError(
                f"{self.name}: an annotation names '{error.name}', which is not defined in module "
                f"'{self.fn.__module__}'; import it there at top level (annotations are read when the op is registered)"
            ) from error

    def take_apart(self, parameter: str, hint: Any) -> Hint:
        try:
            known = _TAKEN_APART.get(hint)
        except TypeError:  # an annotation that has no hash
            return self._take_apart(parameter, hint)
        if known is None:
            known = _TAKEN_APART[hint] = self._take_apart(parameter, hint)
        return known

    def _take_apart(self, parameter: str, hint: Any) -> Hint:
        if _is_jaxtyping(hint):
            return self._jaxtyping(parameter, hint)
        origin = typing.get_origin(hint)
        if origin is Annotated:
            return self._annotated(parameter, hint)
        if origin in (Union, types.UnionType):
            return self._union(parameter, hint)
        if origin is Literal:
            return self._literal(parameter, typing.get_args(hint))
        if origin in (list, collections.abc.Sequence):
            return self._list(parameter, typing.get_args(hint)[0])
        if origin is tuple or hint is tuple:
            return self._tuple(parameter, typing.get_args(hint))
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return self._enum(parameter, hint)
        return Hint(hint)

    def _list(self, parameter: str, element: Any) -> Hint:
        inner = self.take_apart(parameter, element)
        if inner.layer:
            raise self.refuse(parameter, "is a list of layer names", "pass one LayerName per parameter")
        if inner.choices is not None:
            cure = "write list[int]" if inner.bare is int else "write one str, split it"
            raise self.refuse(parameter, "is a list of choices", f"{cure} and look at the values inside")
        return replace(inner, bare=types.GenericAlias(list, (inner.bare,)))

    def _tuple(self, parameter: str, elements: tuple[Any, ...]) -> Hint:
        """A list of known length to torch; the body and the kernels get a tuple."""
        if not elements:
            raise self.refuse(parameter, "is a tuple of nobody knows what", "write tuple[int, int] or tuple[int, ...]")
        any_length = elements[-1] is Ellipsis
        if any(element != elements[0] for element in elements[: -1 if any_length else None]):
            raise self.refuse(
                parameter, "is a tuple of several types, which torch schemas lack", "write one parameter for each"
            )
        return replace(self._list(parameter, elements[0]), as_tuple=True, length=None if any_length else len(elements))

    def _annotated(self, parameter: str, hint: Any) -> Hint:
        base, *metadata = typing.get_args(hint)
        if any(isinstance(item, LayerNameMark) for item in metadata):
            return Hint(torch.Tensor, layer=True)
        found = self.take_apart(parameter, base)
        for item in metadata:
            if isinstance(item, str):
                found = replace(found, shape=self.contract(parameter, item))
            elif isinstance(item, (torch.dtype, Like)):
                found = replace(found, dtype=item)
        if (found.shape is not None or found.dtype is not None) and not _is_tensor_type(found.bare):
            raise self.refuse(parameter, f"has a shape contract but is not a tensor: {hint}", "annotate tensors only")
        return found

    def _union(self, parameter: str, hint: Any) -> Hint:
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if set(inner) == {int, float, bool}:
            return Hint(hint)  # the one union that torch has: a Scalar
        if len(inner) != 1 or len(inner) == len(typing.get_args(hint)):
            raise self.refuse(parameter, f"is a union: {hint}", spellings.of_union(typing.get_args(hint)))
        found = self.take_apart(parameter, inner[0])
        if found.layer:
            raise self.refuse(parameter, "is an optional layer name", "a layer op always names its layer")
        return replace(found, bare=typing.Optional[found.bare])  # noqa: UP045 - the form that infer_schema knows

    def _literal(self, parameter: str, values: tuple[Any, ...]) -> Hint:
        kinds = {type(value) for value in values}
        if len(kinds) != 1 or not kinds <= {str, int}:
            raise self.refuse(parameter, f"is Literal{list(values)}", "use literals that are all str or all int")
        return Hint(kinds.pop(), choices=values)

    def _enum(self, parameter: str, hint: type[enum.Enum]) -> Hint:
        values = tuple(member.value for member in hint)
        base = str if issubclass(hint, str) else int if issubclass(hint, int) else None
        if base is None:
            raise self.refuse(
                parameter,
                f"is the enum {hint.__name__}, whose members are not strings or integers",
                f"derive it from str or int, as in class {hint.__name__}(str, Enum)",
            )
        return Hint(base, choices=values)

    def _jaxtyping(self, parameter: str, hint: Any) -> Hint:
        found = self.take_apart(parameter, hint.array_type)
        text = " ".join(t.lstrip("#") if t != "#" else t for t in hint.dim_str.split())
        return replace(found, shape=self.contract(parameter, text))

    def contract(self, parameter: str, text: str) -> Shape:
        try:
            return parse(text)
        except ShapeSyntaxError as error:
            raise SignatureError(f"{self.name}: contract of '{parameter}': {error}") from None


def _is_jaxtyping(hint: Any) -> bool:
    return isinstance(hint, type) and all(hasattr(hint, a) for a in ("dim_str", "array_type", "dtypes"))


def _is_tensor_type(bare: Any) -> bool:
    tensors = list[torch.Tensor]
    return bare in (torch.Tensor, typing.Optional[torch.Tensor], tensors, typing.Optional[tensors])  # noqa: UP045


def _check_layer_name(front: Front, parameter: str, bare: Any) -> None:
    looks_like_layer = parameter in _LAYER_NAMES or parameter.endswith(("_layer_name", "_layer_idx", "_layer_id"))
    if looks_like_layer and bare in (str, int):
        raise front.refuse(
            parameter,
            f"names a layer as {bare.__name__}, which becomes a constant in every graph and makes like layers differ",
            f"write {parameter}: LayerName (from opreg); callers keep passing a string",
        )


def read_op(
    name: str,
    fn: Callable[..., Any],
    *,
    mutates_args: str | Iterable[str] | Mapping[str, str],
    kind: str | None,
    tags: tuple[torch.Tag, ...],
    schema: str | None,
) -> OpSpec:
    """Everything a typed function says about its op; SignatureError or RegistrationError where it cannot be an op."""
    front = Front(name, fn)
    starts = _starts(name, mutates_args)
    if kind is not None and kind not in KINDS:
        raise RegistrationError(f"{name}: kind={kind!r} is unknown; kinds are {', '.join(map(repr, KINDS))} or None")
    parameters = front.parameters
    for unknown in (m for m in starts if m not in parameters):
        raise RegistrationError(
            f"{name}: mutates_args names '{unknown}', which is no parameter; parameters are "
            f"{', '.join(parameters)}.{nearest(unknown, parameters)}"
        )
    evaluated = front.hints()
    args, written = [], []
    for parameter in parameters.values():
        arg, text = _known_parameter(front, parameter, evaluated, starts)
        args.append(arg)
        written.append(text)
    if len([arg for arg in args if arg.layer]) > 1:
        raise RegistrationError(f"{name}: more than one LayerName parameter; an op belongs to one layer")
    if kind == "attention" or starts:
        # A layer that is written to keeps a cache, as a rule; only an op that merely returns something may be pure.
        args = [replace(arg, mutated=arg.mutated or arg.layer) for arg in args]
    if starts:
        consistency.check_starts(name, args)
    results, returns_tuple, named = returns.read(front, evaluated)
    consistency.check_names(name, args, results)
    consistency.check_effect(name, args, results)
    return OpSpec(
        name=name,
        args=tuple(args),
        returns=results,
        returns_tuple=returns_tuple,
        schema=schema or _schema(args, written, results, returns_tuple),
        kind=kind,
        tags=tags,
        doc=fn.__doc__ or "",
        source=source_of(fn),
        has_body=not _is_declaration(fn),
        named=named,
    )


def _starts(name: str, mutates_args: str | Iterable[str] | Mapping[str, str]) -> dict[str, str | None]:
    """{argument: how it starts, or None where the author says nothing}."""
    if isinstance(mutates_args, str):
        return {mutates_args: None}
    if not isinstance(mutates_args, Mapping):
        return dict.fromkeys(mutates_args)
    for arg, start in mutates_args.items():
        if start not in STARTS:
            raise RegistrationError(
                f"{name}: mutates_args says that '{arg}' starts as {start!r}; it may be "
                f"{', '.join(map(repr, STARTS))}.{nearest(str(start), STARTS)}"
            )
    return dict(mutates_args)


_READ: dict[Any, tuple[ArgSpec, str]] = {}
"""What parameters say, by name, annotation, default and start: those of a package's ops are much the same."""


def _known_parameter(
    front: Front, parameter: Parameter, evaluated: dict[str, Any], starts: Mapping[str, str | None]
) -> tuple[ArgSpec, str]:
    """_read_parameter, 5 us the first time and 1 us when the like was read before."""
    name, kind, default = parameter
    # The repr tells 0.0 from -0.0 and (1,) from (True,), the annotation's type None from a missing one.
    given = None if default is _EMPTY else (type(default), repr(default))
    key = (name, kind, given, evaluated.get(name, Ellipsis), starts.get(name, Ellipsis))
    try:
        known = _READ.get(key)
    except TypeError:  # an annotation that has no hash
        return _read_parameter(front, parameter, evaluated, starts)
    if known is None:
        known = _READ[key] = _read_parameter(front, parameter, evaluated, starts)
    return known


def _read_parameter(
    front: Front, parameter: Parameter, evaluated: dict[str, Any], starts: Mapping[str, str | None]
) -> tuple[ArgSpec, str]:
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        raise front.refuse(parameter.name, "is *args or **kwargs", "a schema lists every argument by name and type")
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        raise front.refuse(parameter.name, "is positional-only", "remove the '/' from the signature")
    if parameter.name not in evaluated:
        raise front.refuse(parameter.name, "has no annotation", f"write {parameter.name}: Tensor (or its type)")
    hint = front.take_apart(parameter.name, evaluated[parameter.name])
    _check_layer_name(front, parameter.name, hint.bare)
    if isinstance(hint.dtype, Like):
        raise front.refuse(parameter.name, "is an input with like(...)", "like() belongs to outputs")
    if parameter.name in starts and not _is_tensor_type(hint.bare):
        raise front.refuse(parameter.name, f"is in mutates_args but is {hint.bare}", "only tensors can be mutated")
    default = REQUIRED if parameter.default is _EMPTY else parameter.default
    if isinstance(default, enum.Enum):
        default = default.value
    if hint.choices is not None and default is not REQUIRED and default is not None and default not in hint.choices:
        raise front.refuse(parameter.name, f"has default {default!r}", f"choose one of {list(hint.choices)}")
    written = parameter_schema.schema(front, parameter, hint, _EMPTY if default is REQUIRED else default)
    arg = ArgSpec(
        name=parameter.name,
        type=written.split(" ", 1)[0],
        shape=hint.shape,
        dtype=hint.dtype,
        default=default,
        keyword_only=parameter.kind is inspect.Parameter.KEYWORD_ONLY,
        mutated=parameter.name in starts,
        start=starts.get(parameter.name),
        layer=hint.layer,
        choices=hint.choices,
        as_tuple=hint.as_tuple,
        length=hint.length,
    )
    return arg, written


def _schema(args: list[ArgSpec], written: list[str], values: tuple[ReturnSpec, ...], many: bool) -> str:
    """The schema string '(Tensor(a0!) out, *, float eps=1e-6) -> Tensor'."""
    parts = []
    for index, (arg, text) in enumerate(zip(args, written, strict=True)):
        if arg.keyword_only and "*" not in parts:
            parts.append("*")
        parts.append(text.replace("Tensor", f"Tensor(a{index}!)", 1) if arg.mutated else text)
    results = ", ".join(f"{value.type} {value.name}".rstrip() for value in values)
    return f"({', '.join(parts)}) -> {results if len(values) == 1 and not many else f'({results})'}"


def source_of(fn: Callable[..., Any]) -> str:
    """'path/of/file.py:12' of a function, or its module where there is no file."""
    code = getattr(inspect.unwrap(fn) if hasattr(fn, "__wrapped__") else fn, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else str(getattr(fn, "__module__", "?"))


def _is_declaration(fn: Callable[..., Any]) -> bool:
    """Whether the body is only a docstring and '...': the op is declared, its reference is a kernel."""
    if fn.__code__.co_names:
        return False
    nothing = {"RESUME", "NOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE", "COPY_FREE_VARS"}
    return all(
        step.opname in nothing and (step.opname not in ("LOAD_CONST", "RETURN_CONST") or step.argval is None)
        for step in dis.get_instructions(fn)
    )
