"""The causal convolution of gdn_attention in Triton: whole chunks for the chunked form, and the state it leaves."""

import triton
import triton.language as tl

from .gdn_batch import INDICES, RUN, VARYING, WRONG, fill, head_column, row_of, sequence

EPS = tl.constexpr(1e-6)


@triton.jit
def silu(y):
    return y / (1.0 + tl.exp(-y))


@triton.jit
def convolve_rows(
    qkvz,
    qkvz_stride,
    tokens,
    conv_state,
    conv_stride,
    weights,
    bias,
    first,
    t,
    inside,
    source,
    column,
    channel,
    actual,
    CONV: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
):
    """silu of the convolution of tokens t [n] in D channels, rounded to the model's dtype and back: [n, D] float32.

    Inputs before the sequence come from its slot, or are zeros where source is -1.
    """
    d = tl.arange(0, D)
    io = qkvz.dtype.element_ty
    y = tl.zeros([t.shape[0], D], tl.float32)
    if bias is not None:
        y += tl.load(bias + channel + d).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        p = t - (W - 1 - w)
        row, known = row_of(tokens, first + p, inside & (p >= 0), actual)
        x = tl.load(qkvz + row[:, None] * qkvz_stride + column + d[None, :], mask=known[:, None], other=0.0)
        if w < W - 1:
            before = inside & (p < 0) & (source >= 0)
            old = conv_state + source * conv_stride + (W - 1 + p)[:, None] * CONV + channel + d[None, :]
            x = tl.where((p < 0)[:, None], tl.load(old, mask=before[:, None], other=0.0), x)
        y += x.to(tl.float32) * tl.load(weights + (channel + d) * W + w).to(tl.float32)[None, :]
    return silu(y).to(io).to(tl.float32)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=INDICES)
def convolve_chunks(
    qkvz,
    qkvz_stride,
    z,
    z_stride,
    conv_state,
    conv_stride,
    weights,
    bias,
    q_out,
    k_out,
    v_out,
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
    V: tl.constexpr,
    W: tl.constexpr,
    FLAT: tl.constexpr,
    C: tl.constexpr,
):
    """q and k, normalised and q scaled, v, and z, of one chunk and one head; grid (chunks, 2*HK + HV).

    q_out, k_out [tokens, HK, K] and v_out [tokens, HV, V] are in the order of tokens, not of rows. The convolution's
    state is only read: `finish` runs after every kernel that reads it.
    """
    chunk = tl.program_id(0)
    which = tl.program_id(1)
    i = tl.load(chunk_owner + chunk)
    if i < 0:
        return
    first, count, source, _slot, state = sequence(
        i, starts, slots, slot_stride, 0, sources, source_stride, initial, None, 1, null_slot, count_slots, most, 1
    )
    if state != RUN:
        return
    CONV: tl.constexpr = 2 * HK * K + HV * V
    t = tl.load(chunk_number + chunk) * C + tl.arange(0, C)
    inside = t < count
    if which < 2 * HK:
        part = which // HK
        head = which % HK
        column = head_column(part, head, HK, HV, K, V, FLAT)
        y = convolve_rows(
            qkvz, qkvz_stride, tokens, conv_state, conv_stride, weights, bias, first, t, inside, source, column,
            which * K, actual, CONV, W, K,
        )  # fmt: skip
        scale = tl.rsqrt(tl.sum(y * y, axis=1) + EPS) * tl.where(part == 0, K**-0.5, 1.0)
        unit = (y * scale[:, None]).to(qkvz.dtype.element_ty)
        to = ((first + t).to(tl.int64) * HK + head)[:, None] * K + tl.arange(0, K)[None, :]
        if part == 0:
            tl.store(q_out + to, unit, mask=inside[:, None])
        else:
            tl.store(k_out + to, unit, mask=inside[:, None])
    else:
        head = which - 2 * HK
        d = tl.arange(0, V)
        v = convolve_rows(
            qkvz, qkvz_stride, tokens, conv_state, conv_stride, weights, bias, first, t, inside, source,
            head_column(2, head, HK, HV, K, V, FLAT), 2 * HK * K + head * V, actual, CONV, W, V,
        )  # fmt: skip
        to_v = ((first + t).to(tl.int64) * HV + head)[:, None] * V + d[None, :]
        tl.store(v_out + to_v, v.to(qkvz.dtype.element_ty), mask=inside[:, None])
        row, known = row_of(tokens, first + t, inside, actual)
        column = head_column(3, head, HK, HV, K, V, FLAT)
        copied = tl.load(qkvz + row[:, None] * qkvz_stride + column + d[None, :], mask=known[:, None])
        tl.store(z + row[:, None] * z_stride + head * V + d[None, :], copied, mask=known[:, None])


@triton.jit
def _window(x, x_stride, tokens, old, first, t, column, valid, actual, W: tl.constexpr, R: tl.constexpr):
    """The last W-1 inputs after token t, oldest first, [R, channels]; those before the sequence from `old` [R, ...]."""
    r = tl.arange(0, R)
    p = t - (W - 2) + r
    row, known = row_of(tokens, first + p, (p >= 0) & (r < W - 1), actual)
    new = tl.load(x + row[:, None] * x_stride + column[None, :], mask=known[:, None] & valid[None, :], other=0)
    # Row r is row W-1+p of the old window: chosen in registers, since the slot may have been overwritten by now.
    wanted = (W - 1 + p)[:, None] == r[None, :]
    shifted = tl.sum(tl.where(wanted[:, :, None], old[None, :, :].to(tl.int32), 0), axis=1)
    return tl.where((p >= 0)[:, None], new, shifted.to(new.dtype))


@triton.jit
def _put(conv_state, conv_stride, slot, window, channel, valid, CONV: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    r = tl.arange(0, R)
    to = conv_state + slot * conv_stride + r[:, None] * CONV + channel[None, :]
    tl.store(to, window, mask=(r < W - 1)[:, None] & valid[None, :])


@triton.jit
def superseded(checkpoint_tokens, checkpoint_slots, count, token, slot, CHECKPOINTS: tl.constexpr):
    """Whether a later token's checkpoint goes to the same slot, so that this one would be overwritten."""
    at = tl.arange(0, CHECKPOINTS)
    others = tl.load(checkpoint_slots + at, mask=at < count, other=-1).to(tl.int64)
    later = tl.load(checkpoint_tokens + at, mask=at < count, other=-1).to(tl.int64) > token
    return tl.sum(((others == slot) & later).to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=INDICES)
def finish(
    out,
    out_stride,
    z,
    z_stride,
    x,
    x_stride,
    conv_state,
    conv_stride,
    starts,
    slots,
    slot_stride,
    column_stride,
    sources,
    source_stride,
    initial,
    accepted,
    mixed,
    tokens,
    checkpoint_tokens,
    checkpoint_slots,
    count_checkpoints,
    columns,
    n,
    null_slot,
    count_slots,
    rows,
    actual,
    most,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    FLAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECKPOINTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the last W-1 inputs of each sequence to its slots, and set rows that no live sequence owns.

    Grid (sequences * blocks of channels,).

    A channel of q or k is read by all value heads of its key head and by every block of V, so the kernels that compute
    only read the old state, and this one, launched after them, is the one writer of each channel. x and conv_state come
    as integers: bits are moved, not numbers.
    """
    CONV: tl.constexpr = 2 * HK * K + HV * V
    G: tl.constexpr = HV // HK
    blocks = tl.cdiv(CONV, BLOCK)
    i = tl.program_id(0) // blocks
    first, count, source, slot, state = sequence(
        i, starts, slots, slot_stride, column_stride, sources, source_stride, initial, accepted, columns, null_slot,
        count_slots, most, COLUMNS,
    )  # fmt: skip
    if mixed is not None:
        state = tl.where(tl.load(mixed + i) != 0, WRONG, state)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = channel < HV * V
    if tokens is None:
        # Tokens are rows: what lies before the first sequence and behind the last one is padding, shared out.
        begin = 0
        end = n
        if starts is not None:
            begin = tl.minimum(tl.maximum(tl.load(starts).to(tl.int32), 0), rows)
            end = tl.minimum(tl.maximum(tl.load(starts + n).to(tl.int32), 0), rows)
        fill(out, out_stride, z, z_stride, None, i * 16, begin, n * 16, rows, channel, valid, 0.0)
        fill(out, out_stride, z, z_stride, None, end + i * 16, rows, n * 16, rows, channel, valid, 0.0)
    if state != RUN:
        value = tl.where(state == WRONG, float("nan"), 0.0)
        fill(out, out_stride, z, z_stride, tokens, first, first + count, 16, actual, channel, valid, value)
        return
    valid = channel < CONV
    if FLAT:
        column = channel
    else:
        c = tl.where(channel < HK * K, channel, channel - HK * K)
        v = channel - 2 * HK * K
        group: tl.constexpr = 2 * K + 2 * G * V
        from_key = c // K * group + c % K + tl.where(channel < HK * K, 0, K)
        from_value = v // V // G * group + 2 * K + v // V % G * V + v % V
        column = tl.where(v < 0, from_key, from_value)
    r = tl.arange(0, R)
    held = conv_state + source * conv_stride + r[:, None] * CONV + channel[None, :]
    old = tl.load(held, mask=((r < W - 1) & (source >= 0))[:, None] & valid[None, :], other=0)
    # The stores below give an element to whichever thread the layout of the window gives it to.
    tl.debug_barrier()
    if accepted is not None:
        for t in range(count):
            to = tl.load(slots + i * slot_stride + t * column_stride).to(tl.int64)
            if (to != -1) & (to != null_slot):
                window = _window(x, x_stride, tokens, old, first, t, column, valid, actual, W, R)
                _put(conv_state, conv_stride, to, window, channel, valid, CONV, W, R)
    else:
        if checkpoint_tokens is not None:
            for j in range(count_checkpoints):
                token = tl.load(checkpoint_tokens + j).to(tl.int64)
                to = tl.load(checkpoint_slots + j).to(tl.int64)
                if (token >= first) & (token < first + count) & (to >= 0) & (to < count_slots):
                    dead = superseded(checkpoint_tokens, checkpoint_slots, count_checkpoints, token, to, CHECKPOINTS)
                    if (to != null_slot) & (to != slot) & (dead == 0):
                        t = (token - first).to(tl.int32)
                        window = _window(x, x_stride, tokens, old, first, t, column, valid, actual, W, R)
                        _put(conv_state, conv_stride, to, window, channel, valid, CONV, W, R)
        window = _window(x, x_stride, tokens, old, first, count - 1, column, valid, actual, W, R)
        _put(conv_state, conv_stride, slot, window, channel, valid, CONV, W, R)
