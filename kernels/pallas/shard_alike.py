"""Two arrays that the partitioner is to split alike, as a JAX function."""

import jax
from jax.experimental.shard_alike import shard_alike as _shard_alike


def shard_alike(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x and y, whose shardings are made the same."""
    alike: tuple[jax.Array, jax.Array] = _shard_alike(x, y)
    return alike
