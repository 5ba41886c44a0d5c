"""Writing a step's K and V into a paged cache in Triton, for cuda and xpu: one program per token and block of heads."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.paged_attention_check import CacheShape, check_update_call
from .rpa_kernels import find_sequence

OP = "opreg::kv_cache_update"

ELEMENTS = 2048
"""Elements of K, and as many of V, that a program moves at most."""


@triton.jit
def rounded(x, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr):
    """x to nearest even among floats of MANTISSA bits and exponents from SMALLEST: a cast of the result is exact.

    Triton 3.7 casts to float8_e5m2 by truncation on compute capability 8.x (cvt.rz), and its interpreter loses a carry.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits >> 23) & 255, SMALLEST + 127)
    # In a sum with 2^23 units of the last place nothing below such a unit is left.
    units = ((exponent - MANTISSA + 23) << 23).to(tl.float32, bitcast=True)
    result = (tl.abs(x) + units) - units
    return (result.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def cache_value(x, scale, SCALED: tl.constexpr, kind: tl.constexpr):
    """x / scale as type `kind`: divided as IEEE 754 says, held inside the range of an 8-bit type, to nearest even."""
    if SCALED or x.dtype != kind:
        x = x.to(tl.float32)
        if SCALED:
            x = tl.div_rn(x, scale + tl.zeros_like(x))
        if kind == tl.int8:
            x = tl.clamp(x, -128.0, 127.0)
            x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: to nearest even
        elif kind == tl.float8e4nv:
            x = rounded(tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL), 3, -6)
        elif kind == tl.float8e5:
            x = rounded(tl.clamp(x, -57344.0, 57344.0, propagate_nan=tl.PropagateNan.ALL), 2, -14)
        x = x.to(kind)
    return x


@triton.jit
def write_token(
    k,
    v,
    kv,
    token,
    page,
    offset,
    k_scale,
    v_scale,
    k_token,
    k_head,
    v_token,
    v_head,
    kv_page,
    kv_position,
    kv_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the heads of one block of one token to their place in a page."""
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (d < HEAD_DIM)
    keys = tl.load(k + token * k_token + head * k_head + d, mask=inside)
    values = tl.load(v + token * v_token + head * v_head + d, mask=inside)
    to = kv + page * kv_page + offset * kv_position + 2 * head * kv_head + d
    kind: tl.constexpr = kv.dtype.element_ty
    tl.store(to, cache_value(keys, k_scale, K_SCALED, kind), mask=inside)
    tl.store(to + kv_head, cache_value(values, v_scale, V_SCALED, kind), mask=inside)


@triton.jit(do_not_specialize=["slots"])
def write_slots(
    k,
    v,
    kv,
    slot_mapping,
    slots,
    slot_stride,
    k_scale,
    v_scale,
    k_token,
    k_head,
    v_token,
    v_head,
    kv_page,
    kv_position,
    kv_head,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write each token to the slot that slot_mapping names. Grid: (tokens, blocks of heads)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token * slot_stride).to(tl.int64)
    tl.device_assert((slot >= -1) & (slot < slots), "slot_mapping names a slot that kv_pages does not have")
    if (slot < 0) | (slot >= slots):
        return
    write_token(
        k,
        v,
        kv,
        token,
        slot // PAGE_SIZE,
        slot % PAGE_SIZE,
        k_scale,
        v_scale,
        k_token,
        k_head,
        v_token,
        v_head,
        kv_page,
        kv_position,
        kv_head,
        HEADS,
        HEAD_DIM,
        K_SCALED,
        V_SCALED,
        BLOCK_H,
        BLOCK_D,
    )


@triton.jit(do_not_specialize=["tokens", "max_seqs", "table_row", "columns", "pages"])
def write_step(
    k,
    v,
    kv,
    kv_lens,
    page_indices,
    cu_q_lens,
    num_seqs,
    tokens,
    max_seqs,
    table_row,
    columns,
    pages,
    k_scale,
    v_scale,
    k_token,
    k_head,
    v_token,
    v_head,
    kv_page,
    kv_position,
    kv_head,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write each token of a step to the position that it has in its sequence. Grid: (tokens, blocks of heads)."""
    token = tl.program_id(0)
    count = tl.maximum(tl.minimum(tl.load(num_seqs), max_seqs), 0)
    sequence, _, q_len, before = find_sequence(cu_q_lens, count, tokens, token, 1, 0)
    if sequence == count:  # a padding row
        return
    position = tl.load(kv_lens + sequence) - q_len + before
    column = position // PAGE_SIZE
    real = (position >= 0) & (column < columns)
    page = tl.load(page_indices + sequence.to(tl.int64) * table_row + column, mask=real, other=-1).to(tl.int64)
    real = real & (page >= 0) & (page < pages)
    tl.device_assert(real, "kv_lens or page_indices names a page that kv_pages does not have")
    if not real:
        return
    write_token(
        k,
        v,
        kv,
        token.to(tl.int64),
        page,
        position % PAGE_SIZE,
        k_scale,
        v_scale,
        k_token,
        k_head,
        v_token,
        v_head,
        kv_page,
        kv_position,
        kv_head,
        HEADS,
        HEAD_DIM,
        K_SCALED,
        V_SCALED,
        BLOCK_H,
        BLOCK_D,
    )


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a cuda device."""
    return torch.cuda.get_device_capability(device)


def why_not_cache(kv_pages: Tensor) -> str | None:
    """The reason why this device or this cache is not for the Triton kernels, or None."""
    if kv_pages.is_neg():
        return "kv_pages is a negative view, whose memory holds other values"
    if kv_pages.dim() == 4 and kv_pages.stride(3) != 1:
        return f"the last dimension of kv_pages is not contiguous (stride {kv_pages.stride(3)})"
    if kv_pages.device.type == "cuda":
        version = capability(kv_pages.device)
        if version < (8, 0):
            return f"compute capability {version[0]}.{version[1]}; the kernels are for 8.0 and later"
        if version < (8, 9) and kv_pages.dtype == torch.float8_e4m3fn:
            return f"compute capability {version[0]}.{version[1]}; Triton has float8_e4m3fn from 8.9 on"
    return None


def why_not(
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    *,
    kv_layout: str = "NHD",
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> str | None:
    """The reason why this cache cannot be written here, or None."""
    return why_not_cache(kv_pages)


def kv_cache_update(
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    *,
    kv_layout: str = "NHD",
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> None:
    """Write each token's K and V into its slot; see opreg::kv_cache_update.

    Slots are not looked at on the host, which would wait for the device: one that the cache does not have is skipped,
    and stops the kernel with TRITON_DEBUG=1.
    """
    sizes = check_update_call(OP, k, v, kv_pages, slot_mapping, kv_layout=kv_layout, k_scale=k_scale, v_scale=v_scale)
    slot_mapping = slot_mapping.resolve_neg()
    index = (slot_mapping, sizes.pages * sizes.page_size, slot_mapping.stride(0))
    launch_write(write_slots, k, v, kv_pages, index, sizes, kv_layout, k_scale, v_scale)


def launch_step_write(
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    sizes: CacheShape,
    kv_layout: str,
    k_scale: float | None,
    v_scale: float | None,
) -> None:
    """Write K and V of a step; index tensors are contiguous, page_indices along its rows."""
    table_row, columns = page_indices.stride(0), page_indices.shape[1]
    index = (kv_lens, page_indices, cu_q_lens, num_seqs, k.shape[0], kv_lens.shape[0], table_row, columns, sizes.pages)
    launch_write(write_step, k, v, kv_pages, index, sizes, kv_layout, k_scale, v_scale)


def rows_contiguous(x: Tensor) -> Tensor:
    """x, copied unless its last dimension is contiguous and it is no negative view, whose memory holds other values."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def cache_strides(kv_pages: Tensor, kv_layout: str) -> tuple[int, int, int]:
    """Elements from one page, position and combined head to the next."""
    page, second, third, _ = kv_pages.stride()
    return (page, second, third) if kv_layout == "NHD" else (page, third, second)


class Blocks(NamedTuple):
    """What one program moves."""

    heads: int
    elements: int
    """Of a head, a power of two."""
    warps: int


@cache
def blocks(heads: int, head_dim: int) -> Blocks:
    """A whole token where it has no more than ELEMENTS, with 16 elements of K and 16 of V to a thread."""
    elements = 1 << (head_dim - 1).bit_length()
    some = min(1 << (heads - 1).bit_length(), max(1, ELEMENTS // elements))
    return Blocks(some, elements, min(max(some * elements // 512, 1), 4))


def launch_write(
    kernel: Any,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    index: tuple[Tensor | int, ...],
    sizes: CacheShape,
    kv_layout: str,
    k_scale: float | None,
    v_scale: float | None,
) -> None:
    """One of the two kernels above; `index` is what it takes between kv and the scales."""
    k, v = rows_contiguous(k), rows_contiguous(v)
    if k.numel() == 0:
        return
    block = blocks(sizes.heads, sizes.head_dim)
    kernel[(k.shape[0], -(-sizes.heads // block.heads))](
        k,
        v,
        kv_pages,
        *index,
        1.0 if k_scale is None else k_scale,
        1.0 if v_scale is None else v_scale,
        *k.stride()[:2],
        *v.stride()[:2],
        *cache_strides(kv_pages, kv_layout),
        PAGE_SIZE=sizes.page_size,
        HEADS=sizes.heads,
        HEAD_DIM=sizes.head_dim,
        K_SCALED=k_scale is not None,
        V_SCALED=v_scale is not None,
        BLOCK_H=block.heads,
        BLOCK_D=block.elements,
        num_warps=block.warps,
    )
