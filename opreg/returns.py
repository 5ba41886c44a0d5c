"""What a return annotation says: one value or several, each with its contract, and the NamedTuple that holds them."""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Any, Optional

import torch

from . import spellings
from .errors import SignatureError
from .spec import ReturnSpec

if TYPE_CHECKING:
    from .signature import Front

_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    Optional[torch.Tensor]: "Tensor?",  # noqa: UP045 - the form that hints are brought into
    list[torch.Tensor]: "Tensor[]",
    int: "SymInt",
    float: "float",
    bool: "bool",
}


def read(front: Front, hints: dict[str, Any]) -> tuple[tuple[ReturnSpec, ...], bool, type | None]:
    """The returned values, whether they come as a tuple, and the NamedTuple class if it is one."""
    if "return" not in hints:
        raise SignatureError(f"{front.name}: no return annotation; write '-> Tensor', or '-> None' if it only mutates")
    hint = hints["return"]
    if hint is type(None) or hint is None:
        return (), False, None
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        fields = _fields(front, hint)
        values = (
            _value(front, element, f"return.{field}", f" in field '{field}' of {hint.__name__}", field)
            for field, element in fields.items()
        )
        return tuple(values), True, hint
    if typing.get_origin(hint) is not tuple:
        return (_value(front, hint, "return", ""),), False, None
    elements = typing.get_args(hint)
    if Ellipsis in elements:
        raise SignatureError(f"{front.name}: returns a tuple of unknown length; write '-> list[Tensor]'")
    many = (_value(front, one, f"return[{index}]", f" in place {index}") for index, one in enumerate(elements))
    return tuple(many), True, None


def _fields(front: Front, made: Any) -> dict[str, Any]:
    """{field: annotation} of a NamedTuple class, in order."""
    hints = typing.get_type_hints(made, include_extras=True)
    for field in made._fields:
        if field not in hints:
            raise SignatureError(
                f"{front.name}: returns {made.__name__}, whose field '{field}' has no type; write "
                f"class {made.__name__}(NamedTuple) with '{field}: Tensor'"
            )
    if not made._fields:
        raise SignatureError(f"{front.name}: returns {made.__name__}, which has no fields; write '-> None'")
    return {field: hints[field] for field in made._fields}


_READ: dict[Any, ReturnSpec] = {}
"""What annotations of returned values say."""


def _value(front: Front, element: Any, parameter: str, place: str, name: str = "") -> ReturnSpec:
    try:
        known = _READ.get((element, name))
    except TypeError:  # an annotation that has no hash
        return _read_value(front, element, parameter, place, name)
    if known is None:
        known = _READ[element, name] = _read_value(front, element, parameter, place, name)
    return known


def _read_value(front: Front, element: Any, parameter: str, place: str, name: str) -> ReturnSpec:
    part = front.take_apart(parameter, element)
    if part.bare not in _TYPES or part.as_tuple:
        plain = isinstance(part.bare, type) and not typing.get_args(part.bare)  # list[int] is a type to Python 3.10
        shown = part.bare.__name__ if plain else part.bare
        raise SignatureError(
            f"{front.name}: returns {shown}{place}, which torch schemas lack; {spellings.of_return(part.bare)}"
        )
    return ReturnSpec(_TYPES[part.bare], part.shape, part.dtype, name)
