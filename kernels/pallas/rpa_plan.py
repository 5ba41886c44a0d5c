"""What is fixed when the ragged paged attention kernel is traced, and the arithmetic that both of its paths share.

Everything is kept in powers of two: `Plan.q_scale` carries the softmax scale times log2(e), so `exp2` needs no further
product.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# Below every real logit, yet finite: the difference of two masked values must be 0 and not NaN.
MASKED = -1e30

# Query rows are kept in groups of this many tokens: the height of a packed bf16 register tile.
GROUP = 16


@dataclass(frozen=True)
class Plan:
    """Sizes in tokens are those of Blocks; scales are in powers of two."""

    tokens_per_block: int
    tokens_per_tile: int
    kv_per_block: int
    kv_per_chunk: int
    query_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages_per_sequence: int
    compute_dtype: Any
    kv_dtype: Any
    layout: str
    packed_input: bool  # token-major pages already come as 32-bit words (interpret mode)
    q_scale: float  # with a cap: relative to the cap
    logit_cap: float | None
    sliding_window: int | None
    out_scale: float
    with_lse: bool
    with_sinks: bool

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    @property
    def stage_stride(self) -> int:
        """Rows per token in the staging buffer; odd, so that strided accesses spread over the banks."""
        return self.query_heads | 1

    @property
    def precision(self) -> lax.Precision | None:
        """Float32 inputs ask for float32 products; the default would round them to bf16."""
        return lax.Precision.HIGHEST if self.compute_dtype == jnp.float32 else None


@dataclass(frozen=True)
class Span:
    """Rows of one sequence inside one block, and the cache positions that they see; all traced int32."""

    sequence: jax.Array
    first_row: jax.Array  # in the block
    end_row: jax.Array
    first_position: jax.Array  # cache position of the first row
    low: jax.Array  # first position to read; start of a page
    high: jax.Array  # one past the last position that is visible
    blocks: jax.Array  # KV blocks from low to high


def floor_div(a: Any, b: int) -> Any:
    """a // b for a >= 0: the general form costs a sign correction on the scalar unit."""
    return lax.div(a, jnp.int32(b))


def ceil_div(a: Any, b: int) -> Any:
    """The least whole number of b that covers a >= 0."""
    return lax.div(a + jnp.int32(b - 1), jnp.int32(b))


def lanes(x: jax.Array, width: int) -> jax.Array:
    """`x`, equal in every lane, at another width."""
    if width == x.shape[1]:
        return x
    return x[:, :width] if width < x.shape[1] else jnp.broadcast_to(x[:, :1], (x.shape[0], width))


def dot_nt(plan: Plan, a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b.T in float32."""
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=plan.precision, preferred_element_type=jnp.float32)


def dot_nn(plan: Plan, a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in float32."""
    dims = (((1,), (0,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=plan.precision, preferred_element_type=jnp.float32)


def unseen(plan: Plan, ahead: jax.Array, limit: Any) -> jax.Array:
    """Where a column, `ahead` of its row by so much, is past the row's own position or before its window.

    `limit` is the position of row 0 less that of column 0.
    """
    hidden: jax.Array = ahead > limit
    if plan.sliding_window is not None:
        hidden = hidden | (ahead <= limit - plan.sliding_window)
    return hidden


def softmax_step(
    plan: Plan, logits: jax.Array, hidden: jax.Array | None, m: jax.Array, l: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Online softmax (Milakov & Gimelshein 2018) in powers of two: new m, new l, weights, factor of the old sums.

    m [rows, 128] holds a row's maximum in every lane; l [rows, 128] a sum per lane, added up only at the end.
    """
    if plan.logit_cap is not None:
        logits = jnp.tanh(logits) * plan.logit_cap
    if hidden is not None:
        logits = jnp.where(hidden, MASKED, logits)
    width = logits.shape[1]
    if width % 128:
        # Narrower than a register: the sum of the row goes to lane 0.
        m_new = jnp.maximum(m, jnp.max(logits, axis=1, keepdims=True))
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(logits - m_new[:, :1])
        first = lax.broadcasted_iota(jnp.int32, l.shape, 1) == 0
        return m_new, l * alpha + jnp.where(first, jnp.sum(p, axis=1, keepdims=True), 0.0), p, alpha
    columns = [logits[:, i : i + 128] for i in range(0, width, 128)]
    # Registers first, lanes last: a reduction over lanes costs as much for one register as for a row of them.
    m_new = jnp.maximum(m, jnp.max(functools.reduce(jnp.maximum, columns), axis=1, keepdims=True))
    alpha = jnp.exp2(m - m_new)
    parts = [jnp.exp2(column - m_new) for column in columns]
    return m_new, functools.reduce(jnp.add, parts, l * alpha), jnp.concatenate(parts, axis=1), alpha


def finish(
    plan: Plan, m: jax.Array, l: jax.Array, acc: jax.Array, sink: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Output rows, and the natural log-sum-exp [rows, 128] in every lane; a row that saw nothing is 0 and -inf.

    `sink` is [1 or rows, 128]. Values stay in all lanes: to take one out and spread it again costs two moves across
    lanes.
    """
    l = jnp.broadcast_to(jnp.sum(l, axis=1, keepdims=True), l.shape)
    seen = m > 0.5 * MASKED
    l = jnp.where(seen, l, 0.0)
    scale = jnp.where(seen, plan.out_scale, 0.0)
    if sink is not None:
        # A logit that takes weight and carries no value.
        sink = sink * LOG2_E
        top = jnp.maximum(m, sink)
        alpha = jnp.exp2(m - top)
        scale, l, m = scale * alpha, l * alpha + jnp.exp2(sink - top), top
    some = l > 0.0
    scale = jnp.where(some, scale / jnp.where(some, l, 1.0), 0.0)
    lse = jnp.where(some, (m + jnp.log2(l)) * LN_2, -jnp.inf) if plan.with_lse else m
    # Rows of the padding may have met anything, so 0 * acc is not always 0.
    return jnp.where(lanes(some, acc.shape[1]), acc * lanes(scale, acc.shape[1]), 0.0), lse
