"""Gated DeltaNet attention in C++: AVX-512 with bfloat16 products, AVX2, or any CPU, whichever is the best here."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..reference.gdn_args import fail, sequences, sizes
from . import build
from .gdn_call import TYPES, WIDE, dense, pack, readable, row_strides, sizes_if_plain

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
# (name, flags) of each instruction set, in the order of gdn_instruction_set in gdn.cpp.
INSTRUCTION_SETS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("portable", ("-O2",)),
    ("avx2", _AVX2),
    ("avx512", (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16")))),
)
# Tokens from which a sequence is worth the chunked form.
CHUNKED_FROM = 12

_FIELDS = 45  # of struct Call in gdn.h, in its order
_Call = ctypes.c_int64 * _FIELDS


@cache
def _entry() -> Any:
    library = build.load("gdn", {"gdn.cpp": ()})
    library.gdn_attention.restype = ctypes.c_int64
    library.gdn_attention.argtypes = [_Call, ctypes.c_void_p]
    library.gdn_instruction_set.restype = ctypes.c_int64
    return library.gdn_attention, INSTRUCTION_SETS[library.gdn_instruction_set()][0]


@cache
def _kernels(name: str) -> int | None:
    """Address of the kernels for one instruction set, which are built only where they are used."""
    library = build.load(f"gdn_{name}", {"gdn_kernels.cpp": dict(INSTRUCTION_SETS)[name]})
    return ctypes.cast(library.gdn_run, ctypes.c_void_p).value


def instruction_set() -> str:
    """Name the best instruction set of this machine that there are kernels for."""
    best: str = _entry()[1]
    return best


@cache
def _why_not() -> str | None:
    reason = build.why_not()
    if reason is not None:
        return reason
    try:
        _kernels(instruction_set())
    except build.BuildError as e:
        return str(e)
    return None


def why_not(
    core_attn_out: Tensor,
    z: Tensor,
    projected_states_qkvz: Tensor,
    projected_states_ba: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weights: Tensor,
    conv_bias: Tensor | None,
    activation: str,
    A_log: Tensor,
    dt_bias: Tensor,
    num_prefills: int,
    num_decodes: int,
    num_spec_decodes: int = 0,
    has_initial_state: Tensor | None = None,
    non_spec_query_start_loc: Tensor | None = None,
    non_spec_token_indx: Tensor | None = None,
    non_spec_state_indices_tensor: Tensor | None = None,
    spec_query_start_loc: Tensor | None = None,
    spec_token_indx: Tensor | None = None,
    spec_state_indices_tensor: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    num_actual_tokens: int | None = None,
    tp_size: int = 1,
    reorder_input: bool = False,
    *,
    null_slot: int = -1,
    source_state_indices: Tensor | None = None,
    checkpoint_token_indx: Tensor | None = None,
    checkpoint_state_indices: Tensor | None = None,
) -> str | None:
    """Say why there is no C++ kernel here (no compiler, or it failed), or None. Builds it at the first call."""
    return _why_not()


def gdn_attention(
    core_attn_out: Tensor,
    z: Tensor,
    projected_states_qkvz: Tensor,
    projected_states_ba: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weights: Tensor,
    conv_bias: Tensor | None,
    activation: str,
    A_log: Tensor,
    dt_bias: Tensor,
    num_prefills: int,
    num_decodes: int,
    num_spec_decodes: int = 0,
    has_initial_state: Tensor | None = None,
    non_spec_query_start_loc: Tensor | None = None,
    non_spec_token_indx: Tensor | None = None,
    non_spec_state_indices_tensor: Tensor | None = None,
    spec_query_start_loc: Tensor | None = None,
    spec_token_indx: Tensor | None = None,
    spec_state_indices_tensor: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    num_actual_tokens: int | None = None,
    tp_size: int = 1,
    reorder_input: bool = False,
    *,
    null_slot: int = -1,
    source_state_indices: Tensor | None = None,
    checkpoint_token_indx: Tensor | None = None,
    checkpoint_state_indices: Tensor | None = None,
) -> None:
    """Run the op in C++; the arguments are those of `opreg::gdn_attention`.

    Sequences of CHUNKED_FROM tokens or more go through the chunked form, with bfloat16 products where the model is
    bfloat16 and the CPU has them and float32 otherwise; shorter ones go token by token in float32.
    """
    _run(
        None,
        core_attn_out,
        z,
        projected_states_qkvz,
        projected_states_ba,
        num_k_heads,
        num_v_heads,
        head_k_dim,
        head_v_dim,
        conv_state,
        ssm_state,
        conv_weights,
        conv_bias,
        activation,
        A_log,
        dt_bias,
        num_prefills,
        num_decodes,
        num_spec_decodes,
        has_initial_state,
        non_spec_query_start_loc,
        non_spec_token_indx,
        non_spec_state_indices_tensor,
        spec_query_start_loc,
        spec_token_indx,
        spec_state_indices_tensor,
        num_accepted_tokens,
        num_actual_tokens,
        tp_size,
        reorder_input,
        null_slot=null_slot,
        source_state_indices=source_state_indices,
        checkpoint_token_indx=checkpoint_token_indx,
        checkpoint_state_indices=checkpoint_state_indices,
    )


def _run(
    forced: str | None,
    core_attn_out: Tensor,
    z: Tensor,
    projected_states_qkvz: Tensor,
    projected_states_ba: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weights: Tensor,
    conv_bias: Tensor | None,
    activation: str,
    A_log: Tensor,
    dt_bias: Tensor,
    num_prefills: int,
    num_decodes: int,
    num_spec_decodes: int,
    has_initial_state: Tensor | None,
    non_spec_query_start_loc: Tensor | None,
    non_spec_token_indx: Tensor | None,
    non_spec_state_indices_tensor: Tensor | None,
    spec_query_start_loc: Tensor | None,
    spec_token_indx: Tensor | None,
    spec_state_indices_tensor: Tensor | None,
    num_accepted_tokens: Tensor | None,
    num_actual_tokens: int | None,
    tp_size: int,
    reorder_input: bool,
    *,
    null_slot: int,
    source_state_indices: Tensor | None,
    checkpoint_token_indx: Tensor | None,
    checkpoint_state_indices: Tensor | None,
) -> None:
    """Run with the kernels of one instruction set; tests force those that are not the best here."""
    plain = sizes_if_plain(
        core_attn_out,
        z,
        projected_states_qkvz,
        projected_states_ba,
        num_k_heads,
        num_v_heads,
        head_k_dim,
        head_v_dim,
        conv_state,
        ssm_state,
        conv_weights,
        conv_bias,
        activation,
        A_log,
        dt_bias,
        num_actual_tokens,
        tp_size,
    )
    s = plain or sizes(
        core_attn_out,
        z,
        projected_states_qkvz,
        projected_states_ba,
        num_k_heads,
        num_v_heads,
        head_k_dim,
        head_v_dim,
        conv_state,
        ssm_state,
        conv_weights,
        conv_bias,
        activation,
        A_log,
        dt_bias,
        num_actual_tokens,
        tp_size,
    )
    count = num_prefills + num_decodes
    metadata = (
        s,
        num_prefills,
        num_decodes,
        num_spec_decodes,
        has_initial_state,
        non_spec_query_start_loc,
        non_spec_token_indx,
        non_spec_state_indices_tensor,
        spec_query_start_loc,
        spec_token_indx,
        spec_state_indices_tensor,
        num_accepted_tokens,
        null_slot,
        source_state_indices,
        checkpoint_token_indx,
        checkpoint_state_indices,
        conv_state,
    )
    prepared = None
    if num_spec_decodes or source_state_indices is not None or checkpoint_token_indx is not None:
        prepared = pack(sequences(*metadata))
        count = prepared.count
    # Block tables hand over a column of a wider tensor.
    initial, starts = dense(has_initial_state), dense(non_spec_query_start_loc)
    tokens, index = dense(non_spec_token_indx), dense(non_spec_state_indices_tensor)
    if prepared is None and not readable(count, num_prefills, num_decodes, initial, starts, tokens, index):
        sequences(*metadata)
        fail("the metadata was refused by the C++ kernel, but not by the checks of the reference")
    conv_slot, ssm_slot, *rows = row_strides(
        s, plain is not None, conv_state, ssm_state, core_attn_out, z, projected_states_qkvz, projected_states_ba
    )
    call = _Call(
        core_attn_out.data_ptr(),
        z.data_ptr(),
        projected_states_qkvz.data_ptr(),
        projected_states_ba.data_ptr(),
        *rows,
        s.hk,
        s.hv,
        s.k,
        s.v,
        s.width,
        reorder_input,
        conv_state.data_ptr(),
        ssm_state.data_ptr(),
        conv_slot,
        ssm_slot,
        s.slots,
        conv_weights.data_ptr(),
        0 if conv_bias is None else conv_bias.data_ptr(),
        A_log.data_ptr(),
        dt_bias.data_ptr(),
        TYPES[z.dtype],
        TYPES[ssm_state.dtype],
        TYPES[conv_weights.dtype],
        0 if conv_bias is None else TYPES[conv_bias.dtype],
        TYPES[A_log.dtype],
        TYPES[dt_bias.dtype],
        s.rows,
        s.actual,
        count,
        0 if initial is None else initial.data_ptr(),
        0 if starts is None else starts.data_ptr(),
        0 if tokens is None else tokens.data_ptr(),
        0 if index is None else index.data_ptr(),
        0 if starts is None else WIDE.get(starts.dtype, 0),
        0 if tokens is None else WIDE.get(tokens.dtype, 0),
        0 if index is None else WIDE.get(index.dtype, 0),
        null_slot,
        *((0, 0, 0) if prepared is None else prepared.addresses()),
        torch.get_num_threads(),
        CHUNKED_FROM,
    )
    run, best = _entry()
    if run(call, _kernels(forced or best)):
        sequences(*metadata)
        fail("the metadata was refused by the C++ kernel, but not by the checks of the reference")
