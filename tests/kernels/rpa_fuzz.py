"""Random calls of the paged-attention operators, and what they must give in float64.

The oracle knows no pages: a call is made from each sequence's own K and V, which are then scattered over a pool of
pages, and everything that may not be read (spare pages, the slack of last pages, positions before the window, padding
rows) is NaN, or 127 in int8. One row of one head is one softmax over the positions that it sees.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

QUERY = (torch.float32, torch.bfloat16, torch.float16)
CACHE = (*QUERY, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
# Of the sum of |weight * value| over what a row sees, so that values which cancel are no excuse and no trap; and of
# the largest logit, whose rounding errors are those of the weights. (With 1e-6 for float32, one of 4,000 calls, 256
# products in each logit, is 1.14 times the limit, and torch's own products just within it.)
LIMITS = {torch.float32: (4e-6, 1.5e-6), torch.bfloat16: (1e-2, 2e-5), torch.float16: (2e-3, 2e-5)}


@dataclass
class Call:
    """q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs in `arguments`; `options` are the keyword arguments."""

    seed: int
    arguments: tuple[Tensor, ...]
    options: dict[str, Any]
    lengths: list[tuple[int, int]]
    tables: list[list[int]]
    keys: list[np.ndarray]  # float64 [kv_len, kv heads, d] per sequence, unscaled
    values: list[np.ndarray]
    page_size: int
    new_keys: Tensor  # [t, kv heads, d]: what an update writes into the step's slots
    new_values: Tensor

    def __str__(self) -> str:
        q, kv = self.arguments[:2]
        options = {name: value for name, value in self.options.items() if value is not None}
        return (
            f"seed {self.seed}: q {q.dtype} {tuple(q.shape)} stride {q.stride()}, kv {kv.dtype} {tuple(kv.shape)} "
            f"stride {kv.stride()}, (q_len, kv_len) {self.lengths}, {options}"
        )


@dataclass
class Limits:
    """What a kernel takes, or what makes it slow to run."""

    query: tuple[torch.dtype, ...] = QUERY
    cache: tuple[torch.dtype, ...] = CACHE
    head_dims: tuple[int, ...] = (1, 3, 7, 8, 16, 24, 32, 33, 40, 64, 80, 96, 128, 192, 256)
    page_sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 16, 17, 32, 48, 64, 128)
    groups: tuple[int, ...] = (1, 1, 2, 3, 4, 4, 5, 7, 8, 9, 16)
    kv_heads: tuple[int, ...] = (1, 1, 2, 2, 3, 4, 8)
    layouts: tuple[str, ...] = ("NHD", "HND")
    most_seqs: int = 6
    most_rows: int = 90
    most_tokens: int = 700
    far: float = 0.02  # how often a sequence reaches beyond position 32,768
    strides: bool = True
    odd_scales: bool = True  # sm_scale of zero and below
    whole_pages: bool = False  # the page in which a window begins holds numbers throughout, as the contract has it


def make(seed: int, limits: Limits | None = None) -> Call:
    """The call of this seed."""
    has = Limits() if limits is None else limits
    rng = np.random.default_rng(seed)

    def one_of(options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    def maybe(chance: float) -> bool:
        return bool(rng.random() < chance)

    dtype = one_of(has.query)
    same = dtype in has.cache and maybe(0.5)
    kv_dtype = dtype if same else one_of(has.cache)
    kv_heads, group, size = one_of(has.kv_heads), one_of(has.groups), one_of(has.page_sizes)
    far = maybe(has.far)
    dim = 16 if far else one_of(has.head_dims)
    lengths = _lengths(rng, has, size, far)
    longest = max((kv for _, kv in lengths), default=1)
    window = None
    if maybe(0.5):
        window = one_of((1, 2, max(1, size - 1), size, size + 1, 31, 32, 33, max(1, longest - 1), longest + 1, 2**40))
    layout, query_heads = one_of(has.layouts), kv_heads * group
    counts = [-(-kv_len // size) for _, kv_len in lengths]
    pool = sum(counts) + int(rng.integers(0, 3))
    free = rng.permutation(pool).tolist()
    room = len(lengths) + int(rng.integers(0, 3))
    table = np.full((room, max(counts, default=0) + int(rng.integers(0, 3))), 2**30, np.int32)
    table[rng.random(table.shape) < 0.5] = -7
    pages = np.full((pool, size, 2 * kv_heads, dim), 127.0 if kv_dtype == torch.int8 else np.nan, np.float32)
    tables: list[list[int]] = []
    keys, values = [], []
    for i, (q_len, kv_len) in enumerate(lengths):
        mine = [free.pop() for _ in range(counts[i])]
        tables.append(mine)
        both = _values(rng, (2, kv_len, kv_heads, dim), kv_dtype)
        keys.append(both[0].astype(np.float64))
        values.append(both[1].astype(np.float64))
        first = 0 if window is None else max(0, kv_len - q_len - window + 1)
        first = first // size * size if has.whole_pages else first
        for p in range(first if q_len else kv_len, kv_len):
            pages[mine[p // size], p % size, 0::2], pages[mine[p // size], p % size, 1::2] = both[0, p], both[1, p]
        seen = first // size if q_len else counts[i]
        table[i, seen : counts[i]] = mine[seen:]  # pages wholly before the window keep their garbage
    rows = sum(q_len for q_len, _ in lengths)
    tokens = rows + int(rng.integers(0, 4))
    q = np.full((tokens, query_heads, dim), np.nan, np.float32)
    q[:rows] = rng.standard_normal((rows, query_heads, dim))
    new = torch.full((2, tokens, kv_heads, dim), torch.nan)
    new[:, :rows] = torch.from_numpy(rng.standard_normal((2, rows, kv_heads, dim)).astype(np.float32))
    kv = torch.from_numpy(pages).clone(
        memory_format=torch.contiguous_format
    )  # numpy has strides of 0 where it is empty
    if layout == "HND":
        kv = kv.transpose(1, 2).contiguous()
    starts = np.full(room + 1, -9, np.int32)
    starts[: len(lengths) + 1] = np.cumsum([0, *(q_len for q_len, _ in lengths)])
    kv_lens = np.full(room, -5, np.int32)
    kv_lens[: len(lengths)] = [kv_len for _, kv_len in lengths]
    index = [torch.from_numpy(x) for x in (kv_lens, table, starts, np.array([len(lengths)], np.int32))]
    tq, tk = torch.from_numpy(q).to(dtype), kv.to(kv_dtype)
    if has.strides:
        tq, tk = _spread(rng, tq, 0.3), _in_layers(rng, tk)
        index[:3] = [_spread(rng, x, 0.1) for x in index[:3]]
    scale = one_of((dim**-0.5, dim**-0.5, 1.0, 0.1, 3.0 * dim**-0.5))
    if has.odd_scales and maybe(0.1):
        scale = one_of((0.0, -(dim**-0.5)))
    k_scale, v_scale = (float(rng.uniform(0.02, 2.0)) if maybe(0.5) else None for _ in range(2))
    if kv_dtype == torch.int8:
        k_scale = 1 / 40 if k_scale is None else k_scale / 40
    sinks = None
    if maybe(0.3):
        sinks = torch.from_numpy(rng.standard_normal(query_heads).astype(np.float32) * one_of((1.0, 10.0)))
        sinks[int(rng.integers(query_heads))] = one_of((-torch.inf, 0.0, 40.0))
    options = {
        "sm_scale": float(scale),
        "sliding_window": window,
        "soft_cap": one_of((0.5, 5.0, 50.0)) if maybe(0.3) else None,
        "mask_value": one_of((-1e4, -1e30, -torch.inf)) if maybe(0.2) else None,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "kv_layout": layout,
        "sinks": sinks,
    }
    return Call(
        seed, (tq, tk, *index), options, lengths, tables, keys, values, size, new[0].to(dtype), new[1].to(dtype)
    )


def _lengths(rng: np.random.Generator, has: Limits, size: int, far: bool) -> list[tuple[int, int]]:
    """(q_len, kv_len) of every sequence; none at all now and then."""
    found: list[tuple[int, int]] = []
    rows = 0
    for _ in range(int(rng.integers(0, has.most_seqs + 1))):
        kind = rng.random()
        q_len = 1 if kind < 0.4 else 0 if kind < 0.5 else int(rng.integers(2, 6 if kind < 0.7 else 60))
        before = int(rng.integers(0, [2, 20, 100, has.most_tokens][int(rng.integers(4))]))
        kv_len = q_len + before
        if rng.random() < 0.3:
            kv_len = -(-kv_len // size) * size  # a multiple of a page
        kv_len = min(kv_len, has.most_tokens)
        q_len = min(q_len, kv_len, has.most_rows - rows)
        rows += q_len
        found.append((q_len, kv_len))
    if far:
        found[:2] = [(int(rng.integers(1, 5)), 32768 + int(rng.integers(-3, 200)))]
    return found


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """Standard normal numbers as this dtype holds them, in float32; whole ones around 40 times as large in int8."""
    x = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    if dtype == torch.int8:
        return (x * 40).round().clamp(-128, 127).numpy()
    return x.to(dtype).float().numpy()


def _spread(rng: np.random.Generator, x: Tensor, chance: float) -> Tensor:
    """The same numbers, now and then as part of a larger tensor: a slice of its rows' ends, or every other element."""
    kind = rng.random()
    if kind < chance and x.dim() == 3:  # as q is part of a fused projection
        whole = torch.full((x.shape[0], 2 * x.shape[1] + 1, x.shape[2]), -3).to(x.dtype)
        whole[:, 1 : 1 + x.shape[1]] = x
        return whole[:, 1 : 1 + x.shape[1]]
    if kind < 2 * chance:
        whole = torch.full((*x.shape[:-1], 2 * x.shape[-1]), -3).to(x.dtype)
        whole[..., ::2] = x
        return whole[..., ::2]
    if kind < 3 * chance and x.dim() == 3:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


def _in_layers(rng: np.random.Generator, kv: Tensor) -> Tensor:
    """The cache, now and then as one layer of a cache that holds all layers' pages side by side."""
    if rng.random() < 0.7:
        return kv
    layers = torch.zeros((kv.shape[0], 3, *kv.shape[1:])).to(kv.dtype)
    layers[:, 1] = kv
    return layers[:, 1]


@dataclass
class Expected:
    """Of every row and head: the result, the sum of |weight * value|, log-sum-exp and the largest |logit|."""

    out: np.ndarray
    scale: np.ndarray
    lse: np.ndarray
    logit: np.ndarray


def expected(call: Call, keys: list[np.ndarray] | None = None, values: list[np.ndarray] | None = None) -> Expected:
    """What the call must give, in float64; keys and values: of the cache, where they are not the call's own."""
    q = call.arguments[0].double().numpy()
    keys, values, o = keys or call.keys, values or call.values, call.options
    tokens, heads, dim = q.shape
    out, size = np.zeros((tokens, heads, dim)), np.zeros((tokens, heads, dim))
    lse, most = np.full((tokens, heads), -np.inf), np.zeros((tokens, heads))
    row = 0
    for i, (q_len, kv_len) in enumerate(call.lengths):
        for r in range(q_len):
            last = kv_len - q_len + r
            first = 0 if o["sliding_window"] is None else max(0, last - o["sliding_window"] + 1)
            for h in range(heads):
                g = h // (heads // keys[i].shape[1])
                s = keys[i][first : last + 1, g] @ q[row, h] * o["sm_scale"] * (o["k_scale"] or 1.0)
                most[row, h] = np.abs(s).max()
                if o["soft_cap"] is not None:
                    s = o["soft_cap"] * np.tanh(s / o["soft_cap"])
                sink = -np.inf if o["sinks"] is None else float(o["sinks"][h])
                top = max(s.max(), sink)
                e = np.exp(s - top)
                total = e.sum() + np.exp(sink - top)
                v = values[i][first : last + 1, g] * (o["v_scale"] or 1.0)
                out[row, h], size[row, h] = e @ v / total, e @ np.abs(v) / total
                lse[row, h] = np.log(total) + top
            row += 1
    return Expected(out, size, lse, most)


def wrong(call: Call, out: Tensor, lse: Tensor | None, want: Expected, slack: float = 1.0) -> str | None:
    """What is wrong with a result, or None. slack: by how much the limits are multiplied."""
    q = call.arguments[0]
    if out.dtype != q.dtype or out.shape != q.shape:
        return f"{out.dtype} {tuple(out.shape)} instead of {q.dtype} {tuple(q.shape)}"
    rows = sum(q_len for q_len, _ in call.lengths)
    if not bool((out[rows:] == 0).all()):
        return "padding rows are not zero"
    of_sum, of_logit = LIMITS[q.dtype]
    relative = slack * (of_sum + of_logit * want.logit)
    worst = np.abs(out.double().numpy() - want.out) / (relative[..., None] * want.scale + 1e-6 * slack)
    if not (worst <= 1).all():  # false for NaN, too
        at = np.unravel_index(np.argmax(np.nan_to_num(worst, nan=np.inf)), worst.shape)
        return f"out[{at}] is {float(out[at])}, expected {want.out[at]}: {worst[at]:.3g} times the limit"
    if lse is None:
        return None
    if not bool((lse[rows:] == -torch.inf).all()):
        return "lse of padding rows is not -inf"
    with np.errstate(invalid="ignore"):
        off = np.abs(lse.double().numpy() - want.lse) / (1e-5 + relative)
    if not (off[:rows] <= 1).all():
        at = np.unravel_index(np.argmax(np.nan_to_num(off[:rows], nan=np.inf)), off[:rows].shape)
        return f"lse[{at}] is {float(lse[at])}, expected {want.lse[at]}: {off[at]:.3g} times the limit"
    return None


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


def stored(x: Tensor, dtype: torch.dtype, scale: float | None) -> np.ndarray:
    """K or V as a cache of this dtype holds it, by numpy's arithmetic and torch's cast; float32."""
    y = x.float().numpy()
    if scale is not None:
        y = y / np.float32(scale)
    if dtype == torch.int8:
        return np.clip(np.rint(y), -128, 127).astype(np.float32)
    if dtype.itemsize == 1:
        y = np.clip(y, -float(torch.finfo(dtype).max), float(torch.finfo(dtype).max))
    return torch.from_numpy(y).to(dtype).float().numpy()


def step(call: Call) -> tuple[list[int], Tensor, list[np.ndarray], list[np.ndarray]]:
    """What an update does: the slot of every row (-1: padding), the cache afterwards, and every sequence's K and V."""
    kv, o = call.arguments[1], call.options
    slots = [-1] * call.arguments[0].shape[0]
    after = kv.clone()
    keys, values = [k.copy() for k in call.keys], [v.copy() for v in call.values]
    k, v = stored(call.new_keys, kv.dtype, o["k_scale"]), stored(call.new_values, kv.dtype, o["v_scale"])
    row = 0
    for i, (q_len, kv_len) in enumerate(call.lengths):
        for position in range(kv_len - q_len, kv_len):
            page, offset = call.tables[i][position // call.page_size], position % call.page_size
            slots[row] = page * call.page_size + offset
            at = after[page, offset] if o["kv_layout"] == "NHD" else after[page, :, offset]
            at[0::2], at[1::2] = (torch.from_numpy(x[row]).to(kv.dtype) for x in (k, v))
            keys[i][position], values[i][position] = k[row], v[row]
            row += 1
    return slots, after, keys, values
