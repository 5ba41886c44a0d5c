"""Keys of the JAX bridge: which arguments of a call are operands, and how the static ones are told apart.

1, 1.0 and True are three keys, 0.0 and -0.0 are two, and nan is found again.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from typing import Any

import torch

from .jax_bridge_arrays import JaxArgumentError, runtime

OPERAND = "<operand>"
"""Stands in a template and in a key for a leaf that is an array at run time."""

EXACT = frozenset((int, bool, str, bytes, type(None), type(...)))
"""Types whose equal values are one value: (type, value) tells them apart."""


def leaf_key(leaf: Any, label: str, treedef: Any, index: int) -> tuple[Any, Any]:
    """(part of the cache key, operand or None) for an argument that is no tensor."""
    run = runtime()
    if isinstance(leaf, run.jax.Array) and run.jax.dtypes.issubdtype(leaf.dtype, run.jax.dtypes.prng_key):
        return (OPERAND, str(run.jax.random.key_impl(leaf))), run.jax.random.key_data(leaf)
    if isinstance(leaf, (run.numpy.ndarray, run.numpy.generic, run.jax.Array)):
        return OPERAND, leaf
    key = static_key(leaf)
    if key is None:
        names = argument_names(treedef)
        kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
        raise JaxArgumentError(
            f"call_jax({label}): {names[index]} is a {kind}, neither an array nor a value that can be "
            "part of the cache key (None, bool, int, float, complex, str, bytes, enum, dtype, type, function, slice, "
            "frozen dataclass). Use it inside a function of your own instead of passing it, or register its class as a "
            "JAX pytree"
        )
    return key, None


def static_key(value: Any) -> Any:
    """A hashable key that tells 1 from 1.0 from True, 0.0 from -0.0, and finds nan again; None for what has none."""
    kind = type(value)
    if kind in EXACT or (kind is float and value and value == value):
        return (kind, value)
    if kind in (float, complex):
        return (kind, repr(value))
    if isinstance(value, (enum.Enum, torch.dtype, type, types.FunctionType, types.BuiltinFunctionType)):
        return (kind, value)
    if kind in (tuple, list):
        parts = [static_key(item) for item in value]
        return None if any(part is None for part in parts) else (kind, *parts)
    if kind in (slice, range):
        return (kind, *(static_key(part) for part in (value.start, value.stop, value.step)))
    if kind.__module__ == "numpy.dtypes" or kind.__qualname__ == "dtype":
        return (kind, str(value))
    if dataclasses.is_dataclass(value) and kind.__hash__ is not None:
        parts = [static_key(getattr(value, field.name)) for field in dataclasses.fields(value)]
        return None if any(part is None for part in parts) else (kind, *parts)
    return None


def argument_names(treedef: Any) -> list[str]:
    """'args[0]', 'kwargs['scale']', … for each leaf of an (args, kwargs) tree."""
    jax = runtime().jax
    paths = jax.tree_util.tree_flatten_with_path(treedef.unflatten(range(treedef.num_leaves)))[0]
    return [
        ("args", "kwargs")[path[0].idx] + jax.tree_util.keystr(path[1:])
        for path, _ in sorted(paths, key=lambda p: p[1])
    ]
