"""Triton programs of splash attention: a block of rows against the keys that it can see, and the other way round.

A causal triangle or a window bounds the loop, so that blocks nobody sees are never loaded. Tensors are contiguous:
q, grad_out, dq [b, h, n, d or e], k, v, dk, dv [b, g, m, d or e], lse, through [b, h, n], segments [b, n] and [b, m].
"""

import triton
import triton.language as tl


@triton.jit
def _capped(scores, cap, CAP: tl.constexpr):
    """Scores through cap * tanh(scores / cap), and the slope there; without a cap, as they are and 1."""
    if CAP:
        ratio = scores / cap
        small = tl.exp(-2.0 * tl.abs(ratio))
        tanh = tl.where(ratio < 0, -1.0, 1.0) * (1.0 - small) / (1.0 + small)
        return cap * tanh, 1.0 - tanh * tanh
    return scores, tl.full(scores.shape, 1.0, tl.float32)


@triton.jit
def _seen(row, column, q_ids, k_ids, n, m, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """Which row sees which key: [rows, keys]; the last row stands where the last key does."""
    place = (row + m - n)[:, None]
    key = column[None, :]
    seen = (row < n)[:, None] & (key < m)
    if CAUSAL:
        seen = seen & (key <= place)
    if WINDOW:
        seen = seen & (tl.abs(key - place) < window)
    if SEGMENTS:
        seen = seen & (q_ids[:, None] == k_ids[None, :])
    return seen


@triton.jit
def _tile(base, rows, count, width, WIDTH: tl.constexpr):
    """Rows of a contiguous [count, width] matrix, zero outside."""
    column = tl.arange(0, WIDTH)
    mask = (rows < count)[:, None] & (column < width)[None, :]
    return tl.load(base + rows[:, None].to(tl.int64) * width + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, rows, count, width, values, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    mask = (rows < count)[:, None] & (column < width)[None, :]
    tl.store(base + rows[:, None].to(tl.int64) * width + column[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _key_range(
    first_row, n, m, window, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """The keys (from, to) that some of ROWS rows can see by their place; from is a multiple of KEYS."""
    low = first_row * 0
    high = low + m
    first = first_row + m - n
    last = tl.minimum(first_row + ROWS, n) - 1 + m - n
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        high = tl.minimum(high, last + window)
    if CAUSAL:
        high = tl.minimum(high, last + 1)
    return low, high


@triton.jit
def attend(
    q, k, v, q_ids, k_ids, out, lse, heads, repeat, n, m, d, e, window, scale, cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """out and lse of ROWS rows of one head."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    batch, group = head // heads, head // repeat  # heads is a multiple of repeat, so this counts key heads over batches
    row = first + tl.arange(0, ROWS)
    queries = _tile(q + head * n * d, row, n, d, D)
    q_id = tl.load(q_ids + batch * n + row, mask=row < n, other=0) if SEGMENTS else row
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, E), tl.float32)
    low, high = _key_range(first, n, m, window, ROWS, KEYS, CAUSAL, WINDOW)
    for start in range(low, high, KEYS):
        column = start + tl.arange(0, KEYS)
        keys = _tile(k + group * m * d, column, m, d, D)
        k_id = tl.load(k_ids + batch * m + column, mask=column < m, other=0) if SEGMENTS else column
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores, _ = _capped(scores, cap, CAP)
        scores = tl.where(_seen(row, column, q_id, k_id, n, m, window, CAUSAL, WINDOW, SEGMENTS), scores, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, axis=1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(best - base)
        total = total * fade + tl.sum(weights, axis=1)
        values = _tile(v + group * m * e, column, m, e, E)
        result = result * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        best = highest
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    _store(out + head * n * e, row, n, e, result / divisor[:, None], E)
    tl.store(lse + head * n + row, tl.where(empty, float("-inf"), best + tl.log(divisor)), mask=row < n)


@triton.jit
def _scores_again(
    queries, keys, grads, values, total, through, seen, scale, cap, CAP: tl.constexpr
):  # fmt: skip
    """Weights, and gradients of the unscaled products, of a block of rows and keys."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores, slope = _capped(scores, cap, CAP)
    weights = tl.where(seen, tl.exp(tl.where(seen, scores - total[:, None], 0.0)), 0.0)
    through_out = tl.dot(grads, tl.trans(values), input_precision="ieee")
    return weights, weights * (through_out + through[:, None]) * slope * scale


@triton.jit
def grad_queries(
    q, k, v, grad_out, lse, through, q_ids, k_ids, dq, heads, repeat, n, m, d, e, window, scale, cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dq of ROWS rows of one head; lse is 0 where a row sees nothing."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    batch, group = head // heads, head // repeat
    row = first + tl.arange(0, ROWS)
    queries = _tile(q + head * n * d, row, n, d, D)
    grads = _tile(grad_out + head * n * e, row, n, e, E)
    total = tl.load(lse + head * n + row, mask=row < n, other=0.0)
    extra = tl.load(through + head * n + row, mask=row < n, other=0.0)
    q_id = tl.load(q_ids + batch * n + row, mask=row < n, other=0) if SEGMENTS else row
    result = tl.zeros((ROWS, D), tl.float32)
    low, high = _key_range(first, n, m, window, ROWS, KEYS, CAUSAL, WINDOW)
    for start in range(low, high, KEYS):
        column = start + tl.arange(0, KEYS)
        keys = _tile(k + group * m * d, column, m, d, D)
        values = _tile(v + group * m * e, column, m, e, E)
        k_id = tl.load(k_ids + batch * m + column, mask=column < m, other=0) if SEGMENTS else column
        seen = _seen(row, column, q_id, k_id, n, m, window, CAUSAL, WINDOW, SEGMENTS)
        _, dscores = _scores_again(queries, keys, grads, values, total, extra, seen, scale, cap, CAP)
        result += tl.dot(dscores.to(keys.dtype), keys, input_precision="ieee")
    _store(dq + head * n * d, row, n, d, result, D)


@triton.jit
def grad_keys(
    q, k, v, grad_out, lse, through, q_ids, k_ids, dk, dv, groups, repeat, n, m, d, e, window, scale, cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS keys of one key head, over all query heads that read it."""
    first = tl.program_id(0) * KEYS
    group = tl.program_id(1).to(tl.int64)
    batch = group // groups
    column = first + tl.arange(0, KEYS)
    keys = _tile(k + group * m * d, column, m, d, D)
    values = _tile(v + group * m * e, column, m, e, E)
    k_id = tl.load(k_ids + batch * m + column, mask=column < m, other=0) if SEGMENTS else column
    result_k = tl.zeros((KEYS, D), tl.float32)
    result_v = tl.zeros((KEYS, E), tl.float32)
    low = first * 0
    high = low + n
    if CAUSAL:
        low = tl.maximum(first - (m - n), 0) // ROWS * ROWS
    if WINDOW:
        low = tl.maximum(low, tl.maximum(first - window + 1 - (m - n), 0) // ROWS * ROWS)
        high = tl.minimum(high, first + KEYS - 1 + window - (m - n))
    for index in range(repeat):
        head = group * repeat + index
        for start in range(low, high, ROWS):
            row = start + tl.arange(0, ROWS)
            queries = _tile(q + head * n * d, row, n, d, D)
            grads = _tile(grad_out + head * n * e, row, n, e, E)
            total = tl.load(lse + head * n + row, mask=row < n, other=0.0)
            extra = tl.load(through + head * n + row, mask=row < n, other=0.0)
            q_id = tl.load(q_ids + batch * n + row, mask=row < n, other=0) if SEGMENTS else row
            seen = _seen(row, column, q_id, k_id, n, m, window, CAUSAL, WINDOW, SEGMENTS)
            weights, dscores = _scores_again(queries, keys, grads, values, total, extra, seen, scale, cap, CAP)
            result_v += tl.dot(tl.trans(weights).to(grads.dtype), grads, input_precision="ieee")
            result_k += tl.dot(tl.trans(dscores).to(queries.dtype), queries, input_precision="ieee")
    _store(dk + group * m * d, column, m, d, result_k, D)
    _store(dv + group * m * e, column, m, e, result_v, E)
