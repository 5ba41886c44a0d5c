"""The body of the ragged paged attention kernel: one grid step owns one block of query tokens.

A step walks the sequences that have rows in its block. Pages of a sequence arrive by DMA into one of two buffers while the
other is worked on, across the borders of sequences too. A sequence with one row in the block takes the decode path (all heads in
one matrix product per chunk); any other takes the prefill path (tiles of rows per KV head).

Everything is kept in powers of two: `Plan.q_scale` carries the softmax scale times log2(e), so `exp2` needs no further product.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .rpa_pages import PageReader

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# Below every real logit, yet finite: the difference of two masked values must be 0 and not NaN.
MASKED = -1e30

# Rows (tokens x query heads of a KV head) in one product of the prefill path, and how many products run ahead of their softmax.
ROWS_PER_PRODUCT = 256
AHEAD = 2

# Page copies started per turn of the loop: a turn alone is bound by its latency, not by its instructions.
UNROLL = 4

# Query rows are kept in groups of this many tokens: the height of a packed bf16 register tile.
GROUP = 16


@dataclass(frozen=True)
class Plan:
    """Everything that is fixed when the kernel is traced."""

    tokens_per_block: int
    tokens_per_tile: int  # rows of a sequence that does not fill its block are worked on in tiles of this many tokens
    kv_per_block: int
    kv_per_chunk: int  # what one decode product covers
    query_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages_per_sequence: int
    compute_dtype: jnp.dtype
    q_scale: float
    logit_cap: float | None  # in powers of two; q_scale is then relative to the cap
    sliding_window: int | None
    out_scale: float
    with_lse: bool
    with_sinks: bool
    layout: str
    kv_dtype: jnp.dtype
    packed_input: bool  # token-major pages already come as 32-bit words (interpret mode)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    @property
    def stage_stride(self) -> int:
        """Rows from one token to the next in the staging buffer; odd, so that strided accesses spread over the banks."""
        return self.query_heads | 1

    @property
    def precision(self) -> lax.Precision | None:
        """Float32 inputs ask for float32 products; the default would round them to bf16."""
        return lax.Precision.HIGHEST if self.compute_dtype == jnp.float32 else None


def scratch_shapes(plan: Plan) -> list[object]:
    """The kernel's scratch, in the order of its last arguments."""
    rows = plan.tokens_per_block * plan.group_size
    reader = PageReader(plan.layout, plan.kv_heads, plan.kv_dtype, plan.packed_input)
    f32 = jnp.float32
    return [
        pltpu.VMEM(reader.buffer_shape(plan.kv_per_block, plan.head_dim), reader.buffer_dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((GROUP * plan.stage_stride, plan.head_dim), f32),
        pltpu.VMEM((plan.kv_heads, rows, plan.head_dim), plan.compute_dtype),
        pltpu.VMEM((plan.kv_heads, rows, 128), f32),
        pltpu.VMEM((plan.kv_heads, rows, 128), f32),
        pltpu.VMEM((plan.kv_heads, rows, plan.head_dim), f32),
        pltpu.VMEM((2, plan.query_heads, 128), f32),
        pltpu.VMEM((plan.query_heads, plan.head_dim), f32),
    ]


@dataclass(frozen=True)
class Span:
    """Rows of one sequence inside one block, and the cache positions that they can see (traced scalars)."""

    sequence: jax.Array
    first_row: jax.Array  # in the block
    end_row: jax.Array
    first_position: jax.Array  # cache position of the first row
    low: jax.Array  # first position to read; start of a page
    high: jax.Array  # one past the last position that is visible
    blocks: jax.Array


class Step:
    """One grid step: refs and traced scalars with the methods that use them."""

    def __init__(
        self, plan: Plan, kv_lens, page_indices, cu_q_lens, num_seqs, q, kv_pages, sinks, out, lse, scratch
    ) -> None:
        self.plan = plan
        self.kv_lens, self.page_indices, self.cu_q_lens = kv_lens, page_indices, cu_q_lens
        self.q, self.sinks, self.out, self.lse = q, sinks, out, lse
        self.buffer, self.semaphores, self.stage, self.q_rows, self.m, self.l, self.acc, self.ml_one, self.acc_one = (
            scratch
        )
        self.pages = PageReader(plan.layout, plan.kv_heads, plan.kv_dtype, plan.packed_input)
        self.kv_pages = kv_pages
        self.first_token = pl.program_id(0) * plan.tokens_per_block
        self.num_seqs = num_seqs[0]
        self.end_token = jnp.minimum(self.first_token + plan.tokens_per_block, cu_q_lens[self.num_seqs])

    # Which sequences

    def first_sequence(self) -> jax.Array:
        """The first sequence that ends past the block's first token, by bisection of cu_q_lens."""

        def halve(bounds):
            low, high = bounds
            middle = lax.shift_right_logical(low + high, 1)
            past = self.cu_q_lens[middle + 1] > self.first_token
            return jnp.where(past, low, middle + 1), jnp.where(past, middle, high)

        low, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (jnp.int32(0), self.num_seqs))
        return self.skip_empty(low)

    def skip_empty(self, sequence) -> jax.Array:
        """The first sequence from `sequence` on that has rows and keys."""

        def empty(s):
            at = jnp.minimum(s, self.num_seqs - 1)
            no_rows = self.cu_q_lens[at + 1] <= self.cu_q_lens[at]
            return (s < self.num_seqs) & (no_rows | (self.kv_lens[at] <= 0))

        return lax.while_loop(empty, lambda s: s + 1, sequence)

    def is_here(self, sequence) -> jax.Array:
        """Whether the sequence starts before the end of the block."""
        start = self.cu_q_lens[jnp.minimum(sequence, self.num_seqs)]
        return (sequence < self.num_seqs) & (start < self.end_token)

    def span(self, sequence) -> Span:
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

    # Pages

    def page_count(self, span: Span, block):
        """Pages of the block that hold anything visible."""
        left = span.high - span.low - block * self.plan.kv_per_block
        return jnp.minimum(ceil_div(left, self.plan.page_size), self.plan.kv_per_block // self.plan.page_size)

    def start_copies(self, span: Span, block, slot) -> None:
        """Start the copies of one block's pages."""
        plan = self.plan
        count = self.page_count(span, block)
        first = span.low + block * plan.kv_per_block
        entry = span.sequence * plan.pages_per_sequence + floor_div(first, plan.page_size)

        def one(i, carry):
            # A page that does not exist would stop the chip; what is read for it is as meaningless as its number.
            page = jnp.clip(self.page_indices[entry + i], 0, self.kv_pages.shape[0] - 1)
            source, target = self.pages.page_refs(self.kv_pages, self.buffer, page, slot, i, plan.page_size)
            pltpu.make_async_copy(source, target, self.semaphores.at[slot]).start()
            return carry

        def several(i, carry):
            for j in range(UNROLL):
                one(i * UNROLL + j, 0)
            return carry

        whole = floor_div(count, UNROLL)
        lax.fori_loop(0, whole, several, 0)
        lax.fori_loop(whole * UNROLL, count, one, 0)

    def wait_copies(self, span: Span, block, slot) -> None:
        """Wait for all pages of a block: semaphores count bytes, so one wait per bit of the number of pages is enough."""
        plan = self.plan
        count = self.page_count(span, block)
        bit = 1
        while bit <= plan.kv_per_block // plan.page_size:

            @pl.when(count & bit != 0)
            def _(bit=bit):
                pages = self.pages.buffer_pages(self.buffer, slot, bit, plan.page_size)
                pltpu.make_async_copy(pages, pages, self.semaphores.at[slot]).wait()

            bit *= 2

    def start_next(self, span: Span, block, slot, following) -> None:
        """Start the copies of whatever comes after this block: this sequence's next one, or the next sequence's first."""
        more = block + 1 < span.blocks

        @pl.when(more)
        def _():
            self.start_copies(span, block + 1, 1 - slot)

        @pl.when(jnp.logical_not(more) & self.is_here(following))
        def _():
            self.start_copies(self.span(following), 0, 1 - slot)

    def clear_tail(self, slot, used, end) -> None:
        """Zero the values of tokens `used` to `end` of a block: 0 * NaN from a stale buffer or page would be NaN."""
        unit = self.pages.rows_per_tile
        first = floor_div(used, unit)

        def one(i, carry):
            self.pages.clear_values(self.buffer, slot, pl.multiple_of(i * unit, unit), used - i * unit)
            return carry

        lax.fori_loop(first, floor_div(end, unit), one, 0)

    # Prefill

    def gather_queries(self, span: Span) -> None:
        """Scale the span's query rows, turn them head-major, and reset their statistics."""
        plan, rows = self.plan, GROUP * self.plan.group_size
        stride = plan.stage_stride

        def one(i, carry):
            for t in range(GROUP):
                token = self.q[i * GROUP + t].astype(jnp.float32) * plan.q_scale
                self.stage[t * stride : t * stride + plan.query_heads, :] = token
            for head in range(plan.query_heads):
                h, g = divmod(head, plan.group_size)
                at = pl.ds(pl.multiple_of(i * rows + g * GROUP, GROUP), GROUP)
                picked = self.stage[pl.ds(head, GROUP, stride=stride), :]
                self.q_rows[h, at, :] = picked.astype(plan.compute_dtype)
            for h in range(plan.kv_heads):
                at = pl.ds(pl.multiple_of(i * rows, GROUP), rows)
                self.m[h, at, :] = jnp.full((rows, 128), MASKED, jnp.float32)
                self.l[h, at, :] = jnp.zeros((rows, 128), jnp.float32)
                self.acc[h, at, :] = jnp.zeros((rows, plan.head_dim), jnp.float32)
            return carry

        lax.fori_loop(floor_div(span.first_row, GROUP), ceil_div(span.end_row, GROUP), one, 0)

    def attend_tile(
        self, slot, tile, tokens: int, position_of_row_0, first_position, masked: bool
    ) -> None:
        """Fold one KV block into the statistics of `tokens` rows from row `tile * tokens` on.

        The tile is cut into products of ROWS_PER_PRODUCT rows of one KV head. Logits are asked for AHEAD products early, so that
        the matrix units work on the next ones while the vector units turn these into weights: 9,219 bundles on a v6e for 256
        tokens x 512 x 32/8 heads, 9,596 with whole heads and one ahead.
        """
        plan = self.plan
        part = min(tokens, max(ROWS_PER_PRODUCT // plan.group_size // GROUP, 1) * GROUP)
        part = part if tokens % part == 0 else GROUP
        rows, parts = part * plan.group_size, tokens // part

        def at(i: int):
            return pl.ds(pl.multiple_of((tile * parts + i) * rows, GROUP), rows)

        def hidden(i: int):
            if not masked:
                return None
            shape = (part // GROUP, plan.group_size, GROUP, plan.kv_per_block)
            column, row = lax.broadcasted_iota(jnp.int32, shape, 3), lax.broadcasted_iota(jnp.int32, shape, 2)
            ahead = column - row - lax.broadcasted_iota(jnp.int32, shape, 0) * GROUP
            limit = position_of_row_0 + (tile * parts + i) * part - first_position
            return self.unseen(ahead, limit).reshape(rows, plan.kv_per_block)

        @functools.cache
        def load(h: int):
            return self.pages.load(self.buffer, slot, h, 0, plan.kv_per_block, plan.compute_dtype)

        def logits(h: int, i: int):
            return dot_nt(plan, self.q_rows[h, at(i), :], load(h)[0])

        products = [(h, i) for h in range(plan.kv_heads) for i in range(parts)]
        early = [logits(*product) for product in products[:AHEAD]]
        for n, (h, i) in enumerate(products):
            now = early.pop(0)
            if n + AHEAD < len(products):
                early.append(logits(*products[n + AHEAD]))
            m, l, p, alpha = softmax_step(plan, now, hidden(i), self.m[h, at(i), :], self.l[h, at(i), :])
            self.m[h, at(i), :], self.l[h, at(i), :] = m, l
            pv = dot_nn(plan, p.astype(plan.compute_dtype), load(h)[1])
            self.acc[h, at(i), :] = self.acc[h, at(i), :] * lanes(alpha, plan.head_dim) + pv

    def unseen(self, ahead, limit):
        """Where a position `ahead` of a row's first column is past the row's own (`limit`) or before its window."""
        hidden = ahead > limit
        if self.plan.sliding_window is not None:
            hidden = hidden | (ahead <= limit - self.plan.sliding_window)
        return hidden

    def prefill(self, span: Span, slot, following) -> jax.Array:
        """Attention of a span of several rows; gives the buffer that the next span's first block is in."""
        plan = self.plan
        self.gather_queries(span)
        position_of_row_0 = span.first_position - span.first_row
        whole = span.end_row - span.first_row > plan.tokens_per_block // 2

        def block(b, slot):
            first = span.low + b * plan.kv_per_block
            self.start_next(span, b, slot, following)
            self.wait_copies(span, b, slot)
            short = span.high < first + plan.kv_per_block

            @pl.when(short)
            def _():
                self.clear_tail(slot, span.high - first, plan.kv_per_block)

            def tiles(tokens: int, low, high) -> None:
                def one(tile, carry):
                    first_row = jnp.maximum(tile * tokens, span.first_row)
                    end_row = jnp.minimum((tile + 1) * tokens, span.end_row)
                    edge = first + plan.kv_per_block - 1 > position_of_row_0 + first_row
                    if plan.sliding_window is not None:
                        edge |= first <= position_of_row_0 + end_row - 1 - plan.sliding_window
                    for masked, when in ((True, edge), (False, jnp.logical_not(edge))):
                        pl.when(when)(
                            functools.partial(self.attend_tile, slot, tile, tokens, position_of_row_0, first, masked)
                        )
                    return carry

                lax.fori_loop(low, high, one, 0)

            if plan.tokens_per_tile == plan.tokens_per_block:
                tiles(plan.tokens_per_block, 0, 1)
            else:
                pl.when(whole)(lambda: tiles(plan.tokens_per_block, 0, 1))
                size = plan.tokens_per_tile
                pl.when(jnp.logical_not(whole))(
                    lambda: tiles(size, floor_div(span.first_row, size), ceil_div(span.end_row, size))
                )
            return 1 - slot

        slot = lax.fori_loop(0, span.blocks, block, slot)
        self.scatter_rows(span)
        return slot

    def scatter_rows(self, span: Span) -> None:
        """Divide by the row sums, turn token-major, and write the span's own rows."""
        plan, rows = self.plan, GROUP * self.plan.group_size
        stride = plan.stage_stride

        def one(i, carry):
            lane = lax.broadcasted_iota(jnp.int32, (GROUP, plan.query_heads), 1)
            lse = jnp.zeros((GROUP, plan.query_heads), jnp.float32)
            for head in range(plan.query_heads):
                h, g = divmod(head, plan.group_size)
                at = pl.ds(pl.multiple_of(i * rows + g * GROUP, GROUP), GROUP)
                l = jnp.sum(self.l[h, at, :], axis=1, keepdims=True)
                sink = self.sinks[head : head + 1, :1] if plan.with_sinks else None
                out, head_lse = finish(plan, self.m[h, at, :1], l, self.acc[h, at, :], sink)
                self.stage[pl.ds(head, GROUP, stride=stride), :] = out
                if plan.with_lse:
                    lse = jnp.where(lane == head, head_lse, lse)
            for t in range(GROUP):
                row = i * GROUP + t

                @pl.when((row >= span.first_row) & (row < span.end_row))
                def _(t=t, row=row):
                    self.out[row] = self.stage[t * stride : t * stride + plan.query_heads, :].astype(self.out.dtype)
                    if plan.with_lse:
                        self.lse[pl.ds(row, 1), :] = lse[t : t + 1]

            return carry

        lax.fori_loop(floor_div(span.first_row, GROUP), ceil_div(span.end_row, GROUP), one, 0)

    # Decode

    def decode(self, span: Span, slot, following) -> jax.Array:
        """Attention of a span of one row; gives the buffer that the next span's first block is in."""
        plan, heads = self.plan, self.plan.query_heads
        q = self.q[span.first_row].astype(jnp.float32) * plan.q_scale
        row = lax.broadcasted_iota(jnp.int32, (heads, plan.head_dim), 0)
        size = plan.group_size
        own = [(row >= h * size) & (row < (h + 1) * size) for h in range(plan.kv_heads)]
        # Rows of other heads are zero, so products with all KV heads add up to each row's own.
        spread = [jnp.where(mask, q, 0.0).astype(plan.compute_dtype) for mask in own]
        self.ml_one[0] = jnp.full((heads, 128), MASKED, jnp.float32)
        self.ml_one[1] = jnp.zeros((heads, 128), jnp.float32)
        self.acc_one[...] = jnp.zeros((heads, plan.head_dim), jnp.float32)

        def chunk(slot, start, first, masked: bool) -> None:
            hidden = None
            if masked:
                ahead = lax.broadcasted_iota(jnp.int32, (heads, plan.kv_per_chunk), 1)
                hidden = self.unseen(ahead, span.first_position - first)
            loaded = [
                self.pages.load(self.buffer, slot, h, start, plan.kv_per_chunk, plan.compute_dtype)
                for h in range(plan.kv_heads)
            ]
            logits = functools.reduce(
                jnp.add, (dot_nt(plan, q_h, k) for q_h, (k, _) in zip(spread, loaded, strict=True))
            )
            m, l, p, alpha = softmax_step(plan, logits, hidden, self.ml_one[0], self.ml_one[1])
            p = p.astype(plan.compute_dtype)
            pv = jnp.zeros((heads, plan.head_dim), jnp.float32)
            for mask, (_, v) in zip(own, loaded, strict=True):
                pv = jnp.where(mask, dot_nn(plan, p, v), pv)
            self.ml_one[0], self.ml_one[1] = m, l
            self.acc_one[...] = self.acc_one[...] * lanes(alpha, plan.head_dim) + pv

        def block(b, slot):
            first = span.low + b * plan.kv_per_block
            self.start_next(span, b, slot, following)
            self.wait_copies(span, b, slot)
            used = jnp.minimum(span.high - first, plan.kv_per_block)
            chunks = ceil_div(used, plan.kv_per_chunk)
            self.clear_tail(slot, used, chunks * plan.kv_per_chunk)

            def one(c, carry):
                start = pl.multiple_of(c * plan.kv_per_chunk, plan.kv_per_chunk)
                edge = used < start + plan.kv_per_chunk
                if plan.sliding_window is not None:
                    edge |= first + start <= span.first_position - plan.sliding_window
                for masked, when in ((True, edge), (False, jnp.logical_not(edge))):
                    pl.when(when)(functools.partial(chunk, slot, start, first + start, masked))
                return carry

            lax.fori_loop(0, chunks, one, 0)
            return 1 - slot

        slot = lax.fori_loop(0, span.blocks, block, slot)
        l = jnp.sum(self.ml_one[1], axis=1, keepdims=True)
        sink = self.sinks[:, :1] if plan.with_sinks else None
        out, lse = finish(plan, self.ml_one[0][:, :1], l, self.acc_one[...], sink)
        self.out[span.first_row] = out.astype(self.out.dtype)
        if plan.with_lse:
            # One value per row to one value per lane: keep the diagonal, then add up the rows.
            across = (heads, heads)
            diagonal = lax.broadcasted_iota(jnp.int32, across, 0) == lax.broadcasted_iota(jnp.int32, across, 1)
            turned = jnp.where(diagonal, jnp.broadcast_to(lse, across), 0.0)
            self.lse[pl.ds(span.first_row, 1), :] = jnp.sum(turned, axis=0, keepdims=True)
        return slot

    def run(self) -> None:
        """All sequences of the block; rows that belong to none are zero."""
        self.out[...] = jnp.zeros(self.out.shape, self.out.dtype)
        if self.plan.with_lse:
            self.lse[...] = jnp.full(self.lse.shape, -jnp.inf, jnp.float32)

        @pl.when(self.first_token < self.end_token)
        def _():
            first = self.first_sequence()

            @pl.when(self.is_here(first))
            def _():
                self.start_copies(self.span(first), 0, jnp.int32(0))

            def one(state):
                sequence, slot = state
                span, following = self.span(sequence), self.skip_empty(sequence + 1)
                slot = lax.cond(
                    span.end_row - span.first_row == 1,
                    lambda: self.decode(span, slot, following),
                    lambda: self.prefill(span, slot, following),
                )
                return following, slot

            lax.while_loop(lambda state: self.is_here(state[0]), one, (first, jnp.int32(0)))


def floor_div(a, b: int):
    """a // b for a >= 0: the general form costs a sign correction on the scalar unit."""
    return lax.div(a, jnp.int32(b))


def ceil_div(a, b: int):
    """The least whole number of b that covers a >= 0."""
    return lax.div(a + jnp.int32(b - 1), jnp.int32(b))


def lanes(x, width: int):
    """`x`, equal in every lane, at another width."""
    if width == x.shape[1]:
        return x
    return x[:, :width] if width < x.shape[1] else jnp.broadcast_to(x[:, :1], (x.shape[0], width))


def dot_nt(plan: Plan, a, b):
    """a @ b.T in float32."""
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=plan.precision, preferred_element_type=jnp.float32)


def dot_nn(plan: Plan, a, b):
    """a @ b in float32."""
    dims = (((1,), (0,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=plan.precision, preferred_element_type=jnp.float32)


def softmax_step(plan: Plan, logits, hidden, m, l):
    """Online softmax in powers of two: new maxima, new row sums (kept apart per lane), weights, and what to scale the old by."""
    if plan.logit_cap is not None:
        logits = jnp.tanh(logits) * plan.logit_cap
    if hidden is not None:
        logits = jnp.where(hidden, MASKED, logits)
    width = logits.shape[1]
    if width % 128:
        # Narrower than a register: the sum of the row goes to lane 0.
        m_new = jnp.maximum(m, jnp.max(logits, axis=1, keepdims=True))
        p = jnp.exp2(logits - m_new[:, :1])
        first = lax.broadcasted_iota(jnp.int32, l.shape, 1) == 0
        alpha = jnp.exp2(m - m_new)
        return m_new, l * alpha + jnp.where(first, jnp.sum(p, axis=1, keepdims=True), 0.0), p, alpha
    columns = [logits[:, i : i + 128] for i in range(0, width, 128)]
    # Registers first, lanes last: a reduction over lanes costs as much for one register as for a row of them.
    m_new = jnp.maximum(m, jnp.max(functools.reduce(jnp.maximum, columns), axis=1, keepdims=True))
    alpha = jnp.exp2(m - m_new)
    parts = [jnp.exp2(column - m_new) for column in columns]
    return m_new, functools.reduce(jnp.add, parts, l * alpha), jnp.concatenate(parts, axis=1), alpha


def finish(plan: Plan, m, l, acc, sink):
    """Output rows and natural log-sum-exp [rows, 1] from the statistics; a row that saw nothing is 0 and -inf."""
    seen = m > 0.5 * MASKED
    m, l = jnp.where(seen, m, MASKED), jnp.where(seen, l, 0.0)
    scale = jnp.where(seen, 1.0, 0.0)
    if sink is not None:
        # A logit that takes weight and carries no value.
        sink = sink * LOG2_E
        top = jnp.maximum(m, sink)
        scale = scale * jnp.exp2(m - top)
        l = l * jnp.exp2(m - top) + jnp.exp2(sink - top)
        m = top
    lse = jnp.where(l > 0.0, (m + jnp.log2(l)) * LN_2, -jnp.inf)
    out = jnp.where(l > 0.0, acc * (scale * plan.out_scale / jnp.where(l > 0.0, l, 1.0)), 0.0)
    return out, lse


def kernel(*refs, plan: Plan) -> None:
    """Entry of pallas_call: kv_lens, page_indices, cu_q_lens, num_seqs, q, kv_pages, [sinks], out, [lse], scratch."""
    refs = list(refs)
    inputs, rest = refs[:6], refs[6:]
    sinks = rest.pop(0) if plan.with_sinks else None
    out = rest.pop(0)
    lse = rest.pop(0) if plan.with_lse else None
    Step(plan, *inputs, sinks, out, lse, rest).run()
