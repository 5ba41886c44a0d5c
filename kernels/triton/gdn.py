"""Gated DeltaNet attention in Triton, for cuda and xpu: no copy to the host, no wait, the same bits in any company."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.gdn_args import sequences, sizes
from ..reference.gdn_checks import check_batch, check_checkpoints, check_index, check_plain, check_speculative, fail
from .gdn_launch import Data, Group, launch, on_device
from .gdn_mixed import windows

_DIMS = (16, 32, 64, 128, 256)
_WIDEST = 8


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
    """Head dimensions that are no power of two from 16 to 256, and convolutions wider than 8: tiles have such sides."""
    for name, dim in (("head_k_dim", head_k_dim), ("head_v_dim", head_v_dim)):
        if dim not in _DIMS:
            return f"{name}={dim}; powers of two from 16 to 256 are compiled"
    if conv_weights.shape[-1] > _WIDEST:
        return f"a convolution of width {conv_weights.shape[-1]}; at most {_WIDEST}"
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
    """Run the op in Triton; the arguments are those of `opreg::gdn_attention`.

    Sequences of up to 16 tokens, and speculative ones, go token by token in float32, longer ones in chunks of 64. In a
    float32 model chunks have 32 tokens where head_k_dim is 128, and where it is 256 all go token by token. Products of
    a 16-bit model have operands of its own dtype: in bfloat16, keys that are nearly equal and do not decay, as of one
    token repeated, cost up to 4e-2 of the output (3e-3 on random inputs), where the C++ kernel goes over to float.

    Index tensors on the GPU are not copied to the host, so their values are not checked there: a sequence whose slots,
    starts or accepted counts cannot be is not run and its rows become NaN, an impossible checkpoint is not written, and
    two sequences on one slot are not noticed. The same holds for drafts on a cache that kernels of another convention
    wrote, and a later call with drafts raises (gdn_mixed.py). Where all of them are on the CPU, every value is checked
    as elsewhere.
    """
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
    written = {"core_attn_out": core_attn_out, "z": z, "conv_state": conv_state, "ssm_state": ssm_state}
    for name, t in written.items():
        if t.is_neg():
            fail(f"{name} is a negative view, whose memory holds other values; pass {name}.resolve_neg()")
    plain = (non_spec_query_start_loc, non_spec_token_indx, non_spec_state_indices_tensor)
    spec = (spec_query_start_loc, spec_token_indx, spec_state_indices_tensor, num_accepted_tokens)
    more = (source_state_indices, checkpoint_token_indx, checkpoint_state_indices)
    if all(t is None or t.is_cpu for t in (has_initial_state, *plain, *spec, *more)):
        known = conv_state if conv_state.is_cpu else None
        sequences(
            s, num_prefills, num_decodes, num_spec_decodes, has_initial_state, *plain, *spec, null_slot, *more, known
        )  # fmt: skip
    check_batch(
        num_prefills, num_decodes, num_spec_decodes, non_spec_token_indx, spec_token_indx, checkpoint_token_indx
    )
    groups = []
    if num_prefills + num_decodes:
        groups.append(_plain(z.device, num_prefills, num_decodes, has_initial_state, *plain, *more))
    if num_spec_decodes:
        groups.append(_speculative(z.device, num_spec_decodes, *spec))
    if not s.rows:
        return
    with on_device(z):
        if not groups or any(group.tokens is not None for group in groups):
            # Which rows an index leaves out is known to nobody here; without one, the kernels see to the padding.
            core_attn_out.zero_()
            z.zero_()
        data = Data(
            core_attn_out,
            z,
            projected_states_qkvz.resolve_neg(),
            projected_states_ba.resolve_neg(),
            conv_state,
            ssm_state,
            conv_weights.resolve_neg(),
            conv_bias if conv_bias is None else conv_bias.resolve_neg(),
            A_log.resolve_neg(),
            dt_bias.resolve_neg(),
        )
        for group in groups:
            launch(s, data, group, null_slot, reorder_input, group.accepted is None and num_prefills > 0)
        if num_spec_decodes:
            windows.check(z.device)


def _plain(
    device: torch.device,
    num_prefills: int,
    num_decodes: int,
    has_initial_state: Tensor | None,
    starts: Tensor | None,
    tokens: Tensor | None,
    slots: Tensor | None,
    sources: Tensor | None,
    checkpoint_tokens: Tensor | None,
    checkpoint_slots: Tensor | None,
) -> Group:
    slots = check_plain(num_prefills, num_decodes, starts, slots, sources, has_initial_state)
    checkpoints = check_checkpoints(checkpoint_tokens, checkpoint_slots)
    at, to = checkpoints if checkpoints and checkpoints[0].numel() else (None, None)
    return Group(
        num_prefills + num_decodes,
        _dense(starts, device),
        _token_index("non_spec_token_indx", tokens, device),
        slots.to(device).resolve_neg(),
        sources if sources is None else sources.to(device).resolve_neg(),
        None if has_initial_state is None else has_initial_state.to(device).contiguous().view(torch.uint8),
        None,
        _dense(at, device),
        _dense(to, device),
    )


def _speculative(
    device: torch.device,
    n: int,
    starts: Tensor | None,
    tokens: Tensor | None,
    slots: Tensor | None,
    accepted: Tensor | None,
) -> Group:
    starts, slots, accepted = check_speculative(n, starts, slots, accepted)
    return Group(
        n,
        _dense(starts, device),
        _token_index("spec_token_indx", tokens, device),
        slots.to(device).resolve_neg(),
        accepted=_dense(accepted, device),
    )


def _token_index(name: str, t: Tensor | None, device: torch.device) -> Tensor | None:
    if t is not None:
        check_index(name, t, 0, "one row for each token")  # how many tokens there are is known on the device
    return _dense(t, device)


def _dense(t: Tensor | None, device: torch.device) -> Tensor | None:
    return t if t is None else t.to(device).resolve_neg().contiguous()
