"""The C++ kernel, every instruction set this processor has, against dense attention in float64 on poisoned pages."""

from collections.abc import Iterator

import pytest
import torch
from opreg.kernels.cpu import build, rpa_cpp
from opreg.kernels.cpu.rpa_cpp import Options
from opreg.ops.paged_attention_inputs import DECODE16, MIXED16, PREFILL16, Batch, make_batch
from torch import Tensor

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LENGTHS = [(5, 18), (1, 29), (20, 59), (1, 22), (0, 7), (0, 0), (3, 3), (1, 8), (33, 33), (1, 1), (2, 300), (70, 129)]
RANKS = [rank for rank in rpa_cpp.LEVELS if rank <= rpa_cpp.level()]
# The middle instruction set differs from the best in one function only; compiling it costs ten seconds.
MARKS = [pytest.param(rank, marks=[pytest.mark.slow] if rank == 2 else [], id=rpa_cpp.LEVELS[rank]) for rank in RANKS]


@pytest.fixture(params=MARKS)
def rank(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread, unless a test asks for another number: the oracle is made of many small operations."""
    before, wanted = torch.get_num_threads(), getattr(request, "param", 1)
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)


TWO_THREADS = pytest.mark.parametrize("threads", [2], indirect=True, ids=["2threads"])


def dense(batch: Batch, options: Options) -> tuple[Tensor, Tensor]:
    """Attention as one masked softmax per sequence, in float64."""
    q, kv_pages, kv_lens, table, cu, num_seqs = batch
    if kv_pages.element_size() == 1:
        kv_pages = kv_pages.double()  # torch before 2.9 cannot index 8-bit floats
    if options.kv_layout == "HND":
        kv_pages = kv_pages.transpose(1, 2)
    size, window = kv_pages.shape[1], options.sliding_window
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for i in range(int(num_seqs)):
        start, end, kv_len = int(cu[i]), int(cu[i + 1]), int(kv_lens[i])
        if start == end:
            continue
        first = 0 if window is None else max(0, kv_len - (end - start) - window + 1)
        position = torch.arange(first, kv_len)
        kv = kv_pages[table[i, position // size].long(), position % size].double()
        k = kv[:, 0::2] * (options.k_scale or 1.0)
        v = kv[:, 1::2] * (options.v_scale or 1.0)
        group = q.shape[1] // k.shape[1]
        s = torch.einsum("thd,nhd->htn", q[start:end].double(), k.repeat_interleave(group, 1)) * options.sm_scale
        if options.soft_cap is not None:
            s = options.soft_cap * torch.tanh(s / options.soft_cap)
        row = torch.arange(kv_len - (end - start), kv_len)[:, None]
        seen = position <= row
        if window is not None:
            seen &= position > row - window
        s = s.masked_fill(~seen, -torch.inf)
        if options.sinks is not None:
            s = torch.cat([s, options.sinks.double().view(-1, 1, 1).expand(-1, end - start, 1)], -1)
        total = torch.logsumexp(s, -1)
        weights = torch.exp(s - total[..., None])[..., : len(position)]
        out[start:end] = torch.einsum("htn,nhd->thd", weights, v.repeat_interleave(group, 1))
        lse[start:end] = total.T
    return out, lse


def compare(batch: Batch, rank: int, **changed: object) -> None:
    options = Options(batch.q.shape[2] ** -0.5, None, None, None, None, None, "NHD", None)._replace(**changed)
    tokens = int(batch.cu_q_lens[batch.num_seqs[0]])
    lse = torch.empty(batch.q.shape[:2])
    got = rpa_cpp.attend("test", *batch, options, lse, use_level=rank)
    want, want_lse = dense(batch, options)
    assert got.dtype == batch.q.dtype
    assert (got.double() - want).norm() <= LIMITS[batch.q.dtype] * want.norm()
    assert (got[tokens:] == 0).all()
    assert (lse[tokens:] == -torch.inf).all()
    torch.testing.assert_close(lse[:tokens].double(), want_lse[:tokens], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("window", [None, 1, 15, 16, 17, 128])
@pytest.mark.parametrize("capped", [False, True])
def test_options(rank: int, kv_layout: str, window: int | None, capped: bool) -> None:
    soft_cap, sinks = (2.0, torch.linspace(-1, 2, 8)) if capped else (None, None)
    batch = make_batch(LENGTHS, heads=(8, 2), head_dim=32, page_size=16, kv_layout=kv_layout, window=window)
    compare(batch, rank, kv_layout=kv_layout, sliding_window=window, soft_cap=soft_cap, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kv_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
)
def test_dtypes(rank: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    # 40 is no multiple of a vector; the sums are long enough for either way of computing.
    batch = make_batch(LENGTHS, heads=(4, 2), head_dim=40, page_size=8, dtype=dtype, kv_dtype=kv_dtype)
    compare(batch, rank, k_scale=0.25, v_scale=0.125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size"),
    [
        ((1, 1), 1, 1),
        ((2, 1), 7, 3),
        ((3, 3), 64, 5),
        ((6, 2), 80, 16),
        ((5, 1), 96, 16),
        ((7, 1), 33, 4),
        ((8, 1), 128, 32),
        ((16, 1), 256, 16),
        ((12, 4), 240, 16),
        ((136, 1), 16, 8),
    ],
)
def test_sizes(rank: int, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, page_size: int) -> None:
    compare(make_batch(LENGTHS, heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype), rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [DECODE16, MIXED16, PREFILL16], ids=["decode16", "mixed16", "prefill16"])
@TWO_THREADS
def test_published_cases(dtype: torch.dtype, lengths: list[tuple[int, int]]) -> None:
    compare(make_batch(lengths, heads=(4, 1), head_dim=128, page_size=16, dtype=dtype), RANKS[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [DECODE16, MIXED16, PREFILL16], ids=["decode16", "mixed16", "prefill16"])
@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((32, 8), 128), ((32, 16), 128), ((16, 2), 128), ((12, 2), 80), ((5, 1), 240), ((3, 3), 80)],
)
@TWO_THREADS
def test_published_grid(
    dtype: torch.dtype, lengths: list[tuple[int, int]], heads: tuple[int, int], head_dim: int
) -> None:
    compare(make_batch(lengths, heads=heads, head_dim=head_dim, page_size=16, dtype=dtype), RANKS[0])


@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 16)],
        [(16, 16)],
        [(1, 64), (64, 64), (65, 128), (1, 63), (1, 65)],
        [(1, 33000), (3, 40000), (40, 33000)],
        [(1, 5000)],
        [(40, 6000)],
    ],
    ids=["page", "pages", "blocks", "past32768", "split-stream", "split-product"],
)
@pytest.mark.parametrize("window", [None, 33])
@TWO_THREADS
def test_lengths(rank: int, lengths: list[tuple[int, int]], window: int | None) -> None:
    batch = make_batch(lengths, heads=(2, 1), head_dim=16, page_size=16, window=window)
    compare(batch, rank, sliding_window=window)


def test_nothing_to_do(rank: int) -> None:
    for batch in (make_batch([]), make_batch([(0, 4), (0, 0)]), make_batch([], spare_rows=0)):
        compare(batch, rank)


def test_strides(rank: int) -> None:
    batch = make_batch(LENGTHS, heads=(4, 2), head_dim=32, page_size=8)
    rows = batch.q.shape[0]
    wide = torch.randn(rows, 3, 4, 64)
    stored = torch.full((batch.kv_pages.shape[0], 2, 8, 4, 32), torch.nan)
    stored[:, 1] = batch.kv_pages
    table = torch.full((batch.page_indices.shape[0], 2 * batch.page_indices.shape[1]), -1, dtype=torch.int32)
    table[:, ::2] = batch.page_indices
    for q in (wide[:, 1, :, :32], wide[:, 1, :, ::2]):
        compare(batch._replace(q=q, kv_pages=stored[:, 1], page_indices=table[:, ::2]), rank)


def test_large_logits_do_not_overflow(rank: int) -> None:
    compare(make_batch(LENGTHS, heads=(8, 2), head_dim=32, page_size=8), rank, sm_scale=40.0)
    compare(make_batch(LENGTHS, heads=(8, 2), head_dim=32, page_size=8), rank, sm_scale=-3.0, soft_cap=30.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_seqs", [3], "num_seqs is 3, but the index tensors hold 2"),
        ("cu_q_lens", [0, 2, 9], r"cu_q_lens\[2\] is 9, but q has 6 rows"),
        ("cu_q_lens", [0, 2, 1], r"cu_q_lens\[2\] is 1, less than"),
        ("kv_lens", [5, 99], r"kv_lens\[1\] is 99, but a sequence has room for 3 pages x 4"),
        ("kv_lens", [1, 6], "sequence 0 has 2 query rows"),
        ("page_indices", [[0, 1, 0], [2, 6, 0]], r"page_indices\[1, 1\] is 6, but kv_pages has 6 pages"),
    ],
)
def test_mistakes(name: str, value: list[int], message: str) -> None:
    batch = make_batch([(2, 5), (1, 6)], spare_seqs=0)._replace(**{name: torch.tensor(value, dtype=torch.int32)})
    with pytest.raises(ValueError, match="opreg::ragged_paged_attention: " + message):
        rpa_cpp.rpa_cpp(*batch)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([(2, 5)])
    assert rpa_cpp.why_not(*batch) is None
    split = batch._replace(kv_pages=batch.kv_pages.repeat_interleave(2, 3)[..., ::2])
    assert rpa_cpp.why_not(*split) == "the last dimension of kv_pages is not contiguous (stride 2)"
    monkeypatch.setenv("OPREG_NO_BUILD", "1")
    monkeypatch.setattr(rpa_cpp, "_libraries", {})  # what is loaded needs no building
    assert "OPREG_NO_BUILD" in (rpa_cpp.why_not(*batch) or "")
    monkeypatch.setattr(build, "X86", False)
    assert "x86-64" in (rpa_cpp.why_not(*batch) or "")
