"""For types that a torch schema lacks: the spelling that works, in words that follow a semicolon in a message."""

from __future__ import annotations

import collections.abc
import types
import typing
from typing import Any

import torch

KNOWN = (
    "Tensor, int, float, bool, str, torch.dtype, torch.device, list[...] and tuple[...] of these, '... | None', Literal"
)

_INSTEAD: dict[Any, str] = {
    torch.nn.Parameter: "write Tensor; a Parameter may be passed",
    torch.SymInt: "write int, which also takes a symbolic size",
    torch.Size: "write tuple[int, ...], and pass x.shape",
    torch.layout: "leave it out: an op has one layout",
    torch.memory_format: "write Literal['contiguous', 'channels_last'], and choose inside",
    complex: "write two floats, or a complex Tensor",
    bytes: "write Tensor, of dtype torch.uint8",
    dict: "write one parameter per entry",
    list: "write what it is a list of: list[int], list[float], list[Tensor]",
    set: "write list[...] of what it holds",
    object: "write the one type that it has",
    Any: "write the one type that it has",
}
_INSTEAD_OF_ORIGIN: dict[Any, str] = {
    dict: _INSTEAD[dict],
    set: _INSTEAD[set],
    collections.abc.Callable: "write Literal[...] of the functions' names, and choose inside",
    collections.abc.Iterable: "write list[...] of what it gives",
}


def of_parameter(annotation: Any, default: Any) -> str:
    """What to write instead for a parameter; `default` is None where the fault may not lie there."""
    inner = _without_none(annotation)
    if inner in _INSTEAD:
        return _INSTEAD[inner]
    origin = typing.get_origin(inner)
    if origin in _INSTEAD_OF_ORIGIN:
        return _INSTEAD_OF_ORIGIN[origin]
    if origin is list and typing.get_args(inner) == (str,):
        return "write one str, and split it inside"
    if origin is list and isinstance(default, (list, tuple)):
        (element,) = typing.get_args(inner)
        return f"write tuple[{getattr(element, '__name__', element)}, ...] = {tuple(default)}"
    if isinstance(inner, typing.TypeVar):
        return "write the one type that it stands for"
    return f"use one of {KNOWN}, with a default of that type"


def of_union(members: tuple[Any, ...]) -> str:
    """What to write instead of a union."""
    known = set(members) - {type(None)}
    if known <= {int, float}:
        return "write float, which takes integers, too"
    if torch.Tensor in known and known <= {torch.Tensor, int, float, bool}:
        return "write Tensor and pass torch.tensor(number), or two parameters of which one is None"
    lists = {typing.get_args(one)[0] for one in known if typing.get_origin(one) in (list, collections.abc.Sequence)}
    if len(lists) == 1 and known - lists and len(known) == 2:
        (element,) = lists
        return f"write list[{getattr(element, '__name__', element)}] and pass a list of one"
    return "torch schemas know one type or 'type | None': write one parameter for each type, '... | None' each"


def of_return(annotation: Any) -> str:
    """What to return instead."""
    if _without_none(annotation) is not annotation:
        return "return a Tensor or None; None for a list is an empty one, for a number a value of its own"
    if annotation is torch.SymInt:
        return "write int"
    if typing.get_origin(annotation) is list:
        return "return a Tensor that holds them"
    return "return Tensor, Tensor | None, list[Tensor], int, float, bool, or a tuple or NamedTuple of these"


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    members = [one for one in typing.get_args(annotation) if one is not type(None)]
    return members[0] if len(members) == 1 else annotation
