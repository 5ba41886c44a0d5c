"""The paged-attention ops for graphs of torch_xla and torch_tpu.

rpa* are the Pallas kernels where a graph is lowered for a TPU and jax.numpy on any other platform; rpa_plain* are
jax.numpy everywhere. What counts is the platform that a graph is lowered for, not the one that it is traced on, so a
graph made on a CPU can be compiled for a TPU.

Lengths and page numbers are data of the graph. Nothing waits for their values, and so nothing refuses them: what a page
number outside the cache gives is not defined, but it stays inside the cache. Who wants them checked forces the kernel
in torch, which reads them on the host: opreg.use_kernel("opreg::ragged_paged_attention", "cpu/rpa_torch").
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .rpa import ragged_paged_attention, ragged_paged_attention_lse
from .rpa_blocks import attached_chip
from .rpa_check import cache_sizes, check_new, check_positive, fail
from .rpa_pages import NHD
from .rpa_plain import Arrays, Options, attend, attend_update, write_slots
from .rpa_update import ragged_paged_attention_update

Pair = tuple[jax.Array, jax.Array]


def _attention(name: str, compute: Callable[[Arrays, Options], Any], doc: str) -> Callable[..., Any]:
    """A function with the parameters of opreg::ragged_paged_attention."""

    def attention(
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
    ) -> Any:
        arrays = Arrays(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks)
        options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout)
        return compute(arrays, options)

    return _named(attention, name, doc)


def _update(
    name: str, compute: Callable[[Arrays, jax.Array, jax.Array, Options], Pair], doc: str
) -> Callable[..., Any]:
    """A function with the parameters of opreg::ragged_paged_attention_update; compute(arrays, k, v, options)."""

    def update(
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
    ) -> Pair:
        arrays = Arrays(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks)
        options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout)
        return compute(arrays, k, v, options)

    return _named(update, name, doc)


def _named(function: Callable[..., Any], name: str, doc: str) -> Callable[..., Any]:
    """Names are what profiles and error messages show."""
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


def _settings(arrays: Arrays, options: Options) -> dict[str, Any]:
    """Keyword arguments of the Pallas kernels."""
    return {**options._asdict(), "sinks": arrays.sinks, "chip": attached_chip()}


def _chosen(arrays: Arrays, options: Options) -> jax.Array:
    def on_tpu(arrays: Arrays) -> jax.Array:
        return ragged_paged_attention(*arrays[:-1], **_settings(arrays, options))

    chosen: jax.Array = lax.platform_dependent(arrays, tpu=on_tpu, default=lambda arrays: attend(arrays, options)[0])
    return chosen


def _chosen_lse(arrays: Arrays, options: Options) -> Pair:
    def on_tpu(arrays: Arrays) -> Pair:
        return ragged_paged_attention_lse(*arrays[:-1], **_settings(arrays, options))

    chosen: Pair = lax.platform_dependent(arrays, tpu=on_tpu, default=lambda arrays: attend(arrays, options))
    return chosen


def _chosen_update(arrays: Arrays, k: jax.Array, v: jax.Array, options: Options) -> Pair:
    def on_tpu(arrays: Arrays, k: jax.Array, v: jax.Array) -> Pair:
        q, *rest, _ = arrays
        out, kv_pages = ragged_paged_attention_update(q, k, v, *rest, **_settings(arrays, options))
        return kv_pages, out

    def elsewhere(arrays: Arrays, k: jax.Array, v: jax.Array) -> Pair:
        return attend_update(arrays, k, v, options)

    chosen: Pair = lax.platform_dependent(arrays, k, v, tpu=on_tpu, default=elsewhere)
    return chosen


rpa = _attention(
    "rpa", _chosen, "opreg::ragged_paged_attention; why_not says which calls the Pallas kernel does not take."
)
rpa_lse = _attention("rpa_lse", _chosen_lse, "opreg::ragged_paged_attention_lse in the same way.")
rpa_update = _update(
    "rpa_update",
    _chosen_update,
    "The new cache and the output of opreg::ragged_paged_attention_update in the same way.",
)
rpa_plain = _attention(
    "rpa_plain",
    lambda arrays, options: attend(arrays, options)[0],
    "opreg::ragged_paged_attention in jax.numpy.",
)
rpa_plain_lse = _attention("rpa_plain_lse", attend, "opreg::ragged_paged_attention_lse in jax.numpy.")
rpa_plain_update = _update(
    "rpa_plain_update",
    attend_update,
    "The new cache and the output of opreg::ragged_paged_attention_update, in jax.numpy.",
)


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
