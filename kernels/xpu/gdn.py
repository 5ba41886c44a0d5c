"""Gated DeltaNet attention by Intel's vllm-xpu-kernels: everything its operator does not check is done here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.gdn_args import Sizes, fail, sequences, sizes
from .gdn_plan import Group, Plan, Plans, Speculative, make_plan
from .gdn_vendor import Vendor, find, why_no_speculation, why_not_cache, why_not_layer

_plans = Plans()


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
    """What the vendor's operator cannot take, or None."""
    if checkpoint_token_indx is not None or checkpoint_state_indices is not None:
        return "the vendor writes a state where a sequence ends, so it has no checkpoints"
    if num_spec_decodes and (reason := why_no_speculation()) is not None:
        return reason
    return why_not_cache(conv_state.shape[0], conv_state.stride(0)) or why_not_layer(
        projected_states_qkvz.dtype,
        ssm_state.dtype,
        conv_weights.dtype,
        None if conv_bias is None else conv_bias.dtype,
        A_log.dtype,
        dt_bias.dtype,
        num_k_heads,
        num_v_heads,
        head_k_dim,
        head_v_dim,
        conv_weights.shape[1],
        tp_size,
        reorder_input,
    )


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
    """Run the op with the vendor's kernels; the arguments are those of `opreg::gdn_attention`.

    Index tensors may be int32 or int64, longer than needed and strided; the host reads them once per step (Plans).
    """
    vendor = find()
    if isinstance(vendor, str):
        fail(vendor)
    s = sizes(
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
    metadata = (
        has_initial_state,
        non_spec_query_start_loc,
        non_spec_token_indx,
        non_spec_state_indices_tensor,
        spec_query_start_loc,
        spec_token_indx,
        spec_state_indices_tensor,
        num_accepted_tokens,
    )
    counts = (num_prefills, num_decodes, num_spec_decodes)
    checkpoints = (checkpoint_token_indx, checkpoint_state_indices)

    def make() -> Plan:
        todo = sequences(s, *counts, *metadata, null_slot, source_state_indices, *checkpoints, conv_state)
        if any(q.final is not None and q.writes for q in todo):
            fail("checkpoint_token_indx is given, but the vendor's operator has no checkpoints")
        return make_plan(todo, conv_state.shape[1] - s.width + 1, z.device)

    plan = _plans.find(
        conv_state.data_ptr(),
        (*counts, s.actual, s.rows, s.slots, s.width, conv_state.shape[1], null_slot, z.device),
        (*metadata, source_state_indices, *checkpoints),
        make,
    )
    unowned = slice(s.actual if plan.owned == s.actual else 0, s.rows)
    if unowned.start < unowned.stop:
        core_attn_out[unowned].zero_()
        z[unowned].zero_()
    if plan.moves is not None:
        source, target = plan.moves
        conv_state[target, : s.width - 1] = conv_state[source, : s.width - 1]
        ssm_state[target] = ssm_state[source]
    layer = {
        "num_k_heads": num_k_heads,
        "num_v_heads": num_v_heads,
        "head_k_dim": head_k_dim,
        "head_v_dim": head_v_dim,
        "conv_weights": conv_weights,
        "conv_bias": conv_bias,
        "activation": activation,
        "A_log": A_log if vendor.schema == "A" else A_log.float(),
        "dt_bias": dt_bias,
        "tp_size": tp_size,
        "reorder_input": reorder_input,
    }
    for group in plan.groups:
        outputs, inputs = (core_attn_out, z), (projected_states_qkvz, projected_states_ba)
        _run(vendor, group, layer, outputs, inputs, conv_state, ssm_state, s)


def _run(
    vendor: Vendor,
    group: Group,
    layer: dict[str, Any],
    outputs: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor],
    conv_state: Tensor,
    ssm_state: Tensor,
    s: Sizes,
) -> None:
    """One call of the vendor: rows made contiguous, outputs and states put where they belong."""
    rows, speculative = group.rows, group.speculative
    qkvz, ba = (_part(t, group).contiguous() if rows is None else t.index_select(0, rows) for t in inputs)
    places = [_part(t, group) if rows is None else t for t in outputs]
    direct = [rows is None and t.is_contiguous() for t in places]
    core, z = (t if same else t.new_empty((group.tokens, *t.shape[1:])) for t, same in zip(places, direct, strict=True))
    conv, ssm, history = conv_state, ssm_state, None
    if speculative is not None:
        history = _history(conv_state, speculative, _convolved(qkvz, s, layer["reorder_input"]), s.width - 1)
        conv, ssm = _caches(conv_state, ssm_state, speculative, history, s)
    values = {"core_attn_out": core, "z": z, "projected_states_qkvz": qkvz, "projected_states_ba": ba}
    vendor({**values, "conv_state": conv, "ssm_state": ssm, **layer, **group.arguments})
    for place, made, same in zip(places, (core, z), direct, strict=True):
        if rows is not None:
            place.index_copy_(0, rows, made)
        elif not same:
            place.copy_(made)
    if speculative is not None and history is not None:
        to, row, token = speculative.to, speculative.row, speculative.token
        windows = history.unfold(1, s.width - 1, 1).mT  # [row, tokens so far, width - 1, channels]
        conv_state[to, : s.width - 1] = windows[row, token + 1]
        if speculative.staged:
            ssm_state[to] = ssm[row * (group.tokens // history.shape[0]) + token]


def _part(t: Tensor, group: Group) -> Tensor:
    return t if group.tokens == t.shape[0] else t[group.first : group.first + group.tokens]


def _convolved(qkvz: Tensor, s: Sizes, flat: bool) -> Tensor:
    """The convolution's inputs [tokens, q of all | k of all | v of all] in packed rows."""
    if flat:
        return qkvz[:, : s.conv_dim]
    values = s.hv // s.hk * s.v
    parts = qkvz.view(qkvz.shape[0], s.hk, -1).split([s.k, s.k, values, values], dim=-1)
    return torch.cat([part.flatten(1) for part in parts[:3]], dim=1)


def _history(conv_state: Tensor, speculative: Speculative, inputs: Tensor, keep: int) -> Tensor:
    """Each row's window and its tokens' inputs behind it: [rows, width - 1 + tokens, channels]."""
    window = conv_state[speculative.source, :keep]
    return torch.cat([window, inputs.view(window.shape[0], -1, window.shape[2])], dim=1)


def _caches(
    conv_state: Tensor, ssm_state: Tensor, speculative: Speculative, history: Tensor, s: Sizes
) -> tuple[Tensor, Tensor]:
    """The caches that a speculative call is given: the caller's, or scratch of one slot for each token."""
    if not speculative.staged:
        return conv_state, ssm_state
    keep = s.width - 1
    count, tokens = history.shape[0], history.shape[1] - keep
    conv = conv_state.new_empty((count * tokens, keep + tokens - 1, s.conv_dim))
    ssm = ssm_state.new_empty((count * tokens, *ssm_state.shape[1:]))
    conv[::tokens, :keep] = history[:, :keep]
    ssm[::tokens] = ssm_state[speculative.source]
    return conv, ssm
