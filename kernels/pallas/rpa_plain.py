"""Ragged paged attention and the cache updates in jax.numpy alone, for platforms on which no Pallas TPU kernel runs.

Shapes are static and lengths are data, as in the TPU kernel: a loop over sequences, over tiles of their query rows and
over blocks of the pages that such a tile sees, with the online softmax. So the work is that of the ragged batch, not of
the padded one, and at most one block of scores exists at a time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .rpa_check import CacheShape, cache_sizes, check_call, check_new
from .rpa_pages import HND
from .rpa_plan import MASKED
from .rpa_update import combined_rows

ROWS = 16  # query tokens per tile
POSITIONS = 256  # cached tokens per block, rounded to whole pages


class Arrays(NamedTuple):
    """The arrays of one call of opreg::ragged_paged_attention."""

    q: jax.Array
    kv_pages: jax.Array
    kv_lens: jax.Array
    page_indices: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array
    sinks: jax.Array | None


class Options(NamedTuple):
    """What is fixed when the call is traced; a scale of None is 1."""

    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    mask_value: float | None
    k_scale: float | None
    v_scale: float | None
    kv_layout: str


def attend(arrays: Arrays, options: Options) -> tuple[jax.Array, jax.Array]:
    """Output [tokens, query heads, head_dim] in q's dtype and float32 log-sum-exp [tokens, query heads].

    Index entries that no sequence owns may hold anything, and so may pages: nothing of them gets into the result.

    Raises ValueError for shapes, dtypes and options that mean nothing.
    """
    shape = check_call(*arrays, *options)
    tokens, heads, head_dim = arrays.q.shape
    # A whole tile of spare rows: a slice that reached past the end would be moved back.
    out = jnp.zeros((tokens + ROWS, heads, head_dim), arrays.q.dtype)
    lse = jnp.full((tokens + ROWS, heads), -jnp.inf, jnp.float32)
    if tokens and shape.pages and arrays.page_indices.size:
        padded = arrays._replace(q=jnp.pad(arrays.q, ((0, ROWS), (0, 0), (0, 0))))
        count = jnp.clip(arrays.num_seqs[0], 0, arrays.kv_lens.shape[0])
        out, lse = lax.fori_loop(jnp.int32(0), count, _Loops(padded, shape, options).sequence, (out, lse))
    return out[:tokens], lse[:tokens]


def attend_update(arrays: Arrays, k: jax.Array, v: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """The cache with the step's K and V, and the output of attend over it.

    Raises ValueError as attend does, and for k and v that do not fit.
    """
    shape = check_call(*arrays, *options)
    check_new(k, v, arrays.kv_pages, options.kv_layout, arrays.q.shape[0])
    kv_pages = write_slots(k, v, arrays.kv_pages, _step_slots(arrays, shape), options)
    return kv_pages, attend(arrays._replace(kv_pages=kv_pages), options)[0]


class _Loops(NamedTuple):
    """The loops of one call from the outermost in; q has a tile of spare rows."""

    arrays: Arrays
    shape: CacheShape
    options: Options

    @property
    def pages_per_block(self) -> int:
        return max(1, min(POSITIONS // self.shape.page_size, self.arrays.page_indices.shape[1]))

    def sequence(self, i: Any, results: tuple[jax.Array, jax.Array]) -> Any:
        """All tiles of sequence i."""
        start, kv_len = self.arrays.cu_q_lens[i], self.arrays.kv_lens[i]
        q_len = jnp.where(kv_len > 0, self.arrays.cu_q_lens[i + 1] - start, 0)
        tiles = (q_len + (ROWS - 1)) // ROWS

        def one(tile: Any, results: Any) -> Any:
            row = tile * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
            at = start + tile * ROWS
            new = self.tile(i, at, kv_len - q_len + row, kv_len)
            real = row < q_len
            # Rows past the end of the sequence are those of the next one, or padding.
            return tuple(
                lax.dynamic_update_slice_in_dim(
                    whole, jnp.where(mask, part, lax.dynamic_slice_in_dim(whole, at, ROWS)), at, 0
                )
                for whole, part, mask in zip(results, new, (real[:, None, None], real[:, None]), strict=True)
            )

        return lax.fori_loop(jnp.int32(0), tiles, one, results)

    def tile(self, i: Any, at: Any, position: jax.Array, kv_len: Any) -> tuple[jax.Array, jax.Array]:
        """Output and log-sum-exp of the query rows from `at` on, which stand at `position`."""
        shape, options = self.shape, self.options
        heads, head_dim = shape.query_heads, shape.head_dim
        span = self.pages_per_block * shape.page_size
        low = jnp.int32(0)
        window = options.sliding_window
        if window is not None and window >= self.arrays.page_indices.shape[1] * shape.page_size:
            window = None  # it hides nothing, and may be more than an int32 holds
        if window is not None:
            low = jnp.maximum(position[0] - (window - 1), 0)
        high = jnp.minimum(position[-1] + 1, kv_len)
        # [kv heads, query heads per kv head, rows, head_dim]
        query = lax.dynamic_slice_in_dim(self.arrays.q, at, ROWS).astype(jnp.float32)
        query = query.reshape(ROWS, shape.kv_heads, -1, head_dim).transpose(1, 2, 0, 3)

        def block(b: Any, state: Any) -> Any:
            m, l, acc = state
            keys, values, seen_at = self.block(i, b, low, high)
            logits = jnp.einsum("hgrd,hcd->hgrc", query, keys, precision=lax.Precision.HIGHEST)
            logits = logits * (options.sm_scale * _or_one(options.k_scale))
            if options.soft_cap is not None:
                logits = jnp.tanh(logits / options.soft_cap) * options.soft_cap
            seen = seen_at <= position[:, None]
            if window is not None:
                seen = seen & (seen_at > position[:, None] - window)
            logits = jnp.where(seen, logits, MASKED)
            m_new = jnp.maximum(m, logits.max(-1))
            weights = jnp.where(seen, jnp.exp(logits - m_new[..., None]), 0.0)
            alpha = jnp.exp(m - m_new)
            mixed = jnp.einsum("hgrc,hcd->hgrd", weights, values, precision=lax.Precision.HIGHEST)
            return m_new, l * alpha + weights.sum(-1), acc * alpha[..., None] + mixed

        rows = query.shape[:3]
        zero = jnp.zeros(rows, jnp.float32)
        state = zero + MASKED, zero, jnp.zeros((*rows, head_dim), jnp.float32)
        m, l, acc = lax.fori_loop(low // span, (high + (span - 1)) // span, block, state)
        if self.arrays.sinks is not None:
            # A logit that takes weight and carries no value.
            sink = self.arrays.sinks.astype(jnp.float32).reshape(shape.kv_heads, -1, 1)
            top = jnp.maximum(m, sink)
            alpha = jnp.exp(m - top)
            m, l, acc = top, l * alpha + jnp.exp(sink - top), acc * alpha[..., None]
        some = l > 0.0
        scale = _or_one(options.v_scale) / jnp.where(some, l, 1.0)
        out = (acc * scale[..., None]).transpose(2, 0, 1, 3).reshape(ROWS, heads, head_dim)
        lse = jnp.where(some, m + jnp.log(jnp.where(some, l, 1.0)), -jnp.inf)
        return out.astype(self.arrays.q.dtype), lse.transpose(2, 0, 1).reshape(ROWS, heads)

    def block(self, i: Any, b: Any, low: Any, high: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys and values [kv heads, positions, head_dim] of one block in float32, and the positions.

        Values outside low to high are zero: what lies there may be NaN, and no weight is small enough for that.
        """
        shape, n = self.shape, self.pages_per_block
        column = b * n + jnp.arange(n, dtype=jnp.int32)
        pages = self.arrays.page_indices[i, jnp.clip(column, 0, self.arrays.page_indices.shape[1] - 1)]
        picked = self.arrays.kv_pages[jnp.clip(pages, 0, shape.pages - 1)]
        if self.options.kv_layout == HND:
            picked = picked.swapaxes(1, 2)
        picked = picked.reshape(n * shape.page_size, shape.kv_heads, 2, shape.head_dim).astype(jnp.float32)
        keys, values = picked.transpose(2, 1, 0, 3)
        at = b * (n * shape.page_size) + jnp.arange(n * shape.page_size, dtype=jnp.int32)
        return keys, jnp.where(((at >= low) & (at < high))[:, None], values, 0.0), at


def write_slots(k: jax.Array, v: jax.Array, kv_pages: jax.Array, slots: jax.Array, options: Options) -> jax.Array:
    """The cache with each token's K and V in its slot; a token whose slot is not there is left out."""
    pages = kv_pages.shape[0]
    _, page_size, _, _ = cache_sizes(kv_pages, options.kv_layout)
    rows = combined_rows(k, v, kv_pages.dtype, options.k_scale, options.v_scale)
    # A negative index would count from the end; one past the end is dropped.
    page, offset = jnp.where(slots < 0, pages, slots // page_size), slots % page_size
    cells = kv_pages.at[page, :, offset] if options.kv_layout == HND else kv_pages.at[page, offset]
    return cells.set(rows, mode="drop")


def _step_slots(arrays: Arrays, shape: CacheShape) -> jax.Array:
    """The slot of every token of a step, -1 for padding: row r of sequence i stands at kv_lens[i] - q_len + r."""
    tokens, (room, width) = arrays.q.shape[0], arrays.page_indices.shape
    if not room or not width:
        return jnp.full((tokens,), -1, jnp.int32)
    token = jnp.arange(tokens, dtype=jnp.int32)
    count = jnp.minimum(arrays.num_seqs[0], room)
    # The first sequence that ends past the token; entries from `count` on may hold anything.
    ends = jnp.where(jnp.arange(room, dtype=jnp.int32) < count, arrays.cu_q_lens[1:], 2**31 - 1)
    sequence = jnp.searchsorted(ends, token, side="right").astype(jnp.int32)
    i = jnp.minimum(sequence, room - 1)
    position = arrays.kv_lens[i] - (arrays.cu_q_lens[i + 1] - token)
    page = arrays.page_indices[i, jnp.clip(position // shape.page_size, 0, width - 1)]
    real = (sequence < count) & (position >= 0) & (page >= 0) & (page < shape.pages)
    return jnp.where(real, page * shape.page_size + position % shape.page_size, -1)


def _or_one(scale: float | None) -> float:
    return 1.0 if scale is None else scale
