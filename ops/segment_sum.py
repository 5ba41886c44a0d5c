"""opreg::segment_sum: rows summed by segment, as in pooling over a packed batch."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import from_jax, register_op


@register_op("opreg::segment_sum")
def segment_sum(
    data: Annotated[Tensor, "n *d"], segment_ids: Annotated[Tensor, "n"], num_segments: int
) -> Annotated[Tensor, "num_segments *d"]:
    """Sums of the rows of data that carry the same segment id.

    out[s] = sum of data[i] over all i with segment_ids[i] == s. Floats are summed in fp32 or wider and rounded once.
    segment_ids: integers in any order; a row with an id below 0 or from num_segments on is left out (padding).

    Raises ContractError where segment_ids has not one entry per row.
    """
    wide = torch.promote_types(data.dtype, torch.float32) if data.dtype.is_floating_point else data.dtype
    out = torch.zeros(num_segments, *data.shape[1:], dtype=wide, device=data.device)
    for segment in range(num_segments):
        out[segment] = data[segment_ids == segment].to(wide).sum(0)
    return out.to(data.dtype)


segment_sum.register_kernel("cpu", "opreg.kernels.cpu.segment_sum:segment_sum")
segment_sum.register_kernel(
    ("cuda", "xpu"),
    "opreg.kernels.triton.segment_sum:segment_sum",
    requires="triton",
    why_not="opreg.kernels.triton.segment_sum:why_not",
)
segment_sum.register_kernel(
    ("cpu", "xla", "tpu"), from_jax("opreg.kernels.pallas.segment_sum:segment_sum"), requires="jax", priority=-10
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    _, segment_ids, ctx.num_segments = inputs
    ctx.save_for_backward(segment_ids)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """Every row gets the gradient of its segment, a row that was left out gets zero."""
    (ids,) = ctx.saved_tensors
    inside = (ids >= 0) & (ids < ctx.num_segments)
    rows = grad.index_select(0, torch.where(inside, ids, 0))
    return rows * inside.view(-1, *(1,) * (rows.dim() - 1)), None, None


segment_sum.register_autograd(_backward, setup_context=_setup_context)


@segment_sum.register_vmap
def _vmap(
    info: Any, in_dims: tuple[int | None, ...], data: Tensor, segment_ids: Tensor, num_segments: int
) -> tuple[Tensor, int]:
    if in_dims[1] is None:
        return segment_sum(data.movedim(in_dims[0] or 0, 1), segment_ids, num_segments), 1
    # Each sample has segments of its own, numbered one after the other; what a sample leaves out stays left out.
    count = info.batch_size
    rows = data.expand(count, *data.shape) if in_dims[0] is None else data.movedim(in_dims[0], 0)
    ids = segment_ids.movedim(in_dims[1], 0)
    first = torch.arange(count, device=ids.device)[:, None] * num_segments
    ids = torch.where((ids >= 0) & (ids < num_segments), ids + first, -1)
    out = segment_sum(rows.flatten(0, 1), ids.flatten(), count * num_segments)
    return out.view(count, num_segments, *out.shape[1:]), 0


for _dtype, _rms in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
    segment_sum.tolerance(_dtype, _rms, "the order of the sum is free; one rounding to the dtype")


@segment_sum.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    for rows, columns, segments in ((37, 5, 4), (1, 8, 3), (0, 8, 3)):
        data = torch.randn(rows, columns, generator=generator).to(device, dtype)
        ids = torch.randint(-1, segments + 1, (rows,), generator=generator).to(device)
        yield {"data": data, "segment_ids": ids, "num_segments": segments}
