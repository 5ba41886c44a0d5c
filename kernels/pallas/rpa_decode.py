"""One query row of one sequence: all heads in one product per chunk of the cache."""

import functools
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .rpa_plan import MASKED, Span, ceil_div, dot_nn, dot_nt, finish, lanes, softmax_step, unseen

if TYPE_CHECKING:
    from .rpa_kernel import Step


def decode(step: "Step", span: Span, slot: Any, following: Any) -> Any:
    """Attend, write the row, and give the buffer that the first block of what follows is in."""
    plan, heads, size = step.plan, step.plan.query_heads, step.plan.group_size
    q = step.q[span.first_row].astype(jnp.float32) * plan.q_scale
    row = lax.broadcasted_iota(jnp.int32, (heads, plan.head_dim), 0)
    own = [(row >= h * size) & (row < (h + 1) * size) for h in range(plan.kv_heads)]
    # Rows of other heads are zero, so the products with all KV heads add up to each row's own. Loading the keys into
    # the matrix unit is what costs; the rows are few.
    spread = [jnp.where(mask, q, 0.0).astype(plan.compute_dtype) for mask in own]
    step.one_m[...] = jnp.full((heads, 128), MASKED, jnp.float32)
    step.one_l[...] = jnp.zeros((heads, 128), jnp.float32)
    step.one_acc[...] = jnp.zeros((heads, plan.head_dim), jnp.float32)

    def chunk(slot: Any, start: Any, first: Any, masked: bool) -> None:
        hidden = None
        if masked:
            ahead = lax.broadcasted_iota(jnp.int32, (heads, plan.kv_per_chunk), 1)
            hidden = unseen(plan, ahead, span.first_position - first)
        loaded = [
            step.pages.load(step.buffer, slot, h, start, plan.kv_per_chunk, plan.compute_dtype)
            for h in range(plan.kv_heads)
        ]
        products = (dot_nt(plan, q_h, k) for q_h, (k, _) in zip(spread, loaded, strict=True))
        logits = functools.reduce(jnp.add, products)
        m, l, p, alpha = softmax_step(plan, logits, hidden, step.one_m[...], step.one_l[...])
        p = p.astype(plan.compute_dtype)
        pv = jnp.zeros((heads, plan.head_dim), jnp.float32)
        for mask, (_, v) in zip(own, loaded, strict=True):
            pv = jnp.where(mask, dot_nn(plan, p, v), pv)
        step.one_m[...], step.one_l[...] = m, l
        step.one_acc[...] = step.one_acc[...] * lanes(alpha, plan.head_dim) + pv

    def block(b: Any, slot: Any) -> Any:
        first = span.low + b * plan.kv_per_block
        step.start_next(span, b, slot, following)
        step.wait_copies(span, b, slot)
        used = jnp.minimum(span.high - first, plan.kv_per_block)
        chunks = ceil_div(used, plan.kv_per_chunk)
        step.clear_tail(slot, used, chunks * plan.kv_per_chunk)

        def one(c: Any, carry: Any) -> Any:
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
    sink = step.sinks[...] if plan.with_sinks else None
    out, lse = finish(plan, step.one_m[...], step.one_l[...], step.one_acc[...], sink)
    step.out[span.first_row] = out.astype(step.out.dtype)
    if plan.with_lse:
        # One value per row to one value per lane: keep the diagonal, then add up the rows.
        across = (heads, heads)
        diagonal = lax.broadcasted_iota(jnp.int32, across, 0) == lax.broadcasted_iota(jnp.int32, across, 1)
        turned = jnp.where(diagonal, lse[:, :heads], 0.0)
        step.lse[pl.ds(span.first_row, 1), :] = jnp.sum(turned, axis=0, keepdims=True)
    return slot
