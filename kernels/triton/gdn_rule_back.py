"""Gradients of gated_delta_rule in Triton: one pass over the chunks from the last to the first, then each chunk alone.

With Y the gradient of the right side of (I + A) X = ..., D that of the state after a chunk, the rest as in
gdn_rule_chunk.py (E', Q', K' are E, Q, K decayed up to a token or from it to the chunk's end):

    dX = K' D^T + P^T dO,  Y = (I + A)^-T dX,  D before the chunk = D diag(exp(sum of g)) - Y^T E' + dO^T Q'
    d(write * V) = Y,  dA = -Y X^T,  dP = dO X^T,  dE' = -Y S0,  dQ' = dO S0,  dK' = X D

An exponent is a matrix of zeros and ones times g, so that its gradient reaches g by the transposed matrix: no
difference of sums here either.
"""

import triton
import triton.language as tl

from .gdn_rule_chunk import SIZES, between, finite, pairs, spans, sums, tokens_of


@triton.jit(do_not_specialize=SIZES)
def back_rule(
    grad,
    grad_strides,
    solved,
    mixed,
    left,
    asked,
    kept,
    whole,
    grad_final,
    grad_initial,
    back_marks,
    grad_corrected,
    count,
    chunks,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One batch entry, one value head, BV rows of the state's gradient, chunk before chunk; grid (b * HV * VP / BV,).

    Writes back_marks [b, HV, chunks, VP, KP], D after each chunk, grad_corrected [b, HV, chunks, C, VP], Y, and
    grad_initial [b, HV, V, K].
    """
    blocks: tl.constexpr = VP // BV
    row = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    head = tl.program_id(0) // blocks % HV
    entry = tl.program_id(0) // (blocks * HV)
    stream = entry.to(tl.int64) * HV + head
    io = solved.dtype.element_ty
    r = tl.arange(0, C)
    d = tl.arange(0, KP)
    cell = stream * V * K + row[:, None] * K + d[None, :]
    in_state = (row < V)[:, None] & (d < K)[None, :]
    D = tl.load(grad_final + cell, mask=in_state, other=0.0).to(tl.float32)
    for i in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - i
        place = stream * chunks + c
        t = c * C + r
        known = (row < V)[:, None] & (t < count)[None, :]
        wide = place * C * KP + r[:, None] * KP + d[None, :]
        pair = place * C * C + r[:, None] * C + r[None, :]
        at = grad + tokens_of(grad_strides, entry, t, head)
        do = tl.load(at[None, :] + row[:, None], mask=known, other=0.0).to(io)
        after = D.to(io)
        tl.store(back_marks + place * VP * KP + row[:, None] * KP + d[None, :], after)
        dx = tl.dot(after, tl.trans(tl.load(kept + wide)), input_precision=PRECISION)
        dx = tl.dot(do, tl.load(mixed + pair), dx, input_precision=PRECISION)
        y = tl.dot(dx.to(io), tl.load(solved + pair), input_precision=PRECISION)
        tl.store(grad_corrected + place * C * VP + r[None, :] * VP + row[:, None], y.to(io))
        D *= tl.load(whole + place * KP + d)[None, :]
        D = tl.dot((-y).to(io), tl.load(left + wide), D, input_precision=PRECISION)
        D = tl.dot(do, tl.load(asked + wide), D, input_precision=PRECISION)
    tl.store(grad_initial + cell, D, mask=in_state)


@triton.jit(do_not_specialize=SIZES)
def share_rule(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    decay,
    decay_strides,
    erase,
    erase_strides,
    write,
    write_strides,
    grad,
    grad_strides,
    scale,
    marks,
    corrected,
    back_marks,
    grad_corrected,
    dq_out,
    dk_out,
    dv_out,
    ddecay,
    derase,
    dwrite,
    count,
    chunks,
    HV: tl.constexpr,
    RATIO: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    DECAYS: tl.constexpr,
    ERASES: tl.constexpr,
    WRITES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of one chunk of one value head but that of its state; grid (b * chunks, HV).

    dq_out, dk_out [b, t, HV, K]: for each value head, to be summed over those of a key head. dv_out [b, t, HV, V].
    """
    chunk = tl.program_id(0) % chunks
    entry = tl.program_id(0) // chunks
    head = tl.program_id(1)
    place = (entry.to(tl.int64) * HV + head) * chunks + chunk
    io = corrected.dtype.element_ty
    r = tl.arange(0, C)
    t = chunk * C + r
    inside = t < count
    from_q = q + tokens_of(q_strides, entry, t, head // RATIO)
    from_k = k + tokens_of(k_strides, entry, t, head // RATIO)
    from_v = v + tokens_of(v_strides, entry, t, head)
    from_decay = decay + tokens_of(decay_strides, entry, t, head)
    from_erase = erase + tokens_of(erase_strides, entry, t, head)
    from_write = write + tokens_of(write_strides, entry, t, head)
    from_grad = grad + tokens_of(grad_strides, entry, t, head)
    token = (entry.to(tl.int64) * count + t) * HV + head
    of_values = place * C * VP + r[:, None] * VP
    dA = tl.zeros([C, C], tl.float32)
    dP = tl.zeros([C, C], tl.float32)
    written = tl.zeros([C], tl.float32)
    for part in tl.range(0, VP, BV):
        row = part + tl.arange(0, BV)
        known = inside[:, None] & (row < V)[None, :]
        y = tl.load(grad_corrected + of_values + row[None, :])
        xt = tl.trans(tl.load(corrected + of_values + row[None, :]))
        do = tl.load(from_grad[:, None] + row[None, :], mask=known, other=0.0).to(io)
        dA = tl.dot(y, xt, dA, input_precision=PRECISION)
        dP = tl.dot(do, xt, dP, input_precision=PRECISION)
        dwv = y.to(tl.float32)
        values = tl.load(from_v[:, None] + row[None, :], mask=known, other=0.0).to(tl.float32)
        to = token[:, None] * V + row[None, :]
        if WRITES:
            w = tl.load(from_write[:, None] + row[None, :], mask=known, other=0.0).to(tl.float32)
            tl.store(dwrite + to, (dwv * values).to(dwrite.dtype.element_ty), mask=known)
        else:
            w = tl.load(from_write, mask=inside, other=0.0).to(tl.float32)[:, None]
            written += tl.sum(dwv * values, axis=1)
        tl.store(dv_out + to, (dwv * w).to(dv_out.dtype.element_ty), mask=known)
    if not WRITES:
        tl.store(dwrite + token, written.to(dwrite.dtype.element_ty), mask=inside)
    dA = tl.where(r[:, None] > r[None, :], -dA, 0.0)
    dP = tl.where(r[:, None] >= r[None, :], dP * scale, 0.0)
    same = tl.sum(tl.where(r[:, None] == r[None, :], dP, 0.0), axis=1)
    upto = tl.where(r[:, None] >= r[None, :], 1.0, 0.0)
    behind = tl.where(r[:, None] < r[None, :], 1.0, 0.0)
    if not DECAYS:
        g = finite(tl.load(from_decay, mask=inside, other=0.0).to(tl.float32))
        since = tl.exp(tl.sum(upto * g[None, :], axis=1))[:, None]
        until = tl.exp(tl.sum(behind * g[None, :], axis=1))[:, None]
        total = tl.exp(tl.sum(g, axis=0))
        decays = between(g, r, PRECISION)
        dA *= decays
        dP *= decays
        found = tl.zeros([C, C], tl.float32)
        of_since = tl.zeros([C], tl.float32)
        of_until = tl.zeros([C], tl.float32)
        of_whole = 0.0
    erased = tl.zeros([C], tl.float32)
    for part in tl.range(0, KP, BK):
        d = part + tl.arange(0, BK)
        known = inside[:, None] & (d < K)[None, :]
        dleft = tl.zeros([C, BK], tl.float32)
        dq = tl.zeros([C, BK], tl.float32)
        dk = tl.zeros([C, BK], tl.float32)
        dwhole = tl.zeros([BK], tl.float32)
        for begin in tl.range(0, VP, BV):
            row = begin + tl.arange(0, BV)
            cell = place * VP * KP + row[:, None] * KP + d[None, :]
            before = tl.load(marks + cell)
            after = tl.load(back_marks + cell)
            y = tl.load(grad_corrected + of_values + row[None, :])
            x = tl.load(corrected + of_values + row[None, :])
            seen = inside[:, None] & (row < V)[None, :]
            do = tl.load(from_grad[:, None] + row[None, :], mask=seen, other=0.0).to(io)
            dleft = tl.dot(y, before, dleft, input_precision=PRECISION)
            dq = tl.dot(do, before, dq, input_precision=PRECISION)
            dk = tl.dot(x, after, dk, input_precision=PRECISION)
            dwhole += tl.sum(before.to(tl.float32) * after.to(tl.float32), axis=0)
        kk = tl.load(from_k[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
        qq = tl.load(from_q[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
        if ERASES:
            e = tl.load(from_erase[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
        else:
            e = tl.load(from_erase, mask=inside, other=0.0).to(tl.float32)[:, None]
        ek = kk * e
        if DECAYS:
            gs = finite(tl.load(from_decay[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32))
            since = tl.exp(sums(upto, gs, PRECISION))
            until = tl.exp(sums(behind, gs, PRECISION))
            total = tl.exp(tl.sum(gs, axis=0))
        de = -dleft * since
        dq = dq * since * scale
        dk = dk * until
        if DECAYS:
            dg = sums(tl.trans(upto), de * ek + dq * qq, PRECISION)
            dg += sums(tl.trans(behind), dk * kk, PRECISION)
            dg += (dwhole * total)[None, :]
            dq += same[:, None] * kk
            dk += same[:, None] * qq
            for level in tl.range(0, LEVELS):
                span = spans(r, level)
                w = tl.exp(sums(span, gs, PRECISION))
                across = pairs(r, level)
                a = tl.where(across, dA, 0.0)
                p = tl.where(across, dP, 0.0)
                kw = kk * w
                dew = tl.dot(a, kw, input_precision=PRECISION)
                dqw = tl.dot(p, kw, input_precision=PRECISION)
                dkw = tl.dot(tl.trans(a), ek * w, input_precision=PRECISION)
                dkw = tl.dot(tl.trans(p), qq * w, dkw, input_precision=PRECISION)
                dw = dew * ek + dqw * qq + dkw * kk
                dg += sums(tl.trans(span), dw * w, PRECISION)
                de += dew * w
                dq += dqw * w
                dk += dkw * w
            at = token[:, None] * K + d[None, :]
            tl.store(ddecay + at, dg.to(ddecay.dtype.element_ty), mask=known)
        else:
            of_since += tl.sum(de * ek + dq * qq, axis=1)
            of_until += tl.sum(dk * kk, axis=1)
            of_whole += tl.sum(dwhole, axis=0)
            kt = tl.trans(kk)
            found += dA * tl.dot(ek, kt, input_precision=PRECISION)
            found += dP * tl.dot(qq, kt, input_precision=PRECISION)
            de = tl.dot(dA, kk, de, input_precision=PRECISION)
            dq = tl.dot(dP, kk, dq, input_precision=PRECISION)
            dk = tl.dot(tl.trans(dA), ek, dk, input_precision=PRECISION)
            dk = tl.dot(tl.trans(dP), qq, dk, input_precision=PRECISION)
        to = token[:, None] * K + d[None, :]
        if ERASES:
            tl.store(derase + to, (de * kk).to(derase.dtype.element_ty), mask=known)
        else:
            erased += tl.sum(de * kk, axis=1)
        tl.store(dq_out + to, dq.to(dq_out.dtype.element_ty), mask=known)
        tl.store(dk_out + to, (dk + de * e).to(dk_out.dtype.element_ty), mask=known)
    if not ERASES:
        tl.store(derase + token, erased.to(derase.dtype.element_ty), mask=inside)
    if not DECAYS:
        # The decay of token s lies between j and i for j < s <= i: sums over i, then over j.
        of_pairs = sums(tl.trans(upto), found, PRECISION)
        of_pairs = tl.sum(tl.where(r[None, :] < r[:, None], of_pairs, 0.0), axis=1)
        dg = of_pairs + tl.sum(tl.trans(upto) * of_since[None, :], axis=1)
        dg += tl.sum(tl.trans(behind) * of_until[None, :], axis=1) + of_whole * total
        tl.store(ddecay + token, dg.to(ddecay.dtype.element_ty), mask=inside)
