"""The chunked form of gated_delta_rule in Triton: what chunks can do alone, then one pass over the chunks.

With g the log decay, E = erase * k, S0 the state [v, k] before a chunk, a sum over tokens written (j, i] where it
excludes j and includes i, and X the corrected values (Yang et al. 2025, section 3.2, solved for X directly):

    A_ij = sum over channels of E_i k_j exp(sum of g over (j, i]), j < i;   P_ij = the same of q_i k_j, j <= i
    (I + A) X = write * V - (E exp(sum of g up to i)) S0^T
    O = (Q exp(sum of g up to i)) S0^T + P X
    S1 = S0 diag(exp(sum of g)) + X^T (K exp(sum of g behind j))

Every sum of decays is a product with a matrix of zeros and ones: no difference of two sums, so that each term is 0 or
less, nothing overflows, and a fast decay takes no digits from a slow one. What the product loses of g, relatively, is
as small in exp(sum), since x exp(-x) is below 1. Where a decay is one number a head it multiplies products of keys;
where it is a vector it cannot, and a chunk is halved again and again: at each border the tokens behind it are scaled by
the decay since the border, those before it by the decay up to it, and pairs across it are one product.
"""

import triton
import triton.language as tl

SIZES = ("count", "chunks")
"""Integers that change from call to call: a kernel for each of 1 and multiples of 16 would be compiled in training."""


@triton.jit
def tokens_of(strides, entry, t, head):
    """Where tokens t of one head begin in a tensor [b, t, h, ..], whose strides may take any of them past 2**31."""
    return entry.to(tl.int64) * strides[0] + t.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]


@triton.jit
def finite(g):
    """exp(-1024) is 0 in float32, as it is for all below, and -inf times 0 would be NaN."""
    return tl.where(g < -1024.0, -1024.0, g)


@triton.jit
def pairs(r, level):
    """Where row and column lie in the second and the first half of one block of 2 * 2**level: [C, C]."""
    i = r[:, None] >> level
    j = r[None, :] >> level
    return (i == j + 1) & (j % 2 == 0)


@triton.jit
def spans(r, level):
    """Which decays lie between a token (row) and the border of its block of 2 * 2**level: [C, C] of 0 and 1.

    Behind the border those from there to the token, before it those after the token.
    """
    i = r[:, None]
    s = r[None, :]
    half = i >> level
    same = half == (s >> level)
    return tl.where(same & (((half % 2 == 1) & (s <= i)) | ((half % 2 == 0) & (s > i))), 1.0, 0.0)


@triton.jit
def sums(choice, g, PRECISION: tl.constexpr):
    """choice times g, choice [C, C] of 0 and 1: those are exact, so that only g comes in parts, two for float32."""
    if PRECISION == "tf32x3":
        high = (g.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # the 11 digits of TF32
        found = tl.dot(choice, high, input_precision="tf32")
        found = tl.dot(choice, g - high, found, input_precision="tf32")
    else:
        found = tl.dot(choice, g, input_precision=PRECISION)
    return found


@triton.jit
def between(g, r, PRECISION: tl.constexpr):
    """exp(sum of g over (j, i]) for j <= i, 0 elsewhere: [C, C] from g [C]."""
    lower = r[:, None] >= r[None, :]
    after = tl.where(r[:, None] > r[None, :], 1.0, 0.0)
    total = sums(tl.where(lower, 1.0, 0.0), g[:, None] * after, PRECISION)
    return tl.where(lower, tl.exp(total), 0.0)


@triton.jit
def invert(A, r, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of strictly lower A [C, C]: blocks of m tokens on the diagonal, then pairs of them.

    The inverse of [[P, 0], [R, U]] is [[P', 0], [-U' R P', U']]. Every factor is the inverse for some run of tokens,
    with entries of the size of its own; powers of A, as in a Neumann series, grow without bound for equal keys.
    """
    x = tl.where(r[:, None] == r[None, :], 1.0, 0.0) - tl.where(pairs(r, 0), A, 0.0)
    for level in tl.static_range(1, LEVELS):
        below = tl.where(pairs(r, level), A, 0.0)
        x -= tl.dot(tl.dot(x, below, input_precision=PRECISION), x, input_precision=PRECISION)
    return x


@triton.jit(do_not_specialize=SIZES)
def solve_rule(
    q,
    q_strides,
    k,
    k_strides,
    decay,
    decay_strides,
    erase,
    erase_strides,
    scale,
    solved,
    mixed,
    left,
    asked,
    kept,
    whole,
    count,
    chunks,
    HV: tl.constexpr,
    RATIO: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    DECAYS: tl.constexpr,
    ERASES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What does not depend on the state, one chunk of one value head; grid (b * chunks, HV).

    solved: (I + A)^-1, mixed: P, both [b, HV, chunks, C, C]. left, asked: E and q decayed up to each token, kept: k
    decayed from there to the chunk's end, [b, HV, chunks, C, KP] with zeros behind the tokens and channels there are.
    whole [b, HV, chunks, KP] float32: decay of the chunk. DECAYS, ERASES: whether that gate is a vector.
    C is 2**LEVELS.
    """
    chunk = tl.program_id(0) % chunks
    entry = tl.program_id(0) // chunks
    head = tl.program_id(1)
    place = (entry.to(tl.int64) * HV + head) * chunks + chunk
    r = tl.arange(0, C)
    t = chunk * C + r
    inside = t < count
    from_q = q + tokens_of(q_strides, entry, t, head // RATIO)
    from_k = k + tokens_of(k_strides, entry, t, head // RATIO)
    from_decay = decay + tokens_of(decay_strides, entry, t, head)
    from_erase = erase + tokens_of(erase_strides, entry, t, head)
    A = tl.zeros([C, C], tl.float32)
    P = tl.zeros([C, C], tl.float32)
    same = tl.zeros([C], tl.float32)
    upto = tl.where(r[:, None] >= r[None, :], 1.0, 0.0)
    behind = tl.where(r[:, None] < r[None, :], 1.0, 0.0)
    if not DECAYS:
        g = finite(tl.load(from_decay, mask=inside, other=0.0).to(tl.float32))
        since = tl.exp(tl.sum(upto * g[None, :], axis=1))[:, None]
        until = tl.exp(tl.sum(behind * g[None, :], axis=1))[:, None]
    if not ERASES:
        e = tl.load(from_erase, mask=inside, other=0.0).to(tl.float32)
    for part in tl.range(0, KP, BK):
        d = part + tl.arange(0, BK)
        known = inside[:, None] & (d < K)[None, :]
        kk = tl.load(from_k[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
        qq = tl.load(from_q[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
        ek = kk  # one number a head comes below, in float32
        if ERASES:
            ek *= tl.load(from_erase[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
        if DECAYS:
            gs = finite(tl.load(from_decay[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32))
            since = tl.exp(sums(upto, gs, PRECISION))
            until = tl.exp(sums(behind, gs, PRECISION))
            total = tl.exp(tl.sum(gs, axis=0))
            for level in tl.range(0, LEVELS):
                w = tl.exp(sums(spans(r, level), gs, PRECISION))
                across = pairs(r, level)
                kt = tl.trans(kk * w)
                A += tl.where(across, tl.dot(ek * w, kt, input_precision=PRECISION), 0.0)
                P += tl.where(across, tl.dot(qq * w, kt, input_precision=PRECISION), 0.0)
            same += tl.sum(qq * kk, axis=1)
        else:
            total = tl.exp(tl.sum(g, axis=0)) + tl.zeros([BK], tl.float32)
            kt = tl.trans(kk)
            A = tl.dot(ek, kt, A, input_precision=PRECISION)
            P = tl.dot(qq, kt, P, input_precision=PRECISION)
        if not ERASES:
            ek = ek * e[:, None]
        to = place * C * KP + r[:, None] * KP + d[None, :]
        tl.store(left + to, ek * since)
        tl.store(asked + to, qq * since * scale)
        tl.store(kept + to, kk * until)
        tl.store(whole + place * KP + d, total)
    if DECAYS:
        P += tl.where(r[:, None] == r[None, :], same[:, None], 0.0)
    else:
        decays = between(g, r, PRECISION)
        A = tl.where(r[:, None] > r[None, :], A * decays, 0.0)
        P *= decays
    if not ERASES:
        A *= e[:, None]
    pair = place * C * C + r[:, None] * C + r[None, :]
    tl.store(mixed + pair, P * scale)
    tl.store(solved + pair, invert(A, r, LEVELS, PRECISION))


@triton.jit(do_not_specialize=SIZES)
def run_rule(
    v,
    v_strides,
    write,
    write_strides,
    solved,
    mixed,
    left,
    asked,
    kept,
    whole,
    initial,
    out,
    final,
    marks,
    corrected,
    count,
    chunks,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    WRITES: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One batch entry, one value head, BV rows of its state, chunk after chunk; grid (b * HV * VP / BV,).

    All products have BV rows, the state's, so that the results of one are the left operand of the next one and stay in
    registers: [BV, C], then [BV, KP]. The state is float32 from the first chunk to the last.
    out [b, t, HV, V], final [b, HV, V, K]; either may be None. For the gradients, or None: marks
    [b, HV, chunks, VP, KP], the state before each chunk, and corrected [b, HV, chunks, C, VP], its X.
    """
    blocks: tl.constexpr = VP // BV
    row = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    head = tl.program_id(0) // blocks % HV
    entry = tl.program_id(0) // (blocks * HV)
    stream = entry.to(tl.int64) * HV + head
    r = tl.arange(0, C)
    d = tl.arange(0, KP)
    cell = stream * V * K + row[:, None] * K + d[None, :]
    in_state = (row < V)[:, None] & (d < K)[None, :]
    S = tl.zeros([BV, KP], tl.float32)
    if initial is not None:
        S = tl.load(initial + cell, mask=in_state, other=0.0).to(tl.float32)
    for c in tl.range(0, chunks, num_stages=STAGES):
        place = stream * chunks + c
        t = c * C + r
        known = (t < count)[:, None] & (row < V)[None, :]
        wide = place * C * KP + r[:, None] * KP + d[None, :]
        pair = place * C * C + r[:, None] * C + r[None, :]
        values = v + tokens_of(v_strides, entry, t, head)
        wv = tl.load(values[:, None] + row[None, :], mask=known, other=0.0).to(tl.float32)
        gates = write + tokens_of(write_strides, entry, t, head)
        if WRITES:
            wv *= tl.load(gates[:, None] + row[None, :], mask=known, other=0.0).to(tl.float32)
        else:
            wv *= tl.load(gates, mask=t < count, other=0.0).to(tl.float32)[:, None]
        e = tl.load(left + wide)
        inverse = tl.load(solved + pair)
        rest = tl.trans(wv) - tl.dot(S, tl.trans(e), input_precision=PRECISION)
        x = tl.dot(rest, tl.trans(inverse), input_precision=PRECISION)
        if out is not None:
            asks = tl.load(asked + wide)
            weight = tl.load(mixed + pair)
            o = tl.dot(S, tl.trans(asks), input_precision=PRECISION)
            o = tl.dot(x, tl.trans(weight), o, input_precision=PRECISION)
            to = ((entry.to(tl.int64) * count + t) * HV + head)[:, None] * V + row[None, :]
            tl.store(out + to, tl.trans(o).to(out.dtype.element_ty), mask=known)
        if marks is not None:
            tl.store(marks + place * VP * KP + row[:, None] * KP + d[None, :], S)
            tl.store(corrected + place * C * VP + r[None, :] * VP + row[:, None], x)
        keeps = tl.load(kept + wide)
        S = tl.dot(x, keeps, S * tl.load(whole + place * KP + d)[None, :], input_precision=PRECISION)
    if final is not None:
        tl.store(final + cell, S, mask=in_state)
