"""Ragged paged attention and the cache update, one row and one head at a time: the truth for other kernels."""

import torch
from torch import Tensor

from .paged_attention_check import CacheShape, check_attention, check_update, check_update_attention, step_slots

OP = "opreg::ragged_paged_attention"
OP_LSE = "opreg::ragged_paged_attention_lse"
OP_UPDATE = "opreg::kv_cache_update"
OP_FUSED = "opreg::ragged_paged_attention_update"


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
    """Attention of every sequence's query rows over its pages, in float32; see opreg::ragged_paged_attention."""
    out, _ = attend(
        OP,
        q,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        mask_value=mask_value,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        sinks=sinks,
    )
    return out.to(q.dtype)


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
    out, lse = attend(
        OP_LSE,
        q,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        mask_value=mask_value,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        sinks=sinks,
    )
    return out.to(q.dtype), lse.to(torch.float32)


def attend(
    op: str,
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
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in `compute_dtype` (tests ask for float64); `op` is the name that errors start with."""
    cache, sequences = check_attention(
        op,
        q,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        mask_value=mask_value,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        sinks=sinks,
    )
    query_heads = q.shape[1]
    group = query_heads // cache.heads
    out = torch.zeros(q.shape, dtype=compute_dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=compute_dtype, device=q.device)
    for sequence in sequences:
        table = page_indices[sequence.place].tolist()
        keys, values = _read_tokens(kv_pages, cache, kv_layout, table, sequence.first_visible, sequence.kv_len)
        keys = keys.to(compute_dtype) * (1.0 if k_scale is None else k_scale)  # [visible tokens, kv heads, head_dim]
        values = values.to(compute_dtype) * (1.0 if v_scale is None else v_scale)
        for row in range(sequence.q_len):
            position = sequence.kv_len - sequence.q_len + row  # causal: the last row sees the whole sequence
            oldest = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen = slice(oldest - sequence.first_visible, position + 1 - sequence.first_visible)
            token = sequence.q_start + row
            for head in range(query_heads):
                query = q[token, head].to(compute_dtype)  # [head_dim]
                logits = (keys[seen, head // group] @ query) * sm_scale  # [seen tokens]
                if soft_cap is not None:
                    logits = soft_cap * torch.tanh(logits / soft_cap)
                if sinks is not None:  # a logit that takes weight and carries no value
                    logits = torch.cat([logits, sinks[head : head + 1].to(compute_dtype)])
                lse[token, head] = torch.logsumexp(logits, 0)
                weights = torch.exp(logits - lse[token, head])
                if sinks is not None:
                    weights = weights[:-1]
                out[token, head] = weights @ values[seen, head // group]
    return out, lse


def kv_cache_update(
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
    cache = check_update(OP_UPDATE, k, v, kv_pages, slot_mapping, kv_layout=kv_layout, k_scale=k_scale, v_scale=v_scale)
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, cache.page_size)
        for head in range(cache.heads):
            for place, new, scale in ((2 * head, k, k_scale), (2 * head + 1, v, v_scale)):
                where = kv_pages[page, offset, place] if kv_layout == "NHD" else kv_pages[page, place, offset]
                where.copy_(quantise(new[token, head], kv_pages.dtype, scale))


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
    """Write the step's K and V, then attend; see opreg::ragged_paged_attention_update."""
    check_update_attention(OP_FUSED, q, k, v, kv_pages, kv_layout)
    cache, sequences = check_attention(
        OP_FUSED,
        q,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        mask_value=mask_value,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        sinks=sinks,
    )
    slots = step_slots(q.shape[0], page_indices, cache.page_size, sequences).to(q.device)
    kv_cache_update(k, v, kv_pages, slots, kv_layout=kv_layout, k_scale=k_scale, v_scale=v_scale)
    return ragged_paged_attention(
        q,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        mask_value=mask_value,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        sinks=sinks,
    )


def quantise(x: Tensor, dtype: torch.dtype, scale: float | None) -> Tensor:
    """`x / scale` in `dtype`: rounded to nearest even and held inside the range of an 8-bit type."""
    if x.dtype == dtype and scale is None:
        return x
    scaled = x.to(torch.float32) / (1.0 if scale is None else scale)
    if dtype == torch.int8:
        return scaled.round().clamp(-128, 127).to(dtype)
    if dtype.itemsize == 1:
        # A cast alone makes NaN (e4m3fn) or infinity (e5m2) of what is out of range.
        largest = torch.finfo(dtype).max
        return scaled.clamp(-largest, largest).to(dtype)
    return scaled.to(dtype)


def _read_tokens(
    kv_pages: Tensor, cache: CacheShape, kv_layout: str, table: list[int], start: int, end: int
) -> tuple[Tensor, Tensor]:
    """K and V of the positions start to end of one sequence, [end - start, kv heads, head_dim] each."""
    tokens = []
    for position in range(start, end):
        page, offset = divmod(position, cache.page_size)
        rows = kv_pages[table[page]]
        tokens.append(rows[offset] if kv_layout == "NHD" else rows[:, offset])
    combined = torch.stack([token.to(torch.float32) for token in tokens])  # [tokens, 2*kv heads, head_dim]
    return combined[:, 0::2], combined[:, 1::2]
