"""Intel's `torch.ops._xpu_C.gdn_attention` (package vllm-xpu-kernels): its three schemas, and what it cannot take."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_COMMON = tuple(
    "core_attn_out z projected_states_qkvz projected_states_ba num_k_heads num_v_heads head_k_dim head_v_dim "
    "conv_state ssm_state conv_weights conv_bias activation A_log dt_bias num_prefills num_decodes".split()
)
_PLAIN = tuple(
    "has_initial_state non_spec_query_start_loc non_spec_state_indices_tensor num_actual_tokens tp_size".split()
)
_SPECULATIVE = tuple(
    "num_spec_decodes has_initial_state non_spec_query_start_loc non_spec_token_indx non_spec_state_indices_tensor "
    "spec_query_start_loc spec_token_indx spec_state_indices_tensor num_accepted_tokens num_actual_tokens tp_size "
    "reorder_input".split()
)
SCHEMAS = {
    "A": (*_COMMON, *_PLAIN),
    "B": (*_COMMON, *_PLAIN, "reorder_input"),
    "C": (*_COMMON, *_SPECULATIVE),
}
"""Argument names by version: A is 0.1.3, B is 0.1.4 to 0.1.8, C is 0.1.9 and later. None of them has defaults."""

_SPECULATIVE_FROM = (0, 1, 14)
# Rows are addressed with 32-bit products of slot and stride in the vendor's convolution.
_ADDRESSES = 2**31


@dataclass(frozen=True)
class Vendor:
    """The operator that was found. schema: a key of SCHEMAS."""

    op: Any
    schema: str

    def __call__(self, values: Mapping[str, Any]) -> None:
        """Call it with the arguments that its schema has."""
        self.op(*[values[name] for name in SCHEMAS[self.schema]])


def schema_of(names: tuple[str, ...]) -> str | None:
    """The schema that has these argument names, if any."""
    return next((schema for schema, known in SCHEMAS.items() if known == names), None)


@cache
def find() -> Vendor | str:
    """The vendor's operator, or the reason why there is none."""
    try:
        if not hasattr(torch.ops._xpu_C, "gdn_attention"):
            importlib.import_module("vllm_xpu_kernels._xpu_C")
    except (ImportError, OSError) as error:
        return f"vllm_xpu_kernels._xpu_C cannot be loaded: {error}"
    if not hasattr(torch.ops._xpu_C, "gdn_attention"):
        return "the installed vllm-xpu-kernels was built without gdn_attention"
    op = torch.ops._xpu_C.gdn_attention.default
    names = tuple(argument.name for argument in op._schema.arguments)
    schema = schema_of(names)
    if schema is None:
        known = {name for names in SCHEMAS.values() for name in names}
        other = ", ".join(name for name in names if name not in known) or "known ones in another order"
        return f"gdn_attention of the installed vllm-xpu-kernels has arguments that are not known here: {other}"
    return Vendor(op, schema)


def version() -> str | None:
    """The installed version of vllm-xpu-kernels, which is not imported to find out."""
    try:
        return importlib.metadata.version("vllm-xpu-kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def why_no_speculation() -> str | None:
    """Why speculative rows are refused by what is installed, or None. Rows of a mixed batch abort before 0.1.14."""
    vendor, found = find(), version()
    if isinstance(vendor, Vendor) and vendor.schema != "C":
        return f"schema {vendor.schema} of vllm-xpu-kernels knows no speculative rows"
    numbers = tuple(int(part) for part in re.findall(r"\d+", found or "")[:3])
    if numbers < _SPECULATIVE_FROM:
        return f"speculative rows need vllm-xpu-kernels 0.1.14 or later ({found or 'unknown'} is installed)"
    return None


@cache
def why_not_layer(
    io: torch.dtype,
    state: torch.dtype,
    weights: torch.dtype,
    bias: torch.dtype | None,
    decay: torch.dtype,
    dt_bias: torch.dtype,
    num_k_heads: int,
    num_v_heads: int,
    k: int,
    v: int,
    width: int,
    tp: int,
    flat: bool,
) -> str | None:
    """Why a layer with these facts is refused, or None. Answered once for each layer's shape, not at every step."""
    vendor = find()
    if isinstance(vendor, str):
        return vendor
    why = []
    if io not in (torch.bfloat16, torch.float16):
        why.append(f"the model is {_short(io)}, prefill is compiled for bfloat16 and float16")
    if k not in (64, 128, 256) or v % 64:
        why.append(f"head_k_dim={k} must be 64, 128 or 256 and head_v_dim={v} a multiple of 64")
    if not 2 <= width <= 5:
        why.append(f"the convolution's width is {width}, compiled are 2 to 5")
    heads = num_v_heads // tp
    ratio = num_v_heads // num_k_heads if num_k_heads else 0
    # b and a are copied four heads at a time, whatever lies behind the last of them.
    if flat and heads % 4:
        why.append(f"{heads} value heads on this rank are no multiple of 4, which reorder_input needs")
    if not flat and ratio > 4 and ratio % 4:
        why.append(f"{ratio} value heads to a key head: up to 4, or a multiple of 4")
    for name, dtype in (("conv_weights", weights), ("conv_bias", bias), ("dt_bias", dt_bias)):
        if dtype not in (None, io):
            why.append(f"{name} is {_short(dtype)} and read as {_short(io)}; convert it when the layer is built")
    if vendor.schema == "A" and flat:
        why.append("schema A knows the interleaved packing only (reorder_input=False)")
    if vendor.schema == "A" and (state, decay) != (io, io):
        why.append(f"schema A reads ssm_state ({_short(state)}) and A_log ({_short(decay)}) as {_short(io)}")
    return "; ".join(why) or None


def why_not_cache(slots: int, stride: int) -> str | None:
    """Why a convolution cache of this many slots, that far apart, is refused."""
    if slots * stride > _ADDRESSES:
        return f"conv_state spans {slots * stride} elements, the vendor's addresses end at {_ADDRESSES}"
    return None


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
