"""A function's parameters and evaluated annotations, without what inspect and typing do for objects of other kinds.

The same as inspect.signature and typing.get_type_hints give, which take 30 us of a registration; here it is 5.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Parameter(NamedTuple):
    """What is read of an inspect.Parameter."""

    name: str
    kind: Any
    default: Any


_new = tuple.__new__  # what the class itself does, 0.2 us later
_PLACE, _KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
_OTHER_KINDS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def parameters(fn: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters by name, in order."""
    code = fn.__code__
    special = "__wrapped__" in fn.__dict__ or "__signature__" in fn.__dict__
    if type(fn) is not types.FunctionType or special or code.co_flags & _OTHER_KINDS or code.co_posonlyargcount:
        found = inspect.signature(fn).parameters
        return {name: Parameter(name, known.kind, known.default) for name, known in found.items()}
    count, names, empty = code.co_argcount, code.co_varnames, inspect.Parameter.empty
    given = fn.__defaults__ or ()
    defaults = (*(empty,) * (count - len(given)), *given)
    made = {name: _new(Parameter, (name, _PLACE, default)) for name, default in zip(names, defaults, strict=False)}
    for name in names[count : count + code.co_kwonlyargcount]:
        made[name] = Parameter(name, _KEYWORD, (fn.__kwdefaults__ or {}).get(name, empty))
    return made


_BUILTIN = {kind.__name__: kind for kind in (int, float, bool, str)}

# Annotations that mean what they are: typing.get_type_hints was seen to return them unchanged.
_SETTLED: set[Any] = {None, torch.Tensor, int, float, bool, str, torch.dtype, torch.device}


def type_hints(fn: Callable[..., Any], local: dict[str, Any] | None) -> dict[str, Any]:
    """The annotations by parameter, with text and forward references evaluated; `None` may stand for its type."""
    evaluated = {
        name: _evaluate(hint, fn.__globals__, local) if isinstance(hint, str) else hint
        for name, hint in fn.__annotations__.items()
    }
    try:
        if _SETTLED.issuperset(evaluated.values()):
            return evaluated
    except TypeError:  # an annotation that has no hash
        pass
    holder = types.SimpleNamespace(__globals__=fn.__globals__, __annotations__=evaluated)
    found = typing.get_type_hints(holder, localns=local, include_extras=True)
    for name, hint in found.items():
        if hint is evaluated[name]:
            _settle(hint)
    return found


def _settle(hint: Any) -> None:
    try:
        _SETTLED.add(hint)
    except TypeError:  # Annotated with something inside that has no hash
        return


def _evaluate(text: str, names: dict[str, Any], local: dict[str, Any] | None) -> Any:
    if local is None:  # most annotations are one name
        if text in names:
            return names[text]
        if text in _BUILTIN:
            return _BUILTIN[text]
    return eval(_parsed(text), names, local)


@functools.lru_cache(maxsize=1024)
def _parsed(annotation: str) -> types.CodeType:
    """The code of an annotation in text; typing would parse it for every function anew."""
    return compile(annotation, "<annotation>", "eval")
