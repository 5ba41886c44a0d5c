"""The body of the ragged paged attention kernel: one grid step owns one block of query tokens.

A step walks the sequences that have rows in its block. Pages of a sequence arrive by DMA into one of two buffers while
the other is worked on, across the borders of sequences too. A sequence with one row in the block takes the decode
path, any other the prefill path. Nothing is prepared outside: which sequences, which pages and which masks are worked
out from the lengths in scalar memory.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .rpa_batch import Batch
from .rpa_decode import decode
from .rpa_pages import PageReader
from .rpa_plan import GROUP, Plan, Span, ceil_div, floor_div
from .rpa_prefill import prefill

# Page copies started per turn of the loop: a turn alone is bound by its latency, not by its instructions.
UNROLL = 4


def scratch_shapes(plan: Plan) -> list[Any]:
    """The kernel's scratch, in the order of its last arguments."""
    rows = plan.tokens_per_block * plan.group_size
    reader = PageReader(plan.layout, plan.kv_heads, plan.kv_dtype, plan.packed_input)
    f32 = jnp.float32
    return [
        pltpu.VMEM(reader.buffer_shape(plan.kv_per_block, plan.head_dim), reader.buffer_dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((-(-plan.head_dim // 128), GROUP * plan.stage_stride, min(plan.head_dim, 128)), f32),
        pltpu.VMEM((plan.kv_heads, rows, plan.head_dim), plan.compute_dtype),
        pltpu.VMEM((plan.kv_heads, rows, 128), f32),
        pltpu.VMEM((plan.kv_heads, rows, 128), f32),
        pltpu.VMEM((plan.kv_heads, rows, plan.head_dim), f32),
        pltpu.VMEM((plan.query_heads, 128), f32),
        pltpu.VMEM((plan.query_heads, 128), f32),
        pltpu.VMEM((plan.query_heads, plan.head_dim), f32),
    ]


class Step(Batch):
    """The refs of one grid step, and what both paths ask of them."""

    def __init__(self, plan: Plan, refs: list[Any]) -> None:
        self.plan = plan
        self.pages = PageReader(plan.layout, plan.kv_heads, plan.kv_dtype, plan.packed_input)
        kv_lens, self.page_indices, cu_q_lens, num_seqs, self.q, self.kv_pages = refs[:6]
        super().__init__(kv_lens, cu_q_lens, num_seqs, plan.tokens_per_block)
        rest = refs[6:]
        self.sinks: Any = rest.pop(0) if plan.with_sinks else None
        self.out = rest.pop(0)
        self.lse: Any = rest.pop(0) if plan.with_lse else None
        self.buffer, self.semaphores, self.stage = rest[:3]
        self.q_rows, self.m, self.l, self.acc = rest[3:7]  # prefill: head-major
        self.one_m, self.one_l, self.one_acc = rest[7:]  # decode

    def run(self) -> None:
        """All sequences of the block; rows that belong to none are zero."""
        self.out[...] = jnp.zeros(self.out.shape, self.out.dtype)
        if self.lse is not None:
            self.lse[...] = jnp.full(self.lse.shape, -jnp.inf, jnp.float32)

        @pl.when(self.first_token < self.end_token)
        def _() -> None:
            first = self.first_sequence()

            @pl.when(self.is_here(first))
            def _() -> None:
                self.start_copies(self.span(first), 0, jnp.int32(0))

            def one(state: Any) -> Any:
                sequence, slot = state
                span, following = self.span(sequence), self.skip_empty(sequence + 1)
                slot = lax.cond(
                    span.end_row - span.first_row == 1,
                    lambda: decode(self, span, slot, following),
                    lambda: prefill(self, span, slot, following),
                )
                return following, slot

            lax.while_loop(lambda state: self.is_here(state[0]), one, (first, jnp.int32(0)))

    def span(self, sequence: Any) -> Span:
        """The sequence's rows in this block and what they see."""
        plan = self.plan
        start, end = self.cu_q_lens[sequence], self.cu_q_lens[sequence + 1]
        first, last = jnp.maximum(start, self.first_token), jnp.minimum(end, self.end_token)
        shift = self.kv_lens[sequence] - end  # from token index to cache position
        low = jnp.int32(0)
        if plan.sliding_window is not None:
            oldest = jnp.maximum(first + shift - plan.sliding_window + 1, 0)
            low = floor_div(oldest, plan.page_size) * plan.page_size
        high = jnp.maximum(last + shift, low + 1)
        blocks = ceil_div(high - low, plan.kv_per_block)
        return Span(sequence, first - self.first_token, last - self.first_token, first + shift, low, high, blocks)

    def page_count(self, span: Span, block: Any) -> Any:
        """Pages of the block that hold anything visible."""
        left = span.high - span.low - block * self.plan.kv_per_block
        return jnp.minimum(ceil_div(left, self.plan.page_size), self.plan.kv_per_block // self.plan.page_size)

    def start_copies(self, span: Span, block: Any, slot: Any) -> None:
        """Start the copies of one block's pages."""
        plan = self.plan
        count = self.page_count(span, block)
        first = span.low + block * plan.kv_per_block
        entry = span.sequence * plan.pages_per_sequence + floor_div(first, plan.page_size)

        def one(i: Any, carry: Any) -> Any:
            # A page that does not exist would stop the chip; what is read for it is as meaningless as its number.
            page = jnp.clip(self.page_indices[entry + i], 0, self.kv_pages.shape[0] - 1)
            for source, target in self.pages.page_refs(self.kv_pages, self.buffer, page, slot, i, plan.page_size):
                pltpu.make_async_copy(source, target, self.semaphores.at[slot]).start()
            return carry

        turn = min(UNROLL, plan.kv_per_block // plan.page_size)

        def several(i: Any, carry: Any) -> Any:
            for j in range(turn):
                one(i * turn + j, 0)
            return carry

        whole = floor_div(count, turn)
        lax.fori_loop(0, whole, several, 0)
        if turn > 1:
            lax.fori_loop(whole * turn, count, one, 0)

    def start_next(self, span: Span, block: Any, slot: Any, following: Any) -> None:
        """Start the copies of what comes next: the sequence's next block, or the first of the next sequence."""
        more = block + 1 < span.blocks

        @pl.when(more)
        def _() -> None:
            self.start_copies(span, block + 1, 1 - slot)

        @pl.when(jnp.logical_not(more) & self.is_here(following))
        def _() -> None:
            self.start_copies(self.span(following), 0, 1 - slot)

    def wait_copies(self, span: Span, block: Any, slot: Any) -> None:
        """Wait for all pages of a block: semaphores count bytes, so one wait per bit of the page count is enough."""
        count = self.page_count(span, block)
        bit = 1
        while bit <= self.plan.kv_per_block // self.plan.page_size:

            @pl.when(count & bit != 0)
            def _(bit: int = bit) -> None:
                pages = self.pages.buffer_pages(self.buffer, slot, bit, self.plan.page_size)
                pltpu.make_async_copy(pages, pages, self.semaphores.at[slot]).wait()

            bit *= 2

    def clear_tail(self, slot: Any, used: Any, end: Any) -> None:
        """Zero the values of tokens `used` to `end` of a block: 0 * NaN from a stale buffer or page would be NaN."""
        unit = self.pages.rows_per_tile

        def one(i: Any, carry: Any) -> Any:
            self.pages.clear_values(self.buffer, slot, pl.multiple_of(i * unit, unit), used - i * unit)
            return carry

        lax.fori_loop(floor_div(used, unit), floor_div(end, unit), one, 0)


def kernel(*refs: Any, plan: Plan) -> None:
    """Entry of pallas_call: kv_lens, page_indices, cu_q_lens, num_seqs, q, kv_pages, [sinks], out, [lse], scratch."""
    Step(plan, list(refs)).run()
