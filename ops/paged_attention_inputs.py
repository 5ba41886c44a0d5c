"""Batches for the paged-attention operators: what `opreg check`, the tests and the benchmarks feed them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# (query tokens, cache length) per sequence: the cases that ragged paged attention on TPU is tested with (jax,
# tests/pallas/tpu_ragged_paged_attention_test.py, decode_only, mixed, prefill_only), so that figures can be compared.
DECODE16 = [
    *((1, kv) for kv in (18, 129, 597, 122, 64, 322, 463, 181)),
    *((1, kv) for kv in (1107, 123, 31, 18, 1229, 229, 87, 1328)),
]
MIXED16 = [
    *((5, 18), (1, 129), (120, 597), (1, 122), (1, 64), (32, 322), (251, 463), (1, 181)),
    *((1, 1107), (99, 123), (1, 31), (5, 18), (3, 1229), (117, 229), (1, 87), (1, 1328)),
]
PREFILL16 = [
    *((5, 18), (15, 129), (120, 597), (100, 122), (21, 64), (32, 322), (251, 463), (40, 181)),
    *((64, 1107), (99, 123), (10, 31), (5, 18), (3, 1229), (120, 229), (9, 87), (2, 1328)),
]


def split_pages(*tensors: Any, kv_layout: str = "NHD", **options: Any) -> dict[str, int]:
    """Sharding rule of a cache among ranks: the axis that holds K and V of head h at 2h and 2h+1."""
    return {"kv_pages": 2 if kv_layout == "NHD" else 1}


class Batch(NamedTuple):
    """The positional arguments of opreg::ragged_paged_attention, in order."""

    q: Tensor
    kv_pages: Tensor
    kv_lens: Tensor
    page_indices: Tensor
    cu_q_lens: Tensor
    num_seqs: Tensor


def make_batch(
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    kv_layout: str = "NHD",
    spare_rows: int = 3,
    spare_seqs: int = 2,
    spare_pages: int = 2,
    window: int | None = None,
    poison: bool = True,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Batch:
    """A batch over a shuffled page pool in which nothing that must not be read is harmless.

    lengths: (query tokens, cache length) per sequence. heads: (query heads, kv heads). spare_*: padding rows, sequences
    and pages. Padding rows of q, unused pages, the slack of last pages and, with `window`, positions that no row may
    see are NaN (127 in int8; 7 without `poison`, for comparisons that know no NaN); unused index entries are far out of
    range, so that a kernel which reads them shows.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    origin = generator.device
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    query_heads, kv_heads = heads
    page_counts = [-(-kv_len // page_size) for _, kv_len in lengths]
    pool = sum(page_counts) + spare_pages
    filler = torch.nan if poison else 7.0
    pages = torch.full((pool, page_size, 2 * kv_heads, head_dim), filler, device=origin)
    free = torch.randperm(pool, generator=generator, device=origin).tolist()
    table = torch.full((len(lengths) + spare_seqs, max(page_counts, default=0) + 1), 2**30, dtype=torch.int32)
    starts, kv_lens = [0], []
    for i, (q_len, kv_len) in enumerate(lengths):
        mine = [free.pop() for _ in range(page_counts[i])]
        first = 0 if window is None or q_len == 0 else max(0, kv_len - q_len - window + 1)
        if mine:
            content = torch.full((len(mine) * page_size, 2 * kv_heads, head_dim), filler, device=origin)
            content[:kv_len] = torch.randn(
                kv_len, 2 * kv_heads, head_dim, generator=generator, device=origin, dtype=torch.float32
            )
            content[:first] = filler
            pages[mine] = content.view(len(mine), page_size, 2 * kv_heads, head_dim)
            table[i, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
            table[i, : first // page_size] = -7  # evicted pages
        starts.append(starts[-1] + q_len)
        kv_lens.append(kv_len)
    if kv_dtype == torch.int8:
        pages = torch.nan_to_num(pages * 32, nan=127.0).round().clamp(-128, 127)
    kv_pages = pages.to(kv_dtype)
    if kv_layout == "HND":
        kv_pages = kv_pages.transpose(1, 2).contiguous()
    q = torch.randn(
        starts[-1] + spare_rows, query_heads, head_dim, generator=generator, device=origin, dtype=torch.float32
    )
    q[starts[-1] :] = filler
    return Batch(
        q.to(device=device, dtype=dtype),
        kv_pages.to(device),
        torch.tensor(kv_lens + [-5] * spare_seqs, dtype=torch.int32, device=device),
        table.to(device),
        torch.tensor(starts + [-9] * spare_seqs, dtype=torch.int32, device=device),
        torch.tensor([len(lengths)], dtype=torch.int32, device=device),
    )
