"""Which calls of the paged-attention ops the Pallas TPU kernel does not take, asked with torch tensors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .rpa_check import CacheShape, cache_sizes, limits
from .rpa_pages import NHD


class _Facts(NamedTuple):
    """What cache_sizes asks of an array."""

    shape: tuple[int, ...]
    ndim: int
    dtype: Any


def why_not(
    q: jax.Array,
    kv_pages: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = NHD,
    sinks: jax.Array | None = None,
) -> str | None:
    """For opreg::ragged_paged_attention and its _lse."""
    return _limits(q, kv_pages, page_indices, kv_layout)


def why_not_update(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = NHD,
    sinks: jax.Array | None = None,
) -> str | None:
    """For opreg::ragged_paged_attention_update."""
    return _limits(q, kv_pages, page_indices, kv_layout)


def _limits(q: Any, kv_pages: Any, page_indices: Any, kv_layout: str) -> str | None:
    q_dtype, kv_dtype = (str(x.dtype).removeprefix("torch.") for x in (q, kv_pages))
    cache = _Facts(tuple(kv_pages.shape), kv_pages.ndim, jnp.dtype(kv_dtype))
    pages, page_size, kv_heads, head_dim = cache_sizes(cache, kv_layout)
    shape = CacheShape(pages, page_size, kv_heads, q.shape[1], head_dim)
    return limits(q_dtype, kv_dtype, shape, kv_layout, tuple(page_indices.shape))
