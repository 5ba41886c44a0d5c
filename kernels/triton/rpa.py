"""Ragged paged attention in Triton, for cuda and xpu: prefill, split-KV decode, and the update that attends.

Nothing here waits for the device: what to launch follows from shapes alone, so that calls can be captured in a CUDA
graph. Lengths and page numbers are therefore not checked; with TRITON_DEBUG=1 the kernels stop at the first wrong one.
"""

import torch
from torch import Tensor

from ..reference.paged_attention_check import CACHE_DTYPES, QUERY_DTYPES, check_call, check_update_attention
from .kv_cache_update import launch_step_write, why_not_cache
from .rpa_launch import (
    LARGEST_GROUP,
    LARGEST_GROUP_FLOAT32,
    LARGEST_HEAD_DIM,
    Options,
    dot_dtype,
    launch,
)

OP = "opreg::ragged_paged_attention"
OP_LSE = "opreg::ragged_paged_attention_lse"
OP_FUSED = "opreg::ragged_paged_attention_update"


def why_not(
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Tensor | None = None,
) -> str | None:
    """The reason why this call is not for the Triton kernel, or None."""
    return _why_not_attention(q, kv_pages, sm_scale, kv_layout)


def why_not_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Tensor | None = None,
) -> str | None:
    """The reason why this call is not for the Triton kernels, or None."""
    return _why_not_attention(q, kv_pages, sm_scale, kv_layout)


def _why_not_attention(q: Tensor, kv_pages: Tensor, sm_scale: float, kv_layout: str) -> str | None:
    if q.dtype not in QUERY_DTYPES or kv_pages.dtype not in CACHE_DTYPES or q.dim() != 3 or kv_pages.dim() != 4:
        return None  # a mistake: the kernel itself says what is wrong
    reason = why_not_cache(kv_pages)
    if reason is not None:
        return reason
    if q.shape[2] > LARGEST_HEAD_DIM:
        return f"head_dim is {q.shape[2]}; at most {LARGEST_HEAD_DIM}"
    group = q.shape[1] // max(1, kv_pages.shape[1 if kv_layout == "HND" else 2] // 2)
    dot = dot_dtype(q.dtype, kv_pages.dtype)
    most = LARGEST_GROUP_FLOAT32 if dot == torch.float32 else LARGEST_GROUP
    if group > most:
        return f"{group} query heads share a kv head; at most {most} where products are {dot}"
    if sm_scale <= 0.0:
        return f"sm_scale is {sm_scale}; the kernel folds a positive scale into the exponent"
    return None


def ragged_paged_attention(
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every sequence's query rows over its pages; see opreg::ragged_paged_attention."""
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout, sinks)
    batch = _contiguous(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)
    cache = check_call(OP, *batch, **options._asdict())
    return launch(*batch, options, cache, False)[0]


def ragged_paged_attention_lse(
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, with the log-sum-exp of each row; see opreg::ragged_paged_attention_lse."""
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout, sinks)
    batch = _contiguous(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)
    cache = check_call(OP_LSE, *batch, **options._asdict())
    return launch(*batch, options, cache, True)


def ragged_paged_attention_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Tensor | None = None,
) -> Tensor:
    """Write the step's K and V, then attend; see opreg::ragged_paged_attention_update.

    A launch of its own writes the cache. The attention comes after it on the same stream, so it reads what was written.
    """
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout, sinks)
    batch = _contiguous(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)
    check_update_attention(OP_FUSED, q, k, v, kv_pages, kv_layout)
    cache = check_call(OP_FUSED, *batch, **options._asdict())
    launch_step_write(k, v, *batch[1:], cache, kv_layout, k_scale, v_scale)
    return launch(*batch, options, cache, False)[0]


def _contiguous(
    q: Tensor, kv_pages: Tensor, kv_lens: Tensor, page_indices: Tensor, cu_q_lens: Tensor, num_seqs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments, copied where they are negative views, whose memory holds other values, and index tensors also
    where they are not contiguous (page_indices: along its rows)."""
    q, kv_lens, table, cu_q_lens, num_seqs = (x.resolve_neg() for x in (q, kv_lens, page_indices, cu_q_lens, num_seqs))
    table = table if table.dim() != 2 or table.stride(1) == 1 else table.contiguous()
    return q, kv_pages, kv_lens.contiguous(), table, cu_q_lens.contiguous(), num_seqs
