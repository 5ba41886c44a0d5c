"""Checks of shapes, dtypes and options: everything that is known when the kernel is traced."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from .rpa_pages import HND, NHD, packing

OP = "opreg::ragged_paged_attention (pallas)"
QUERY_DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = (*QUERY_DTYPES, "float8_e4m3fn", "float8_e5m2", "int8")
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
    """Sizes of the cache, or ValueError for what the kernel cannot take."""
    if kv_layout not in (NHD, HND):
        raise fail(f"kv_layout is {kv_layout!r}; use 'NHD' or 'HND'")
    if q.ndim != 3 or kv_pages.ndim != 4:
        raise fail(f"q is {q.shape} and kv_pages {kv_pages.shape}; they need 3 and 4 dimensions")
    if q.dtype.name not in QUERY_DTYPES:
        raise fail(f"q is {q.dtype}; use one of {', '.join(QUERY_DTYPES)} (a TPU computes in no other)")
    if kv_pages.dtype.name not in CACHE_DTYPES:
        raise fail(f"kv_pages is {kv_pages.dtype}; use one of {', '.join(CACHE_DTYPES)}")
    pages, second, third, head_dim = kv_pages.shape
    page_size, combined = (second, third) if kv_layout == NHD else (third, second)
    _, query_heads, q_dim = q.shape
    if combined == 0 or combined % 2:
        raise fail(
            f"kv_pages {kv_pages.shape} ({kv_layout}) has {combined} combined heads; "
            "K and V alternate, so it must be even"
        )
    if q_dim != head_dim:
        raise fail(f"q has head_dim {q_dim} but kv_pages has {head_dim}; they must be equal")
    kv_heads = combined // 2
    if query_heads == 0 or query_heads % kv_heads:
        raise fail(
            f"q has {query_heads} heads and kv_pages {kv_heads}; query heads must be a multiple of the cache's heads"
        )
    if query_heads > 128:
        raise fail(f"q has {query_heads} heads; the kernel takes at most 128 (split the heads into two calls)")
    _check_tiles(kv_pages, kv_layout, page_size, combined)
    if kv_layout == NHD and head_dim > 128 and head_dim % 128:
        raise fail(f"NHD pages with head_dim {head_dim}: above 128 it must be a multiple of 128; use the HND layout")
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
    scalars = 4 * (3 * room + 2 + room * page_indices.shape[1])
    if scalars > SCALAR_BYTES:
        raise fail(
            f"page_indices {page_indices.shape} and the lengths take {scalars} bytes of scalar memory; there are "
            f"{SCALAR_BYTES}, so use larger pages or split the batch"
        )
    if sinks is not None and sinks.shape != (query_heads,):
        raise fail(f"sinks is {sinks.shape}; it needs one value per query head, ({query_heads},)")
    if sliding_window is not None and sliding_window <= 0:
        raise fail(f"sliding_window is {sliding_window}; it must be positive (None means no window)")
    if mask_value is not None and not mask_value <= LARGEST_MASK_VALUE:
        raise fail(f"mask_value is {mask_value}; it must be {LARGEST_MASK_VALUE} or less (None is always right)")
    for name, value in (("soft_cap", soft_cap), ("k_scale", k_scale), ("v_scale", v_scale)):
        if value is not None and not (value > 0.0 and math.isfinite(value)):
            raise fail(f"{name} is {value}; it must be finite and positive (None means none)")
    if not math.isfinite(sm_scale):
        raise fail(f"sm_scale is {sm_scale}; it must be finite")
    return CacheShape(pages, page_size, kv_heads, query_heads, head_dim)


def _check_tiles(kv_pages: Any, kv_layout: str, page_size: int, combined: int) -> None:
    n = packing(kv_pages.dtype)
    if kv_layout == HND and page_size % (8 * n):
        raise fail(
            f"page_size {page_size} with HND pages of {kv_pages.dtype}: a page must fill register tiles, "
            f"a multiple of {8 * n} tokens; use such a page size or the NHD layout"
        )
    if kv_layout == NHD and combined % n:
        raise fail(
            f"NHD pages of {kv_pages.dtype} with {combined // 2} KV head(s): {n} values share a 32-bit word, "
            f"so 2*kv_heads must be a multiple of {n}; use the HND layout"
        )
