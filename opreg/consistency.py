"""Whether what a signature says fits together: layer names, starts, names of dims, and an effect that survives."""

from __future__ import annotations

from .errors import RegistrationError, nearest
from .spec import ArgSpec, Like, ReturnSpec


def check_starts(name: str, args: list[ArgSpec]) -> None:
    counted = any(arg.layer or (arg.name == "num_actual_tokens" and arg.type.startswith("SymInt")) for arg in args)
    for arg in args:
        if arg.start == "tail" and not counted:
            raise RegistrationError(
                f"{name}: '{arg.name}' starts as 'tail', but nothing says where the tail begins; give the op a "
                "LayerName (its metadata has num_actual_tokens) or a parameter num_actual_tokens: int"
            )
        if arg.layer and arg.start not in (None, "state"):
            raise RegistrationError(f"{name}: the layer '{arg.name}' can only start as 'state', not {arg.start!r}")


def check_names(name: str, args: list[ArgSpec], returns: tuple[ReturnSpec, ...]) -> None:
    """Every name of an output or an expression must be bound by an input before it is used."""
    facts: list[ArgSpec | ReturnSpec] = [*args, *returns]
    if not [fact for fact in facts if fact.shape is not None or fact.dtype is not None]:
        return  # as for most ops
    bound = {arg.name for arg in args if arg.type in ("SymInt", "int", "SymInt?")}
    for arg in args:
        for dim in arg.shape.dims if arg.shape else ():
            for used in (n for n in dim.names if dim.kind == "expr" and n not in bound):
                raise RegistrationError(
                    f"{name}: contract of '{arg.name}' computes with '{used}' before any earlier argument defines it"
                )
            bound.update(dim.names)
    tensors = [arg.name for arg in args if arg.is_tensor]
    for result in returns:
        for dim in result.shape.dims if result.shape else ():
            if dim.kind == "any" or (dim.kind == "star" and not dim.names):
                raise RegistrationError(
                    f"{name}: '{dim.text}' in the output's contract has no size; name the dimension"
                )
            for used in (n for n in dim.names if n not in bound):
                raise RegistrationError(
                    f"{name}: the output's dim '{used}' is defined by no input; inputs define {sorted(bound)}."
                    f"{nearest(used, bound)}"
                )
        if isinstance(result.dtype, Like) and result.dtype.name not in tensors:
            raise RegistrationError(
                f"{name}: like('{result.dtype.name}') names no tensor argument; there are {tensors}."
                f"{nearest(result.dtype.name, tensors)}"
            )


def check_effect(name: str, args: list[ArgSpec], returns: tuple[ReturnSpec, ...]) -> None:
    if not returns and not any(arg.mutated for arg in args):
        layer = next((arg.name for arg in args if arg.layer), None)
        written = f"mutates_args=('{layer}',) if it writes its layer's state" if layer else "mutates_args=(...)"
        raise RegistrationError(
            f"{name}: returns nothing and mutates nothing, so every compiler removes it; name what it writes in "
            f"{written}, or return a tensor that the caller uses"
        )
