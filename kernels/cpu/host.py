"""Functions of Python and torch for C++ that reads the arguments of a call itself (csrc/torch_tensor.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from . import build

_PYTHON = (
    "PyLong_AsLongLong",
    "PyLong_FromLong",
    "PyObject_IsTrue",
    "PyUnicode_AsUTF8AndSize",
    "PyObject_IsInstance",
    "PyErr_Occurred",
    "PyErr_Clear",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
)
_TORCH = tuple(f"aoti_torch_get_{what}" for what in ("data_ptr", "dim", "sizes", "strides", "dtype", "device_type"))
_Table = ctypes.c_void_p * (len(_PYTHON) + len(_TORCH) + 5)


@cache
def _table() -> ctypes.Array[ctypes.c_void_p]:
    """The fields of host::Table, in its order. BuildError where this torch or this Python has not all of them."""
    # Looking a name up in a library also looks in those that it was linked against: here, all of torch.
    torch_library = ctypes.CDLL(torch._C.__file__)
    try:
        functions = [getattr(ctypes.pythonapi, name) for name in _PYTHON] + [getattr(torch_library, n) for n in _TORCH]
    except AttributeError as e:
        raise build.BuildError(f"C++ cannot read the arguments of this Python and this torch: {e}") from None
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    return _Table(*addresses, id(None), id(torch.Tensor), _offset(), *_lazy())


def _offset() -> int:
    """Where in a tensor object its TensorImpl* is: the one place that agrees for all samples."""
    samples = (torch.empty(2), torch.nn.Parameter(torch.empty(2)), torch.empty(2)[1:])
    for at in range(object.__basicsize__, torch.Tensor.__basicsize__, 8):
        if all(ctypes.c_uint64.from_address(id(x) + at).value == x._cdata for x in samples):
            return at
    raise build.BuildError("the tensor objects of this torch hold no pointer to their TensorImpl")


def _lazy() -> tuple[int, int]:
    """Where in a TensorImpl its dispatch keys are, and the keys of views whose memory holds other values than they do:
    negative (torch._neg_view, the .imag of a conjugate) and conjugate ones.
    """

    def keys(x: torch.Tensor) -> int:
        number: int = torch._C._dispatch_keys(x).raw_repr()
        return number

    real, number = torch.empty(2), torch.empty(2, dtype=torch.complex64)
    samples = (real, torch._neg_view(real), number, number.conj(), torch.nn.Parameter(torch.empty(2)))
    for at in range(8, 256, 8):
        if all(ctypes.c_uint64.from_address(x._cdata + at).value == keys(x) for x in samples):
            return at, (keys(samples[0]) ^ keys(samples[1])) | (keys(samples[2]) ^ keys(samples[3]))
    raise build.BuildError("the tensors of this torch do not show their dispatch keys")


def function(method: Any, *more: int) -> Callable[..., int]:
    """The Python function that C++ describes: `method`, a function of a library, is given the table and `more`."""
    method.restype = ctypes.c_void_p
    method.argtypes = [ctypes.c_void_p] * (1 + len(more))
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.restype = ctypes.py_object
    make.argtypes = [ctypes.c_void_p] * 3
    made: Callable[..., int] = make(method(_table(), *more), None, None)
    return made
