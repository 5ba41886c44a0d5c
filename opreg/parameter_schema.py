"""One parameter as a torch schema writes it: 'Tensor? bias=None', 'SymInt[2] size=[1, 1]'."""

from __future__ import annotations

import inspect
import typing
from typing import TYPE_CHECKING, Any

import torch

from . import library, spellings
from .facts import replace
from .hints import Parameter

if TYPE_CHECKING:
    from .signature import Front, Hint

_EMPTY = inspect.Parameter.empty
_GENERATORS = {torch.Generator: "Generator", typing.Optional[torch.Generator]: "Generator?"}  # noqa: UP045

# (annotation, type and text of the default): what torch makes of such a parameter, 30 us a question.
_ASKED: dict[Any, tuple[str, str]] = {}


def schema(front: Front, parameter: Parameter, hint: Hint, default: Any) -> str:
    """'Tensor? bias=None', 'SymInt n', ...; torch is asked for one parameter at a time so that the message is short."""
    bare = hint.bare
    if hint.as_tuple and default is not _EMPTY and default is not None:
        return _tuple_with_default(front, parameter, hint, default)
    if hint.length is not None:
        return schema(front, parameter, replace(hint, length=None), default).replace("[]", f"[{hint.length}]", 1)
    if bare == typing.Optional[list[torch.Tensor]] and default in (_EMPTY, None):  # noqa: UP045
        # Every torch has the type in schemas and knows it everywhere else; infer_schema does not.
        return f"Tensor[]? {parameter.name}{'' if default is _EMPTY else '=None'}"
    if bare in _GENERATORS and default in (_EMPTY, None):
        # Every torch has the type in schemas; infer_schema knows none, or from 2.13 on only one that is not optional.
        return f"{_GENERATORS[bare]} {parameter.name}{'' if default is _EMPTY else '=None'}"
    asked = (bare, type(default), repr(default))
    if asked in _ASKED:
        kind, rest = _ASKED[asked]
        return f"{kind} {parameter.name}{rest}"
    alone = inspect.Parameter(parameter.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=bare)
    try:
        _check_default(alone)
        inferred = library.infer_schema(inspect.Signature([alone], return_annotation=None), ())
    except (ValueError, TypeError):
        shown = "" if default is _EMPTY else f" and default {default!r}"
        raise front.refuse(
            parameter.name,
            f"has type {_show(bare)}{shown}, which torch schemas lack",
            spellings.of_parameter(bare, default),
        ) from None
    text = inferred[1 : inferred.rindex(") ->")]
    kind, _, rest = text.partition(" ")
    _ASKED[asked] = kind, rest.removeprefix(parameter.name)
    return text


def _tuple_with_default(front: Front, parameter: Parameter, hint: Hint, default: Any) -> str:
    """'SymInt[2] size=[1, 1]': infer_schema takes no default that is a sequence, the schema parser does."""
    text = schema(front, parameter, hint, _EMPTY)
    element = next(arg for arg in (typing.get_args(hint.bare)[0], hint.bare) if typing.get_origin(arg) is list)
    (kind,) = typing.get_args(element)
    allowed = {int: (int,), float: (int, float), bool: (bool,)}.get(kind, ())
    right = isinstance(default, tuple) and all(
        isinstance(one, allowed) and (kind is bool or not isinstance(one, bool)) for one in default
    )
    if not right or (hint.length is not None and len(default) != hint.length):
        many = "any number" if hint.length is None else hint.length
        raise front.refuse(
            parameter.name,
            f"has default {default!r}",
            f"give a tuple of {many} x {_show(kind)}" if allowed else "leave the default out, or write '... | None'",
        )
    return f"{text}=[{', '.join(str(kind(one)) for one in default)}]"


def _check_default(parameter: inspect.Parameter) -> None:
    """TypeError for a default of another type; neither infer_schema nor the schema parser looks (`int n="a"`)."""
    allowed = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
    inner = [arg for arg in typing.get_args(parameter.annotation) if arg is not type(None)] or [parameter.annotation]
    default = parameter.default
    if default is _EMPTY or default is None or inner[0] not in allowed or len(inner) > 1:
        return
    if not isinstance(default, allowed[inner[0]]) or (isinstance(default, bool) and inner[0] is not bool):
        raise TypeError(f"default {default!r} is no {inner[0].__name__}")


def _show(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
