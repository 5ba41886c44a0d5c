"""Matrix products of consecutive groups of rows in Triton, for cuda and xpu: a program computes one tile of one group.

Which tile belongs to which group is worked out on the device, so that nothing waits for the group sizes: every group
may end with a part of a tile, hence at most cdiv(m, tile) + g tiles are started and those too many end at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64
_COLUMNS = 64
_DEPTH = 32


@triton.jit
def grouped_matmul_tiles(
    lhs,
    rhs,
    out,
    groups,
    firsts,
    ends,
    k,
    n,
    lhs_stride,
    rhs_group,
    rhs_row,
    rhs_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[rows of a tile, a block of columns] = lhs[these rows] @ rhs[the tile's group]; a group of -1 has no tile."""
    tile = tl.program_id(0)
    group = tl.load(groups + tile)
    if group >= 0:
        row = tl.load(firsts + tile) + tl.arange(0, ROWS)
        in_rows = row < tl.load(ends + tile)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        in_columns = column < n
        matrix = rhs + group.to(tl.int64) * rhs_group
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, k, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            in_depth = depth < k
            left = tl.load(
                lhs + row[:, None] * lhs_stride + depth[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0
            )
            right = tl.load(
                matrix + depth[:, None].to(tl.int64) * rhs_row + column[None, :] * rhs_column,
                mask=in_depth[:, None] & in_columns[None, :],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision="ieee")
        mask = in_rows[:, None] & in_columns[None, :]
        tl.store(out + row[:, None] * n + column[None, :], total.to(out.dtype.element_ty), mask=mask)


def grouped_matmul(lhs: Tensor, rhs: Tensor, group_sizes: Tensor) -> Tensor:
    """lhs [m, k], rhs [g, k, n], group_sizes [g] -> [m, n], summed in fp32; rows past the last group are zero."""
    (m, k), n, count = lhs.shape, rhs.shape[2], rhs.shape[0]
    out = torch.zeros(m, n, dtype=lhs.dtype, device=lhs.device)
    if not (m and n and k and count):
        return out
    lhs, rhs = lhs.resolve_neg(), rhs.resolve_neg()  # a negative view's memory holds other values
    if lhs.stride(1) != 1:
        lhs = lhs.contiguous()
    sizes = group_sizes.to(torch.int64)
    row_ends = sizes.cumsum(0)
    tile_ends = ((sizes + _ROWS - 1) // _ROWS).cumsum(0)
    tiles = triton.cdiv(m, _ROWS) + count
    tile = torch.arange(tiles, device=lhs.device)
    groups = torch.searchsorted(tile_ends, tile, right=True)
    owner = groups.clamp(max=count - 1)
    begin = torch.cat([tile_ends.new_zeros(1), tile_ends[:-1]])[owner]
    firsts = (row_ends - sizes)[owner] + (tile - begin) * _ROWS
    groups = torch.where(groups < count, groups, -1)
    grouped_matmul_tiles[(tiles, triton.cdiv(n, _COLUMNS))](
        lhs,
        rhs,
        out,
        groups,
        firsts,
        row_ends[owner],
        k,
        n,
        lhs.stride(0),
        *rhs.stride(),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
    )
    return out


def why_not(lhs: Tensor, rhs: Tensor, group_sizes: Tensor) -> str | None:
    """float64, whose sums would be rounded to fp32, and matrices of another dtype than the rows."""
    if lhs.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"wants float32, float16 or bfloat16, but lhs is {lhs.dtype}"
    if rhs.dtype is not lhs.dtype:
        return f"rhs is {rhs.dtype}, but lhs is {lhs.dtype}"
    return None
