"""How pages lie in HBM and in the kernel's buffers, and how one KV head's keys and values come out of them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

HND = "HND"
NHD = "NHD"


def packing(dtype: Any) -> int:
    """Values of `dtype` in a 32-bit word."""
    return 4 // int(jnp.dtype(dtype).itemsize)


def pack_words(kv_pages: jax.Array) -> jax.Array:
    """Token-major pages [pages, rows, head_dim] as the words that the TPU's registers hold: `packing` rows to a word.

    On a TPU this is a change of type without a move. Interpret mode cannot change a ref's type, so there the words are
    made outside the kernel.
    """
    pages, rows, head_dim = kv_pages.shape
    n = packing(kv_pages.dtype)
    split = kv_pages.reshape(pages, rows // n, n, head_dim).swapaxes(2, 3)
    return lax.bitcast_convert_type(split, jnp.uint32)


@dataclass(frozen=True)
class PageReader:
    """Buffer shapes and loads of one layout.

    HND pages are [2*heads, page_size, head_dim]; a buffer is [2, 2*heads, tokens, head_dim].
    NHD pages are taken as [page_size*2*heads, head_dim]; a buffer is [2, columns, tokens*2*heads, 128 at most], and a
    head's rows are every so-many-th of its 32-bit words (K and V of a 16-bit head share a word). Only rows one register
    wide can be read with a stride, hence the columns.
    """

    layout: str
    kv_heads: int
    kv_dtype: Any
    packed_input: bool = False

    @property
    def rows_per_tile(self) -> int:
        """Tokens in a register tile of the buffer, the unit of clear_values."""
        return 8 * packing(self.kv_dtype) if self.layout == HND else 8

    @property
    def words_per_token(self) -> int:
        """Rows of 32-bit words that one token takes in an NHD buffer."""
        return 2 * self.kv_heads // packing(self.kv_dtype)

    @property
    def buffer_dtype(self) -> Any:
        """Element type of the buffer."""
        return jnp.dtype(jnp.uint32) if self.packed_input else self.kv_dtype

    def rows_per_token(self) -> int:
        """Rows of the buffer (in its element type) that one token takes in an NHD buffer."""
        return self.words_per_token if self.packed_input else 2 * self.kv_heads

    def buffer_shape(self, tokens: int, head_dim: int) -> tuple[int, ...]:
        """Shape of the double buffer."""
        if self.layout == HND:
            return (2, 2 * self.kv_heads, tokens, head_dim)
        return (2, -(-head_dim // 128), tokens * self.rows_per_token(), min(head_dim, 128))

    def page_refs(
        self, kv_pages: Any, buffer: Any, page: Any, slot: Any, index: Any, page_size: int
    ) -> list[tuple[Any, Any]]:
        """Where a page is and where it goes, as the block's `index`-th: one copy, or one per column."""
        if self.layout == HND:
            at = pl.ds(pl.multiple_of(index * page_size, page_size), page_size)
            return [(kv_pages.at[page], buffer.at[slot, :, at, :])]
        rows = page_size * self.rows_per_token()
        at = pl.ds(pl.multiple_of(index * rows, rows), rows)
        _, columns, _, width = buffer.shape
        if columns == 1:
            return [(kv_pages.at[page], buffer.at[slot, 0, at, :])]
        return [
            (kv_pages.at[page, :, pl.ds(column * width, width)], buffer.at[slot, column, at, :])
            for column in range(columns)
        ]

    def buffer_pages(self, buffer: Any, slot: Any, count: int, page_size: int) -> Any:
        """The first `count` pages of a buffer."""
        if self.layout == HND:
            return buffer.at[slot, :, pl.ds(0, count * page_size), :]
        return buffer.at[slot, :, pl.ds(0, count * page_size * self.rows_per_token()), :]

    def _words(self, buffer: Any, slot: Any, start: Any, row: int, count: int) -> jax.Array:
        """Word `row` of each of `count` tokens from token `start` on."""
        stride = self.words_per_token
        view = buffer
        if packing(self.kv_dtype) > 1 and not self.packed_input:
            view = buffer.bitcast(jnp.uint32)
        # Two steps: the compiler must see that the first is aligned, and that the second is fixed.
        base = start * stride if isinstance(start, int) else pl.multiple_of(start * stride, count * stride)
        columns = [
            view.at[slot, column, pl.ds(base, count * stride), :][pl.ds(row, count, stride=stride), :]
            for column in range(buffer.shape[1])
        ]
        return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)

    def load(
        self, buffer: Any, slot: Any, head: int, start: Any, count: int, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [count, head_dim] of one KV head, from token `start` of the buffer on, in `dtype`.

        `start` is 0 or a traced multiple of `count`.
        """
        if self.layout == HND:
            at = pl.ds(start, count)
            return widen(buffer[slot, 2 * head, at, :], dtype), widen(buffer[slot, 2 * head + 1, at, :], dtype)
        n = packing(self.kv_dtype)
        if n == 1:
            k, v = (self._words(buffer, slot, start, 2 * head + i, count).astype(dtype) for i in (0, 1))
            return k, v
        words = self._words(buffer, slot, start, 2 * head // n, count)
        place = 2 * head % n
        return unpack(words, place, self.kv_dtype, dtype), unpack(words, place + 1, self.kv_dtype, dtype)

    def clear_values(self, buffer: Any, slot: Any, start: Any, keep: Any) -> None:
        """Zero the values of `rows_per_tile` tokens from `start` on, except the first `keep`."""
        count = self.rows_per_tile
        if self.layout == HND:
            at = pl.ds(start, count)
            for head in range(self.kv_heads):
                value = buffer[slot, 2 * head + 1, at, :].astype(jnp.float32)
                kept = lax.broadcasted_iota(jnp.int32, value.shape, 0) < keep
                buffer[slot, 2 * head + 1, at, :] = jnp.where(kept, value, 0.0).astype(self.kv_dtype)
            return
        # Keys go too: their logits are masked, so any finite value will do.
        rows = self.rows_per_token()
        at = pl.ds(start * rows, count * rows)
        for column in range(buffer.shape[1]):
            value = buffer[slot, column, at, :]
            kept = lax.broadcasted_iota(jnp.int32, value.shape, 0) < keep * rows
            if value.dtype == jnp.uint32:
                buffer[slot, column, at, :] = jnp.where(kept, value, jnp.uint32(0))
            else:
                buffer[slot, column, at, :] = jnp.where(kept, value.astype(jnp.float32), 0.0).astype(value.dtype)


def widen(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in `dtype`; 8-bit types go through float32, which every chip can do."""
    if x.dtype == dtype:
        return x
    return x.astype(jnp.float32).astype(dtype)


def unpack(words: jax.Array, place: int, kv_dtype: Any, dtype: Any) -> jax.Array:
    """The `place`-th value of every word, in `dtype`."""
    if kv_dtype == jnp.bfloat16:
        high = words << 16 if place == 0 else words & jnp.uint32(0xFFFF0000)
        return lax.bitcast_convert_type(high, jnp.float32).astype(dtype)
    byte = lax.bitcast_convert_type(words << (24 - 8 * place), jnp.int32) >> 24  # sign extended
    if kv_dtype == jnp.int8:
        return byte.astype(jnp.float32).astype(dtype)
    return float8_bits(byte, kv_dtype).astype(dtype)


def float8_bits(byte: jax.Array, kv_dtype: Any) -> jax.Array:
    """Float32 values of sign-extended 8-bit patterns.

    Built from the fields because a float32 made by shifting the bits into place would be subnormal where the 8-bit
    value is, and TPUs flush those to zero.
    """
    mantissa_bits, bias = (3, 7) if kv_dtype == jnp.float8_e4m3fn else (2, 15)
    magnitude = byte & 0x7F
    shifted = magnitude << (23 - mantissa_bits)
    normal = lax.bitcast_convert_type(shifted + ((127 - bias) << 23), jnp.float32)
    small = magnitude.astype(jnp.float32) * 2.0 ** (1 - bias - mantissa_bits)
    value = jnp.where(magnitude < (1 << mantissa_bits), small, normal)
    return jnp.where(byte < 0, -value, value)
