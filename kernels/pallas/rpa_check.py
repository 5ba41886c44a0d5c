"""Checks of shapes, dtypes and options: everything that is known when the kernel is traced."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from .rpa_pages import HND, NHD, packing

OP = "opreg::ragged_paged_attention (pallas)"
QUERY_DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = (*QUERY_DTYPES, "float8_e4m3fn", "float8_e5m2", "int8")
NOT_ON_TPU = "float16"
LARGEST_MASK_VALUE = -1e4

# All chips have 1 MiB of scalar memory; the compiler wants some for itself.
SCALAR_BYTES = 2**20 - 2**16


class CacheShape(NamedTuple):
    """Sizes of the problem that block sizes depend on."""

    pages: int
    page_size: int
    kv_heads: int
    query_heads: int
    head_dim: int


def fail(text: str) -> ValueError:
    """The error to raise."""
    return ValueError(f"{OP}: {text}")


def cache_sizes(kv_pages: Any, kv_layout: str) -> tuple[int, int, int, int]:
    """Pages, page size, KV heads and head_dim of a cache, or ValueError where it cannot be one."""
    if kv_layout not in (NHD, HND):
        raise fail(f"kv_layout is {kv_layout!r}; use 'NHD' or 'HND'")
    if kv_pages.ndim != 4:
        raise fail(f"kv_pages is {kv_pages.shape}; it needs 4 dimensions")
    if kv_pages.dtype.name not in CACHE_DTYPES:
        raise fail(f"kv_pages is {kv_pages.dtype}; use one of {', '.join(CACHE_DTYPES)}")
    pages, second, third, head_dim = kv_pages.shape
    page_size, combined = (second, third) if kv_layout == NHD else (third, second)
    if combined == 0 or combined % 2:
        raise fail(
            f"kv_pages {kv_pages.shape} ({kv_layout}) has {combined} combined heads; "
            "K and V alternate, so it must be even"
        )
    if page_size == 0 or head_dim == 0:
        raise fail(f"kv_pages {kv_pages.shape} ({kv_layout}) has an empty page_size or head_dim; both must be positive")
    return pages, page_size, combined // 2, head_dim


def check_positive(**options: float | None) -> None:
    """ValueError unless each option is None or finite and positive."""
    for name, value in options.items():
        if value is not None and not (value > 0.0 and math.isfinite(value)):
            raise fail(f"{name} is {value}; it must be finite and positive (None means none)")


def check_new(k: Any, v: Any, kv_pages: Any, kv_layout: str, tokens: int) -> None:
    """ValueError unless k and v are `tokens` rows for the cache."""
    _, _, heads, head_dim = cache_sizes(kv_pages, kv_layout)
    wanted = (tokens, heads, head_dim)
    for name, new in (("k", k), ("v", v)):
        if new.shape != wanted:
            raise fail(
                f"{name} is {new.shape}; {tokens} tokens for kv_pages {kv_pages.shape} ({kv_layout}) need {wanted}"
            )
        if new.dtype.name not in QUERY_DTYPES:
            raise fail(f"{name} is {new.dtype}; use one of {', '.join(QUERY_DTYPES)}")


def check_call(
    q: Any,
    kv_pages: Any,
    kv_lens: Any,
    page_indices: Any,
    cu_q_lens: Any,
    num_seqs: Any,
    sinks: Any,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    mask_value: float | None,
    k_scale: float | None,
    v_scale: float | None,
    kv_layout: str,
) -> CacheShape:
    """Sizes of the cache, or ValueError for a call that means nothing, whatever computes it."""
    pages, page_size, kv_heads, head_dim = cache_sizes(kv_pages, kv_layout)
    if q.ndim != 3:
        raise fail(f"q is {q.shape}; it needs 3 dimensions")
    if q.dtype.name not in QUERY_DTYPES:
        raise fail(f"q is {q.dtype}; use one of {', '.join(QUERY_DTYPES)}")
    _, query_heads, q_dim = q.shape
    if q_dim != head_dim:
        raise fail(f"q has head_dim {q_dim} but kv_pages has {head_dim}; they must be equal")
    if query_heads == 0 or query_heads % kv_heads:
        raise fail(
            f"q has {query_heads} heads and kv_pages {kv_heads}; query heads must be a multiple of the cache's heads"
        )
    for name, array, dims in (
        ("kv_lens", kv_lens, 1),
        ("page_indices", page_indices, 2),
        ("cu_q_lens", cu_q_lens, 1),
        ("num_seqs", num_seqs, 1),
    ):
        if array.dtype != jnp.int32 or array.ndim != dims:
            raise fail(f"{name} is {array.dtype} {array.shape}; it must be int32 with {dims} dimension(s)")
    room = kv_lens.shape[0]
    if num_seqs.shape != (1,) or page_indices.shape[0] != room or cu_q_lens.shape[0] != room + 1:
        raise fail(
            f"kv_lens {kv_lens.shape} asks for page_indices ({room}, n), cu_q_lens ({room + 1},) and num_seqs (1,); "
            f"they are {page_indices.shape}, {cu_q_lens.shape} and {num_seqs.shape}"
        )
    if sinks is not None and sinks.shape != (query_heads,):
        raise fail(f"sinks is {sinks.shape}; it needs one value per query head, ({query_heads},)")
    if sliding_window is not None and sliding_window <= 0:
        raise fail(f"sliding_window is {sliding_window}; it must be positive (None means no window)")
    if mask_value is not None and not mask_value <= LARGEST_MASK_VALUE:
        raise fail(f"mask_value is {mask_value}; it must be {LARGEST_MASK_VALUE} or less (None is always right)")
    check_positive(soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale)
    if not math.isfinite(sm_scale):
        raise fail(f"sm_scale is {sm_scale}; it must be finite")
    return CacheShape(pages, page_size, kv_heads, query_heads, head_dim)


def limits(q_dtype: str, kv_dtype: str, shape: CacheShape, kv_layout: str, table: tuple[int, int]) -> str | None:
    """Why the TPU kernel cannot take a call that check_call takes, or None; `table` is the shape of page_indices."""
    for name, dtype in (("q", q_dtype), ("kv_pages", kv_dtype)):
        if dtype == NOT_ON_TPU:
            return f"{name} is {dtype}, in which a TPU does not compute; use bfloat16 or float32"
    if shape.query_heads > 128:
        return f"q has {shape.query_heads} heads; the kernel takes at most 128 (split the heads into two calls)"
    n = packing(kv_dtype)
    if kv_layout == HND and shape.page_size % (8 * n):
        return (
            f"page_size {shape.page_size} with HND pages of {kv_dtype}: a page must fill register tiles, "
            f"a multiple of {8 * n} tokens; use such a page size or the NHD layout"
        )
    if kv_layout == NHD and 2 * shape.kv_heads % n:
        return (
            f"NHD pages of {kv_dtype} with {shape.kv_heads} KV head(s): {n} values share a 32-bit word, "
            f"so 2*kv_heads must be a multiple of {n}; use the HND layout"
        )
    if kv_layout == NHD and shape.head_dim > 128 and shape.head_dim % 128:
        return f"NHD pages with head_dim {shape.head_dim}: above 128 it must be a multiple of 128; use the HND layout"
    room, pages = table
    scalars = 4 * (3 * room + 2 + room * pages)
    if scalars > SCALAR_BYTES:
        return (
            f"page_indices {table} and the lengths take {scalars} bytes of scalar memory; there are {SCALAR_BYTES}, so "
            "use larger pages or split the batch"
        )
    return None


def check(
    q: Any,
    kv_pages: Any,
    kv_lens: Any,
    page_indices: Any,
    cu_q_lens: Any,
    num_seqs: Any,
    sinks: Any,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    mask_value: float | None,
    k_scale: float | None,
    v_scale: float | None,
    kv_layout: str,
) -> CacheShape:
    """check_call, and ValueError for what the TPU kernel cannot take."""
    shape = check_call(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks,
        sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout,
    )  # fmt: skip
    why = limits(q.dtype.name, kv_pages.dtype.name, shape, kv_layout, page_indices.shape)
    if why is not None:
        raise fail(why)
    return shape
