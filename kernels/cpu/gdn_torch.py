"""Gated DeltaNet attention in vectorised torch: any device, no compiler; one-token sequences are taken together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.gdn_args import Sequence, Sizes, sequences, sizes

EPS = 1e-6
CHUNK = 64
# Below this many tokens the token-by-token form does fewer and smaller torch calls than one padded chunk.
RECURRENT_BELOW = 6


def gdn_attention_torch(
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
    """Run the op with torch's own operators in float32; the arguments are those of `opreg::gdn_attention`."""
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
    if sum(len(sequence.rows) for sequence in todo) != s.rows:
        core_attn_out.zero_()
        z.zero_()
    weights = conv_weights.float()
    bias = None if conv_bias is None else conv_bias.float()
    # A one-token sequence that keeps one state is a decode step whatever the caller's counts call it.
    decodes = [q for q in todo if len(q.rows) == 1 and q.source is not None and not q.writes]
    if decodes:
        rows = torch.tensor([q.rows[0] for q in decodes], device=z.device)
        source = torch.tensor([q.source for q in decodes], device=z.device)
        final = torch.tensor([q.final for q in decodes], device=z.device)
        x, z[rows], g, beta = _unpack(
            projected_states_qkvz[rows], projected_states_ba[rows], A_log, dt_bias, s, reorder_input
        )
        window = torch.cat([conv_state[source, : s.width - 1], x[:, None]], 1)
        conv_state[final, : s.width - 1] = window[:, 1:]
        q, k, v = _heads((window.float() * weights.T).sum(1), bias, x.dtype, s)
        out, state = _step(ssm_state[source].float(), q, k, v, g, beta)
        ssm_state[final] = state.to(ssm_state.dtype)
        core_attn_out[rows] = out.to(core_attn_out.dtype)
    for sequence in todo:
        if not (len(sequence.rows) == 1 and sequence.source is not None and not sequence.writes):
            _one(
                sequence,
                core_attn_out,
                z,
                projected_states_qkvz,
                projected_states_ba,
                conv_state,
                ssm_state,
                weights,
                bias,
                A_log,
                dt_bias,
                s,
                reorder_input,
            )


def _one(
    sequence: Sequence,
    core_attn_out: Tensor,
    z: Tensor,
    qkvz: Tensor,
    ba: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    s: Sizes,
    flat: bool,
) -> None:
    """Run one sequence of any length, stopping where a state has to be written on the way."""
    given = sequence.rows
    rows = slice(given.start, given.stop) if isinstance(given, range) else torch.tensor(given, device=z.device)
    count, keep = len(given), s.width - 1
    x, z[rows], g, beta = _unpack(qkvz[rows], ba[rows], A_log, dt_bias, s, flat)
    state = ssm_state.new_zeros((s.hv, s.v, s.k), dtype=torch.float32)
    history = conv_state.new_zeros((keep, s.conv_dim))
    if sequence.source is not None:
        history = conv_state[sequence.source, :keep]
        state = ssm_state[sequence.source].float()
    history = torch.cat([history, x])
    long = history.float()
    y = sum(long[i : i + count] * weights[:, i] for i in range(s.width))
    q, k, v = _heads(torch.as_tensor(y), bias, x.dtype, s)
    out = torch.empty((count, s.hv, s.v), dtype=torch.float32, device=z.device)
    stops = sorted({t + 1 for t in sequence.writes} | {count})
    begin = 0
    for end in stops:
        part = slice(begin, end)
        if end - begin < RECURRENT_BELOW:
            for t in range(begin, end):
                o, new = _step(state[None], q[t, None], k[t, None], v[t, None], g[t, None], beta[t, None])
                out[t], state = o[0], new[0]
        else:
            out[part], state = _chunks(state, q[part], k[part], v[part], g[part], beta[part])
        slots = list(sequence.writes.get(end - 1, ()))
        if end == count and sequence.final is not None:
            slots.append(sequence.final)
        for slot in slots:
            conv_state[slot, :keep] = history[end : end + keep]
            ssm_state[slot] = state.to(ssm_state.dtype)
        begin = end
    core_attn_out[rows] = out.to(core_attn_out.dtype)


def _unpack(
    qkvz: Tensor, ba: Tensor, A_log: Tensor, dt_bias: Tensor, s: Sizes, flat: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the convolution's input [n, q all | k all | v all], z [n, hv, V], log decay and beta [n, hv]."""
    n, ratio = qkvz.shape[0], s.hv // s.hk
    if flat:
        x, z = qkvz[:, : s.conv_dim], qkvz[:, s.conv_dim :]
        b, a = ba[:, : s.hv], ba[:, s.hv :]
    else:
        parts = qkvz.view(n, s.hk, -1).split([s.k, s.k, ratio * s.v, ratio * s.v], dim=-1)
        x = torch.cat([p.reshape(n, -1) for p in parts[:3]], -1)
        z = parts[3].reshape(n, -1)
        b, a = (p.reshape(n, s.hv) for p in ba.view(n, s.hk, 2 * ratio).split(ratio, dim=-1))
    g = -A_log.float().exp() * torch.nn.functional.softplus(a.float() + dt_bias.float())
    return x, z.reshape(n, s.hv, s.v), g, b.float().sigmoid()


def _heads(y: Tensor, bias: Tensor | None, io: torch.dtype, s: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Turn convolution sums [n, conv_dim] into q, k (normalised, per value head) and v, each [n, hv, dim] float32."""
    if bias is not None:
        y = y + bias
    y = torch.nn.functional.silu(y).to(io).float()
    q, k, v = y.split([s.hk * s.k, s.hk * s.k, s.hv * s.v], dim=-1)
    ratio = s.hv // s.hk
    q, k = (
        t * torch.rsqrt((t * t).sum(-1, keepdim=True) + EPS)
        for t in (q.reshape(-1, s.hk, s.k), k.reshape(-1, s.hk, s.k))
    )
    return (
        (q * s.k**-0.5).repeat_interleave(ratio, dim=1),
        k.repeat_interleave(ratio, dim=1),
        v.reshape(-1, s.hv, s.v),
    )


def _step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """One token of n sequences: state [n, hv, V, K], vectors [n, hv, dim], scalars [n, hv]."""
    # Products and sums, not matrix products: those may sum in another order for another batch size.
    state = state * g.exp()[..., None, None]
    delta = (v - (state * k[..., None, :]).sum(-1)) * beta[..., None]
    state = state + delta[..., None] * k[..., None, :]
    return (state * q[..., None, :]).sum(-1), state


def _chunks(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence in chunks, the direct-solve form: state [hv, V, K], vectors [t, hv, dim], scalars [t, hv]."""
    q, k, v, g, beta = (t.transpose(0, 1) for t in (q, k, v, g, beta))
    out = torch.empty_like(v)
    for first in range(0, q.shape[1], CHUNK):
        part = slice(first, first + CHUNK)
        qc, kc, bc = q[:, part], k[:, part], beta[:, part]
        # Differences of sums that may be in the thousands: float64, or a later slow decay loses its digits.
        total = g[:, part].double().cumsum(-1)
        # Mask the exponent, not the exponential: above the diagonal it is positive and may overflow to inf.
        decay = (total[:, :, None] - total[:, None, :]).tril().float().exp().tril()
        grown = total.float().exp()[..., None]
        system = (kc @ kc.mT) * decay * bc[..., None]
        right = bc[..., None] * (v[:, part] - grown * (kc @ state.mT))
        x = _solve(system, right)
        out[:, part] = grown * (qc @ state.mT) + ((qc @ kc.mT) * decay) @ x
        last = total[:, -1:, None]
        state = last.float().exp() * state + (x * (last - total[..., None]).float().exp()).mT @ kc
    return out.transpose(0, 1), state


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """X of (I + A) X = R, A the part of `system` below the diagonal."""
    if system.device.type == "xla":
        # torch_xla takes solve_triangular to the CPU, in the middle of a graph, and only this older form to XLA.
        found: Tensor = torch.ops.aten.triangular_solve(right, system, upper=False, unitriangular=True)[0]
    else:
        found = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return found
