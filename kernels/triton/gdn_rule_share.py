"""The last step of the gradients of gated_delta_rule in Triton: from those of what chunks made to q, k and the gates.

An exponent is a matrix of zeros and ones times g (gdn_rule_chunk.py), so that its gradient reaches g by the transposed
matrix: no difference of sums here either.
"""

import triton
import triton.language as tl

from .gdn_rule_chunk import SIZES, finite, pairs, spans, sums, tokens_of


@triton.jit(do_not_specialize=SIZES)
def share_rule(
    q,
    q_strides,
    k,
    k_strides,
    decay,
    decay_strides,
    erase,
    erase_strides,
    scale,
    dsolved,
    dmixed,
    dleft,
    dasked,
    dkept,
    dwhole,
    dq_out,
    dk_out,
    ddecay,
    derase,
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
    """Gradients of q, k, decay and erase, one chunk of one value head; grid (b * chunks, HV).

    dq_out, dk_out [b, t, HV, K]: for each value head, to be summed over those of a key head. C is 2**LEVELS.
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
    token = (entry.to(tl.int64) * count + t) * HV + head
    pair = place * C * C + r[:, None] * C + r[None, :]
    transposed = place * C * C + r[None, :] * C + r[:, None]
    upto = tl.where(r[:, None] >= r[None, :], 1.0, 0.0)
    behind = tl.where(r[:, None] < r[None, :], 1.0, 0.0)
    if DECAYS:
        same = tl.load(dmixed + place * C * C + r * C + r)
    else:
        g = finite(tl.load(from_decay, mask=inside, other=0.0).to(tl.float32))
        since = tl.exp(tl.sum(upto * g[None, :], axis=1))[:, None]
        until = tl.exp(tl.sum(behind * g[None, :], axis=1))[:, None]
        total = tl.exp(tl.sum(g, axis=0))
        found = tl.zeros([C, C], tl.float32)
        of_since = tl.zeros([C], tl.float32)
        of_until = tl.zeros([C], tl.float32)
        of_whole = 0.0
    erased = tl.zeros([C], tl.float32)
    for part in tl.range(0, KP, BK, num_stages=1):
        d = part + tl.arange(0, BK)
        known = inside[:, None] & (d < K)[None, :]
        kk = tl.load(from_k[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
        qq = tl.load(from_q[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
        if ERASES:
            e = tl.load(from_erase[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
        else:
            e = tl.load(from_erase, mask=inside, other=0.0).to(tl.float32)[:, None]
        ek = kk * e
        if DECAYS:
            # r, but nothing that the compiler may move out of the loop: matrices of zeros and ones are made anew, since
            # they would hold the registers of the sums.
            rr = r + tl.minimum(part, 0)
            upto = tl.where(rr[:, None] >= rr[None, :], 1.0, 0.0)
            behind = tl.where(rr[:, None] < rr[None, :], 1.0, 0.0)
            gs = finite(tl.load(from_decay[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32))
            since = tl.exp(sums(upto, gs, PRECISION))
            until = tl.exp(sums(behind, gs, PRECISION))
            total = tl.exp(tl.sum(gs, axis=0))
        wide = place * C * KP + r[:, None] * KP + d[None, :]
        de = tl.load(dleft + wide) * since
        dq = tl.load(dasked + wide) * since * scale
        dk = tl.load(dkept + wide) * until
        of_total = tl.load(dwhole + place * KP + d)
        to = token[:, None] * K + d[None, :]
        if DECAYS:
            dg = sums(tl.trans(upto), de * ek + dq * qq, PRECISION)
            dg += sums(tl.trans(behind), dk * kk, PRECISION)
            dg += (of_total * total)[None, :]
            dq += same[:, None] * kk
            dk += same[:, None] * qq
            for level in tl.range(0, LEVELS, num_stages=1):
                w = tl.exp(sums(spans(rr, level), gs, PRECISION))
                across = pairs(rr, level)
                found = tl.dot(tl.load(dsolved + pair, mask=across, other=0.0), kk * w, input_precision=PRECISION)
                de += found * w
                dw = found * ek
                found = tl.dot(tl.load(dmixed + pair, mask=across, other=0.0), kk * w, input_precision=PRECISION)
                dq += found * w
                dw += found * qq
                across = tl.trans(across)
                turned = tl.load(dmixed + transposed, mask=across, other=0.0)
                found = tl.dot(turned, qq * w, input_precision=PRECISION)
                turned = tl.load(dsolved + transposed, mask=across, other=0.0)
                found = tl.dot(turned, ek * w, found, input_precision=PRECISION)
                dk += found * w
                dw += found * kk
                dg += sums(tl.trans(spans(rr, level)), dw * w, PRECISION)
            tl.store(ddecay + to, dg.to(ddecay.dtype.element_ty), mask=known)
        else:
            of_since += tl.sum(de * ek + dq * qq, axis=1)
            of_until += tl.sum(dk * kk, axis=1)
            of_whole += tl.sum(of_total, axis=0)
            kt = tl.trans(kk)
            dA = tl.load(dsolved + pair)
            found += dA * tl.dot(ek, kt, input_precision=PRECISION)
            de = tl.dot(dA, kk, de, input_precision=PRECISION)
            dP = tl.load(dmixed + pair)
            found += dP * tl.dot(qq, kt, input_precision=PRECISION)
            dq = tl.dot(dP, kk, dq, input_precision=PRECISION)
            dk = tl.dot(tl.load(dsolved + transposed), ek, dk, input_precision=PRECISION)
            dk = tl.dot(tl.load(dmixed + transposed), qq, dk, input_precision=PRECISION)
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
