"""What to launch for a call of ragged paged attention: tiles, blocks and KV splits, all from shapes and the device."""

from collections.abc import Iterable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..reference.paged_attention_check import CacheShape
from .kv_cache_update import cache_strides, rows_contiguous
from .rpa_kernels import LOG2E, attend_blocks, merge_splits

LARGEST_GROUP = 128
"""Query heads per kv head: those of one token are rows of one tile."""
LARGEST_GROUP_FLOAT32 = 32
"""In float32, whose products need no tensor core but every register: more rows are spilled."""
LARGEST_HEAD_DIM = 256

MIN_TILES = 2
"""KV tiles that a split is given at least, where a sequence has them: a program costs about as much as one tile."""
MOST_SPLITS = 64
PROGRAMS_PER_CORE = 6
"""Two rounds of the three decode programs that an H100 holds per core: more splits than one round needs, because the
sequences of a batch differ in length and a program without work ends at once."""
FEW_TOKENS = 4
"""Query tokens of a sequence that a decode block has rows for, where a batch has more rows than sequences (drafts)."""
MOST_DECODE_ROWS = 64

ROOMY = 200 * 1024
"""Shared memory from which tiles are those of an H100 (227 KiB), not of an A100 (163 KiB) or a desktop GPU (99 KiB)."""

DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Options(NamedTuple):
    """The keyword arguments of the operator."""

    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    mask_value: float | None
    k_scale: float | None
    v_scale: float | None
    kv_layout: str
    sinks: Tensor | None


class Device(NamedTuple):
    """What block sizes depend on."""

    cores: int
    """Streaming multiprocessors, or Xe cores."""
    shared_bytes: int
    """Shared memory that one program can have."""


class Tiles(NamedTuple):
    """Sizes of a program: rows x KV positions, warps, depth of the load pipeline."""

    rows: int
    positions: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """One launch of attend_blocks."""

    blocks: int
    """Programs along the query axis."""
    block_q: int
    """Query tokens of a block."""
    any_sequence: bool
    """Blocks are searched for over all sequences, and padding rows are zeroed."""
    skip: int
    """Sequences of at most so many rows are another launch's."""
    splits: int
    tiles: Tiles


@cache
def device_facts(device: torch.device) -> Device:
    """Facts of a device, asked for once; for one that is neither cuda nor xpu (the interpreter), those of an A100."""
    if device.type == "cuda":
        cuda = torch.cuda.get_device_properties(device)
        return Device(cuda.multi_processor_count, getattr(cuda, "shared_memory_per_block_optin", 96 * 1024))
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        # Eight vector engines make an Xe core (Intel's Xe HPC and Xe2); 128 KiB of local memory belong to it.
        return Device(max(1, int(xpu.gpu_eu_count) // 8), 128 * 1024)
    return Device(108, 160 * 1024)


def dot_dtype(q: torch.dtype, kv: torch.dtype) -> torch.dtype:
    """The type in which q, K and V are multiplied: it holds every value of all three."""
    return q if kv.itemsize == 1 or kv == q else torch.promote_types(q, kv)


def power_of_two(n: int) -> int:
    """The least power of two that is n or more (triton.next_power_of_2 takes microseconds)."""
    return 1 << (n - 1).bit_length()


def prefill_tiles(group: int, block_d: int, itemsize: int, shared_bytes: int) -> Tiles:
    """Tiles for long query blocks: the largest of which ptxas spills no register (tests/lanes/triton compiles them)."""
    if itemsize == 4:  # no tensor core multiplies float32 exactly
        rows = max(16 if block_d > 128 else 32, power_of_two(group))
        return Tiles(rows, 16, 8 if rows * block_d > 2048 and rows > 16 else 4, 2)
    rows = max(64 if block_d > 128 else 128, power_of_two(group))
    if shared_bytes >= ROOMY:
        return Tiles(rows, 32 if block_d > 128 else 64, 8, 3)
    return Tiles(rows, 32, 8, 2 if block_d > 128 else 3)


def decode_tiles(rows: int, block_d: int, itemsize: int, shared_bytes: int) -> Tiles:
    """Tiles for `rows` rows: 16 at least, the fewest that a matrix instruction takes, and a deep pipeline of loads.

    The page number comes first and takes half of the stages: with 5 of them two tiles of K and V are on their way.
    """
    rows = max(16, power_of_two(rows))
    if itemsize == 4:
        return Tiles(rows, 16, 4 if rows == 16 else 8, 2)
    positions = min(128, 8192 // block_d)
    if rows > 64:
        return Tiles(rows, positions, 8, 3)
    return Tiles(rows, positions, 4, 5 if shared_bytes >= ROOMY else 3)


def count_splits(programs: int, longest: int, positions: int, cores: int) -> int:
    """Parts to cut every sequence's KV into, so that no more than PROGRAMS_PER_CORE of them fall to a core."""
    tiles = -(-longest // positions)
    return max(1, min(PROGRAMS_PER_CORE * cores // programs, tiles // MIN_TILES, MOST_SPLITS))


@lru_cache(maxsize=4096)
def plans(
    tokens: int,
    seqs: int,
    capacity: int,
    window: int | None,
    heads: int,
    group: int,
    head_dim: int,
    itemsize: int,
    device: Device,
) -> tuple[Plan, ...]:
    """The launches for a call of `tokens` rows and at most `seqs` sequences of at most `capacity` positions.

    How long each sequence is only the device knows. Where there are no more rows than sequences, decoding is what is
    likely, and one launch with small blocks takes every sequence; otherwise sequences with up to a small block of rows
    go to one launch, with their KV split, and the others to a second one. heads: kv heads. itemsize: of what is
    multiplied.
    """
    block_d = max(16, power_of_two(head_dim))
    one_token = tokens <= seqs
    rows = group if one_token else max(group, min(FEW_TOKENS * group, 16 if itemsize == 4 else MOST_DECODE_ROWS))
    decode = decode_tiles(rows, block_d, itemsize, device.shared_bytes)
    prefill = prefill_tiles(group, block_d, itemsize, device.shared_bytes)
    small, large = decode.rows // group, prefill.rows // group
    longest = capacity if window is None else min(capacity, window + small + decode.positions)
    active = min(tokens, seqs)
    splits = count_splits(max(1, active) * heads, longest, decode.positions, device.cores)
    if one_token or tokens <= small:
        return (Plan(tokens // small + active + 1, small, True, 0, splits, decode),)
    long = Plan(tokens // large + active + 1, large, True, small, 1, prefill)
    return (Plan(seqs, small, False, 0, splits, decode), long) if seqs else (long,)


def launch(
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    options: Options,
    cache: CacheShape,
    with_lse: bool,
    chosen: Iterable[Plan] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (of no elements without `with_lse`). `chosen`: these launches instead of plans()."""
    tokens, query_heads, head_dim = q.shape
    seqs = kv_lens.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, query_heads) if with_lse else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    group = query_heads // cache.heads
    dot = dot_dtype(q.dtype, kv_pages.dtype)
    if chosen is None:
        capacity, window = page_indices.shape[1] * cache.page_size, options.sliding_window
        facts = device_facts(q.device)
        chosen = plans(tokens, seqs, capacity, window, cache.heads, group, head_dim, dot.itemsize, facts)
    q = rows_contiguous(q)
    sinks = None if options.sinks is None else options.sinks.resolve_neg().contiguous()
    scale = options.sm_scale * (1.0 if options.k_scale is None else options.k_scale)
    v_scale = 1.0 if options.v_scale is None else options.v_scale
    if options.soft_cap is None:
        factors = (scale * LOG2E.value, 0.0, 0.0)
    else:
        factors = (1.0, 2.0 * LOG2E.value * scale / options.soft_cap, options.soft_cap * LOG2E.value)
    strides = cache_strides(kv_pages, options.kv_layout)
    q_token, q_head, _ = q.stride()
    table_row = page_indices.stride(0)
    block_d = max(16, power_of_two(head_dim))
    for plan in chosen:
        tiles = plan.tiles
        part = part_lse = lse  # not read unless split
        if plan.splits > 1:
            rows = plan.blocks * cache.heads * plan.splits * tiles.rows
            part = torch.empty((rows, head_dim), dtype=torch.float32, device=q.device)
            part_lse = torch.empty((rows,), dtype=torch.float32, device=q.device)
        attend_blocks[(plan.blocks, cache.heads, plan.splits)](
            q,
            kv_pages,
            out,
            lse,
            part,
            part_lse,
            kv_lens,
            page_indices,
            cu_q_lens,
            num_seqs,
            sinks,
            *factors,
            v_scale,
            tokens,
            seqs,
            options.sliding_window or 0,
            table_row,
            cache.pages,
            q_token,
            q_head,
            *strides,
            GROUP=group,
            HEAD_DIM=head_dim,
            PAGE_SIZE=cache.page_size,
            DOT=DOT_TYPES[dot],
            PRECISION="ieee",
            WINDOWED=options.sliding_window is not None,
            CAPPED=options.soft_cap is not None,
            SINKS=sinks is not None,
            LSE=with_lse,
            ANY=plan.any_sequence,
            SKIP=plan.skip,
            SPLIT=plan.splits > 1,
            MIN_TILES=MIN_TILES,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.positions,
            BLOCK_D=block_d,
            BLOCK_Q=plan.block_q,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if plan.splits > 1:
            merge_splits[(plan.blocks * plan.block_q, query_heads)](
                part,
                part_lse,
                out,
                lse,
                cu_q_lens,
                num_seqs,
                v_scale,
                tokens,
                seqs,
                plan.splits,
                GROUP=group,
                HEAD_DIM=head_dim,
                LSE=with_lse,
                ANY=plan.any_sequence,
                BLOCK_M=tiles.rows,
                BLOCK_D=block_d,
                BLOCK_Q=plan.block_q,
                BLOCK_S=power_of_two(plan.splits),
                num_warps=4,
            )
    return out, lse
