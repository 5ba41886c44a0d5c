"""What every Triton kernel of gdn_attention asks of a batch: a sequence's tokens, rows and slots, and its chunks.

All of it is read on the device. A copy of lengths or slots to the host would make it wait for the device at every call.
"""

import triton
import triton.language as tl

VARYING = ("n", "rows", "actual", "most", "null_slot", "columns", "count_checkpoints")
"""Integers that change from call to call: specialised kernels for 1 and for multiples of 16 would be compiled while a
server runs, a variant for each combination."""
INDICES = ("starts", "slots", "sources", "initial", "accepted", "tokens", "checkpoint_tokens", "checkpoint_slots")
"""Pointers that may be slices of larger tensors; the same holds for their alignment."""

SKIP = tl.constexpr(0)
"""Nothing to do: no tokens, or the null slot."""
RUN = tl.constexpr(1)
WRONG = tl.constexpr(2)
"""Numbers that cannot be: nothing is read or written by them, and the sequence's outputs become NaN."""


@triton.jit
def sequence(
    i,
    starts,
    slots,
    slot_stride,
    column_stride,
    sources,
    source_stride,
    initial,
    accepted,
    columns,
    null_slot,
    count_slots,
    most,
    COLUMNS: tl.constexpr,
):
    """(first token, tokens, slot to start from or -1 for zeros, own slot, SKIP or RUN or WRONG) of sequence i.

    Tokens run to `most`. A speculative sequence (accepted is not None) has a row of `columns` slots and no slot of its
    own; COLUMNS is the power of two that holds them.
    """
    if starts is None:
        first = i
        last = i + 1
    else:
        first = tl.load(starts + i).to(tl.int32)
        last = tl.load(starts + i + 1).to(tl.int32)
    slot = tl.load(slots + i * slot_stride).to(tl.int64)
    skip = (first == last) | (slot == -1) | (slot == null_slot)
    wrong = (first < 0) | (last < first) | (last > most) | (slot < -1) | (slot >= count_slots)
    source = slot
    fresh = first != first  # False
    if accepted is not None:
        kept = tl.load(accepted + i).to(tl.int32)
        wrong = wrong | (kept < 0) | (kept > columns) | (last - first > columns)
        column = tl.minimum(tl.maximum(kept - 1, 0), columns - 1)
        source = tl.load(slots + i * slot_stride + column * column_stride).to(tl.int64)
        at = tl.arange(0, COLUMNS)
        used = at < tl.minimum(last - first, columns)
        row = tl.load(slots + i * slot_stride + at * column_stride, mask=used, other=-1).to(tl.int64)
        wrong = wrong | (tl.min(row, axis=0) < -1) | (tl.max(row, axis=0) >= count_slots)
    else:
        if sources is not None:
            source = tl.load(sources + i * source_stride).to(tl.int64)
        if initial is not None:
            fresh = tl.load(initial + i) == 0
    wrong = wrong | ((fresh == 0) & ((source < 0) | (source == null_slot) | (source >= count_slots)))
    state = tl.where(skip, SKIP, tl.where(wrong, WRONG, RUN))
    first = tl.minimum(tl.maximum(first, 0), most)
    last = tl.minimum(tl.maximum(last, first), most)
    return first, last - first, tl.where(fresh, -1, source), slot, state


@triton.jit
def mixed_windows(
    i,
    conv_state,
    conv_stride,
    slots,
    slot_stride,
    column_stride,
    accepted,
    columns,
    null_slot,
    count_slots,
    wanted,
    CONV: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
):
    """1 if columns that speculative sequence i has accepted do not hold windows one token apart, else 0.

    Kernels that keep one rolling buffer in column 0 leave the other columns alone, so theirs do not. The first 64
    channels tell; bits are compared, since NaN equals itself. `wanted` False: 0, and nothing is read.
    """
    r = tl.arange(0, R)
    d = tl.arange(0, 64)
    inside = (r < W - 2)[:, None] & (d < CONV)[None, :]
    at = conv_state + r[:, None] * CONV + d[None, :]
    found = tl.zeros([R, 64], tl.int32)
    last = tl.where(wanted & (W > 2), tl.minimum(tl.load(accepted + i).to(tl.int32), columns) - 1, 0)
    for t in range(last):
        a = tl.load(slots + i * slot_stride + t * column_stride).to(tl.int64)
        b = tl.load(slots + i * slot_stride + (t + 1) * column_stride).to(tl.int64)
        live = (a >= 0) & (b >= 0) & (a < count_slots) & (b < count_slots) & (a != b) & (a != null_slot)
        mask = inside & live & (b != null_slot)
        older = tl.load(at + a * conv_stride + CONV, mask=mask, other=0.0)
        newer = tl.load(at + b * conv_stride, mask=mask, other=0.0)
        if conv_state.dtype.element_ty == tl.float32:
            found |= (older.to(tl.int32, bitcast=True) != newer.to(tl.int32, bitcast=True)).to(tl.int32)
        else:
            found |= (older.to(tl.int16, bitcast=True) != newer.to(tl.int16, bitcast=True)).to(tl.int32)
    return tl.max(tl.max(found, axis=1), axis=0)


@triton.jit
def row_of(tokens, token, mask, actual):
    """(row of a token, whether it may be touched): the two differ where a batch mixes plain and speculative ones."""
    # One return, after both branches: Triton compiles what follows a branch that has returned.
    if tokens is None:
        row = token.to(tl.int64)
    else:
        row = tl.load(tokens + token, mask=mask, other=-1).to(tl.int64)
        mask = mask & (row >= 0) & (row < actual)
    return row, mask


@triton.jit
def head_column(part, head, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, FLAT: tl.constexpr):
    """First column in qkvz of a head's q (part 0), k (1), v (2) or z (3)."""
    G: tl.constexpr = HV // HK
    if FLAT:
        of_key = part * HK * K + head * K
        of_value = 2 * HK * K + tl.where(part == 3, HV * V, 0) + head * V
        column = tl.where(part < 2, of_key, of_value)
    else:
        of_value = 2 * K + tl.where(part == 3, G * V, 0) + head % G * V
        key = tl.where(part < 2, head, head // G)
        column = key * (2 * K + 2 * G * V) + tl.where(part < 2, part * K, of_value)
    return column


@triton.jit
def gate_columns(head, HK: tl.constexpr, HV: tl.constexpr, FLAT: tl.constexpr):
    """Columns in ba of b and a of a value head."""
    G: tl.constexpr = HV // HK
    if FLAT:
        b, a = head, HV + head
    else:
        b = head // G * (2 * G) + head % G
        a = b + G
    return b, a


@triton.jit
def gates(a, b, rate, shift):
    """(log decay, beta) in float32; rate is A_log, shift is dt_bias."""
    x = a.to(tl.float32) + shift.to(tl.float32)
    # softplus(x) = max(x, 0) + log(1 + e) with e = exp(-|x|), and log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3.
    # tl.log(1 + e) would lose the digits of a small e, those of a slow decay, and Triton has no log1p.
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    u = s * s
    series = 1.0 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9 + u * (1 / 11 + u * (1 / 13))))))
    soft = tl.maximum(x, 0.0) + 2.0 * s * series
    return -tl.exp(rate.to(tl.float32)) * soft, tl.sigmoid(b.to(tl.float32))


@triton.jit
def fill(out, out_stride, z, z_stride, tokens, first, last, step, actual, column, valid, value):
    """Set 16 rows of both outputs from `first` on in some columns, then 16 more `step` further, up to `last`."""
    at = tl.arange(0, 16)
    content = tl.full([16, column.shape[0]], value, tl.float32).to(out.dtype.element_ty)
    for from_token in range(first, last, step):
        row, known = row_of(tokens, from_token + at, from_token + at < last, actual)
        mask = known[:, None] & valid[None, :]
        tl.store(out + row[:, None] * out_stride + column[None, :], content, mask=mask)
        tl.store(z + row[:, None] * z_stride + column[None, :], content, mask=mask)


@triton.jit(do_not_specialize=("n", "bound"), do_not_specialize_on_alignment=("starts",))
def plan_chunks(
    chunk_owner,
    chunk_number,
    first_chunk,
    starts,
    n,
    bound,
    ABOVE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Number the chunks of all sequences of more than ABOVE tokens; grid (n,).

    chunk_owner[c]: the sequence that chunk c belongs to, -1 for chunks that are not; chunk_number[c]: which of its
    chunks it is; first_chunk[i]: c of sequence i's first chunk, -1 where the table has no room for all of them, which
    only starts that cannot be bring about.
    """
    i = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    before = 0
    for j in range(0, i, BLOCK):
        known = j + at < i
        count = tl.load(starts + j + at + 1, mask=known, other=0) - tl.load(starts + j + at, mask=known, other=0)
        before += tl.sum(tl.where(count > ABOVE, (count + C - 1) // C, 0).to(tl.int32), axis=0)
    own = (tl.load(starts + i + 1) - tl.load(starts + i)).to(tl.int32)
    chunks = tl.where(own > ABOVE, (own + C - 1) // C, 0)
    fits = before + chunks <= bound
    tl.store(first_chunk + i, tl.where(fits, before, -1))
    end = tl.minimum(before + chunks, bound)
    for c in range(before, end, BLOCK):
        tl.store(chunk_owner + c + at, tl.where(fits, i, -1), mask=c + at < end)
        tl.store(chunk_number + c + at, c + at - before, mask=c + at < end)
    if i == n - 1:
        for c in range(end, bound, BLOCK):
            tl.store(chunk_owner + c + at, -1, mask=c + at < bound)
