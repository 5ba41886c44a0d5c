"""Sum of rows by segment, as a JAX function."""

import jax
import jax.numpy as jnp


def segment_sum(data: jax.Array, segment_ids: jax.Array, num_segments: int) -> jax.Array:
    """Rows of `data` summed by id; ids outside 0 to num_segments - 1 are left out. Floats are summed in fp32."""
    wide = jnp.promote_types(data.dtype, jnp.float32) if jnp.issubdtype(data.dtype, jnp.inexact) else data.dtype
    # A negative id would count from the end.
    ids = jnp.where(segment_ids < 0, num_segments, segment_ids)
    return jax.ops.segment_sum(data.astype(wide), ids, num_segments).astype(data.dtype)
