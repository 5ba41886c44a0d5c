"""Which Triton kernels of gdn_attention run for a call, and their grids: from shapes alone, never from values.

Numbers of warps are the fewest with which ptxas spills no register of a 16-bit model for sm_90 (test_gdn_sm90.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..reference.gdn_args import Sizes
from ..reference.gdn_checks import holds_rolling_buffer
from .gdn_batch import plan_chunks
from .gdn_chunk import run_chunks, solve_chunks
from .gdn_conv import convolve_chunks, finish
from .gdn_decode import run_tokens
from .gdn_mixed import windows

AT_MOST = 16
"""Tokens up to which a sequence goes token by token. Its own length alone decides, so that company changes no bit."""
CHANNELS = 256
"""Channels of one program of `finish`."""


@dataclass(frozen=True, slots=True)
class Data:
    """The tensors that hold numbers, as the op names them."""

    core_attn_out: Tensor
    z: Tensor
    qkvz: Tensor
    ba: Tensor
    conv_state: Tensor
    ssm_state: Tensor
    conv_weights: Tensor
    conv_bias: Tensor | None
    A_log: Tensor
    dt_bias: Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """The sequences of one kind: speculative ones have `accepted` and a row of slots each, plain ones what is left."""

    n: int
    starts: Tensor | None
    tokens: Tensor | None
    slots: Tensor
    sources: Tensor | None = None
    initial: Tensor | None = None
    accepted: Tensor | None = None
    checkpoint_tokens: Tensor | None = None
    checkpoint_slots: Tensor | None = None

    def batch(self, s: Sizes, null_slot: int) -> dict[str, Any]:
        """The arguments that all kernels take to find a sequence's tokens and slots."""
        return {
            "starts": self.starts,
            "slots": self.slots,
            "slot_stride": self.slots.stride(0),
            "sources": self.sources,
            "source_stride": 0 if self.sources is None else self.sources.stride(0),
            "initial": self.initial,
            "tokens": self.tokens,
            "null_slot": null_slot,
            "count_slots": s.slots,
            "actual": s.actual,
            # Behind the end of an index tensor there is nothing to read, whatever the starts say.
            "most": s.actual if self.tokens is None else min(s.actual, self.tokens.numel()),
        }

    def writes(self) -> dict[str, Any]:
        """The arguments of kernels that write states."""
        columns = 1 if self.accepted is None else self.slots.shape[1]
        return {
            "column_stride": 0 if self.accepted is None else self.slots.stride(1),
            "accepted": self.accepted,
            "columns": columns,
            "COLUMNS": triton.next_power_of_2(columns),
            **self.checkpoints(),
        }

    def checkpoints(self) -> dict[str, Any]:
        count = 0 if self.checkpoint_tokens is None else self.checkpoint_tokens.numel()
        return {
            "checkpoint_tokens": self.checkpoint_tokens,
            "checkpoint_slots": self.checkpoint_slots,
            "count_checkpoints": count,
        }


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if x.device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(x.device).device(x.device)
    return context


def block_rows(s: Sizes, io: torch.dtype) -> int:
    """Rows of the state [V, K] that one program keeps in registers: at most 4096 numbers, 32 a thread of 4 warps.

    Half of them in float32, whose products keep three parts of every operand; and 16 where K is below 64, since ptxas
    spills 776 bytes of [32, 32] and nothing of [16, 32].
    """
    most = 2048 if io == torch.float32 else 4096
    return max(16, min(s.v, 32 if s.k >= 64 else 16, most // s.k))


def chunking(s: Sizes, io: torch.dtype) -> tuple[int, int]:
    """(tokens of a chunk, chunks in flight in `run_chunks`), (0, 0) where every sequence goes token by token.

    Two chunks in flight take 61 KB of shared memory at Qwen3-Next's sizes, three would take 109 KB. With K=16, chunks
    of 64 tokens spill 152 bytes in 16 bits and 3 KB in float32, whose operands are held in three parts; in float32 with
    K=128 they spill 496 bytes, 32 tokens 88 and one chunk in flight nothing; with K=256 the least that was found, 16
    tokens and one chunk, spills 1.5 KB.
    """
    if s.k == 16:
        return 32, 2
    if io != torch.float32 or s.k <= 64:
        return 64, 2
    return (32, 1) if s.k == 128 else (0, 0)


def window_rows(s: Sizes) -> int:
    """Rows of a tile that holds the convolution's window."""
    return int(triton.next_power_of_2(max(s.width - 1, 1)))


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def launch(s: Sizes, x: Data, group: Group, null_slot: int, flat: bool, prefills: bool) -> None:
    """Run the sequences of one kind. `prefills` False: none needs the chunked form, whatever its length."""
    io = x.qkvz.dtype
    heads = {"HK": s.hk, "HV": s.hv, "K": s.k, "V": s.v, "FLAT": flat}
    batch, writes = group.batch(s, null_slot), group.writes()
    programs = group.n * s.hv * (s.v // block_rows(s, io))
    mixed = report = None
    if group.accepted is not None and holds_rolling_buffer(x.conv_state, s.width, group.slots.shape[1]):
        mixed, report = x.qkvz.new_empty(group.n, dtype=torch.int32), windows.report(x.qkvz.device)
    chunked = prefills and group.starts is not None and s.actual > AT_MOST and chunking(s, io)[0] > 0
    run_tokens[(programs,)](
        out=x.core_attn_out,
        out_stride=x.core_attn_out.stride(0),
        z=x.z,
        z_stride=x.z.stride(0),
        qkvz=x.qkvz,
        qkvz_stride=x.qkvz.stride(0),
        ba=x.ba,
        ba_stride=x.ba.stride(0),
        conv_state=x.conv_state,
        conv_stride=x.conv_state.stride(0),
        ssm_state=x.ssm_state,
        ssm_stride=x.ssm_state.stride(0),
        weights=x.conv_weights,
        bias=x.conv_bias,
        rate=x.A_log,
        shift=x.dt_bias,
        **batch,
        **writes,
        **heads,
        mixed=mixed,
        report=report,
        W=s.width,
        R=window_rows(s),
        BV=block_rows(s, io),
        AT_MOST=AT_MOST if chunked else 0,
        # Of [16, 64] in float32 ptxas spills 16 bytes with four, and with two where sequences are short.
        num_warps=1 if (block_rows(s, io), s.k, io) == (16, 64, torch.float32) else 4,
    )
    if chunked:
        _chunks(s, x, group, batch, heads)
    finish[(group.n * triton.cdiv(s.conv_dim, CHANNELS),)](
        out=x.core_attn_out,
        out_stride=x.core_attn_out.stride(0),
        z=x.z,
        z_stride=x.z.stride(0),
        x=bits(x.qkvz),
        x_stride=x.qkvz.stride(0),
        conv_state=bits(x.conv_state),
        conv_stride=x.conv_state.stride(0),
        n=group.n,
        rows=s.rows,
        **batch,
        **writes,
        **heads,
        mixed=mixed,
        W=s.width,
        CHECKPOINTS=triton.next_power_of_2(max(writes["count_checkpoints"], 1)),
        R=window_rows(s),
        BLOCK=CHANNELS,
        num_warps=4,
    )


def _chunks(s: Sizes, x: Data, group: Group, batch: dict[str, Any], heads: dict[str, Any]) -> None:
    """The chunked form: of the sequences of more than AT_MOST tokens, whose chunks are numbered on the device."""
    tokens, stages = chunking(s, x.qkvz.dtype)
    # The most chunks that any division of the tokens into n sequences can have; those that are not end at once.
    bound = s.actual // tokens + min(group.n, s.actual // (AT_MOST + 1))
    new = x.qkvz.new_empty
    owner, number = new(bound, dtype=torch.int32), new(bound, dtype=torch.int32)
    first_chunk = new(group.n, dtype=torch.int32)
    q, k = new(s.actual, s.hk, s.k), new(s.actual, s.hk, s.k)
    v = new(s.actual, s.hv, s.v)
    solved, mixed = new(bound, s.hv, tokens, tokens), new(bound, s.hv, tokens, tokens)
    sums = new(bound, s.hv, 2, tokens, dtype=torch.float32)
    # 16-bit operands lose nothing to TF32 that they have not lost already. float32 is the sum of three TF32 products:
    # in plain float32, without tensor cores, these kernels spill 16 KB of registers.
    precision = "tf32x3" if x.qkvz.dtype == torch.float32 else "tf32"
    plan_chunks[(group.n,)](
        owner, number, first_chunk, group.starts, group.n, bound, ABOVE=AT_MOST, C=tokens, BLOCK=1024
    )
    chunks = {"chunk_owner": owner, "chunk_number": number}
    convolve_chunks[(bound, 2 * s.hk + s.hv)](
        qkvz=x.qkvz,
        qkvz_stride=x.qkvz.stride(0),
        z=x.z,
        z_stride=x.z.stride(0),
        conv_state=x.conv_state,
        conv_stride=x.conv_state.stride(0),
        weights=x.conv_weights,
        bias=x.conv_bias,
        q_out=q,
        k_out=k,
        v_out=v,
        **chunks,
        **batch,
        **heads,
        W=s.width,
        C=tokens,
        num_warps=max(1, max(s.k, s.v) // 16),
    )
    no_values = {name: value for name, value in heads.items() if name != "V"}
    solve_chunks[(bound, s.hv)](
        q_in=q,
        k_in=k,
        ba=x.ba,
        ba_stride=x.ba.stride(0),
        rate=x.A_log,
        shift=x.dt_bias,
        solved=solved,
        mixed=mixed,
        sums=sums,
        **chunks,
        **batch,
        **no_values,
        # In float32, all of K at once spills 160 bytes of K=64 and 3.6 KB of K=256.
        BK=s.k if precision == "tf32" else min(s.k, 32),
        C=tokens,
        PRECISION=precision,
        num_warps=4,
    )
    checkpoints = group.checkpoints()
    run_chunks[(group.n * s.hv * (s.v // block_rows(s, x.qkvz.dtype)),)](
        out=x.core_attn_out,
        out_stride=x.core_attn_out.stride(0),
        q_in=q,
        k_in=k,
        v_in=v,
        solved=solved,
        mixed=mixed,
        sums=sums,
        ssm_state=x.ssm_state,
        ssm_stride=x.ssm_state.stride(0),
        first_chunk=first_chunk,
        **batch,
        **checkpoints,
        HK=s.hk,
        HV=s.hv,
        K=s.k,
        V=s.v,
        C=tokens,
        BV=block_rows(s, x.qkvz.dtype),
        ABOVE=AT_MOST,
        CHECKPOINTS=triton.next_power_of_2(max(checkpoints["count_checkpoints"], 1)),
        PRECISION=precision,
        STAGES=stages,
        num_warps=8,
    )
