"""Writing the KV cache in C++, alone and together with ragged paged attention."""

import torch
from torch import Tensor

from ..reference.paged_attention_check import (
    CacheShape,
    check_new_tokens,
    check_scales,
    check_update,
    check_update_attention,
)
from . import rpa_cpp, rpa_entry
from .rpa_cpp import TYPES, Options, WriteArgs, cache_strides

OP_UPDATE = "opreg::kv_cache_update"
OP_FUSED = "opreg::ragged_paged_attention_update"


def why_not_update(
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    *,
    kv_layout: str = "NHD",
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> str | None:
    """The reason why this cache cannot be written here, or None."""
    return rpa_cpp.why_not_cache(kv_pages)


def why_not_fused(
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
    """The reason why this call cannot run here, or None."""
    return rpa_cpp.why_not_cache(kv_pages)


def rpa_cpp_write(
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    *,
    kv_layout: str = "NHD",
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> None:
    """Write each token's K and V into its slot; see opreg::kv_cache_update."""
    if rpa_entry.write(k, v, kv_pages, slot_mapping, kv_layout, k_scale, v_scale):
        return
    check_scales(OP_UPDATE, k_scale, v_scale)
    cache = check_new_tokens(OP_UPDATE, k, v, kv_pages, kv_layout)
    k, v = _rows(k, v)
    # The slots' own checks are C++'s; what does not even look like slots goes to the checks in Python at once.
    wrong = slot_mapping.shape != k.shape[:1] or slot_mapping.dtype not in (torch.int32, torch.int64)
    if not wrong:
        slots = slot_mapping.to(torch.int64).contiguous()
        args = _write_args(k, v, kv_pages, cache, kv_layout, k_scale, v_scale)
        args.slots = slots.data_ptr()
        wrong = rpa_cpp.library(rpa_cpp.level()).rpa_write(args) != 0
    if wrong:
        check_update(OP_UPDATE, k, v, kv_pages, slot_mapping, kv_layout=kv_layout, k_scale=k_scale, v_scale=v_scale)
        raise RuntimeError(f"{OP_UPDATE}: the C++ kernel refused slots that pass every check; please report this call")


def rpa_cpp_fused(
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
    """Write the step's K and V, then attend, in one call; see opreg::ragged_paged_attention_update."""
    # fmt: off
    made: Tensor | None = rpa_entry.attend(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale, sliding_window, soft_cap, mask_value,
        k_scale, v_scale, kv_layout, sinks, False, k, v,
    )
    # fmt: on
    if made is not None:
        return made
    check_scales(OP_FUSED, k_scale, v_scale)
    check_update_attention(OP_FUSED, q, k, v, kv_pages, kv_layout)
    cache = check_new_tokens(OP_FUSED, k, v, kv_pages, kv_layout)
    k, v = _rows(k, v)
    step = _write_args(k, v, kv_pages, cache, kv_layout, k_scale, v_scale)
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout, sinks)
    arguments = (q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)
    return rpa_cpp.attend(OP_FUSED, *arguments, options, None, step=step)


def _rows(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype (float32 holds either exactly), rows contiguous."""
    k, v = k.resolve_neg(), v.resolve_neg()
    if k.dtype != v.dtype:
        k, v = k.to(torch.float32), v.to(torch.float32)
    return k if k.stride(2) == 1 else k.contiguous(), v if v.stride(2) == 1 else v.contiguous()


def _write_args(
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    cache: CacheShape,
    kv_layout: str,
    k_scale: float | None,
    v_scale: float | None,
) -> WriteArgs:
    page, position, head = cache_strides(kv_pages, kv_layout)
    return WriteArgs(
        k.data_ptr(),
        v.data_ptr(),
        kv_pages.data_ptr(),
        None,
        *k.stride()[:2],
        *v.stride()[:2],
        page,
        position,
        head,
        k.shape[0],
        cache.page_size,
        cache.pages * cache.page_size,
        cache.heads,
        cache.head_dim,
        TYPES[k.dtype],
        TYPES[kv_pages.dtype],
        torch.get_num_threads(),
        k_scale is not None,
        v_scale is not None,
        1.0 if k_scale is None else k_scale,
        1.0 if v_scale is None else v_scale,
    )
