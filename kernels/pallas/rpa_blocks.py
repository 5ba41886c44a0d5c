"""Block sizes of the ragged paged attention kernel, and what they take of the vector memory."""

import math
from dataclasses import dataclass, replace

from .rpa_check import CacheShape, fail
from .rpa_pages import HND, packing


@dataclass(frozen=True)
class Blocks:
    """Sizes in tokens.

    tokens_per_block: query tokens of a grid step. tokens_per_tile: query tokens per tile where a sequence fills less than half a
    block. kv_per_block: cached tokens fetched together, and per prefill tile. kv_per_chunk: cached tokens per decode product.
    """

    tokens_per_block: int
    tokens_per_tile: int
    kv_per_block: int
    kv_per_chunk: int
    vmem_limit_bytes: int | None = None

    def fitted(self, tokens: int, capacity: int, shape: CacheShape, kv_dtype: object, kv_layout: str) -> "Blocks":
        """The same for a call of `tokens` rows and at most `capacity` cached tokens per sequence, in whole pages and tiles."""
        for name in ("tokens_per_block", "tokens_per_tile"):
            if getattr(self, name) % 16 or getattr(self, name) <= 0:
                raise fail(f"blocks.{name} is {getattr(self, name)}; it must be a positive multiple of 16")
        rows = min(self.tokens_per_block, -(-tokens // 16) * 16)
        tile = min(self.tokens_per_tile, rows)
        rows = -(-rows // tile) * tile
        unit = math.lcm(shape.page_size, 8 * packing(kv_dtype) if kv_layout == HND else 8)
        room = max(unit, -(-capacity // unit) * unit)
        kv = min(max(self.kv_per_block // unit, 1) * unit, room)
        chunk = self.kv_per_chunk
        if chunk >= kv or kv % chunk or chunk % 8:
            chunk = kv
        return replace(self, tokens_per_block=rows, tokens_per_tile=tile, kv_per_block=kv, kv_per_chunk=chunk)


def default_blocks(shape: CacheShape, q_dtype: object, kv_dtype: object, kv_layout: str) -> Blocks:
    """Block sizes for the chip at hand."""
    return Blocks(256, 32, 512, 512, 100 * 2**20)
