"""What tests of Triton kernels in the interpreter share."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture
def products() -> Iterator[None]:
    """Products as hardware computes them: triton 3.7's interpreter multiplies float32 where TF32 is asked for,
    truncates in casts to bfloat16, and multiplies bit patterns of bfloat16.
    """

    def up(x: np.ndarray) -> np.ndarray:
        return (x.astype(np.uint32) << 16).view(np.float32)

    def down(x: np.ndarray) -> np.ndarray:
        rounded = torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.int16)
        return rounded.numpy().view(np.uint16).reshape(np.shape(x))

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def new_cast(self: InterpreterBuilder, x: TensorHandle, to: Any) -> TensorHandle:
        if (x.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):
            return TensorHandle(up(x.data), tl.float32)
        if (x.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(down(x.data), tl.bfloat16)
        return cast(self, x, to)

    def new_dot(self: InterpreterBuilder, a: Any, b: Any, c: Any, precision: Any, *rest: Any) -> TensorHandle:
        def operand(x: TensorHandle) -> TensorHandle:
            if x.dtype.scalar == tl.bfloat16:
                return TensorHandle(up(x.data), tl.float32)
            if x.dtype.scalar == tl.float32 and precision == INPUT_PRECISION.TF32:
                kept = np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)
                return TensorHandle(kept.view(np.float32), tl.float32)
            return x

        return dot(self, operand(a), operand(b), c, precision, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", new_cast)
        patch.setattr(InterpreterBuilder, "create_dot", new_dot)
        yield
