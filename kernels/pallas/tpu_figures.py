"""The kernel's figures out of a compiled schedule, and what they are held against."""

from dataclasses import dataclass

import jax.numpy as jnp

from .rpa_blocks import VMEM_BYTES, Blocks, default_blocks
from .rpa_check import CacheShape
from .rpa_kernel import UNROLL
from .tpu_bundles import DumpError, Region, Schedule
from .tpu_compile import Problem, compile_for

# Bytes per second from a core's memory, and cycles per second: JAX's own table of chips, and the clock that its peak
# rates imply.
MEMORY = {"v4": 0.61e12, "v5e": 0.82e12, "v5p": 1.23e12, "v6e": 1.64e12, "7x": 3.7e12}
CLOCK = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "7x": 2.2e9}

# bf16 operations per cycle of a core's matrix units, and how deep and wide one unit is: heads narrower than that leave
# part of it idle, so 128 is at most half of what a 256-wide unit can do.
MATRIX = {"v4": (131072, 128), "v5e": (131072, 128), "v5p": (131072, 128), "v6e": (524288, 256), "7x": (524288, 256)}


@dataclass(frozen=True)
class Figures:
    """Bundles of one KV block of work: a whole tile of prefill inside and at the edge of the mask, and one decode
    sequence."""

    chip: str
    tile: str  # query tokens x cached tokens
    kv: int  # cached tokens of the decode sequence
    inside: int
    masked: int
    small_inside: int | None
    small_masked: int | None
    decode_product: int
    decode_sequence: int
    matrix_use: float
    matrix_bound: int
    copy_floor: float

    @property
    def decode_ratio(self) -> float:
        """Cycles of a decode sequence over those that its pages take to arrive; copies run during the sequence
        before."""
        return max(self.copy_floor, self.decode_sequence) / self.copy_floor


def tile_blocks(chip: str) -> Blocks:
    """The tile that figures are compared on, whatever the tuner chose: 256 x 512, and what fits a v4."""
    sizes = (64, 32, 256, 256) if chip == "v4" else (256, 32, 512, 512)
    return Blocks(*sizes, VMEM_BYTES[chip])


def measure(chip: str, problem: Problem, blocks: Blocks | None = None) -> Figures:
    """Compile for the chip, with its default blocks unless told otherwise, and read the schedule.

    Raises TpuCompileError where it does not compile.
    """
    p, q_dtype, kv_dtype = problem, jnp.dtype(problem.q_dtype), jnp.dtype(problem.kv_dtype)
    shape = CacheShape(p.pages, p.page_size, p.kv_heads, p.query_heads, p.head_dim)
    if blocks is None:
        blocks = default_blocks(shape, q_dtype, kv_dtype, chip, p.layout)
    fitted = blocks.fitted(p.tokens, p.pages_per_sequence * p.page_size, shape, kv_dtype, p.layout)
    compiled = compile_for(chip, p, blocks=blocks, schedule=True)
    if compiled.schedule is None:
        raise DumpError("the compiler was asked for a schedule and gave none")
    return figures(chip, p, fitted, compiled.schedule)


def figures(chip: str, problem: Problem, blocks: Blocks, schedule: Schedule) -> Figures:
    """Figures of a schedule that was compiled with `blocks` (as fitted).

    The kernel's products are straight-line code and come in a fixed order: decode, whole block, small tile; masked
    first.

    Raises DumpError where the schedule has other products than that.
    """
    products = schedule.products()
    expected = 4 if blocks.tokens_per_tile == blocks.tokens_per_block else 6
    if len(products) != expected:
        found = ", ".join(str(region.bundles) for region in products)
        raise DumpError(f"expected {expected} regions with matrix products, found {len(products)} ({found} bundles)")
    _, decode, masked, inside = products[:4]
    small = products[4:]
    size = {"float32": 4, "bfloat16": 2}.get(problem.kv_dtype, 1)
    kv_bytes = blocks.kv_per_block * 2 * problem.kv_heads * problem.head_dim * size
    peak, side = MATRIX[chip]
    work = 4 * blocks.tokens_per_block * blocks.kv_per_block * problem.query_heads * problem.head_dim
    usable = peak * min(1.0, problem.head_dim / side)
    return Figures(
        chip=chip,
        tile=f"{blocks.tokens_per_block} x {blocks.kv_per_block}",
        kv=blocks.kv_per_block,
        inside=inside.bundles,
        masked=masked.bundles,
        small_inside=small[1].bundles if small else None,
        small_masked=small[0].bundles if small else None,
        decode_product=decode.bundles,
        decode_sequence=decode_sequence(problem, blocks, schedule, decode),
        matrix_use=inside.use("MATMUL", schedule.capacity),
        matrix_bound=round(work / usable),
        copy_floor=kv_bytes / MEMORY[chip] * CLOCK[chip],
    )


def decode_sequence(problem: Problem, blocks: Blocks, schedule: Schedule, product: Region) -> int:
    """Bundles of one decode sequence of one full KV block, counted from above.

    Everything between the head of the loop over sequences and the end of the decode path counts once, whether or not
    it would run; the loops that start page copies count once per turn, but only one of the two places that have them
    runs.
    """
    masked = schedule.products()[0]
    turns = -(-(blocks.kv_per_block // problem.page_size) // UNROLL)
    regions = schedule.regions
    last = regions.index(product)
    total, copying = 0, []
    # The first two copying loops belong to the block's first sequence, before the loop over sequences.
    heads = [i for i, region in enumerate(regions[:last]) if region.loop and region.copies]
    begin = heads[1] + 1 if len(heads) > 2 else 0
    for region in regions[begin:last]:
        if region is masked:
            continue  # the masked product, which does not run here
        if region.loop and region.copies:
            copying.append(region.bundles)
        else:
            total += region.bundles
    after = []
    for region in regions[last + 1 :]:
        if region.loop:
            break  # the loop that gathers rows: the prefill path
        after.append(region.bundles)
    products = blocks.kv_per_block // blocks.kv_per_chunk
    return total + turns * max(copying, default=0) + products * product.bundles + sum(after)
