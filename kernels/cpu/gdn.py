"""Gated DeltaNet attention in C++: AVX-512 with bfloat16 products, AVX2, or any CPU, whichever is the best here."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, get_num_threads

from ..reference.gdn_args import Sequence, fail, sequences, sizes
from . import build, host

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
# (name, flags) of each instruction set, in the order of gdn_instruction_set in gdn.cpp.
INSTRUCTION_SETS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("portable", ("-O2",)),
    ("avx2", _AVX2),
    ("avx512", (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16")))),
)


_WRITTEN = (0, 1, 8, 9)  # core_attn_out, z, conv_state, ssm_state


@cache
def _library() -> ctypes.CDLL:
    library = build.load("gdn", {"gdn.cpp": ()})
    library.gdn_instruction_set.restype = ctypes.c_int64
    return library


@cache
def instruction_set() -> str:
    """Name the best instruction set of this machine that there are kernels for."""
    best: int = _library().gdn_instruction_set()
    return INSTRUCTION_SETS[best][0]


@cache
def _kernels(name: str) -> int:
    """Address of the kernels for one instruction set, which are built only where they are used."""
    library = build.load(f"gdn_{name}", {"gdn_kernels.cpp": dict(INSTRUCTION_SETS)[name]})
    return ctypes.cast(library.gdn_run, ctypes.c_void_p).value or 0


@cache
def _native() -> Callable[..., int]:
    """The C++ entry."""
    return host.function(_library().gdn_method, _kernels(instruction_set()))


def _first(*args: Any) -> int:
    """Stand in for the C++ entry until it is built."""
    global _entry
    _entry = _native()
    return _entry(*args)


# Takes the op's arguments in order, threads, kernels (0: the best here) and what _pack made (0: nothing). Returns 0
# where it did the call, 1 where that cannot be or needs to be packed, 2 without memory.
_entry: Callable[..., int] = _first


def why_not() -> str | None:
    """Say why there is no C++ kernel on this machine (no compiler, or it failed), or None. Builds it."""
    reason = build.why_not()
    if reason is not None:
        return reason
    try:
        _native()
    except build.BuildError as e:
        return str(e)
    return None


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

    Sequences of 12 tokens or more go through the chunked form, with bfloat16 products where the model is bfloat16, the
    CPU has them and the chunk is well conditioned, and float32 otherwise; shorter ones go token by token in float32.
    """
    # Nothing but this call: with cold caches, whatever else Python touches shows in a decode step.
    if _entry(
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
        null_slot,
        source_state_indices,
        checkpoint_token_indx,
        checkpoint_state_indices,
        get_num_threads(),
        0,
        0,
    ):
        _prepared(
            0,
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
            null_slot,
            source_state_indices,
            checkpoint_token_indx,
            checkpoint_state_indices,
        )


def _run(name: str, *args: Any) -> None:
    """Run with the kernels of one instruction set; tests force those that are not the best here."""
    if _entry(*args, get_num_threads(), _kernels(name), 0):
        _prepared(_kernels(name), *args)


def _prepared(kernels: int, *args: Any) -> None:
    """Make the call that C++ has refused, now with its sequences read and checked in Python, or say what is wrong."""
    if any(isinstance(x, Tensor) and x.is_neg() for x in args):
        _resolved(kernels, args)
        return
    shapes, metadata = (*args[:15], *args[26:28]), (*args[15:26], *args[29:], args[8])
    packed = _pack(sequences(sizes(*shapes), *metadata))
    code = _entry(*args, get_num_threads(), kernels, packed[0].buffer_info()[0])
    if code == 2:
        raise MemoryError("opreg::gdn_attention: no memory for the list of sequences of this call")
    if code:
        fail("the call was refused by the C++ kernel, but not by the checks of the reference")


def _resolved(kernels: int, args: tuple[Any, ...]) -> None:
    """Make the call with tensors of their own in place of negative views, whose memory holds other values."""
    own = [x.resolve_neg() if isinstance(x, Tensor) else x for x in args]
    if _entry(*own, get_num_threads(), kernels, 0):
        _prepared(kernels, *own)
    for at in _WRITTEN:
        if own[at] is not args[at]:
            args[at].copy_(own[at])


def _pack(todo: list[Sequence]) -> tuple[array[int], ...]:
    """What C++ reads checked sequences from: struct Prepared, and the arrays that it points to, to be kept alive.

    A sequence is six numbers; the rows of its tokens and its (token, slot) pairs are pieces of the other two arrays.
    """
    flat, rows, writes = array("q"), array("q"), array("q")
    for q in todo:
        first, before = len(rows), len(writes) // 2
        rows.extend(q.rows)
        for token in sorted(q.writes):
            for slot in q.writes[token]:
                writes.extend((token, slot))
        source, final = (-1 if slot is None else slot for slot in (q.source, q.final))
        flat.extend((first, len(q.rows), source, final, before, len(writes) // 2))
    parts = (flat, rows, writes)
    return array("q", [len(todo), *(part.buffer_info()[0] for part in parts)]), *parts
