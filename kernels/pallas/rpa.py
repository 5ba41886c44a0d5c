"""Ragged paged attention for TPU: one Pallas kernel for any mix of prefill and decode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .rpa_blocks import Blocks, current_chip, default_blocks
from .rpa_check import check
from .rpa_kernel import kernel, scratch_shapes
from .rpa_pages import NHD, pack_words
from .rpa_plan import LOG2_E, Plan


def ragged_paged_attention(
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
    blocks: Blocks | None = None,
    chip: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Causal attention of every sequence's query rows over its pages.

    Args:
        q: [tokens, query heads, head_dim], float32 or bfloat16; sequence i owns rows cu_q_lens[i] to cu_q_lens[i+1].
        kv_pages: K and V of head h at 2h and 2h+1 of the combined axis; NHD [pages, page_size, 2*kv_heads, head_dim]
            or HND [pages, 2*kv_heads, page_size, head_dim]; float32, bfloat16, float8_e4m3fn, float8_e5m2 or int8.
        kv_lens: int32 [sequences], tokens in the cache, the step's own included.
        page_indices: int32 [sequences, pages per sequence].
        cu_q_lens: int32 [sequences + 1].
        num_seqs: int32 [1]; later sequences are padding.
        sm_scale: factor of q.k, before the cap.
        sliding_window: a row sees this many positions, its own included.
        soft_cap: logits become cap * tanh(logits / cap).
        mask_value: at most -1e4; hidden positions have no weight whatever it is.
        k_scale: what a stored key is multiplied by.
        v_scale: what a stored value is multiplied by.
        kv_layout: "NHD" or "HND".
        sinks: float [query heads], a logit per head that takes weight and carries no value.
        blocks: block sizes; default_blocks picks them for the chip.
        chip: "v4", "v5e", "v5p", "v6e" or "7x", where that is not JAX's default device (compiling ahead of time).
        interpret: False, or pltpu.InterpretParams to run on a CPU.

    Returns [tokens, query heads, head_dim] in q's dtype; rows past cu_q_lens[num_seqs] are zero.

    Raises ValueError for shapes, dtypes or options that the kernel cannot take. Values of the index arrays are not
    checked.
    """
    return _call(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks,
        sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout, blocks, chip, interpret, False,
    )[0]  # fmt: skip


def ragged_paged_attention_lse(
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
    blocks: Blocks | None = None,
    chip: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """ragged_paged_attention and the natural log of the softmax denominator, sink included.

    The second result is float32 [tokens, query heads]; -inf in rows that belong to no sequence. Arguments and errors
    are those of ragged_paged_attention.
    """
    out, lse = _call(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks,
        sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout, blocks, chip, interpret, True,
    )  # fmt: skip
    return out, lse


def _call(
    q: jax.Array,
    kv_pages: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    sinks: jax.Array | None,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    mask_value: float | None,
    k_scale: float | None,
    v_scale: float | None,
    kv_layout: str,
    blocks: Blocks | None,
    chip: str | None,
    interpret: Any,
    with_lse: bool,
) -> tuple[jax.Array, ...]:
    shape = check(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks,
        sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout,
    )  # fmt: skip
    tokens, heads, head_dim = q.shape
    if tokens == 0 or kv_lens.shape[0] == 0 or kv_pages.shape[0] == 0:
        empty = jnp.zeros(q.shape, q.dtype)
        return (empty, jnp.full(q.shape[:2], -jnp.inf, jnp.float32)) if with_lse else (empty,)
    if sliding_window is not None and sliding_window >= page_indices.shape[1] * shape.page_size:
        sliding_window = None  # it hides nothing, and may be more than an int32 holds
    if blocks is None:
        blocks = default_blocks(shape, q.dtype, kv_pages.dtype, current_chip() if chip is None else chip, kv_layout)
    blocks = blocks.fitted(tokens, page_indices.shape[1] * shape.page_size, shape, kv_pages.dtype, kv_layout)
    scale = sm_scale * (1.0 if k_scale is None else k_scale)
    plan = Plan(
        tokens_per_block=blocks.tokens_per_block,
        tokens_per_tile=blocks.tokens_per_tile,
        kv_per_block=blocks.kv_per_block,
        kv_per_chunk=blocks.kv_per_chunk,
        query_heads=heads,
        kv_heads=shape.kv_heads,
        head_dim=head_dim,
        page_size=shape.page_size,
        pages_per_sequence=page_indices.shape[1],
        compute_dtype=jnp.dtype(q.dtype),
        q_scale=scale * LOG2_E if soft_cap is None else scale / soft_cap,
        logit_cap=None if soft_cap is None else soft_cap * LOG2_E,
        sliding_window=sliding_window,
        out_scale=1.0 if v_scale is None else v_scale,
        with_lse=with_lse,
        with_sinks=sinks is not None,
        layout=kv_layout,
        kv_dtype=jnp.dtype(kv_pages.dtype),
        packed_input=kv_layout == NHD and bool(interpret) and kv_pages.dtype.itemsize < 4,
    )
    if kv_layout == NHD:
        # Rows of a page one under the other: on a TPU the same bytes where head_dim is one register wide.
        kv_pages = kv_pages.reshape(shape.pages, shape.page_size * 2 * shape.kv_heads, head_dim)
        if plan.packed_input:
            kv_pages = pack_words(kv_pages)
    inputs = [q, kv_pages]
    block = (blocks.tokens_per_block, heads, head_dim)
    in_specs = [
        pl.BlockSpec(block, lambda i, *_: (i, 0, 0)),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    if sinks is not None:
        inputs.append(jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], (heads, 128)))
        in_specs.append(pl.BlockSpec((heads, 128), lambda i, *_: (0, 0)))
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    out_specs = [pl.BlockSpec(block, lambda i, *_: (i, 0, 0))]
    if with_lse:
        out_shape.append(jax.ShapeDtypeStruct((tokens, heads), jnp.float32))
        out_specs.append(pl.BlockSpec(block[:2], lambda i, *_: (i, 0)))
    body: Callable[..., None] = functools.partial(kernel, plan=plan)
    call = pl.pallas_call(
        body,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(tokens, blocks.tokens_per_block),),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_shapes(plan),
        ),
        # Steps share nothing, so chips with two cores per device can split them.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=blocks.vmem_limit_bytes,
            # Half of what it takes to start a copy; page numbers are held inside the cache by the kernel itself.
            disable_bounds_checks=True,
        ),
        name="ragged_paged_attention",
        interpret=interpret,
    )
    # A one-dimensional table: rows of a two-dimensional one would be padded to 128 entries in scalar memory.
    return tuple(call(kv_lens, page_indices.reshape(-1), cu_q_lens, num_seqs, *inputs))
