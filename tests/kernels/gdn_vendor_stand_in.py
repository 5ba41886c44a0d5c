"""A stand-in for vllm-xpu-kernels' gdn_attention on CPU tensors, stricter than the vendor's.

It raises VendorCheck for what some version of the vendor checks, and Corruption for what the vendor does not check but
answers with wrong numbers or writes to memory that is not its own. Outputs are NaN until they are written.
"""

from itertools import pairwise
from typing import Any

import torch
from opreg.kernels.cpu import gdn_torch
from opreg.kernels.reference.gdn_args import Sizes
from torch import Tensor

_COMMON = (
    "Tensor! core_attn_out, Tensor! z, Tensor projected_states_qkvz, Tensor projected_states_ba, int num_k_heads, "
    "int num_v_heads, int head_k_dim, int head_v_dim, Tensor! conv_state, Tensor! ssm_state, Tensor conv_weights, "
    "Tensor? conv_bias, str activation, Tensor A_log, Tensor dt_bias, int num_prefills, int num_decodes, "
)
_PLAIN = (
    "Tensor? has_initial_state, Tensor non_spec_query_start_loc, Tensor non_spec_state_indices_tensor, "
    "int num_actual_tokens, int tp_size"
)
_SPECULATIVE = (
    "int num_spec_decodes, Tensor? has_initial_state, Tensor? non_spec_query_start_loc, Tensor? non_spec_token_indx, "
    "Tensor? non_spec_state_indices_tensor, Tensor? spec_query_start_loc, Tensor? spec_token_indx, "
    "Tensor? spec_state_indices_tensor, Tensor? num_accepted_tokens, int num_actual_tokens, int tp_size, "
    "bool reorder_input"
)
SCHEMAS = {
    "A": f"gdn_attention({_COMMON}{_PLAIN}) -> ()",
    "B": f"gdn_attention({_COMMON}{_PLAIN}, bool reorder_input) -> ()",
    "C": f"gdn_attention({_COMMON}{_SPECULATIVE}) -> ()",
}


class VendorCheck(RuntimeError):
    """A TORCH_CHECK of the vendor."""


class Corruption(RuntimeError):
    """What the vendor lets through to wrong numbers or foreign memory."""


def must(condition: bool, text: str) -> None:
    if not condition:
        raise VendorCheck(text)


def safe(condition: bool, text: str) -> None:
    if not condition:
        raise Corruption(text)


def define(schema: str, calls: list[dict[str, Any]]) -> None:
    """Register torch.ops._xpu_C.gdn_attention with one of the schemas; it appends the arguments of its calls."""
    library = torch.library.Library("_xpu_C", "DEF")
    library.define(SCHEMAS[schema])
    names = [argument.name for argument in torch._C.parse_schema(f"_xpu_C::{SCHEMAS[schema]}").arguments]

    def gdn_attention(*args: Any) -> None:
        v = dict(zip(names, args, strict=True))
        calls.append(v)
        _run(v, schema)

    library.impl("gdn_attention", gdn_attention, "CPU")
    _KEEP.append(library)


_KEEP: list[torch.library.Library] = []
ROLLING = [False]
"""Where speculative rows keep convolution windows: False: after token t in column t, as before 0.1.14; True: all in one
rolling buffer of width - 1 + drafts rows in column 0, as since (vllm-xpu-kernels #544)."""


def _run(v: dict[str, Any], schema: str) -> None:
    s = _sizes(v, schema)
    tokens = 0
    if v["num_prefills"] + v["num_decodes"] > 0:
        given = v.get("non_spec_token_indx")
        tokens = v["num_actual_tokens"] if given is None else given.shape[0]
    spec_tokens = v["spec_token_indx"].shape[0] if v.get("num_spec_decodes", 0) > 0 else 0
    must(not (tokens and spec_tokens), "speculative and other rows in one call (before 0.1.14)")
    must(tokens + spec_tokens == v["num_actual_tokens"], "token counts do not add up (before 0.1.14)")
    must(tokens + spec_tokens > 0, "no tokens")
    v["core_attn_out"].fill_(float("nan"))
    v["z"].fill_(float("nan"))
    if spec_tokens:
        _speculative(v, s)
    else:
        _plain(v, s, tokens, schema)


def _sizes(v: dict[str, Any], schema: str) -> Sizes:
    core, z, qkvz, ba = (v[n] for n in ("core_attn_out", "z", "projected_states_qkvz", "projected_states_ba"))
    conv, ssm, weights, bias = v["conv_state"], v["ssm_state"], v["conv_weights"], v["conv_bias"]
    for name in "core_attn_out z projected_states_qkvz projected_states_ba conv_weights A_log dt_bias".split():
        must(v[name].is_contiguous(), f"{name} must be contiguous")
    must(conv[0].is_contiguous(), "conv_state of each slot must be contiguous")
    must(ssm[0].is_contiguous(), "ssm_state of each slot must be contiguous")
    tp, actual = v["tp_size"], v["num_actual_tokens"]
    hk, hv, k, d = v["num_k_heads"] // tp, v["num_v_heads"] // tp, v["head_k_dim"], v["head_v_dim"]
    must(hv % hk == 0, "num_v_heads % num_k_heads")
    for name, t in (("core_attn_out", core), ("z", z)):
        must(t.shape[1:] == (hv, d), f"{name} is {tuple(t.shape)}")
    must(qkvz.shape[1] == hk * (2 * k + 2 * d * hv // hk), "projected_states_qkvz.size(1)")
    must(ba.shape[1] == 2 * hv, "projected_states_ba.size(1)")
    for name in "core_attn_out z projected_states_qkvz projected_states_ba".split():
        rows = v[name].shape[0]
        must(rows == actual if schema in "AB" else rows >= actual, f"{name} has {rows} rows, {actual} tokens")
    must(v["activation"] in ("silu", "swish"), "activation")
    must(k % 32 == 0 and k // 32 in (1, 2, 4, 8), "head_k_dim")
    must(v["dt_bias"].dtype == core.dtype, "dt_bias must have the dtype of core_attn_out")
    must(ssm.dtype in (torch.float32, torch.float16, torch.bfloat16), "ssm_state dtype")
    if schema != "A":
        must(v["A_log"].dtype == torch.float32, "A_log must be float32")
    else:
        safe(v["A_log"].dtype == core.dtype, "A_log is read in the model's dtype")
        safe(ssm.dtype == core.dtype, "ssm_state is read in the model's dtype")
    for name, t in (("conv_state", conv), ("conv_weights", weights), ("conv_bias", bias), ("projected_states_ba", ba)):
        safe(t is None or t.dtype == qkvz.dtype, f"{name} is read as {qkvz.dtype}")
    safe(core.dtype == z.dtype == qkvz.dtype, "outputs are written in the inputs' dtype")
    safe(bias is None or bias.is_contiguous(), "conv_bias with strides")
    width, flat = weights.shape[1], v.get("reorder_input", False)
    safe(2 <= width <= 5, "no kernel is launched for this width")
    safe(conv.shape[1] >= width - 1, "conv_state is too short")
    safe(k % 64 == 0 and d % 64 == 0, "the chunked kernel computes whole blocks of 64")
    safe(not flat or hv % 4 == 0, "b and a spill into the next row")
    safe(flat or hv // hk <= 4 or hv // hk % 4 == 0, "b and a spill into the next key head")
    safe(conv.shape[0] * conv.stride(0) <= 2**31, "slot addresses overflow 32 bits")
    return Sizes(hk, hv, k, d, width, 2 * hk * k + hv * d, ssm.shape[0], core.shape[0], actual)


def _index(v: dict[str, Any], name: str, size: int | None, schema: str = "C") -> list[int]:
    t = v[name]
    must(t is not None, f"{name} must be provided")
    (must if schema == "C" else safe)(t.dtype == torch.int32, f"{name} must be int32")
    must(t.is_contiguous(), f"{name} must be contiguous")
    (must if schema == "C" else safe)(t.dim() == 1 and size in (None, t.shape[0]), f"{name} has size {t.shape}")
    return t.tolist()


def _rows(v: dict[str, Any], name: str, tokens: int, s: Sizes) -> list[int]:
    if v.get(name) is None:
        return list(range(tokens))
    rows = _index(v, name, tokens)
    safe(len(set(rows)) == len(rows) and all(0 <= r < s.actual for r in rows), f"{name} is {rows}")
    return rows


def _plain(v: dict[str, Any], s: Sizes, tokens: int, schema: str) -> None:
    n = v["num_prefills"] + v["num_decodes"]
    starts = _index(v, "non_spec_query_start_loc", n + 1, schema)
    slots = _index(v, "non_spec_state_indices_tensor", n, schema)
    rows = _rows(v, "non_spec_token_indx", tokens, s)
    known = v["has_initial_state"]
    if known is not None:
        must(known.dtype == torch.bool and known.is_contiguous() and known.shape == (n,), "has_initial_state")
    if v["num_prefills"]:
        must(v["core_attn_out"].dtype in (torch.float16, torch.bfloat16), "prefill in float32")
    safe(starts[0] == 0 and starts[-1] == tokens, f"starts {starts} of {tokens} tokens")
    safe(all(a < b for a, b in pairwise(starts)), "an empty sequence: its slot gets garbage")
    safe(all(0 <= slot < s.slots for slot in slots), f"slots {slots} outside the cache")
    safe(len(set(slots)) == n, f"slots {slots} are written twice")
    for i, slot in enumerate(slots):
        keep = known is None or bool(known[i])
        window, state = _load(v, slot if keep else None, s)
        history, states = _compute(v, rows[starts[i] : starts[i + 1]], window, state, s)
        v["conv_state"][slot, : s.width - 1] = history[-(s.width - 1) :]
        v["ssm_state"][slot] = states[-1].to(v["ssm_state"].dtype)


def _speculative(v: dict[str, Any], s: Sizes) -> None:
    n = v["num_spec_decodes"]
    starts = _index(v, "spec_query_start_loc", n + 1)
    accepted = _index(v, "num_accepted_tokens", n)
    columns = v["spec_state_indices_tensor"]
    must(columns.dtype == torch.int32 and columns.is_contiguous(), "spec_state_indices_tensor")
    must(columns.dim() == 2 and columns.shape[0] == n, "spec_state_indices_tensor must have a row for each sequence")
    each = columns.shape[1]
    must(v["spec_token_indx"].shape[0] == n * each, "as many tokens of each row as there are columns")
    rows = _rows(v, "spec_token_indx", n * each, s)
    safe(starts == list(range(0, n * each + 1, each)), f"starts {starts} for {each} tokens each")
    table = columns.tolist()
    used = [slot for row in table for slot in set(row)]
    safe(all(0 <= slot < s.slots for slot in used), f"slots {table} outside the cache")
    safe(len(set(used)) == len(used), f"slots {table} belong to two rows")
    safe(all(0 <= count <= each for count in accepted), f"accepted {accepted} of {each} columns")
    if ROLLING[0]:
        must(v["conv_state"].shape[1] >= s.width - 2 + each, "conv_state has too few rows for speculative decoding")
    for i, row in enumerate(table):
        offset = max(accepted[i] - 1, 0)
        window, state = _load(v, row[offset], s)
        if ROLLING[0]:
            window = v["conv_state"][row[0], offset : offset + s.width - 1].clone()
        history, states = _compute(v, rows[i * each : (i + 1) * each], window, state, s)
        for t, slot in enumerate(row):
            v["ssm_state"][slot] = states[t].to(v["ssm_state"].dtype)
            if not ROLLING[0]:
                v["conv_state"][slot, : s.width - 1] = history[t + 1 : t + s.width]
        if ROLLING[0]:
            v["conv_state"][row[0], : s.width - 2 + each] = history[1:]


def _load(v: dict[str, Any], slot: int | None, s: Sizes) -> tuple[Tensor, Tensor]:
    if slot is None:
        return v["conv_state"].new_zeros(s.width - 1, s.conv_dim), torch.zeros(s.hv, s.v, s.k)
    return v["conv_state"][slot, : s.width - 1].clone(), v["ssm_state"][slot].float()


def _compute(
    v: dict[str, Any], rows: list[int], window: Tensor, state: Tensor, s: Sizes
) -> tuple[Tensor, list[Tensor]]:
    """Write a sequence's outputs; return its convolution inputs, old ones first, and the state after each token."""
    flat = v.get("reorder_input", False)
    x, z, g, beta = gdn_torch._unpack(
        v["projected_states_qkvz"][rows], v["projected_states_ba"][rows], v["A_log"], v["dt_bias"], s, flat
    )
    v["z"][rows] = z
    history = torch.cat([window, x])
    bias = None if v["conv_bias"] is None else v["conv_bias"].float()
    taps = (history[i : i + len(rows)].float() * v["conv_weights"][:, i].float() for i in range(s.width))
    q, k, values = gdn_torch._heads(torch.stack(list(taps)).sum(0), bias, x.dtype, s)
    states, state = [], state[None]
    for t, row in enumerate(rows):
        out, state = gdn_torch._step(state, *(part[t, None] for part in (q, k, values, g, beta)))
        v["core_attn_out"][row] = out[0].to(x.dtype)
        states.append(state[0])
    return history, states
