"""Matrix products of consecutive groups of rows with one matrix each: jax.lax.ragged_dot, and megablox for TPU."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm

TILE = 128


def _clear_tail(out: jax.Array, group_sizes: jax.Array) -> jax.Array:
    rows = jnp.arange(out.shape[0])[:, None]
    return jnp.where(rows < group_sizes.sum(), out, 0)


def ragged_dot(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """lhs [m, k], rhs [g, k, n], group_sizes [g] -> [m, n]; rows past the last group are zero."""
    out = jax.lax.ragged_dot(lhs, rhs, group_sizes.astype(jnp.int32), preferred_element_type=jnp.float32)
    return _clear_tail(out, group_sizes).astype(lhs.dtype)


def megablox(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The same by jax's Pallas kernel; interpreted where it is not lowered for TPU. m, k and n are multiples of 128."""
    sizes = group_sizes.astype(jnp.int32)
    # The kernel leaves rows past the last group unwritten, and wants every row to belong to a group.
    sizes = sizes.at[-1].add(lhs.shape[0] - sizes.sum())

    def run(interpret: bool, *arrays: jax.Array) -> jax.Array:
        out: jax.Array = gmm(*arrays, jnp.float32, (TILE, TILE, TILE), interpret=interpret)
        return out

    out: jax.Array = jax.lax.platform_dependent(lhs, rhs, sizes, tpu=partial(run, False), default=partial(run, True))
    return _clear_tail(out, group_sizes).astype(lhs.dtype)
