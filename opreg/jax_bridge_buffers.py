"""Memory for small arguments on CPU: they are copied into memory that jax already knows.

A numpy view of a tensor and its hand-over to jax take 2.6 us an argument; a copy of some KiB into the memory behind a
JAX array that was made once takes 0.4 us. jax takes arrays to be constant, so a buffer belongs to one call at a time,
from the copy until the results are there, and a small result is copied out before another call may write.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from .jax_bridge_arrays import WIDE, runtime

LIMIT = 16 * 1024
"""Arguments of at most this many bytes are copied."""
_ALIGNMENT = 64  # what jax needs to use the memory of a numpy array as it is

# ctypes.memmove with nothing returned, for arguments that are ctypes values already: 0.2 us and not 0.33.
copy = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


class Buffers:
    """Memory for the arguments of one call: its addresses, and the numpy and JAX arrays that share it."""

    __slots__ = ("addresses", "arrays", "hosts")

    def __init__(self, specs: Sequence[tuple[torch.Size, torch.dtype]]) -> None:
        run = runtime()
        self.hosts = []
        for shape, dtype in specs:
            size = shape.numel() * dtype.itemsize
            raw = run.numpy.zeros(size + _ALIGNMENT, run.numpy.uint8)
            start = -raw.ctypes.data % _ALIGNMENT
            self.hosts.append(raw[start : start + size].view(run.to_numpy_dtype[dtype]).reshape(shape))
        self.addresses = [ctypes.c_void_p(host.ctypes.data) for host in self.hosts]
        # Without a device the arrays are uncommitted, as numpy arrays are: jax takes both for the same call.
        self.arrays = tuple(run.jax.device_put(host, may_alias=True) for host in self.hosts)

    def shared(self) -> bool:
        """Whether jax took the memory as it is; it may copy, and then nothing written later would reach it."""
        return [array.unsafe_buffer_pointer() for array in self.arrays] == [place.value for place in self.addresses]


def suit(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether each tensor is a few bytes in a row that are its values, and nothing else must be thought of."""
    return all(
        0 < tensor.nbytes <= LIMIT
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
        and not tensor.requires_grad
        and tensor.dtype not in WIDE
        for tensor in tensors
    )
