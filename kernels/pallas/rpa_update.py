"""Write a step's keys and values into their pages, then attend: one traced function, the cache updated in place."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .rpa import ragged_paged_attention
from .rpa_batch import Batch
from .rpa_blocks import Blocks
from .rpa_check import check, check_new
from .rpa_pages import HND, NHD, packing
from .rpa_plan import ceil_div, floor_div

# Tokens per grid step. Each may need a cell of its own (HND): 32 cells of 16 heads x 16 tokens x 128 are 2 MiB.
TOKENS = 32

# A cast alone makes NaN (e4m3fn) or infinity (e5m2) of what is out of range.
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def ragged_paged_attention_update(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = NHD,
    sinks: jax.Array | None = None,
    blocks: Blocks | None = None,
    chip: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """write_step, then ragged_paged_attention over the new cache.

    Returns the output and the cache. Under jit with `kv_pages` donated the cache is written in place; without donation
    XLA copies it first. Arguments and errors are those of write_step and ragged_paged_attention.
    """
    kv_pages = write_step(
        q,
        k,
        v,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        interpret=interpret,
    )
    out = ragged_paged_attention(
        q,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        mask_value=mask_value,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        sinks=sinks,
        blocks=blocks,
        chip=chip,
        interpret=interpret,
    )
    return out, kv_pages


def write_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = NHD,
    interpret: Any = False,
) -> jax.Array:
    """The cache with row r of sequence i at position kv_lens[i] - q_len + r.

    k and v are [tokens, kv heads, head_dim], row for row with q; they are divided by their scales, and what an 8-bit
    type cannot hold becomes its largest value. Rows past cu_q_lens[num_seqs] are not written. Sequences may share
    pages that they only read.

    Raises ValueError for shapes and dtypes that the kernel cannot take.
    """
    shape = check(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, None,
        1.0, None, None, None, k_scale, v_scale, kv_layout,
    )  # fmt: skip
    check_new(k, v, kv_pages, kv_layout, q.shape[0])
    if q.shape[0] == 0 or kv_lens.shape[0] == 0 or kv_pages.shape[0] == 0:
        return kv_pages
    dtype = kv_pages.dtype
    rows = combined_rows(k, v, dtype, k_scale, v_scale)
    unit = 8 * packing(dtype)
    scratch: list[Any] = [pltpu.SemaphoreType.DMA((2,))]
    if kv_layout == HND:
        cell = (2 * shape.kv_heads, unit, shape.head_dim)
        scratch += [pltpu.VMEM((TOKENS, *cell), dtype), pltpu.VMEM(cell, jnp.float32)]

    def body(*refs: Any) -> None:
        lengths, table, starts, count, new, _, pages, semaphores, *rest = refs
        step = Writer(lengths, table, starts, count, new, pages, semaphores, page_indices.shape[1], shape.page_size)
        if kv_layout == HND:
            cells, work = rest
            step.write_cells(cells, work, unit)
        else:
            step.write_tokens()

    cache: jax.Array = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(q.shape[0], TOKENS),),
            in_specs=[
                pl.BlockSpec((TOKENS, *rows.shape[1:]), lambda i, *_: (i, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=scratch,
        ),
        input_output_aliases={5: 0},
        # Two steps may write into the same cell, one after the other.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        name="kv_cache_update",
        interpret=interpret,
    )(kv_lens, page_indices.reshape(-1), cu_q_lens, num_seqs, rows, kv_pages)
    return cache


def quantise(x: jax.Array, dtype: Any, scale: float | None) -> jax.Array:
    """`x / scale` in `dtype`, held inside the range of an 8-bit type."""
    if x.dtype == dtype and scale is None:
        return x
    scaled = x.astype(jnp.float32)
    if scale is not None:
        # By a constant XLA would not divide but multiply with its reciprocal, which rounds some halves the other way;
        # an optimization barrier is gone when it does so. A divisor that depends on data it divides by.
        scaled = scaled / jnp.where(jnp.isnan(scaled), 1.0, scale)
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(scaled), -128, 127).astype(dtype)
    largest = LARGEST.get(jnp.dtype(dtype).name)
    if largest is not None:
        scaled = jnp.clip(scaled, -largest, largest)
    return scaled.astype(dtype)


def combined_rows(k: jax.Array, v: jax.Array, dtype: Any, k_scale: float | None, v_scale: float | None) -> jax.Array:
    """What goes into the cache, [tokens, 2*kv heads, head_dim]: K of head h at 2h, V at 2h+1."""
    rows = jnp.stack([quantise(k, dtype, k_scale), quantise(v, dtype, v_scale)], axis=2)
    return rows.reshape(k.shape[0], 2 * k.shape[1], k.shape[2])


class Writer(Batch):
    """One grid step: the rows of a block of tokens and where they go."""

    def __init__(
        self,
        kv_lens: Any,
        page_indices: Any,
        cu_q_lens: Any,
        num_seqs: Any,
        new: Any,
        pages: Any,
        semaphores: Any,
        pages_per_sequence: int,
        page_size: int,
    ) -> None:
        super().__init__(kv_lens, cu_q_lens, num_seqs, TOKENS)
        self.page_indices, self.new, self.pages, self.semaphores = page_indices, new, pages, semaphores
        self.pages_per_sequence, self.page_size = pages_per_sequence, page_size

    def each_sequence(self, visit: Any, state: Any) -> Any:
        """`visit(sequence, first position, end position, token less position, state)` for each that has rows here."""

        def one(carry: Any) -> Any:
            sequence, state = carry
            start, end = self.cu_q_lens[sequence], self.cu_q_lens[sequence + 1]
            shift = self.kv_lens[sequence] - end
            first = jnp.maximum(jnp.maximum(start, self.first_token) + shift, 0)
            last = jnp.minimum(end, self.end_token) + shift
            state = visit(sequence, first, last, -shift - self.first_token, state)
            return self.skip_empty(sequence + 1), state

        return lax.while_loop(lambda carry: self.is_here(carry[0]), one, (self.first_sequence(), state))[1]

    def page(self, sequence: Any, position: Any) -> Any:
        """The page of a position; one that does not exist would stop the chip."""
        entry = sequence * self.pages_per_sequence + floor_div(position, self.page_size)
        return jnp.clip(self.page_indices[entry], 0, self.pages.shape[0] - 1)

    def write_tokens(self) -> None:
        """NHD: a token's rows of all heads lie together, so each is one copy."""

        def copy(sequence: Any, position: Any, row: Any) -> Any:
            offset = lax.rem(position, jnp.int32(self.page_size))
            target = self.pages.at[self.page(sequence, position), offset]
            return pltpu.make_async_copy(self.new.at[row], target, self.semaphores.at[0])

        def visit(sequence: Any, first: Any, last: Any, to_row: Any, count: Any) -> Any:
            lax.fori_loop(first, last, lambda at, carry: (copy(sequence, at, at + to_row).start(), carry)[1], 0)
            return count + jnp.maximum(last - first, 0)

        count = self.each_sequence(visit, jnp.int32(0))
        one = pltpu.make_async_copy(self.new.at[0], self.new.at[0], self.semaphores.at[0])
        lax.fori_loop(0, count, lambda _, carry: (one.wait(), carry)[1], 0)

    def write_cells(self, cells: Any, work: Any, unit: int) -> None:
        """HND: a token is one row of every head's tile, so tiles are read, changed and written back.

        A cell is the tiles of all heads for `unit` tokens. All cells of the step are under way together; a cell that
        is replaced as a whole is not read.
        """

        def place(sequence: Any, cell: Any) -> Any:
            start = cell * unit
            offset = pl.multiple_of(lax.rem(start, jnp.int32(self.page_size)), unit)
            return self.pages.at[self.page(sequence, start), :, pl.ds(offset, unit), :]

        def each_cell(visit: Any) -> Any:
            """`visit(sequence, first, last, to_row, cell, slot, partial)` for each cell; gives the number of partial
            ones."""

            def sequence_cells(sequence: Any, first: Any, last: Any, to_row: Any, state: Any) -> Any:
                begin = floor_div(first, unit)

                def one(cell: Any, state: Any) -> Any:
                    slot, partials = state
                    partial = (cell * unit < first) | ((cell + 1) * unit > last)
                    visit(sequence, first, last, to_row, cell, slot, partial)
                    return slot + 1, partials + partial.astype(jnp.int32)

                return lax.fori_loop(begin, jnp.where(last > first, ceil_div(last, unit), begin), one, state)

            return self.each_sequence(sequence_cells, (jnp.int32(0), jnp.int32(0)))

        def read(sequence: Any, first: Any, last: Any, to_row: Any, cell: Any, slot: Any, partial: Any) -> None:
            @pl.when(partial)
            def _() -> None:
                pltpu.make_async_copy(place(sequence, cell), cells.at[slot], self.semaphores.at[0]).start()

        def change(sequence: Any, first: Any, last: Any, to_row: Any, cell: Any, slot: Any, partial: Any) -> None:
            work[...] = cells[slot].astype(jnp.float32)

            place_in_cell = lax.broadcasted_iota(jnp.int32, work.shape[1:], 0)

            def one(position: Any, carry: Any) -> Any:
                row = self.new[position + to_row].astype(jnp.float32)
                here = place_in_cell == position - cell * unit
                for head in range(row.shape[0]):
                    work[head] = jnp.where(here, row[head : head + 1], work[head])
                return carry

            lax.fori_loop(jnp.maximum(first, cell * unit), jnp.minimum(last, (cell + 1) * unit), one, 0)
            cells[slot] = work[...].astype(cells.dtype)
            pltpu.make_async_copy(cells.at[slot], place(sequence, cell), self.semaphores.at[1]).start()

        def wait(semaphore: int, count: Any) -> None:
            one = pltpu.make_async_copy(cells.at[0], cells.at[0], self.semaphores.at[semaphore])
            lax.fori_loop(0, count, lambda _, carry: (one.wait(), carry)[1], 0)

        _, partials = each_cell(read)
        wait(0, partials)
        count, _ = each_cell(change)
        wait(1, count)
