"""Several query rows of one sequence: tiles of head-major rows against one KV block after another."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .rpa_plan import GROUP, MASKED, Span, ceil_div, dot_nn, dot_nt, finish, floor_div, lanes, softmax_step, unseen

if TYPE_CHECKING:
    from .rpa_kernel import Step

# Rows (tokens x query heads of a KV head) in one product, and how many products run ahead of their softmax.
ROWS_PER_PRODUCT = 256
AHEAD = 2


def prefill(step: "Step", span: Span, slot: Any, following: Any) -> Any:
    """Attend, write the span's rows, and give the buffer that the first block of what follows is in."""
    plan = step.plan
    gather_queries(step, span)
    position_of_row_0 = span.first_position - span.first_row
    whole = span.end_row - span.first_row > plan.tokens_per_block // 2
    size = plan.tokens_per_tile

    def block(b: Any, slot: Any) -> Any:
        first = span.low + b * plan.kv_per_block
        step.start_next(span, b, slot, following)
        step.wait_copies(span, b, slot)

        @pl.when(span.high < first + plan.kv_per_block)
        def _() -> None:
            step.clear_tail(slot, span.high - first, plan.kv_per_block)

        def tiles(tokens: int, low: Any, high: Any) -> None:
            def one(tile: Any, carry: Any) -> Any:
                first_row = jnp.maximum(tile * tokens, span.first_row)
                end_row = jnp.minimum((tile + 1) * tokens, span.end_row)
                edge = first + plan.kv_per_block - 1 > position_of_row_0 + first_row
                if plan.sliding_window is not None:
                    edge |= first <= position_of_row_0 + end_row - 1 - plan.sliding_window
                # Position of the tile's first row less that of the block's first column.
                limit = position_of_row_0 + tile * tokens - first
                for masked, when in ((True, edge), (False, jnp.logical_not(edge))):
                    pl.when(when)(functools.partial(attend_tile, step, slot, tile, tokens, limit, masked))
                return carry

            lax.fori_loop(low, high, one, 0)

        if size == plan.tokens_per_block:
            tiles(size, 0, 1)
        else:
            pl.when(whole)(lambda: tiles(plan.tokens_per_block, 0, 1))
            some = jnp.logical_not(whole)
            pl.when(some)(lambda: tiles(size, floor_div(span.first_row, size), ceil_div(span.end_row, size)))
        return 1 - slot

    slot = lax.fori_loop(0, span.blocks, block, slot)
    scatter_rows(step, span)
    return slot


def gather_queries(step: "Step", span: Span) -> None:
    """Scale the span's query rows, turn them head-major, and reset their statistics."""
    plan = step.plan
    rows, stride = GROUP * plan.group_size, plan.stage_stride

    def one(i: Any, carry: Any) -> Any:
        tokens = step.q[pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)].astype(jnp.float32) * plan.q_scale
        for t in range(GROUP):
            for c, columns in enumerate(split(tokens[t])):
                step.stage[c, t * stride : t * stride + plan.query_heads, : columns.shape[1]] = columns
        for head in range(plan.query_heads):
            h, g = divmod(head, plan.group_size)
            at = pl.ds(pl.multiple_of(i * rows + g * GROUP, GROUP), GROUP)
            picked = staged(step, pl.ds(head, GROUP, stride=stride))
            step.q_rows[h, at, :] = picked.astype(plan.compute_dtype)
        at = pl.ds(pl.multiple_of(i * rows, GROUP), rows)
        step.m[:, at, :] = jnp.full((plan.kv_heads, rows, 128), MASKED, jnp.float32)
        step.l[:, at, :] = jnp.zeros((plan.kv_heads, rows, 128), jnp.float32)
        step.acc[:, at, :] = jnp.zeros((plan.kv_heads, rows, plan.head_dim), jnp.float32)
        return carry

    lax.fori_loop(floor_div(span.first_row, GROUP), ceil_div(span.end_row, GROUP), one, 0)


def attend_tile(step: "Step", slot: Any, tile: Any, tokens: int, limit: Any, masked: bool) -> None:
    """Fold one KV block into the statistics of `tokens` rows from row `tile * tokens` on.

    The tile is cut into products of ROWS_PER_PRODUCT rows of one KV head. Logits are asked for AHEAD products early,
    so that the matrix units work on the next ones while the vector units turn these into weights: 9,219 bundles on a
    v6e for 256 tokens x 512 x 32/8 heads, 9,596 with whole heads and one ahead.
    """
    plan = step.plan
    part = min(tokens, max(ROWS_PER_PRODUCT // plan.group_size // GROUP, 1) * GROUP)
    part = part if tokens % part == 0 else GROUP
    rows, parts = part * plan.group_size, tokens // part

    def at(i: int) -> Any:
        return pl.ds(pl.multiple_of((tile * parts + i) * rows, GROUP), rows)

    def hidden(i: int) -> jax.Array | None:
        if not masked:
            return None
        shape = (part // GROUP, plan.group_size, GROUP, plan.kv_per_block)
        column, row = lax.broadcasted_iota(jnp.int32, shape, 3), lax.broadcasted_iota(jnp.int32, shape, 2)
        ahead = column - row - lax.broadcasted_iota(jnp.int32, shape, 0) * GROUP
        return unseen(plan, ahead, limit + i * part).reshape(rows, plan.kv_per_block)

    @functools.cache
    def load(h: int) -> tuple[jax.Array, jax.Array]:
        return step.pages.load(step.buffer, slot, h, 0, plan.kv_per_block, plan.compute_dtype)

    def logits(h: int, i: int) -> jax.Array:
        return dot_nt(plan, step.q_rows[h, at(i), :], load(h)[0])

    products = [(h, i) for h in range(plan.kv_heads) for i in range(parts)]
    early = [logits(*product) for product in products[:AHEAD]]
    for n, (h, i) in enumerate(products):
        now = early.pop(0)
        if n + AHEAD < len(products):
            early.append(logits(*products[n + AHEAD]))
        m, l, p, alpha = softmax_step(plan, now, hidden(i), step.m[h, at(i), :], step.l[h, at(i), :])
        step.m[h, at(i), :], step.l[h, at(i), :] = m, l
        pv = dot_nn(plan, p.astype(plan.compute_dtype), load(h)[1])
        step.acc[h, at(i), :] = step.acc[h, at(i), :] * lanes(alpha, plan.head_dim) + pv


def scatter_rows(step: "Step", span: Span) -> None:
    """Divide by the row sums, turn token-major, and write the span's own rows."""
    plan = step.plan
    rows, stride = GROUP * plan.group_size, plan.stage_stride

    def one(i: Any, carry: Any) -> Any:
        lane = lax.broadcasted_iota(jnp.int32, (GROUP, plan.query_heads), 1)
        lse = jnp.zeros((GROUP, plan.query_heads), jnp.float32)
        for head in range(plan.query_heads):
            h, g = divmod(head, plan.group_size)
            at = pl.ds(pl.multiple_of(i * rows + g * GROUP, GROUP), GROUP)
            sink = step.sinks[head : head + 1, :] if plan.with_sinks else None
            out, head_lse = finish(plan, step.m[h, at, :], step.l[h, at, :], step.acc[h, at, :], sink)
            for c, columns in enumerate(split(out)):
                step.stage[c, pl.ds(head, GROUP, stride=stride), : columns.shape[1]] = columns
            if plan.with_lse:
                lse = jnp.where(lane == head, head_lse[:, : plan.query_heads], lse)
        first = pl.multiple_of(i * GROUP, GROUP)
        begin, end = jnp.maximum(span.first_row - first, 0), jnp.minimum(span.end_row - first, GROUP)
        whole = end - begin == GROUP
        if plan.with_lse:
            row = lax.broadcasted_iota(jnp.int32, lse.shape, 0)
            at = pl.ds(first, GROUP)
            step.lse[at, :] = jnp.where((row >= begin) & (row < end), lse, step.lse[at, :])

        def write(t: Any, carry: Any) -> Any:
            step.out[first + t] = staged(step, pl.ds(t * stride, plan.query_heads)).astype(step.out.dtype)
            return carry

        @pl.when(whole)
        def _() -> None:
            for t in range(GROUP):
                write(t, 0)

        @pl.when(jnp.logical_not(whole))
        def _() -> None:
            lax.fori_loop(begin, end, write, 0)

        return carry

    lax.fori_loop(floor_div(span.first_row, GROUP), ceil_div(span.end_row, GROUP), one, 0)


def split(rows: jax.Array) -> list[jax.Array]:
    """Columns one register wide, the last one what is left."""
    return [rows[:, i : i + 128] for i in range(0, rows.shape[1], 128)]


def staged(step: "Step", at: Any) -> jax.Array:
    """Rows of the staging buffer, which is kept in columns: only rows one register wide can be read with a stride."""
    columns = [step.stage[c, at, :] for c in range(step.stage.shape[0])]
    rows = columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)
    return rows[:, : step.plan.head_dim]
