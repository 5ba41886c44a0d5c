"""Sum of rows by segment in Triton, for cuda and xpu: rows are ordered by segment, and a program sums one segment.

No atomics: the order of the sum follows from the ids alone, so that a second run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16
_MOST_COLUMNS = 256


@triton.jit
def segment_sum_rows(data, order, starts, out, stride, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[segment, a block of columns] = sum of data[order[i]] for i from starts[segment] to starts[segment + 1]."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    first = tl.load(starts + segment)
    last = tl.load(starts + segment + 1)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, ROWS):
        place = start + tl.arange(0, ROWS)
        row = tl.load(order + place, mask=place < last, other=0)
        mask = (place < last)[:, None] & inside[None, :]
        total += tl.load(data + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + segment * columns + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


def segment_sum(data: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """data [n, *d], segment_ids [n] -> [num_segments, *d], summed in fp32 and rounded once."""
    out = torch.empty(num_segments, *data.shape[1:], dtype=data.dtype, device=data.device)
    if out.numel() == 0:
        return out
    rows = data.resolve_neg().unsqueeze(-1).flatten(1)  # a negative view's memory holds other values
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    # Ids below 0 are ordered before the first segment and ids past the last one after it: neither is in a segment.
    ordered, order = segment_ids.to(torch.int64).sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_segments + 1, device=data.device))
    columns = rows.shape[1]
    block = min(triton.next_power_of_2(columns), _MOST_COLUMNS)
    grid = (num_segments, triton.cdiv(columns, block))
    segment_sum_rows[grid](rows, order, starts, out, rows.stride(0), columns, ROWS=_ROWS, COLUMNS=block)
    return out


def why_not(data: Tensor, segment_ids: Tensor, num_segments: int) -> str | None:
    """Integers, which the reference sums in their own type, and float64, whose sums would be rounded to fp32."""
    if data.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"wants float32, float16 or bfloat16, but data is {data.dtype}"
    return None
