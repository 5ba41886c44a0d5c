"""The chunked form of gdn_attention's recurrence in Triton: what chunks can do alone, then one pass over the chunks.

With D_ij = exp(G_i - G_j) for i >= j, G the running sum of the log decay inside a chunk, X the corrected values and S0
the state [V, K] before the chunk (Yang et al. 2025, section 3.2, solved for X instead of for two auxiliary matrices):

    (I + A) X = diag(beta) (V - diag(e^G) K S0^T),  A = strictly lower part of diag(beta) (K K^T * D)
    O = diag(e^G) Q S0^T + (lower part of Q K^T * D) X
    S1 = e^{G_last} S0 + (diag(e^{G_last - G}) X)^T K
"""

import triton
import triton.language as tl

from .gdn_batch import INDICES, RUN, VARYING, gate_columns, gates, row_of, sequence
from .gdn_conv import superseded


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=INDICES)
def solve_chunks(
    q_in,
    k_in,
    ba,
    ba_stride,
    rate,
    shift,
    solved,
    mixed,
    sums,
    chunk_owner,
    chunk_number,
    starts,
    slots,
    slot_stride,
    sources,
    source_stride,
    initial,
    tokens,
    null_slot,
    count_slots,
    actual,
    most,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    FLAT: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What does not depend on the state: (I + A)^-1 diag(beta), lower Q K^T * D, and G; grid (chunks, HV).

    solved, mixed [chunks, HV, C, C] in the model's dtype; sums [chunks, HV, 2, C] float32: G in two parts.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.load(chunk_owner + chunk)
    if i < 0:
        return
    first, count, _source, _slot, state = sequence(
        i, starts, slots, slot_stride, 0, sources, source_stride, initial, None, 1, null_slot, count_slots, most, 1
    )
    if state != RUN:
        return
    r = tl.arange(0, C)
    t = tl.load(chunk_number + chunk) * C + r
    inside = t < count
    row, known = row_of(tokens, first + t, inside, actual)
    b_column, a_column = gate_columns(head, HK, HV, FLAT)
    a = tl.load(ba + row * ba_stride + a_column, mask=known, other=0.0)
    b = tl.load(ba + row * ba_stride + b_column, mask=known, other=0.0)
    g, beta = gates(a, b, tl.load(rate + head), tl.load(shift + head))
    # Behind the end nothing decays; nothing is written either, since k and v are zeros there.
    g = tl.where(inside, g, 0.0)
    # One sum in float32 that has met a fast decay (g down to -1e4) has no digits left for the slow ones behind it, and
    # not every GPU has float64. Multiples of 1/64 add up exactly, and the rest of 64 tokens stays below 1. What -1024
    # decays to is 0 in float32, as it is for anything below.
    g = tl.where(g < -1024.0, -1024.0, g)
    coarse = tl.floor(g * 64.0 + 0.5) * 0.015625
    high = tl.cumsum(coarse, axis=0)
    low = tl.cumsum(g - coarse, axis=0)
    to = sums + (chunk.to(tl.int64) * HV + head) * 2 * C + r
    tl.store(to, high)
    tl.store(to + C, low)
    at = ((first + t).to(tl.int64) * HK + head // (HV // HK))[:, None] * K + tl.arange(0, BK)[None, :]
    weight = tl.zeros([C, C], tl.float32)
    A = tl.zeros([C, C], tl.float32)
    for part in tl.range(0, K, BK):
        k = tl.load(k_in + at + part, mask=inside[:, None], other=0.0)
        q = tl.load(q_in + at + part, mask=inside[:, None], other=0.0)
        kt = tl.trans(k)
        weight = tl.dot(q, kt, weight, input_precision=PRECISION)
        A = tl.dot(k, kt, A, input_precision=PRECISION)
    lower = r[:, None] >= r[None, :]
    # The exponent is masked, not the exponential: above the diagonal it is positive and overflows.
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decay = tl.exp(tl.where(lower, between, float("-inf")))
    to_pair = (chunk.to(tl.int64) * HV + head) * C * C + r[:, None] * C + r[None, :]
    io = mixed.dtype.element_ty
    tl.store(mixed + to_pair, (weight * decay).to(io))
    A *= decay * beta[:, None]
    # Blocks of m tokens on the diagonal are inverted, then pairs of them: the inverse of [[P, 0], [R, U]] is
    # [[P', 0], [-U' R P', U']]. This is forward substitution by blocks. Every factor is the inverse for some run of
    # tokens, with entries of at most 1; powers of A, as in a Neumann series, grow like binomial coefficients when keys
    # are equal.
    x = tl.where(r[:, None] == r[None, :], 1.0, 0.0) - tl.where(_pairs(r, 1), A, 0.0)
    for level in tl.static_range(1, 16):
        if (2 << level) <= C:
            below = tl.where(_pairs(r, 1 << level), A, 0.0)
            x -= tl.dot(tl.dot(x, below, input_precision=PRECISION), x, input_precision=PRECISION)
    tl.store(solved + to_pair, (x * beta[None, :]).to(io))


@triton.jit
def _pairs(r, m: tl.constexpr):
    """Where row and column lie in the second and the first half of one block of 2*m: the R of a pair."""
    i = r[:, None] // m
    j = r[None, :] // m
    return (i == j + 1) & (j % 2 == 0)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=INDICES)
def run_chunks(
    out,
    out_stride,
    q_in,
    k_in,
    v_in,
    solved,
    mixed,
    sums,
    ssm_state,
    ssm_stride,
    first_chunk,
    starts,
    slots,
    slot_stride,
    sources,
    source_stride,
    initial,
    tokens,
    checkpoint_tokens,
    checkpoint_slots,
    count_checkpoints,
    null_slot,
    count_slots,
    actual,
    most,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    ABOVE: tl.constexpr,
    CHECKPOINTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One sequence, one value head, BV rows of its state, chunk after chunk; grid (sequences * HV * V / BV,).

    All products have BV rows, the state's, so that the results of one are the left operand of the next one and stay in
    registers: [BV, C] = (V^T, S0 K^T, S0 Q^T), then [BV, K]. The state is float32 from its first chunk to its last.
    """
    blocks: tl.constexpr = V // BV
    begin = tl.program_id(0) % blocks * BV
    head = tl.program_id(0) // blocks % HV
    i = tl.program_id(0) // (blocks * HV)
    first, count, source, slot, state = sequence(
        i, starts, slots, slot_stride, 0, sources, source_stride, initial, None, 1, null_slot, count_slots, most, 1
    )
    if (state != RUN) | (count <= ABOVE):
        return
    base = tl.load(first_chunk + i).to(tl.int64)
    if base < 0:
        return
    io = k_in.dtype.element_ty
    r = tl.arange(0, C)
    d = tl.arange(0, BV)
    key = head // (HV // HK)
    cell = (head * V + begin + d)[:, None] * K + tl.arange(0, K)[None, :]
    S = tl.zeros([BV, K], tl.float32)
    if source >= 0:
        S = tl.load(ssm_state + source * ssm_stride + cell).to(tl.float32)
    for c in tl.range(0, tl.cdiv(count, C), num_stages=STAGES):
        t = c * C + r
        inside = t < count
        at = ((first + t).to(tl.int64) * HK + key)[:, None] * K + tl.arange(0, K)[None, :]
        k = tl.load(k_in + at, mask=inside[:, None], other=0.0)
        q = tl.load(q_in + at, mask=inside[:, None], other=0.0)
        from_v = ((first + t).to(tl.int64) * HV + head)[:, None] * V + begin + d[None, :]
        v = tl.load(v_in + from_v, mask=inside[:, None], other=0.0)
        pair = ((base + c) * HV + head) * C * C + r[:, None] * C + r[None, :]
        inverse = tl.load(solved + pair)
        weight = tl.load(mixed + pair)
        of_sums = sums + ((base + c) * HV + head) * 2 * C
        high = tl.load(of_sums + r)
        low = tl.load(of_sums + C + r)
        high_last = tl.load(of_sums + C - 1)
        low_last = tl.load(of_sums + 2 * C - 1)
        grown = tl.exp(high + low)
        s = S.to(io)
        rest = tl.trans(v).to(tl.float32) - tl.dot(s, tl.trans(k), input_precision=PRECISION) * grown[None, :]
        x = tl.dot(rest.to(io), tl.trans(inverse), input_precision=PRECISION)
        o = tl.dot(s, tl.trans(q), input_precision=PRECISION) * grown[None, :]
        o = tl.dot(x.to(io), tl.trans(weight), o, input_precision=PRECISION)
        row, known = row_of(tokens, first + t, inside, actual)
        to_out = out + row[:, None] * out_stride + head * V + begin + d[None, :]
        tl.store(to_out, tl.trans(o).to(io), mask=known[:, None])
        if checkpoint_tokens is not None:
            for j in range(count_checkpoints):
                token = tl.load(checkpoint_tokens + j).to(tl.int64)
                to = tl.load(checkpoint_slots + j).to(tl.int64)
                p = (token - first).to(tl.int32) - c * C
                if (p >= 0) & (p < C) & (token < first + count) & (to >= 0) & (to < count_slots) & (to != null_slot):
                    dead = superseded(checkpoint_tokens, checkpoint_slots, count_checkpoints, token, to, CHECKPOINTS)
                    # On the sequence's own slot its last state would be a second write, perhaps of another thread.
                    if (to != slot) & (dead == 0):
                        high_p = tl.load(of_sums + p)
                        low_p = tl.load(of_sums + C + p)
                        since = tl.where(r <= p, (high_p - high) + (low_p - low), float("-inf"))
                        part = tl.dot((x * tl.exp(since)[None, :]).to(io), k, input_precision=PRECISION)
                        at_p = tl.exp(high_p + low_p) * S + part
                        tl.store(ssm_state + to * ssm_stride + cell, at_p.to(ssm_state.dtype.element_ty))
        left = tl.exp((high_last - high) + (low_last - low))
        S = tl.dot((x * left[None, :]).to(io), k, tl.exp(high_last + low_last) * S, input_precision=PRECISION)
    tl.store(ssm_state + slot * ssm_stride + cell, S.to(ssm_state.dtype.element_ty))
