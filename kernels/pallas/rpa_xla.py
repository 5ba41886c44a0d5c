"""The paged-attention ops for graphs of torch_xla and torch_tpu.

rpa* are the Pallas kernels where a graph is lowered for a TPU and jax.numpy on any other platform; rpa_plain* are
jax.numpy everywhere. What counts is the platform that a graph is lowered for, not the one that it is traced on, so a
graph made on a CPU can be compiled for a TPU.

Lengths and page numbers are data of the graph. Nothing waits for their values, and so nothing refuses them: what a page
number outside the cache gives is not defined, but it stays inside the cache.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .rpa import ragged_paged_attention, ragged_paged_attention_lse
from .rpa_blocks import attached_chip
from .rpa_check import cache_sizes, check_new, check_positive, fail
from .rpa_pages import NHD
from .rpa_plain import Arrays, Options, attend, attend_update, write_slots
from .rpa_update import ragged_paged_attention_update


def rpa(
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
) -> jax.Array:
    """opreg::ragged_paged_attention; why_not says which calls the Pallas kernel does not take."""
    arrays = Arrays(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks)
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout)
    return _chosen(arrays, options, False)[0]


def rpa_lse(
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
) -> tuple[jax.Array, jax.Array]:
    """opreg::ragged_paged_attention_lse in the same way."""
    arrays = Arrays(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks)
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout)
    out, lse = _chosen(arrays, options, True)
    return out, lse


def rpa_update(
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
) -> tuple[jax.Array, jax.Array]:
    """The new cache and the output of opreg::ragged_paged_attention_update in the same way."""
    arrays = Arrays(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks)
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout)

    def on_tpu(arrays: Arrays, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, *rest, sinks = arrays
        settings = {**options._asdict(), "sinks": sinks, "chip": attached_chip()}
        out, kv_pages = ragged_paged_attention_update(q, k, v, *rest, **settings)
        return kv_pages, out

    def elsewhere(arrays: Arrays, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return attend_update(arrays, k, v, options)

    chosen: tuple[jax.Array, jax.Array] = lax.platform_dependent(arrays, k, v, tpu=on_tpu, default=elsewhere)
    return chosen


def rpa_plain(
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
) -> jax.Array:
    """opreg::ragged_paged_attention in jax.numpy."""
    arrays = Arrays(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks)
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout)
    return attend(arrays, options)[0]


def rpa_plain_lse(
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
) -> tuple[jax.Array, jax.Array]:
    """opreg::ragged_paged_attention_lse in jax.numpy."""
    arrays = Arrays(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks)
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout)
    return attend(arrays, options)


def rpa_plain_update(
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
) -> tuple[jax.Array, jax.Array]:
    """The new cache and the output of opreg::ragged_paged_attention_update, in jax.numpy."""
    arrays = Arrays(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks)
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout)
    return attend_update(arrays, k, v, options)


def kv_cache_update(
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    slot_mapping: jax.Array,
    *,
    kv_layout: str = NHD,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> jax.Array:
    """The new cache of opreg::kv_cache_update: one scatter, on every platform."""
    cache_sizes(kv_pages, kv_layout)
    check_positive(k_scale=k_scale, v_scale=v_scale)
    check_new(k, v, kv_pages, kv_layout, k.shape[0])
    if slot_mapping.dtype not in (jnp.int32, jnp.int64) or slot_mapping.shape != k.shape[:1]:
        raise fail(
            f"slot_mapping is {slot_mapping.dtype} {slot_mapping.shape}; it must be int32 or int64 {k.shape[:1]}"
        )
    options = Options(1.0, None, None, None, k_scale, v_scale, kv_layout)
    return write_slots(k, v, kv_pages, slot_mapping, options)


def _chosen(arrays: Arrays, options: Options, with_lse: bool) -> tuple[jax.Array, ...]:
    def on_tpu(arrays: Arrays) -> tuple[jax.Array, ...]:
        *positional, sinks = arrays
        settings = {**options._asdict(), "sinks": sinks, "chip": attached_chip()}
        if with_lse:
            return ragged_paged_attention_lse(*positional, **settings)
        return (ragged_paged_attention(*positional, **settings),)

    def elsewhere(arrays: Arrays) -> tuple[jax.Array, ...]:
        return attend(arrays, options)[: 2 if with_lse else 1]

    chosen: tuple[jax.Array, ...] = lax.platform_dependent(arrays, tpu=on_tpu, default=elsewhere)
    return chosen
