"""Gated DeltaNet attention, one token at a time: the truth that other kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from .gdn_args import Sizes, sequences, sizes

EPS = 1e-6


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
    """Run the op token by token in float32; the arguments are those of `opreg::gdn_attention`."""
    _gdn_attention(
        torch.float32,
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


def _gdn_attention(
    compute: torch.dtype,
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
    """Run the op token by token in dtype `compute`; tests take float64 here as their truth."""
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
    todo = sequences(
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
    # Rows that no live sequence owns (padding, skipped slots) must not keep what the allocator left there.
    core_attn_out.zero_()
    z.zero_()
    weights = conv_weights.to(compute)
    bias = torch.zeros_like(weights[:, 0]) if conv_bias is None else conv_bias.to(compute)
    decay_rate = -A_log.to(compute).exp()
    for sequence in todo:
        keep = s.width - 1
        window = torch.zeros(s.width, s.conv_dim, dtype=conv_state.dtype, device=conv_state.device)  # oldest first
        state = torch.zeros(s.hv, s.v, s.k, dtype=compute, device=ssm_state.device)
        if sequence.source is not None:
            window[1:] = conv_state[sequence.source, :keep]
            state = ssm_state[sequence.source].to(compute, copy=True)
        for t, row in enumerate(sequence.rows):
            x, z[row], b, a = _unpack(projected_states_qkvz[row], projected_states_ba[row], s, reorder_input)
            window = torch.cat([window[1:], x[None]])
            y = (window.to(compute) * weights.T).sum(0) + bias
            y = (y * torch.sigmoid(y)).to(x.dtype).to(compute)  # silu; the one rounding to the model's dtype
            q, k, v = y.split([s.hk * s.k, s.hk * s.k, s.hv * s.v])
            q = _normalise(q.view(s.hk, s.k)) * s.k**-0.5
            k = _normalise(k.view(s.hk, s.k))
            v = v.view(s.hv, s.v)
            alpha = torch.exp(decay_rate * torch.nn.functional.softplus(a.to(compute) + dt_bias.to(compute)))
            beta = torch.sigmoid(b.to(compute))
            for h in range(s.hv):
                kh, qh = k[h * s.hk // s.hv], q[h * s.hk // s.hv]
                decayed = alpha[h] * state[h]
                delta = beta[h] * (v[h] - decayed @ kh)
                state[h] = decayed + torch.outer(delta, kh)
                core_attn_out[row, h] = state[h] @ qh
            for slot in sequence.writes.get(t, ()):
                conv_state[slot, :keep] = window[1:]
                ssm_state[slot] = state
        if sequence.final is not None:
            conv_state[sequence.final, :keep] = window[1:]
            ssm_state[sequence.final] = state


def _normalise(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)


def _unpack(qkvz: Tensor, ba: Tensor, s: Sizes, flat: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split one row into the convolution's input [q all | k all | v all], z [hv, V], b [hv] and a [hv]."""
    if flat:
        return qkvz[: s.conv_dim], qkvz[s.conv_dim :].view(s.hv, s.v), ba[: s.hv], ba[s.hv :]
    g = s.hv // s.hk  # value heads of one key head; a group is [q | k | v of its heads | z of its heads]
    q, k, v, z = qkvz.view(s.hk, -1).split([s.k, s.k, g * s.v, g * s.v], dim=-1)
    b, a = ba.view(s.hk, 2 * g).split(g, dim=-1)
    x = torch.cat([q.reshape(-1), k.reshape(-1), v.reshape(-1)])
    return x, z.reshape(s.hv, s.v), b.reshape(-1), a.reshape(-1)
