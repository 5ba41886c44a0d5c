"""The token-by-token form of gated_delta_rule in Triton: decode steps and short sequences, the state read once."""

import triton
import triton.language as tl

from .gdn_rule_chunk import tokens_of


@triton.jit(do_not_specialize=("count",))
def step_rule(
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
    scale,
    initial,
    out,
    final,
    count,
    HV: tl.constexpr,
    RATIO: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    BV: tl.constexpr,
    DECAYS: tl.constexpr,
    ERASES: tl.constexpr,
    WRITES: tl.constexpr,
):
    """One batch entry, one value head, BV rows of its state [V, K] in registers; grid (b * HV * cdiv(V, BV),).

    All float32. out [b, t, HV, V], final [b, HV, V, K].
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    row = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    head = tl.program_id(0) // blocks % HV
    entry = tl.program_id(0) // (blocks * HV)
    d = tl.arange(0, KP)
    in_k = d < K
    in_v = row < V
    cell = (entry.to(tl.int64) * HV + head) * V * K + row[:, None] * K + d[None, :]
    in_state = in_v[:, None] & in_k[None, :]
    S = tl.zeros([BV, KP], tl.float32)
    if initial is not None:
        S = tl.load(initial + cell, mask=in_state, other=0.0).to(tl.float32)
    from_q = q + tokens_of(q_strides, entry, entry * 0, head // RATIO) + d
    from_k = k + tokens_of(k_strides, entry, entry * 0, head // RATIO) + d
    from_v = v + tokens_of(v_strides, entry, entry * 0, head) + row
    from_decay = decay + tokens_of(decay_strides, entry, entry * 0, head)
    from_erase = erase + tokens_of(erase_strides, entry, entry * 0, head)
    from_write = write + tokens_of(write_strides, entry, entry * 0, head)
    to = out + (entry.to(tl.int64) * count * HV + head) * V + row
    for _ in range(count):
        kk = tl.load(from_k, mask=in_k, other=0.0).to(tl.float32)
        qq = tl.load(from_q, mask=in_k, other=0.0).to(tl.float32)
        vv = tl.load(from_v, mask=in_v, other=0.0).to(tl.float32)
        if DECAYS:
            a = tl.exp(tl.load(from_decay + d, mask=in_k, other=0.0).to(tl.float32))
        else:
            a = tl.exp(tl.load(from_decay).to(tl.float32)) + tl.zeros([KP], tl.float32)
        if ERASES:
            ek = kk * tl.load(from_erase + d, mask=in_k, other=0.0).to(tl.float32)
        else:
            ek = kk * tl.load(from_erase).to(tl.float32)
        if WRITES:
            wv = vv * tl.load(from_write + row, mask=in_v, other=0.0).to(tl.float32)
        else:
            wv = vv * tl.load(from_write).to(tl.float32)
        S = S * a[None, :]
        # Both products with the state before the write, so that neither sum waits for the other.
        delta = wv - tl.sum(S * ek[None, :], axis=1)
        o = tl.sum(S * qq[None, :], axis=1) + tl.sum(kk * qq, axis=0) * delta
        S = S + delta[:, None] * kk[None, :]
        tl.store(to, (o * scale).to(out.dtype.element_ty), mask=in_v)
        from_q += q_strides[1]
        from_k += k_strides[1]
        from_v += v_strides[1]
        from_decay += decay_strides[1]
        from_erase += erase_strides[1]
        from_write += write_strides[1]
        to += HV * V
    tl.store(final + cell, S, mask=in_state)
