"""Checks of the paged-attention arguments, shared by every kernel that runs where values can be read on the host."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTISED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
CACHE_DTYPES = QUERY_DTYPES + QUANTISED_DTYPES
LAYOUTS = ("NHD", "HND")

# Largest mask value that is taken: a user who passes something near zero expects masked positions to keep weight, which
# no implementation of this operator gives.
LARGEST_MASK_VALUE = -1e4


class CacheShape(NamedTuple):
    """Sizes of a paged cache, whichever way round the layout keeps them."""

    pages: int
    page_size: int
    heads: int
    head_dim: int


class Sequence(NamedTuple):
    """One sequence of the batch, as numbers on the host."""

    place: int
    """Its row in kv_lens and page_indices."""
    q_start: int
    q_len: int
    kv_len: int
    first_visible: int
    """First cache position that any of its query rows may see (0 without a sliding window)."""


def fail(op: str, text: str) -> ValueError:
    """The error to raise: every message starts with the operator's name."""
    return ValueError(f"{op}: {text}")


def cache_shape(op: str, kv_pages: Tensor, kv_layout: str) -> CacheShape:
    """Sizes of `kv_pages` under `kv_layout`, or ValueError where it cannot be a cache."""
    if kv_layout not in LAYOUTS:
        raise fail(
            op,
            f"kv_layout is {kv_layout!r}; use 'NHD' for [pages, page_size, 2*kv_heads, head_dim] "
            "or 'HND' for [pages, 2*kv_heads, page_size, head_dim]",
        )
    if kv_pages.dim() != 4:
        raise fail(op, f"kv_pages has {kv_pages.dim()} dimensions {tuple(kv_pages.shape)}; it needs 4 ({kv_layout})")
    if kv_pages.dtype not in CACHE_DTYPES:
        raise fail(op, f"kv_pages is {kv_pages.dtype}; use one of {_names(CACHE_DTYPES)}")
    pages, second, third, head_dim = kv_pages.shape
    page_size, combined = (second, third) if kv_layout == "NHD" else (third, second)
    if combined == 0 or combined % 2 != 0:
        raise fail(
            op,
            f"kv_pages {tuple(kv_pages.shape)} with kv_layout={kv_layout!r} has {combined} combined heads; K and V "
            "alternate, so it must be an even number of at least 2 (is the layout the other one?)",
        )
    if page_size == 0 or head_dim == 0:
        raise fail(op, f"kv_pages {tuple(kv_pages.shape)} has an empty page_size or head_dim; both must be at least 1")
    return CacheShape(pages, page_size, combined // 2, head_dim)


def check_scales(op: str, k_scale: float | None, v_scale: float | None) -> None:
    """ValueError unless both scales are None or finite and positive."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and not (scale > 0.0 and math.isfinite(scale)):
            raise fail(op, f"{name} is {scale}; it must be finite and positive (None means 1.0)")


def check_attention(
    op: str,
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    mask_value: float | None,
    k_scale: float | None,
    v_scale: float | None,
    kv_layout: str,
    sinks: Tensor | None,
) -> tuple[CacheShape, list[Sequence]]:
    """check_call, then the values; give the cache's sizes and the sequences that have query rows.

    Only the entries of `page_indices` that will be read are looked at: entries past a sequence's length, and of pages
    wholly before its sliding window, may hold anything. Copies the index tensors to the host, which waits for a device.
    """
    cache = check_call(
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
    sequences = _read_sequences(op, q.shape[0], cache, kv_lens, page_indices, cu_q_lens, num_seqs, sliding_window)
    _check_pages(op, cache, page_indices, sequences)
    return cache, sequences


def check_call(
    op: str,
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    mask_value: float | None,
    k_scale: float | None,
    v_scale: float | None,
    kv_layout: str,
    sinks: Tensor | None,
) -> CacheShape:
    """Check shapes, dtypes, devices and options, whatever the tensors hold; give the cache's sizes."""
    cache = cache_shape(op, kv_pages, kv_layout)
    _check_query(op, q, cache)
    check_scales(op, k_scale, v_scale)
    _check_options(op, sm_scale, sliding_window, soft_cap, mask_value)
    _check_index_tensors(op, kv_lens, page_indices, cu_q_lens, num_seqs)
    if sinks is not None:
        if sinks.dim() != 1 or sinks.shape[0] != q.shape[1]:
            raise fail(op, f"sinks is {tuple(sinks.shape)}; it needs one value per query head, ({q.shape[1]},)")
        if not sinks.is_floating_point():
            raise fail(op, f"sinks is {sinks.dtype}; use a floating-point dtype such as torch.float32")
    device = q.device
    for name, tensor in (
        ("kv_pages", kv_pages),
        ("kv_lens", kv_lens),
        ("page_indices", page_indices),
        ("cu_q_lens", cu_q_lens),
        ("num_seqs", num_seqs),
        ("sinks", sinks),
    ):
        if tensor is not None and tensor.device != device:
            raise fail(op, f"{name} is on {tensor.device} but q is on {device}; move it with .to(q.device)")
    return cache


def check_update(
    op: str,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    *,
    kv_layout: str,
    k_scale: float | None,
    v_scale: float | None,
) -> CacheShape:
    """check_update_call, then the slots, which waits for a device; give the cache's sizes."""
    cache = check_update_call(op, k, v, kv_pages, slot_mapping, kv_layout=kv_layout, k_scale=k_scale, v_scale=v_scale)
    check_slots(op, slot_mapping, cache)
    return cache


def check_update_call(
    op: str,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    *,
    kv_layout: str,
    k_scale: float | None,
    v_scale: float | None,
) -> CacheShape:
    """Check shapes, dtypes and options of a cache update, whatever the tensors hold; give the cache's sizes."""
    check_scales(op, k_scale, v_scale)
    cache = check_new_tokens(op, k, v, kv_pages, kv_layout)
    if slot_mapping.dtype not in (torch.int32, torch.int64):
        raise fail(op, f"slot_mapping is {slot_mapping.dtype}; use torch.int32 or torch.int64")
    if slot_mapping.dim() != 1 or slot_mapping.shape[0] != k.shape[0]:
        raise fail(
            op,
            f"slot_mapping is {tuple(slot_mapping.shape)}; it needs one slot per token of k, ({k.shape[0]},), "
            "-1 for padding rows",
        )
    return cache


def check_new_tokens(op: str, k: Tensor, v: Tensor, kv_pages: Tensor, kv_layout: str) -> CacheShape:
    """Check the K and V of a step against the cache they go to; give the cache's sizes."""
    cache = cache_shape(op, kv_pages, kv_layout)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 3 or tuple(tensor.shape[1:]) != (cache.heads, cache.head_dim):
            raise fail(
                op,
                f"{name} is {tuple(tensor.shape)}; kv_pages {tuple(kv_pages.shape)} ({kv_layout}) needs "
                f"(tokens, {cache.heads}, {cache.head_dim})",
            )
        if tensor.dtype not in QUERY_DTYPES:
            raise fail(op, f"{name} is {tensor.dtype}; use one of {_names(QUERY_DTYPES)}")
    if k.shape[0] != v.shape[0]:
        raise fail(op, f"k has {k.shape[0]} tokens but v has {v.shape[0]}; they must be equal")
    return cache


def check_slots(op: str, slot_mapping: Tensor, cache: CacheShape) -> None:
    """ValueError for a slot that the cache does not have."""
    if slot_mapping.numel():
        low, high = (int(value) for value in torch.aminmax(slot_mapping))
        slots = cache.pages * cache.page_size
        if low < -1 or high >= slots:
            bad = low if low < -1 else high
            raise fail(
                op,
                f"slot_mapping[{(slot_mapping == bad).nonzero()[0].item()}] is {bad}; slots are page * page_size + "
                f"offset, 0 to {slots - 1} for {cache.pages} pages of {cache.page_size} tokens, or -1 to skip the row",
            )


def check_update_attention(op: str, q: Tensor, k: Tensor, v: Tensor, kv_pages: Tensor, kv_layout: str) -> None:
    """What the fused operator adds to check_call: a K and V row for every query row."""
    check_new_tokens(op, k, v, kv_pages, kv_layout)
    if k.shape[0] != q.shape[0]:
        raise fail(op, f"k has {k.shape[0]} tokens but q has {q.shape[0]}; they must be equal")


def step_slots(tokens: int, page_indices: Tensor, page_size: int, sequences: list[Sequence]) -> Tensor:
    """The slot of every row of a step, int64 [tokens] on the CPU: the sequences' last positions; -1 for padding."""
    slots = torch.full((tokens,), -1, dtype=torch.int64)
    table = page_indices.cpu()
    for s in sequences:
        position = torch.arange(s.kv_len - s.q_len, s.kv_len)
        page = table[s.place, position // page_size].to(torch.int64)
        slots[s.q_start : s.q_start + s.q_len] = page * page_size + position % page_size
    return slots


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def _check_query(op: str, q: Tensor, cache: CacheShape) -> None:
    if q.dim() != 3:
        raise fail(op, f"q has {q.dim()} dimensions {tuple(q.shape)}; it needs [tokens, query heads, head_dim]")
    if q.dtype not in QUERY_DTYPES:
        raise fail(op, f"q is {q.dtype}; use one of {_names(QUERY_DTYPES)}")
    if q.shape[2] != cache.head_dim:
        raise fail(op, f"q has head_dim {q.shape[2]} but kv_pages has {cache.head_dim}; they must be equal")
    if q.shape[1] == 0 or q.shape[1] % cache.heads != 0:
        raise fail(
            op,
            f"q has {q.shape[1]} heads and kv_pages {cache.heads}; query heads must be a multiple of the cache's heads",
        )


def _check_options(
    op: str, sm_scale: float, sliding_window: int | None, soft_cap: float | None, mask_value: float | None
) -> None:
    if not math.isfinite(sm_scale):
        raise fail(op, f"sm_scale is {sm_scale}; it must be finite (usually head_dim ** -0.5)")
    if sliding_window is not None and sliding_window <= 0:
        raise fail(op, f"sliding_window is {sliding_window}; it must be positive (None means no window)")
    if soft_cap is not None and not (soft_cap > 0.0 and math.isfinite(soft_cap)):
        raise fail(op, f"soft_cap is {soft_cap}; it must be finite and positive (None means no cap)")
    if mask_value is not None and not mask_value <= LARGEST_MASK_VALUE:
        raise fail(
            op,
            f"mask_value is {mask_value}; masked positions get no weight at all, so it must be {LARGEST_MASK_VALUE} or "
            "less (None is always right)",
        )


def _check_index_tensors(op: str, kv_lens: Tensor, page_indices: Tensor, cu_q_lens: Tensor, num_seqs: Tensor) -> None:
    for name, tensor, dims in (
        ("kv_lens", kv_lens, 1),
        ("page_indices", page_indices, 2),
        ("cu_q_lens", cu_q_lens, 1),
        ("num_seqs", num_seqs, 1),
    ):
        if tensor.dtype != torch.int32:
            raise fail(op, f"{name} is {tensor.dtype}; it must be torch.int32 (use .to(torch.int32))")
        if tensor.dim() != dims:
            raise fail(op, f"{name} has {tensor.dim()} dimensions {tuple(tensor.shape)}; it needs {dims}")
    if num_seqs.shape[0] != 1:
        raise fail(op, f"num_seqs has {num_seqs.shape[0]} values; it needs exactly 1")
    room = kv_lens.shape[0]
    if page_indices.shape[0] != room:
        raise fail(op, f"page_indices has {page_indices.shape[0]} rows but kv_lens has {room}; one row per sequence")
    if cu_q_lens.shape[0] != room + 1:
        raise fail(op, f"cu_q_lens has {cu_q_lens.shape[0]} values; {room} sequences (kv_lens) need {room + 1}")


def _read_sequences(
    op: str,
    tokens: int,
    cache: CacheShape,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    sliding_window: int | None,
) -> list[Sequence]:
    count, room = int(num_seqs.item()), kv_lens.shape[0]
    if not 0 <= count <= room:
        raise fail(op, f"num_seqs is {count}, but the index tensors hold {room} sequences; it must be 0 to {room}")
    starts, lengths = cu_q_lens[: count + 1].tolist(), kv_lens[:count].tolist()
    if starts[0] != 0:
        raise fail(op, f"cu_q_lens[0] is {starts[0]}; it must be 0")
    capacity = page_indices.shape[1] * cache.page_size
    sequences = []
    for i in range(count):
        q_len, kv_len = starts[i + 1] - starts[i], lengths[i]
        if q_len < 0:
            raise fail(
                op, f"cu_q_lens[{i + 1}] is {starts[i + 1]}, less than cu_q_lens[{i}] = {starts[i]}; it may not fall"
            )
        if starts[i + 1] > tokens:
            raise fail(
                op, f"cu_q_lens[{i + 1}] is {starts[i + 1]}, but q has {tokens} rows; pad q or shorten the batch"
            )
        if not 0 <= kv_len <= capacity:
            raise fail(
                op,
                f"kv_lens[{i}] is {kv_len}, but a sequence has room for {page_indices.shape[1]} pages x "
                f"{cache.page_size} tokens = {capacity}; widen page_indices or correct the length",
            )
        if q_len > kv_len:
            raise fail(
                op,
                f"sequence {i} has {q_len} query rows (cu_q_lens) but kv_lens[{i}] is {kv_len}; kv_lens counts the "
                "step's own tokens too, so it is never smaller",
            )
        if q_len:
            first = 0 if sliding_window is None else max(0, kv_len - q_len - sliding_window + 1)
            sequences.append(Sequence(i, starts[i], q_len, kv_len, first))
    return sequences


def _check_pages(op: str, cache: CacheShape, page_indices: Tensor, sequences: list[Sequence]) -> None:
    if not sequences:
        return
    size = cache.page_size
    table = page_indices.cpu()
    rows = table[torch.tensor([s.place for s in sequences])]
    columns = torch.arange(table.shape[1])
    first = torch.tensor([[s.first_visible // size] for s in sequences])
    end = torch.tensor([[-(-s.kv_len // size)] for s in sequences])
    wrong = (columns >= first) & (columns < end) & ((rows < 0) | (rows >= cache.pages))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise fail(
            op,
            f"page_indices[{sequences[row].place}, {column}] is {int(rows[row, column])}, but kv_pages has "
            f"{cache.pages} pages; it must be 0 to {cache.pages - 1}",
        )
