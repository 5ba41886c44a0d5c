"""Which sequences have rows in a grid step's block of tokens, from the lengths in scalar memory."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


class Batch:
    """The lengths, seen from one block of tokens."""

    def __init__(self, kv_lens: Any, cu_q_lens: Any, num_seqs: Any, tokens_per_block: int) -> None:
        self.kv_lens, self.cu_q_lens = kv_lens, cu_q_lens
        self.num_seqs = num_seqs[0]
        self.first_token = pl.program_id(0) * tokens_per_block
        self.end_token = jnp.minimum(self.first_token + tokens_per_block, cu_q_lens[self.num_seqs])

    def first_sequence(self) -> Any:
        """The first sequence that ends past the block's first token, by bisection of cu_q_lens."""

        def halve(bounds: Any) -> Any:
            low, high = bounds
            middle = lax.shift_right_logical(low + high, 1)
            past = self.cu_q_lens[middle + 1] > self.first_token
            return jnp.where(past, low, middle + 1), jnp.where(past, middle, high)

        low, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (jnp.int32(0), self.num_seqs))
        return self.skip_empty(low)

    def skip_empty(self, sequence: Any) -> Any:
        """The first sequence from `sequence` on that has rows and keys."""

        def empty(s: Any) -> Any:
            at = jnp.minimum(s, self.num_seqs - 1)
            no_rows = self.cu_q_lens[at + 1] <= self.cu_q_lens[at]
            return (s < self.num_seqs) & (no_rows | (self.kv_lens[at] <= 0))

        return lax.while_loop(empty, lambda s: s + 1, sequence)

    def is_here(self, sequence: Any) -> Any:
        """Whether the sequence starts before the end of the block."""
        start = self.cu_q_lens[jnp.minimum(sequence, self.num_seqs)]
        return (sequence < self.num_seqs) & (start < self.end_token)
