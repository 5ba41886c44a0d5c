"""Tensors to JAX and back: the one place that imports jax, the dtype table, and what each dtype or layout costs.

On CPU an argument becomes a numpy view of the tensor (0.6 us; jax.dlpack.from_dlpack takes 30 us) and jax uses its
memory without a copy where it is aligned to 64 bytes and contiguous. A small result is copied out (0.3 us), a large one
is taken over through DLPack (about 6 us, no copy).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from .errors import KernelError, OpregError

COPY_LIMIT = 32 * 1024
"""Results of at most this many bytes are copied: 32 KiB take 1 us to copy and 6 us to hand over."""


class JaxArgumentError(OpregError, TypeError):
    """An argument or a result of a JAX function that cannot cross between torch and JAX."""


# A tensor type that numpy lacks is passed as the integers that it is stored in, and renamed on the other side.
STORED: dict[torch.dtype, tuple[torch.dtype, str]] = {
    torch.bfloat16: (torch.uint16, "bfloat16"),
    torch.float8_e4m3fn: (torch.uint8, "float8_e4m3fn"),
    torch.float8_e5m2: (torch.uint8, "float8_e5m2"),
    torch.float8_e4m3fnuz: (torch.uint8, "float8_e4m3fnuz"),
    torch.float8_e5m2fnuz: (torch.uint8, "float8_e5m2fnuz"),
}
_DIRECT = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bool,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
    torch.complex128,
)
WIDE = frozenset((torch.float64, torch.int64, torch.uint64, torch.complex128))
"""64-bit types: jax truncates them silently unless its x64 mode is on, so they switch it on for the call."""
PLAIN = frozenset((torch.float32, torch.float16, torch.bool, torch.int8, torch.int16, torch.int32, torch.uint8))
"""Types whose tensor.numpy() can be handed to jax as it is, with no thought of x64, conjugation or renaming."""


@dataclass(frozen=True, eq=False)
class Runtime:
    """What the bridge uses of jax, looked up once.

    leaf: the pytree of one array. cpu_default: false where jax would run on another device.
    """

    jax: Any
    export: Any
    numpy: Any
    array_type: type
    leaf: Any
    flatten: Callable[[Any], tuple[list[Any], Any]]
    enable_x64: Callable[[bool], AbstractContextManager[Any]]
    to_numpy_dtype: dict[torch.dtype, Any]
    to_torch_dtype: dict[Any, torch.dtype]
    inconclusive: type[Exception]
    dlpack_dtypes: frozenset[Any]
    cpu: Any
    cpu_default: bool


@functools.cache
def runtime() -> Runtime:
    """jax, imported at first need; KernelError with the command to type where it is not installed."""
    try:
        import jax
        import jax.export
        import jax.numpy as jnp
        import numpy
    except ModuleNotFoundError as missing:
        raise KernelError(
            f"opreg needs jax to run JAX functions, and importing it failed: {missing}. "
            "Install it with: pip install 'opreg[jax]'"
        ) from missing
    # jax.enable_x64 is the public name from jax 0.8; before that it lived in jax.experimental.
    enable_x64 = getattr(jax, "enable_x64", None)
    if not callable(enable_x64):
        enable_x64 = importlib.import_module("jax.experimental").enable_x64
    to_numpy = {dtype: numpy.dtype(str(dtype).removeprefix("torch.")) for dtype in _DIRECT}
    to_numpy.update({dtype: numpy.dtype(getattr(jnp, name)) for dtype, (_, name) in STORED.items()})
    cpu = jax.local_devices(backend="cpu")[0]
    return Runtime(
        jax=jax,
        export=jax.export,
        numpy=numpy,
        array_type=type(jax.device_put(numpy.zeros(1, numpy.int8), cpu)),
        leaf=jax.tree_util.tree_structure(0),
        flatten=jax.tree_util.tree_flatten,
        enable_x64=enable_x64,
        to_numpy_dtype=to_numpy,
        to_torch_dtype={numpy_dtype: dtype for dtype, numpy_dtype in to_numpy.items()},
        # jax.core before jax 0.8.
        inconclusive=getattr(jax.errors, "InconclusiveDimensionOperation", None)
        or importlib.import_module("jax.core").InconclusiveDimensionOperation,
        # 8-bit floats are not DLPack types on every version of the two sides.
        dlpack_dtypes=frozenset(to_numpy[dtype] for dtype in (*_DIRECT, torch.bfloat16)),
        cpu=cpu,
        cpu_default=jax.default_backend() == "cpu",
    )


def check_tensor(tensor: torch.Tensor, name: str, function: str) -> None:
    """JaxArgumentError unless the tensor's type and layout exist in JAX."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise JaxArgumentError(f"call_jax({function}): {name} is a {kind} tensor; JAX takes dense ones, see to_dense()")
    if tensor.dtype not in STORED and tensor.dtype not in _DIRECT:
        raise JaxArgumentError(
            f"call_jax({function}): {name} has dtype {tensor.dtype}, which has no JAX counterpart; convert it first. "
            f"JAX takes {', '.join(sorted(str(d).removeprefix('torch.') for d in (*_DIRECT, *STORED)))}"
        )


def numpy_view(tensor: torch.Tensor) -> Any:
    """A CPU tensor's memory as a numpy array (no copy unless the tensor is lazily conjugated or negated)."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    stored = STORED.get(tensor.dtype)
    if stored is None:
        return tensor.numpy()
    return tensor.view(stored[0]).numpy().view(runtime().to_numpy_dtype[tensor.dtype])


def torch_dtype(dtype: Any, function: str) -> torch.dtype:
    """The torch dtype of a JAX result; JaxArgumentError where torch has none."""
    found = runtime().to_torch_dtype.get(dtype)
    if found is None:
        cure = "return jax.random.key_data(key)" if "key<" in str(dtype) else "convert it in the function"
        raise JaxArgumentError(f"call_jax({function}): a result has dtype {dtype}, which torch lacks; {cure}")
    return found


def cpu_tensor(array: Any, function: str, keep: bool = False) -> torch.Tensor:
    """A CPU tensor with a JAX result's values, its own memory; waits for the result. keep: never take memory over."""
    run = runtime()
    dtype = torch_dtype(array.dtype, function)
    if array.nbytes > COPY_LIMIT and not keep and array.dtype in run.dlpack_dtypes:
        taken: torch.Tensor = from_dlpack(array)
        return taken
    # numpy.array waits, copies, and gives writable memory (numpy.asarray would be a read-only view).
    return _named(run.numpy.array(array), dtype)


def _named(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """torch.from_numpy for every dtype of the table."""
    stored = STORED.get(dtype)
    if stored is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(runtime().to_numpy_dtype[stored[0]])).view(dtype)


def from_foreign(value: Any, function: str) -> torch.Tensor:
    """A tensor of a numpy array, numpy scalar or jax array that was given as an argument."""
    run = runtime()
    if isinstance(value, run.jax.Array):
        return cpu_tensor(value, function, keep=True)
    array = run.numpy.asarray(value)
    dtype = run.to_torch_dtype.get(array.dtype)
    if dtype is None:
        raise JaxArgumentError(f"call_jax({function}): a numpy argument has dtype {array.dtype}, which JAX lacks")
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch has neither read-only tensors nor negative strides
    return _named(array, dtype)
