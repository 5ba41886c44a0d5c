"""Gradients of gated_delta_rule in Triton: one pass over the chunks from the last to the first, then each chunk alone.

With Y the gradient of the right side of (I + A) X = ..., D that of the state after a chunk, the rest as in
gdn_rule_chunk.py (E', Q', K' are E, Q, K decayed up to a token or from it to the chunk's end):

    dX = K' D^T + P^T dO,  Y = (I + A)^-T dX,  D before the chunk = D diag(exp(sum of g)) - Y^T E' + dO^T Q'
    d(write * V) = Y,  dA = -Y X^T,  dP = dO X^T,  dE' = -Y S0,  dQ' = dO S0,  dK' = X D

What these are to q, k and the gates is in gdn_rule_share.py.
"""

import triton
import triton.language as tl

from .gdn_rule_chunk import SIZES, between, finite, tokens_of


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
        do = tl.load(at[None, :] + row[:, None], mask=known, other=0.0).to(tl.float32)
        tl.store(back_marks + place * VP * KP + row[:, None] * KP + d[None, :], D)
        dx = tl.dot(D, tl.trans(tl.load(kept + wide)), input_precision=PRECISION)
        dx = tl.dot(do, tl.load(mixed + pair), dx, input_precision=PRECISION)
        y = tl.dot(dx, tl.load(solved + pair), input_precision=PRECISION)
        tl.store(grad_corrected + place * C * VP + r[None, :] * VP + row[:, None], y)
        D *= tl.load(whole + place * KP + d)[None, :]
        D = tl.dot(-y, tl.load(left + wide), D, input_precision=PRECISION)
        D = tl.dot(do, tl.load(asked + wide), D, input_precision=PRECISION)
    tl.store(grad_initial + cell, D, mask=in_state)


@triton.jit(do_not_specialize=SIZES)
def part_rule(
    v,
    v_strides,
    write,
    write_strides,
    grad,
    grad_strides,
    decay,
    decay_strides,
    scale,
    marks,
    corrected,
    back_marks,
    grad_corrected,
    dsolved,
    dmixed,
    dleft,
    dasked,
    dkept,
    dwhole,
    dv_out,
    dwrite,
    count,
    chunks,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DECAYS: tl.constexpr,
    WRITES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of one chunk of one value head the gradients of what `solve_rule` made, of v and of write; grid (b * chunks, HV).

    In float32: those of A (dsolved), of P before it is scaled (dmixed), both times the decays between tokens where the
    decay is one number, and of left, asked, kept and whole. dv_out [b, t, HV, V].
    """
    chunk = tl.program_id(0) % chunks
    entry = tl.program_id(0) // chunks
    head = tl.program_id(1)
    place = (entry.to(tl.int64) * HV + head) * chunks + chunk
    r = tl.arange(0, C)
    t = chunk * C + r
    inside = t < count
    from_v = v + tokens_of(v_strides, entry, t, head)
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
        do = tl.load(from_grad[:, None] + row[None, :], mask=known, other=0.0).to(tl.float32)
        dA = tl.dot(y, xt, dA, input_precision=PRECISION)
        dP = tl.dot(do, xt, dP, input_precision=PRECISION)
        values = tl.load(from_v[:, None] + row[None, :], mask=known, other=0.0).to(tl.float32)
        to = token[:, None] * V + row[None, :]
        if WRITES:
            w = tl.load(from_write[:, None] + row[None, :], mask=known, other=0.0).to(tl.float32)
            tl.store(dwrite + to, (y * values).to(dwrite.dtype.element_ty), mask=known)
        else:
            w = tl.load(from_write, mask=inside, other=0.0).to(tl.float32)[:, None]
            written += tl.sum(y * values, axis=1)
        tl.store(dv_out + to, (y * w).to(dv_out.dtype.element_ty), mask=known)
    if not WRITES:
        tl.store(dwrite + token, written.to(dwrite.dtype.element_ty), mask=inside)
    pair = place * C * C + r[:, None] * C + r[None, :]
    dA = tl.where(r[:, None] > r[None, :], -dA, 0.0)
    dP = tl.where(r[:, None] >= r[None, :], dP * scale, 0.0)
    if not DECAYS:
        g = tl.load(decay + tokens_of(decay_strides, entry, t, head), mask=inside, other=0.0).to(tl.float32)
        decays = between(finite(g), r, PRECISION)
        dA *= decays
        dP *= decays
    tl.store(dsolved + pair, dA)
    tl.store(dmixed + pair, dP)
    for part in tl.range(0, KP, BK):
        d = part + tl.arange(0, BK)
        of_left = tl.zeros([C, BK], tl.float32)
        of_asked = tl.zeros([C, BK], tl.float32)
        of_kept = tl.zeros([C, BK], tl.float32)
        of_whole = tl.zeros([BK], tl.float32)
        for begin in tl.range(0, VP, BV):
            row = begin + tl.arange(0, BV)
            cell = place * VP * KP + row[:, None] * KP + d[None, :]
            before = tl.load(marks + cell)
            after = tl.load(back_marks + cell)
            y = tl.load(grad_corrected + of_values + row[None, :])
            x = tl.load(corrected + of_values + row[None, :])
            known = inside[:, None] & (row < V)[None, :]
            do = tl.load(from_grad[:, None] + row[None, :], mask=known, other=0.0).to(tl.float32)
            of_left = tl.dot(y, before, of_left, input_precision=PRECISION)
            of_asked = tl.dot(do, before, of_asked, input_precision=PRECISION)
            of_kept = tl.dot(x, after, of_kept, input_precision=PRECISION)
            of_whole += tl.sum(before * after, axis=0)
        to = place * C * KP + r[:, None] * KP + d[None, :]
        tl.store(dleft + to, -of_left)
        tl.store(dasked + to, of_asked)
        tl.store(dkept + to, of_kept)
        tl.store(dwhole + place * KP + d, of_whole)
