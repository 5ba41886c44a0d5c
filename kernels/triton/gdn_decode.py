"""The token-by-token form of gdn_attention in Triton: decode steps, drafts under verification, and short prompts."""

import triton
import triton.language as tl

from .gdn_batch import INDICES, RUN, VARYING, WRONG, gate_columns, gates, head_column, mixed_windows, row_of, sequence
from .gdn_conv import EPS, silu


@triton.jit
def convolve_token(
    qkvz,
    qkvz_stride,
    tokens,
    conv_state,
    conv_stride,
    weights,
    bias,
    first,
    t,
    source,
    column,
    channel,
    actual,
    CONV: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
):
    """silu of the convolution at token t in D channels, rounded to the model's dtype and back: [D] float32."""
    d = tl.arange(0, D)
    y = tl.zeros([D], tl.float32)
    if bias is not None:
        y += tl.load(bias + channel + d).to(tl.float32)
    for w in tl.static_range(W):
        p = t - (W - 1 - w)
        row, known = row_of(tokens, first + p, p >= 0, actual)
        x = tl.load(qkvz + row * qkvz_stride + column + d, mask=known & (d >= 0), other=0.0)
        if w < W - 1:
            old = conv_state + source * conv_stride + (W - 1 + p) * CONV + channel + d
            x = tl.where(p < 0, tl.load(old, mask=(p < 0) & (source >= 0) & (d >= 0), other=0.0), x)
        y += x.to(tl.float32) * tl.load(weights + (channel + d) * W + w).to(tl.float32)
    return silu(y).to(qkvz.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=INDICES)
def run_tokens(
    out,
    out_stride,
    z,
    z_stride,
    qkvz,
    qkvz_stride,
    ba,
    ba_stride,
    conv_state,
    conv_stride,
    ssm_state,
    ssm_stride,
    weights,
    bias,
    rate,
    shift,
    starts,
    slots,
    slot_stride,
    column_stride,
    sources,
    source_stride,
    initial,
    accepted,
    mixed,
    report,
    tokens,
    checkpoint_tokens,
    checkpoint_slots,
    count_checkpoints,
    columns,
    null_slot,
    count_slots,
    actual,
    most,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    FLAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    BV: tl.constexpr,
    AT_MOST: tl.constexpr,
):
    """Everything from packed inputs to outputs and state, one sequence, one value head, BV rows of its state [V, K].

    Grid (sequences * HV * V / BV,). The state is read once and stays in registers; each sum over K is one reduction.
    Sequences of more than AT_MOST tokens are left to the chunked form (AT_MOST 0: none are). The convolution's state is
    only read, and rows that no live sequence owns are left alone: see `finish` for both.

    A speculative sequence whose windows another kind of kernel wrote is WRONG; mixed [sequences] tells `finish`, which
    writes windows and cannot find out, and report [1] becomes 1. mixed None: the cache has no room for such windows.
    """
    CONV: tl.constexpr = 2 * HK * K + HV * V
    G: tl.constexpr = HV // HK
    blocks: tl.constexpr = V // BV
    begin = tl.program_id(0) % blocks * BV
    head = tl.program_id(0) // blocks % HV
    i = tl.program_id(0) // (blocks * HV)
    first, count, source, slot, state = sequence(
        i, starts, slots, slot_stride, column_stride, sources, source_stride, initial, accepted, columns, null_slot,
        count_slots, most, COLUMNS,
    )  # fmt: skip
    if mixed is not None:
        other = mixed_windows(
            i, conv_state, conv_stride, slots, slot_stride, column_stride, accepted, columns, null_slot, count_slots,
            state == RUN, CONV, W, R,
        )  # fmt: skip
        tl.store(mixed + i, other)  # every program of a sequence stores the same
        tl.store(report, 1, mask=other != 0)
        state = tl.where(other != 0, WRONG, state)
    if (state != RUN) | ((AT_MOST > 0) & (count > AT_MOST)):
        return
    key = head // G
    q_column = head_column(0, key, HK, HV, K, V, FLAT)
    k_column = head_column(1, key, HK, HV, K, V, FLAT)
    v_column = head_column(2, head, HK, HV, K, V, FLAT) + begin
    z_column = head_column(3, head, HK, HV, K, V, FLAT) + begin
    b_column, a_column = gate_columns(head, HK, HV, FLAT)
    d = tl.arange(0, BV)
    cell = (head * V + begin + d)[:, None] * K + tl.arange(0, K)[None, :]
    S = tl.zeros([BV, K], tl.float32)
    if source >= 0:
        S = tl.load(ssm_state + source * ssm_stride + cell).to(tl.float32)
    for t in range(count):
        q = convolve_token(
            qkvz, qkvz_stride, tokens, conv_state, conv_stride, weights, bias, first, t, source, q_column,
            key * K, actual, CONV, W, K,
        )  # fmt: skip
        k = convolve_token(
            qkvz, qkvz_stride, tokens, conv_state, conv_stride, weights, bias, first, t, source, k_column,
            (HK + key) * K, actual, CONV, W, K,
        )  # fmt: skip
        v = convolve_token(
            qkvz, qkvz_stride, tokens, conv_state, conv_stride, weights, bias, first, t, source, v_column,
            2 * HK * K + head * V + begin, actual, CONV, W, BV,
        )  # fmt: skip
        q = q * (tl.rsqrt(tl.sum(q * q, axis=0) + EPS) * K**-0.5)
        k = k * tl.rsqrt(tl.sum(k * k, axis=0) + EPS)
        row, known = row_of(tokens, first + t, t >= 0, actual)
        a = tl.load(ba + row * ba_stride + a_column, mask=known, other=0.0)
        b = tl.load(ba + row * ba_stride + b_column, mask=known, other=0.0)
        g, beta = gates(a, b, tl.load(rate + head), tl.load(shift + head))
        alpha = tl.exp(g)
        # Both products with the undecayed state, so that neither sum waits for the other.
        delta = beta * (v - alpha * tl.sum(S * k[None, :], axis=1))
        o = alpha * tl.sum(S * q[None, :], axis=1) + tl.sum(k * q, axis=0) * delta
        S = alpha * S + delta[:, None] * k[None, :]
        copied = tl.load(qkvz + row * qkvz_stride + z_column + d, mask=known & (d >= 0))
        tl.store(z + row * z_stride + head * V + begin + d, copied, mask=known & (d >= 0))
        to_out = out + row * out_stride + head * V + begin + d
        tl.store(to_out, o.to(out.dtype.element_ty), mask=known & (d >= 0))
        if accepted is not None:
            to = tl.load(slots + i * slot_stride + t * column_stride).to(tl.int64)
            if (to != -1) & (to != null_slot):
                tl.store(ssm_state + to * ssm_stride + cell, S.to(ssm_state.dtype.element_ty))
        elif checkpoint_tokens is not None:
            for j in range(count_checkpoints):
                to = tl.load(checkpoint_slots + j).to(tl.int64)
                here = tl.load(checkpoint_tokens + j) == first + t
                # A checkpoint on the sequence's own slot is overwritten by its last state.
                if here & (to >= 0) & (to < count_slots) & (to != null_slot) & (to != slot):
                    tl.store(ssm_state + to * ssm_stride + cell, S.to(ssm_state.dtype.element_ty))
    if accepted is None:
        tl.store(ssm_state + slot * ssm_stride + cell, S.to(ssm_state.dtype.element_ty))
