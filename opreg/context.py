"""Where a kernel finds its layer: forward_context(), current_layer() and the names that travel through graphs.

A layer name inside a graph is data, never a constant: a 0-d int64 CPU tensor whose value is a hash of the name. It
enters a graph as an input, so that identical layers give identical graphs, and its meaning does not depend on the
order in which layers were built or on the process. The same form works on every supported torch and inside nested
compile regions; torch's value-opaque objects (2.11 and later, private) do neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar, Token
from typing import Annotated, Any, Union, cast

import torch
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import _disable_current_modes

from . import _compat
from .errors import ContextError, RegistrationError, listing, nearest


class LayerNameMark:
    """What makes a parameter a layer name; put there by `LayerName`."""

    def __repr__(self) -> str:
        return "LayerName"


LayerName = Annotated[Union[str, torch.Tensor], LayerNameMark()]
"""Annotation of the parameter that names a layer. Callers pass a string; in graphs it is a handle (layer_handle)."""

_NAMES: dict[int, str] = {}
_NAME_ATTRIBUTE = "_opreg_layer_name"


class _Handles:
    """One attribute per layer name. An object, not a dict: Dynamo looks attributes up when it needs them, so a handle
    made while a graph is traced is found, and making one later invalidates no graph (a dict is guarded as a whole)."""


_HANDLES = _Handles()


def _number(name: str) -> int:
    """The value of a name's handle, from now on known in this process."""
    if not isinstance(name, str):
        raise TypeError(f"a layer is named by a string (or its handle), not by {type(name).__name__}: {name!r}")
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
    other = _NAMES.setdefault(number, name)
    if other != name:
        raise RegistrationError(f"layer names '{name}' and '{other}' have the same 64-bit hash; rename one of them")
    return number


def _handle_key(name: str) -> str:
    """The attribute of _HANDLES that holds the handle of `name`, made if new. Run for real while Dynamo traces."""
    number = _number(name)
    key = f"h{number & (2**64 - 1):016x}"
    if not hasattr(_HANDLES, key):
        # Outside any mode: under tracing a fresh tensor would be fake and die with the trace, and one made in inference
        # mode could not be written by graphs outside of it (a handle counts as written where its layer keeps state).
        with _disable_current_modes(), torch.inference_mode(False):
            handle = torch.tensor(number, dtype=torch.int64)
        # Compiled graphs hand on the very object they were given: reading this costs 0.06 us, .item() 0.4 us.
        setattr(handle, _NAME_ATTRIBUTE, name)
        setattr(_HANDLES, key, handle)
    return key


_compat.constant_under_dynamo(_handle_key)


def layer_handle(name: str | torch.Tensor) -> torch.Tensor:
    """The handle of a layer name: a 0-d int64 CPU tensor, the same object for the same name."""
    if isinstance(name, torch.Tensor):
        return name
    handle: torch.Tensor = getattr(_HANDLES, _handle_key(name))
    return handle


def handle_of_string(name: str, silent: str | None) -> torch.Tensor:
    """The handle of a name that was given to torch.ops as a string, where a compiler may be looking on.

    Compilers run such a call on fake tensors and refuse real ones that are no inputs, so under any dispatch mode the
    handle is computed, by an operator that they see. A handle made inside the graph keeps no call alive whose results
    nobody reads. silent: the op, if it has no results but its layer's state: its call would vanish.
    """
    if not _len_torch_dispatch_stack():
        return layer_handle(name)
    if silent is not None:
        raise ContextError(
            f"{silent}: torch.ops was called with the layer's name '{name}' under a compiler, which would remove the "
            "call, since it writes nothing but the layer's state; call the function that register_op returned"
        )
    return torch.full((), _number(name), dtype=torch.int64, device="cpu")


def layer_name(handle: str | torch.Tensor) -> str:
    """The name behind a handle (a string is returned as it is)."""
    if isinstance(handle, str):
        return handle
    known: str | None = getattr(handle, _NAME_ATTRIBUTE, None)
    if known is not None:
        return known
    number = int(handle.item())
    name = _NAMES.get(number)
    if name is None:
        raise ContextError(
            f"{number} is not the handle of a layer name known in this process; "
            "enter forward_context(layers={name: layer, ...}) with the layer's name before the call"
        )
    return name


# What is current: {name: (layer, metadata)} of one context, filled as layers are asked for, and under _CONTEXT the
# context itself. A plain dict: one with a __missing__ costs 10 ns more per look-up.
_CONTEXT = object()
_current: ContextVar[dict[Any, Any]] = ContextVar("opreg_forward_context", default={})  # noqa: B039 - never filled
_get, _set, _reset = _current.get, _current.set, _current.reset


def current_layer(layer_name: LayerName) -> tuple[Any, Any]:
    """(layer, metadata) of a layer in the innermost forward context; ContextError names what is missing."""
    try:
        return _get()[layer_name]  # type: ignore[no-any-return]
    except KeyError:
        pass
    return find_layer(layer_name)


def current_context() -> forward_context | None:
    """The innermost forward context."""
    return _get().get(_CONTEXT)


def find_layer(key: str | torch.Tensor) -> tuple[Any, Any]:
    """What current_layer gives, the first time that a context is asked for the layer."""
    name, table, context = layer_name(key), _get(), current_context()
    if name in table:
        return cast("tuple[Any, Any]", table[name])
    if context is None:
        raise ContextError(
            f"layer '{name}' was asked for outside any forward context; "
            "wrap the call in `with opreg.forward_context(layers={...}, metadata=...):`"
        )
    layers, metadata = context.layers, context.metadata
    if name not in layers:
        raise ContextError(
            f"no layer '{name}' in the forward context; it has {listing(layers)}.{nearest(name, layers)}"
        )
    if isinstance(metadata, Mapping):
        if name not in metadata:
            raise ContextError(
                f"the forward context's metadata has no entry for layer '{name}'; it has {listing(metadata)}."
                f"{nearest(name, metadata)} Pass metadata=None for a profiling run of all layers."
            )
        metadata = metadata[name]
    found = table[name] = (layers[name], metadata)
    return found


class forward_context:
    """Make layers and metadata findable by name for the calls inside the `with` block.

    layers: mapping from layer name to layer object (any object; usually the nn.Module).
    metadata: None (profiling run: mutated outputs of layer ops become zeros and no kernel runs), one object for all
        layers, or a mapping from layer name to object, in which every layer that is asked for must have an entry.

    Contexts nest and restore, and are separate per thread and per asyncio task. A context can be entered again after
    it was left, not while it is active.

        with opreg.forward_context(layers={"layers.0": layer}, metadata=metadata):
            model(tokens)
    """

    __slots__ = ("_token", "layers", "metadata")

    def __init__(self, *, layers: Mapping[str, Any], metadata: Any = None) -> None:
        if type(layers) is not dict and not isinstance(layers, Mapping):
            raise TypeError(f"forward_context: layers maps names to layer objects; got {type(layers).__name__}")
        self.layers = layers
        self.metadata = metadata
        self._token: Token[dict[Any, Any]] | None = None

    def __enter__(self) -> forward_context:
        if self._token is not None:
            raise RuntimeError("this forward_context is already active; make a new one for a nested call")
        self._token = _set({_CONTEXT: self})
        return self

    def __exit__(self, *exc: object) -> None:
        token = self._token
        if token is None:
            raise RuntimeError("this forward_context was left without having been entered")
        self._token = None
        _reset(token)
