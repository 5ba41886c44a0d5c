"""opreg::kv_cache_update: write a step's K and V into the pages of a KV cache."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import from_jax, register_op

from .paged_attention_inputs import split_pages


@register_op("opreg::kv_cache_update", mutates_args=("kv_pages",))
def kv_cache_update(
    k: Annotated[Tensor, "t h d"],
    v: Annotated[Tensor, "t h d"],
    kv_pages: Annotated[Tensor, "_ _ _ d"],
    slot_mapping: Annotated[Tensor, "t"],
    *,
    kv_layout: str = "NHD",
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> None:
    """Write K and V of each token into its slot of a paged KV cache, quantising where the cache is 8 bits wide.

    cache[slot] = round(k / k_scale) (v likewise), held inside the range of an 8-bit cache; None means a scale of 1.

    k, v: float32, bfloat16 or float16, one row per token of the step.
    kv_pages: K of head h at 2h and V at 2h+1; "NHD" [pages, page_size, 2*h, d] or "HND" [pages, 2*h, page_size, d];
        float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8.
    slot_mapping: int32 or int64, page * page_size + offset of each token, -1 for padding rows, which are skipped.
        Slots are distinct: of two tokens with one slot, which one stays is not defined.

    Writes the named slots of kv_pages, and no other.
    Raises ValueError for sizes, dtypes or slots that cannot be, wherever values can be read.
    """
    ...


kv_cache_update.register_kernel(None, "opreg.kernels.reference.paged_attention:kv_cache_update", priority=-100)
kv_cache_update.register_kernel(None, "opreg.kernels.cpu.rpa_torch:kv_cache_update", priority=-50)
kv_cache_update.register_kernel(
    "cpu",
    "opreg.kernels.cpu.rpa_cpp_update:rpa_cpp_write",
    requires="c++",
    why_not="opreg.kernels.cpu.rpa_cpp_update:why_not_update",
)
kv_cache_update.register_kernel(
    ("xla", "tpu"), from_jax("opreg.kernels.pallas.rpa_xla:kv_cache_update", mutates_args="kv_pages"), requires="jax"
)
kv_cache_update.register_kernel(
    ("cuda", "xpu"),
    "opreg.kernels.triton.kv_cache_update:kv_cache_update",
    requires="triton",
    why_not="opreg.kernels.triton.kv_cache_update:why_not",
    priority=5,
)
kv_cache_update.register_sharding("h", others=split_pages)
for _dtype in (torch.float32, torch.bfloat16, torch.float16):
    kv_cache_update.tolerance(_dtype, 0.0, "numbers are copied, or rounded once to nearest even")


def slots_from_slices(slices: Tensor, num_slices: int, tokens: int) -> Tensor:
    """The slot mapping that says what the TPU operator's slices say.

    slices: int32 [3, n] of (first slot, first row, length), of which the first num_slices columns count.
    tokens: rows of k and v.
    Returns int64 [tokens], -1 for rows that no slice covers.
    Raises ValueError for a slice outside the rows.
    """
    slots = torch.full((tokens,), -1, dtype=torch.int64, device=slices.device)
    for cache_start, row, length in slices[:, :num_slices].t().tolist():
        if row < 0 or length < 0 or row + length > tokens:
            raise ValueError(
                f"slots_from_slices: slice ({cache_start}, {row}, {length}) covers rows {row} to {row + length - 1}, "
                f"but there are {tokens}; correct its start or length"
            )
        slots[row : row + length] = torch.arange(cache_start, cache_start + length, device=slices.device)
    return slots


@kv_cache_update.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    slots = torch.tensor([11, -1, 0, 5, 4, -1, 23], device=device)

    def new() -> Tensor:
        return torch.randn(7, 2, 16, generator=generator, device=generator.device).to(device=device, dtype=dtype)

    def call(kv_dtype: torch.dtype, kv_layout: str, **options: Any) -> dict[str, Any]:
        pages = torch.zeros((6, 4, 4, 16), dtype=kv_dtype, device=device)  # page_size and 2*h are both 4
        return {"k": new(), "v": new(), "kv_pages": pages, "slot_mapping": slots, "kv_layout": kv_layout, **options}

    yield call(dtype, "NHD")
    yield {**call(dtype, "HND"), "slot_mapping": slots.to(torch.int32)}
    yield call(torch.int8, "NHD", k_scale=0.03, v_scale=0.05)
    yield call(torch.bfloat16, "HND", k_scale=0.01, v_scale=2.0)
