"""Root-mean-square norm in Triton, for cuda and xpu: one program per row, the row read once and kept in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST = 65536
"""Longest row, in elements: more would not fit in one program's registers."""


@triton.jit
def rms_norm_rows(x, weight, y, stride, columns, eps, BLOCK: tl.constexpr):
    """y[row] = x[row] * rsqrt(mean(x[row]^2) + eps) * weight, sums and products in fp32."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(x + row * stride + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values * values, axis=0) / columns
    result = values * tl.rsqrt(mean + eps) * scale
    tl.store(y + row * columns + offsets, result.to(y.dtype.element_ty), mask=inside)


def warps(block: int) -> int:
    """One warp per 512 elements, so that a thread holds 16; at least 1, at most 16."""
    return min(max(block // 512, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [*n, d] with any strides (copied unless rows are evenly spaced and contiguous), weight [d]; the result is
    contiguous."""
    columns = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = x.resolve_neg().reshape(-1, columns)  # a negative view's memory holds other values
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    block = triton.next_power_of_2(columns)
    rms_norm_rows[(rows.shape[0],)](
        rows, weight.resolve_neg().contiguous(), y, rows.stride(0), columns, eps, BLOCK=block, num_warps=warps(block)
    )
    return y


def why_not(x: Tensor, weight: Tensor, eps: float = 1e-6) -> str | None:
    """Rows of more than 65,536 elements, and float64, whose sums this kernel would round to fp32."""
    if x.dtype == torch.float64:
        return "x is float64, and the kernel computes in float32"
    if x.shape[-1] > _MOST:
        return f"rows of {x.shape[-1]} elements; at most {_MOST}"
    return None
