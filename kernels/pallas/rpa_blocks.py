"""Block sizes of the ragged paged attention kernel, and what they take of the vector memory."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .rpa_check import CacheShape, fail
from .rpa_pages import HND, packing
from .rpa_table import TABLE

MIB = 2**20

# Vector memory of a core. A chip that is not known (a graph lowered where there is no TPU) gets blocks that fit all of
# them.
VMEM_BYTES = {"v4": 16 * MIB, "v5e": 128 * MIB, "v5p": 64 * MIB, "v6e": 128 * MIB, "7x": 64 * MIB}
ANY_CHIP = "any"

# What JAX calls them.
CHIPS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
}

# What the PCI bus calls them: Google's vendor id, and the device ids that torch_xla 2.9 and torch_tpu 0.2 look for.
PCI_VENDOR = "0x1ae0"
PCI_CHIPS = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "7x"}

# The compiler spills registers into vector memory: up to 3.5 MiB with the largest blocks below.
SPILL_BYTES = 4 * MIB


@dataclass(frozen=True)
class Blocks:
    """Sizes in tokens.

    tokens_per_block: query tokens of a grid step. tokens_per_tile: query tokens per tile where a sequence fills less
    than half a block. kv_per_block: cached tokens fetched together, and per prefill tile. kv_per_chunk: cached tokens
    per decode product.
    """

    tokens_per_block: int
    tokens_per_tile: int
    kv_per_block: int
    kv_per_chunk: int
    vmem_limit_bytes: int | None = None

    def fitted(self, tokens: int, capacity: int, shape: CacheShape, kv_dtype: Any, kv_layout: str) -> "Blocks":
        """The same in whole pages and tiles, for `tokens` rows and at most `capacity` cached tokens per sequence."""
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


def vmem_bytes(blocks: Blocks, shape: CacheShape, q_dtype: Any, kv_dtype: Any) -> int:
    """Vector memory that the kernel's buffers take, an allowance for spills included."""
    width = -(-shape.head_dim // 128) * 128
    q_size, kv_size = int(jnp.dtype(q_dtype).itemsize), int(jnp.dtype(kv_dtype).itemsize)
    rows = blocks.tokens_per_block * shape.query_heads
    windows = 2 * 2 * rows * width * q_size  # q and out, two buffers each
    pages = 2 * blocks.kv_per_block * 2 * shape.kv_heads * width * kv_size
    state = rows * (width * q_size + 2 * 128 * 4 + width * 4)  # head-major q, m and l, acc
    return windows + pages + state + SPILL_BYTES


def current_chip() -> str:
    """Short name of JAX's default device, or ANY_CHIP where that is not a TPU that is known here."""
    if jax.default_backend() != "tpu":
        return ANY_CHIP
    return CHIPS.get(jax.devices()[0].device_kind, ANY_CHIP)


def attached_chip(bus: Path = Path("/sys/bus/pci/devices")) -> str:
    """Short name of the TPU on this machine's PCI bus, or ANY_CHIP where there is none that is known here.

    For kernels that torch_xla or torch_tpu runs: asking JAX would start a second client of the chip, which it refuses.
    """
    for vendor in sorted(bus.glob("*/vendor")):
        if vendor.read_text().strip() == PCI_VENDOR:
            chip = PCI_CHIPS.get(vendor.with_name("device").read_text().strip())
            if chip is not None:
                return chip
    return ANY_CHIP


def default_blocks(shape: CacheShape, q_dtype: Any, kv_dtype: Any, chip: str, layout: str) -> Blocks:
    """What the tuner chose for the chip and these heads, else the largest blocks of a fixed form that fit the chip."""
    limit = VMEM_BYTES.get(chip, min(VMEM_BYTES.values()))
    names = jnp.dtype(q_dtype).name, jnp.dtype(kv_dtype).name
    tuned = TABLE.get((chip, shape.query_heads, shape.kv_heads, shape.head_dim, *names, layout))
    if tuned is not None:
        return Blocks(*tuned, limit)
    tokens, kv = 256, 512
    while True:
        blocks = Blocks(tokens, min(32, tokens), kv, kv, limit)
        if vmem_bytes(blocks, shape, q_dtype, kv_dtype) <= limit or (tokens, kv) == (16, 32):
            return blocks
        # Rows and pages in turn, so that a tile stays near square.
        if tokens > 16 and (tokens * 2 >= kv or kv == 32):
            tokens //= 2
        else:
            kv //= 2
