"""Device code of ragged paged attention in Triton: one kernel for prefill and decode, one that merges KV splits."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_sequence(cu_q_lens, count, tokens, block, BLOCK_Q: tl.constexpr, ROOM: tl.constexpr):
    """The sequence that owns a query block: (sequence, its first row of q, its rows, its rows before the block).

    Sequence i owns the blocks from cu_q_lens[i] // BLOCK_Q + ROOM * min(i, cu_q_lens[i]). ROOM = 1 leaves room for the
    last, partial block of each sequence before it, of which no more than cu_q_lens[i] have rows. Sequence `count` is
    the padding up to row `tokens`. A block that is nobody's has all rows of a sequence before it.
    With BLOCK_Q = 1 every block is full and ROOM may be 0: block and row of q are the same.
    """
    low = block * 0
    high = count
    while low < high:
        middle = (low + high + 1) // 2
        start = tl.load(cu_q_lens + middle)
        owns = start // BLOCK_Q + ROOM * tl.minimum(middle, start) <= block
        low = tl.where(owns, middle, low)
        high = tl.where(owns, high, middle - 1)
    start = tl.load(cu_q_lens + low)
    end = tl.load(cu_q_lens + low + 1, mask=low < count, other=tokens)
    before = (block - start // BLOCK_Q - ROOM * tl.minimum(low, start)) * BLOCK_Q
    return low, start, end - start, before


@triton.jit
def attend_tile(
    acc,
    top,
    total,
    queries,
    kv,
    table,
    start,
    begin,
    end,
    position,
    window,
    scale,
    cap_in,
    cap_out,
    kv_page,
    kv_position,
    kv_head,
    pages,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of online softmax (Milakov & Gimelshein 2018) over the positions start to start + BLOCK_N.

    acc, top, total: weighted values, largest logit and sum of weights of each row so far; logits are in base 2.
    EDGE: some row does not see some position. Without it every position is seen, and nothing is masked.
    """
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = (n >= begin) & (n < end)
    if PAGE_SIZE % BLOCK_N == 0:  # the tile lies in one page
        page = tl.load(table + start // PAGE_SIZE).to(tl.int64)
        tl.device_assert((page >= 0) & (page < pages), "page_indices names a page that kv_pages does not have")
        place = page * kv_page + (start % PAGE_SIZE + tl.arange(0, BLOCK_N)) * kv_position
    else:
        # Entries of the table that no row needs may hold anything.
        page = tl.load(table + n // PAGE_SIZE, mask=inside if EDGE else None, other=0 if EDGE else None).to(tl.int64)
        tl.device_assert((page >= 0) & (page < pages), "page_indices names a page that kv_pages does not have")
        place = page * kv_page + (n % PAGE_SIZE) * kv_position
    key_at = kv + place[None, :] + d[:, None]
    value_at = kv + kv_head + place[:, None] + d[None, :]
    # Masked loads give zeros: what lies outside may be NaN, and a weight of zero would not hide it.
    if EDGE:
        keys = tl.load(key_at, mask=inside[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        values = tl.load(value_at, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        keys = tl.load(key_at, mask=(d < HEAD_DIM)[:, None], other=0.0)
        values = tl.load(value_at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        keys = tl.load(key_at)
        values = tl.load(value_at)

    scores = tl.dot(queries, keys.to(queries.dtype), input_precision=PRECISION)
    if CAPPED:  # tanh(x) = 1 - 2 / (1 + e^2x), exact at both ends
        scores = cap_out * (1.0 - 2.0 / (1.0 + tl.exp2(scores * cap_in)))
    if EDGE:
        seen = n[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (n[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    larger = tl.maximum(top, tl.max(scores, 1) * scale)
    # A row that has seen nothing yet keeps -inf, and -inf - -inf is NaN.
    anchor = tl.where(larger == float("-inf"), 0.0, larger) if EDGE else larger
    weights = tl.exp2(scores * scale - anchor[:, None])
    fade = tl.exp2(top - anchor)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(queries.dtype), values.to(queries.dtype), acc * fade[:, None], input_precision=PRECISION)
    return acc, larger, total


@triton.jit(do_not_specialize=["tokens", "max_seqs", "window", "table_row", "pages"])
def attend_blocks(
    q,
    kv,
    out,
    lse,
    part,
    part_lse,
    kv_lens,
    page_indices,
    cu_q_lens,
    num_seqs,
    sinks,
    scale,
    cap_in,
    cap_out,
    v_scale,
    tokens,
    max_seqs,
    window,
    table_row,
    pages,
    q_token,
    q_head,
    kv_page,
    kv_position,
    kv_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    ANY: tl.constexpr,
    SKIP: tl.constexpr,
    SPLIT: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Attention of BLOCK_Q query rows and the GROUP query heads of one kv head, over one split of what they see.

    Grid: (query blocks, kv heads, splits). The rows of a tile are (token, head of the group) pairs, so that a page is
    read once for the whole group.
    ANY: blocks are searched for among all sequences with more than SKIP rows, and padding rows are zeroed; otherwise
        block i is sequence i, and sequences with more than BLOCK_Q rows are left to another launch.
    SPLIT: write normalised partial results to part and part_lse (base 2) instead of out and lse.
    scale, cap_in, cap_out: factors that take a product of q and k, or its capped value, to a logit in base 2.
    """
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    count = tl.maximum(tl.minimum(tl.load(num_seqs), max_seqs), 0)
    if ANY:
        # Last blocks first: under a causal mask they take longest.
        block = tl.num_programs(0) - 1 - tl.program_id(0)
        sequence, q_start, q_len, before = find_sequence(cu_q_lens, count, tokens, block, BLOCK_Q, 1)
        if before >= q_len:
            return
        if (q_len <= SKIP) & (sequence < count):
            return
    else:
        block = tl.program_id(0)
        sequence = block
        if sequence >= count:
            return
        q_start = tl.load(cu_q_lens + sequence)
        q_len = tl.load(cu_q_lens + sequence + 1) - q_start
        before = 0
        if (q_len > BLOCK_Q) | (q_len == 0):
            return

    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = row // GROUP
    query_head = head * GROUP + row % GROUP
    real = (row < BLOCK_Q * GROUP) & (before + token < q_len)
    first = (q_start + before).to(tl.int64)
    whole = real[:, None] & (d < HEAD_DIM)[None, :]
    out_at = out + first * heads * GROUP * HEAD_DIM + (token * heads * GROUP + query_head)[:, None] * HEAD_DIM + d
    lse_at = lse + first * heads * GROUP + token * heads * GROUP + query_head

    if sequence == count:  # padding rows, with ANY only
        if split == 0:
            tl.store(out_at, tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty), mask=whole)
            if LSE:
                tl.store(lse_at, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=real)
        return

    kv_len = tl.load(kv_lens + sequence)
    tl.device_assert(q_len <= kv_len, "a sequence has more query rows (cu_q_lens) than tokens (kv_lens)")
    tl.device_assert(q_start + q_len <= tokens, "cu_q_lens ends past the rows of q")
    oldest = kv_len - q_len + before  # position of the block's first row
    end = tl.minimum(oldest + BLOCK_Q, kv_len)
    begin = 0
    full_begin = 0
    if WINDOWED:
        begin = tl.maximum(0, oldest - window + 1)
        full_begin = tl.maximum(0, end - window)
    # Tiles low to high are this program's; of these, full_low to full_high are seen by every row.
    low = begin // BLOCK_N
    high = tl.cdiv(end, BLOCK_N)
    if SPLIT:
        share = tl.maximum(tl.cdiv(high - low, splits), MIN_TILES)
        low = tl.minimum(low + split * share, high)
        high = tl.minimum(low + share, high)
        part_at = ((block * heads + head).to(tl.int64) * splits + split) * BLOCK_M
        if low == high:
            tl.store(part_lse + part_at + row, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=real)
            return
    full_low = tl.minimum(tl.maximum(tl.cdiv(full_begin, BLOCK_N), low), high)
    full_high = tl.maximum(tl.minimum((oldest + 1) // BLOCK_N, high), full_low)

    q_at = q + first * q_token + (token * q_token + query_head * q_head)[:, None] + d
    queries = tl.load(q_at, mask=whole, other=0.0).to(DOT)
    kv += 2 * head * kv_head
    table = page_indices + sequence.to(tl.int64) * table_row
    position = oldest + token
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # a position without a value, seen by every row: it belongs to the first split
        counted = real & (split == 0)
        top = tl.load(sinks + query_head, mask=counted, other=float("-inf")).to(tl.float32) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    for tile in range(full_low, full_high):
        acc, top, total = attend_tile(
            acc,
            top,
            total,
            queries,
            kv,
            table,
            tile * BLOCK_N,
            begin,
            end,
            position,
            window,
            scale,
            cap_in,
            cap_out,
            kv_page,
            kv_position,
            kv_head,
            pages,
            HEAD_DIM,
            PAGE_SIZE,
            WINDOWED,
            CAPPED,
            False,
            BLOCK_N,
            BLOCK_D,
            PRECISION,
        )
    # The order of tiles does not matter to an online softmax: both edges share a loop.
    left = full_low - low
    for edge in range(left + high - full_high):
        tile = tl.where(edge < left, low + edge, full_high + edge - left)
        acc, top, total = attend_tile(
            acc,
            top,
            total,
            queries,
            kv,
            table,
            tile * BLOCK_N,
            begin,
            end,
            position,
            window,
            scale,
            cap_in,
            cap_out,
            kv_page,
            kv_position,
            kv_head,
            pages,
            HEAD_DIM,
            PAGE_SIZE,
            WINDOWED,
            CAPPED,
            True,
            BLOCK_N,
            BLOCK_D,
            PRECISION,
        )

    # A split may hold nothing that a row sees: top is -inf then, and acc zero.
    total = tl.where(total > 0.0, total, 1.0)
    if SPLIT:
        tl.store(part_lse + part_at + row, top + tl.log2(total), mask=real)
        tl.store(part + (part_at + row)[:, None] * HEAD_DIM + d, acc / total[:, None], mask=whole)
    else:
        tl.store(out_at, (acc * (v_scale / total)[:, None]).to(out.dtype.element_ty), mask=whole)
        if LSE:
            tl.store(lse_at, (top + tl.log2(total)) * LN2, mask=real)


@triton.jit(do_not_specialize=["tokens", "max_seqs", "splits"])
def merge_splits(
    part,
    part_lse,
    out,
    lse,
    cu_q_lens,
    num_seqs,
    v_scale,
    tokens,
    max_seqs,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LSE: tl.constexpr,
    ANY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add up the splits that attend_blocks left, each weighted by its part of the sum.

    Grid: (blocks * BLOCK_Q, query heads).
    """
    block = tl.program_id(0) // BLOCK_Q
    token = tl.program_id(0) % BLOCK_Q
    query_head = tl.program_id(1)
    query_heads = tl.num_programs(1)
    count = tl.maximum(tl.minimum(tl.load(num_seqs), max_seqs), 0)
    if ANY:
        sequence, q_start, q_len, before = find_sequence(cu_q_lens, count, tokens, block, BLOCK_Q, 1)
        if (sequence == count) | (before + token >= q_len):
            return
    else:
        if block >= count:
            return
        q_start = tl.load(cu_q_lens + block)
        q_len = tl.load(cu_q_lens + block + 1) - q_start
        before = 0
        if (q_len > BLOCK_Q) | (token >= q_len):
            return
    split = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    head = query_head // GROUP
    row = token * GROUP + query_head % GROUP
    at = ((block * (query_heads // GROUP) + head).to(tl.int64) * splits + split) * BLOCK_M + row
    logs = tl.load(part_lse + at, mask=split < splits, other=float("-inf"))
    top = tl.max(logs, 0)
    weights = tl.exp2(logs - top)
    total = tl.sum(weights, 0)
    # Empty splits have written no values.
    filled = (logs > float("-inf"))[:, None] & (d < HEAD_DIM)[None, :]
    values = tl.load(part + at[:, None] * HEAD_DIM + d, mask=filled, other=0.0)
    mixed = tl.sum(values * weights[:, None], 0) * (v_scale / total)
    out_row = (q_start + before + token).to(tl.int64) * query_heads + query_head
    tl.store(out + out_row * HEAD_DIM + d, mixed.to(out.dtype.element_ty), mask=d < HEAD_DIM)
    if LSE:
        tl.store(lse + out_row, (top + tl.log2(total)) * LN2)
