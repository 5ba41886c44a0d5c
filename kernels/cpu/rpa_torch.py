"""Ragged paged attention in vectorised torch, for any device: float32, sequences of like size in one batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.paged_attention_check import (
    CacheShape,
    Sequence,
    check_attention,
    check_update,
    check_update_attention,
    step_slots,
)

OP = "opreg::ragged_paged_attention"
OP_LSE = "opreg::ragged_paged_attention_lse"
OP_UPDATE = "opreg::kv_cache_update"
OP_FUSED = "opreg::ragged_paged_attention_update"

# Sequences with at most this many query rows are batched with others of like size; longer ones fill the machine alone.
GROUPED_ROWS = 16
# Most float32 scores held at once (64 MiB): long prompts are cut into blocks of query rows.
SCORES_AT_ONCE = 1 << 24


class _Options(NamedTuple):
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    v_scale: float
    kv_layout: str
    sinks: Tensor | None


def rpa_torch(
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
    cache, sequences = check_attention(
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
    options = _options(sm_scale, sliding_window, soft_cap, k_scale, v_scale, kv_layout, sinks)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    _attend(out, None, q, kv_pages, page_indices, cache, sequences, options)
    return out


def rpa_torch_lse(
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
    cache, sequences = check_attention(
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
    options = _options(sm_scale, sliding_window, soft_cap, k_scale, v_scale, kv_layout, sinks)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    _attend(out, lse, q, kv_pages, page_indices, cache, sequences, options)
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
    if slot_mapping.numel() == 0:
        return
    slots = slot_mapping.to(torch.int64)
    if bool((slots < 0).any()):
        kept = (slots >= 0).nonzero().squeeze(1)
        slots, k, v = slots[kept], k[kept], v[kept]
    page, offset = slots // cache.page_size, slots % cache.page_size
    cells = _bytes(kv_pages)  # not every device can scatter 8-bit floats
    if kv_layout == "HND":
        cells = cells.transpose(1, 2)
    cells[:, :, 0::2].index_put_((page, offset), _bytes(_quantise(k, kv_pages.dtype, k_scale)))
    cells[:, :, 1::2].index_put_((page, offset), _bytes(_quantise(v, kv_pages.dtype, v_scale)))


def rpa_torch_update(
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
    return rpa_torch(
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


def _options(
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    k_scale: float | None,
    v_scale: float | None,
    kv_layout: str,
    sinks: Tensor | None,
) -> _Options:
    return _Options(
        sm_scale=sm_scale * (1.0 if k_scale is None else k_scale),
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        v_scale=1.0 if v_scale is None else v_scale,
        kv_layout=kv_layout,
        sinks=None if sinks is None else sinks.to(torch.float32),
    )


def _quantise(x: Tensor, dtype: torch.dtype, scale: float | None) -> Tensor:
    if x.dtype == dtype and scale is None:
        return x
    scaled = x.to(torch.float32) if scale is None else x.to(torch.float32) / scale
    if dtype == torch.int8:
        return scaled.round().clamp(-128, 127).to(dtype)
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        return scaled.clamp(-largest, largest).to(dtype)
    return scaled.to(dtype)


def _bytes(x: Tensor) -> Tensor:
    """8-bit floats as uint8, anything else as it is: indexing then works for every dtype on every device."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _group_key(sequence: Sequence, page_size: int) -> tuple[int, int]:
    """Sequences with the same key waste less than half of a common rectangle of query rows, and of pages."""
    if sequence.q_len > GROUPED_ROWS:
        return -1, sequence.place
    pages = -(-sequence.kv_len // page_size) - sequence.first_visible // page_size
    return (sequence.q_len - 1).bit_length(), (pages - 1).bit_length()


def _attend(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    kv_pages: Tensor,
    page_indices: Tensor,
    cache: CacheShape,
    sequences: list[Sequence],
    options: _Options,
) -> None:
    groups: dict[tuple[int, int], list[Sequence]] = {}
    for sequence in sequences:
        groups.setdefault(_group_key(sequence, cache.page_size), []).append(sequence)
    for group in groups.values():
        _attend_group(out, lse, q, kv_pages, page_indices, cache, group, options)


def _attend_group(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    kv_pages: Tensor,
    page_indices: Tensor,
    cache: CacheShape,
    group: list[Sequence],
    options: _Options,
) -> None:
    device, size, count = q.device, cache.page_size, len(group)
    facts = torch.tensor(group, dtype=torch.int64).to(device)  # [sequences, fields of Sequence]
    place, q_start, q_len, kv_len, first_visible = facts.unsqueeze(-1).unbind(1)  # [sequences, 1] each
    first_page = first_visible // size

    pages = max(-(-s.kv_len // size) - s.first_visible // size for s in group)
    columns = first_page + torch.arange(pages, device=device)
    # A shorter sequence repeats its last page: entries past its end may hold anything.
    columns = torch.minimum(columns, (kv_len + size - 1) // size - 1)
    keys, values = _gather(kv_pages, page_indices[place, columns].to(torch.int64), cache, options.kv_layout)
    position = first_page * size + torch.arange(pages * size, device=device)  # [sequences, positions]
    dead = (position < first_visible) | (position >= kv_len)
    # Zero, not only masked: what lies there may be NaN, and 0 * NaN is NaN.
    values.masked_fill_(dead[:, None, :, None], 0.0)

    heads, share = cache.heads, q.shape[1] // cache.heads
    longest = max(s.q_len for s in group)
    block = max(1, min(longest, SCORES_AT_ONCE // (count * q.shape[1] * pages * size)))
    for start in range(0, longest, block):
        row = torch.arange(start, min(start + block, longest), device=device)
        rows = row.shape[0]
        real = row < q_len  # [sequences, rows]
        token = q_start + torch.minimum(row, q_len - 1)
        query = q[token].to(torch.float32).view(count, rows, heads, share, -1).permute(0, 2, 3, 1, 4)
        scores = query.reshape(count, heads, share * rows, -1) @ keys.transpose(-1, -2)
        scores = scores.mul_(options.sm_scale)
        if options.soft_cap is not None:
            scores = scores.div_(options.soft_cap).tanh_().mul_(options.soft_cap)
        scores = scores.view(count, heads, share, rows, -1)
        newest = (kv_len - q_len + torch.minimum(row, q_len - 1)).unsqueeze(-1)  # [sequences, rows, 1]
        hidden = position[:, None, :] > newest
        if options.sliding_window is not None:
            hidden |= position[:, None, :] <= newest - options.sliding_window
        scores.masked_fill_(hidden[:, None, None], -torch.inf)

        largest = scores.amax(-1, keepdim=True)
        sink = None if options.sinks is None else options.sinks.view(heads, share, 1, 1)
        if sink is not None:
            largest = torch.maximum(largest, sink)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        if sink is not None:
            total = total + torch.exp(sink - largest)
        mixed = weights.view(count, heads, share * rows, -1) @ values
        mixed = mixed.view(count, heads, share, rows, -1).mul_(options.v_scale / total)
        token = token[real]
        out[token] = mixed.permute(0, 3, 1, 2, 4).reshape(count, rows, -1, q.shape[2])[real].to(out.dtype)
        if lse is not None:
            row_lse = (largest + total.log()).squeeze(-1)  # [sequences, heads, share, rows]
            lse[token] = row_lse.permute(0, 3, 1, 2).reshape(count, rows, -1)[real]


def _gather(kv_pages: Tensor, table: Tensor, cache: CacheShape, kv_layout: str) -> tuple[Tensor, Tensor]:
    """K and V of the pages in `table` [sequences, pages]: float32 [sequences, kv heads, positions, head_dim]."""
    picked = _bytes(kv_pages)[table].view(kv_pages.dtype)
    count, pages = table.shape
    if kv_layout == "NHD":
        picked = picked.view(count, pages * cache.page_size, cache.heads, 2, cache.head_dim).permute(3, 0, 2, 1, 4)
    else:
        picked = picked.view(count, pages, cache.heads, 2, cache.page_size, cache.head_dim).permute(3, 0, 2, 1, 4, 5)
    both = torch.empty((2, count, cache.heads, pages * cache.page_size, cache.head_dim), device=kv_pages.device)
    both.view(picked.shape).copy_(picked)
    return both[0], both[1]
