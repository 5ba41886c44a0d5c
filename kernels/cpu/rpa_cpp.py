"""Ragged paged attention in C++: AVX-512 with bf16 products, AVX-512 or AVX2, whichever the processor has."""

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.paged_attention_check import check_attention, check_call
from . import build, rpa_entry

OP = "opreg::ragged_paged_attention"
OP_LSE = "opreg::ragged_paged_attention_lse"

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c")
_FLAGS = {
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
}
TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
    torch.int8: 5,
}
LEVELS = {3: "avx512bf16", 2: "avx512", 1: "avx2"}
"""Instruction sets by rank; a processor that has one has those of lower rank."""


class Args(ctypes.Structure):
    """RpaArgs of csrc/rpa.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "out", "lse", "kv")),
        *((name, ctypes.c_void_p) for name in ("kv_lens", "pages", "cu_q_lens", "num_seqs", "sinks")),
        *((name, ctypes.c_int64) for name in ("q_token", "q_head", "kv_page", "kv_position", "kv_head", "pages_row")),
        *(
            (name, ctypes.c_int64)
            for name in ("tokens", "max_seqs", "pages_per_seq", "num_pages", "page_size", "window")
        ),
        *((name, ctypes.c_int32) for name in ("q_heads", "kv_heads", "head_dim", "q_type", "kv_type", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "soft_cap", "v_scale")),
    )


class WriteArgs(ctypes.Structure):
    """RpaWriteArgs of csrc/rpa_write.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "v", "kv", "slots")),
        *((name, ctypes.c_int64) for name in ("k_token", "k_head", "v_token", "v_head")),
        *((name, ctypes.c_int64) for name in ("kv_page", "kv_position", "kv_head")),
        *((name, ctypes.c_int64) for name in ("tokens", "page_size", "num_slots")),
        *((name, ctypes.c_int32) for name in ("kv_heads", "head_dim", "new_type", "kv_type", "threads")),
        *((name, ctypes.c_int32) for name in ("k_scaled", "v_scaled")),
        *((name, ctypes.c_float) for name in ("k_scale", "v_scale")),
    )


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


@cache
def level() -> int:
    """The best of LEVELS that this processor has, 0 for none."""
    probe = build.load("rpa_level", {"rpa_level.cpp": ()})
    probe.rpa_level.restype = ctypes.c_int32
    return int(probe.rpa_level())


_libraries: dict[int, ctypes.CDLL] = {}


def library(rank: int) -> ctypes.CDLL:
    """The kernels for one of LEVELS, built and loaded once."""
    known = _libraries.get(rank)
    if known is not None:
        return known
    name = LEVELS[rank]
    built = build.load(f"rpa_{name}", {"rpa.cpp": (), f"rpa_{name}.cpp": _FLAGS[name]})
    built.rpa_attention.argtypes = (ctypes.POINTER(Args), ctypes.POINTER(WriteArgs))
    built.rpa_write.argtypes = (ctypes.POINTER(WriteArgs),)
    built.rpa_write.restype = ctypes.c_int32
    built.rpa_attention.restype = ctypes.c_int32
    _libraries[rank] = built
    if rank == level():
        rpa_entry.load(built.rpa_attention, built.rpa_write)
    return built


def why_not(
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Tensor | None = None,
) -> str | None:
    """The reason why this call cannot run here, or None."""
    return why_not_cache(kv_pages)


def why_not_cache(kv_pages: Tensor) -> str | None:
    """The reason why this machine or this cache is not for the C++ kernels, or None."""
    # A library that is loaded answers for the machine; asking again costs a tenth of a short call.
    if not _libraries:
        reason = _why_not_here()
        if reason is not None:
            return reason
    if kv_pages.dim() == 4 and kv_pages.stride(3) != 1:
        return f"the last dimension of kv_pages is not contiguous (stride {kv_pages.stride(3)})"
    return "kv_pages is a negative view, whose memory holds other values" if kv_pages.is_neg() else None


def _why_not_here() -> str | None:
    if not build.X86:
        return "the C++ kernel is written for x86-64 (AVX2 or AVX-512)"
    reason = build.why_not()
    if reason is not None:
        return reason
    return "the processor has no AVX2 with FMA and F16C" if level() == 0 else None


def rpa_cpp(
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every sequence's query rows over its pages; see opreg::ragged_paged_attention."""
    # fmt: off
    made: Tensor | None = rpa_entry.attend(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale, sliding_window, soft_cap, mask_value,
        k_scale, v_scale, kv_layout, sinks, False, None, None,
    )
    # fmt: on
    if made is not None:
        return made
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout, sinks)
    return attend(OP, q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, options, None)


def rpa_cpp_lse(
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, with the log-sum-exp of each row; see opreg::ragged_paged_attention_lse."""
    # fmt: off
    made: tuple[Tensor, Tensor] | None = rpa_entry.attend(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale, sliding_window, soft_cap, mask_value,
        k_scale, v_scale, kv_layout, sinks, True, None, None,
    )
    # fmt: on
    if made is not None:
        return made
    options = Options(sm_scale, sliding_window, soft_cap, mask_value, k_scale, v_scale, kv_layout, sinks)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    return attend(OP_LSE, q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, options, lse), lse


def cache_strides(kv_pages: Tensor, kv_layout: str) -> tuple[int, int, int]:
    """Elements from one page, position and combined head to the next."""
    page, second, third, _ = kv_pages.stride()
    return (page, second, third) if kv_layout == "NHD" else (page, third, second)


def attend(
    op: str,
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    options: Options,
    lse: Tensor | None,
    *,
    use_level: int | None = None,
    step: WriteArgs | None = None,
) -> Tensor:
    """Output, and log-sum-exp into `lse` unless that is None.

    use_level: one of LEVELS instead of the best. step: K and V to write first (its slots are left to the kernel).
    """
    q = q.resolve_neg()
    arguments = (q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)
    cache = check_call(op, *arguments, **options._asdict())
    if q.stride(2) != 1:
        q = q.contiguous()
    # Asking for a stride is cheaper than contiguous(), which goes through the dispatcher.
    if kv_lens.stride(0) != 1:
        kv_lens = kv_lens.contiguous()
    if cu_q_lens.stride(0) != 1:
        cu_q_lens = cu_q_lens.contiguous()
    if page_indices.stride(1) != 1:
        page_indices = page_indices.contiguous()
    sinks = None if options.sinks is None else options.sinks.resolve_neg().to(torch.float32).contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)  # half the time of empty(shape, dtype=...)
    page, position, head = cache_strides(kv_pages, options.kv_layout)
    args = Args(
        q.data_ptr(),
        out.data_ptr(),
        None if lse is None else lse.data_ptr(),
        kv_pages.data_ptr(),
        kv_lens.data_ptr(),
        page_indices.data_ptr(),
        cu_q_lens.data_ptr(),
        num_seqs.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        q.stride(0),
        q.stride(1),
        page,
        position,
        head,
        page_indices.stride(0),
        q.shape[0],
        kv_lens.shape[0],
        page_indices.shape[1],
        cache.pages,
        cache.page_size,
        options.sliding_window or 0,
        q.shape[1],
        cache.heads,
        cache.head_dim,
        TYPES[q.dtype],
        TYPES[kv_pages.dtype],
        torch.get_num_threads(),
        options.sm_scale * (1.0 if options.k_scale is None else options.k_scale),
        options.soft_cap or 0.0,
        1.0 if options.v_scale is None else options.v_scale,
    )
    if library(level() if use_level is None else use_level).rpa_attention(args, step) != 0:
        check_attention(op, *arguments, **options._asdict())
        raise RuntimeError(f"{op}: the C++ kernel refused index tensors that pass every check; please report this call")
    return out
