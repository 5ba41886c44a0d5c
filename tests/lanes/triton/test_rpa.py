"""The Triton attention in the interpreter (TRITON_INTERPRET=1), against the loop-written truth in float64."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
from opreg.kernels.reference import paged_attention as reference
from opreg.kernels.reference.paged_attention_check import cache_shape
from opreg.kernels.triton import rpa, rpa_launch
from opreg.kernels.triton.rpa_launch import Device, Options, Plan, Tiles
from opreg.ops.paged_attention_inputs import DECODE16, MIXED16, PREFILL16, Batch, make_batch
from torch import Tensor

# float32 sums in another order; one rounding of weights and result to float16. tl.dot is wrong for bfloat16 in the
# interpreter of Triton 3.7, so that type is left to a GPU.
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3}
# Decode, chunked and whole prompts, no rows, no tokens, full pages of 4, a block's worth of rows.
LENGTHS = [(5, 18), (1, 61), (0, 7), (20, 44), (0, 0), (3, 3), (1, 8), (9, 32), (1, 1)]

# A split has two tiles at least: of 3 splits, the sequence of 61 tokens fills all, that of 18 fills two.
SMALL, LARGE = Tiles(16, 8, 4, 2), Tiles(32, 16, 4, 2)


def split_and_long(batch: Batch, splits: int = 3) -> list[Plan]:
    """Short sequences with their KV split, long ones in a launch of their own."""
    tokens, seqs = batch.q.shape[0], batch.kv_lens.shape[0]
    return [Plan(seqs, 8, False, 0, splits, SMALL), Plan(tokens // 16 + min(tokens, seqs) + 1, 16, True, 8, 1, LARGE)]


def all_split(batch: Batch, splits: int = 2) -> list[Plan]:
    """One launch for all sequences, with their KV split."""
    tokens, seqs = batch.q.shape[0], batch.kv_lens.shape[0]
    return [Plan(tokens // 8 + min(tokens, seqs) + 1, 8, True, 0, splits, SMALL)]


@pytest.fixture(autouse=True)
def nan_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty holds NaN, so that what nobody wrote shows; the device is small enough to be emulated."""
    monkeypatch.setattr(rpa_launch, "device_facts", lambda device: Device(4, 227 * 1024))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def compare(batch: Batch, chosen: list[Plan] | None = None, limit: float | None = None, **changed: object) -> Tensor:
    options = Options(batch.q.shape[2] ** -0.5, None, None, None, None, None, "NHD", None)._replace(**changed)
    cache = cache_shape("test", batch.kv_pages, options.kv_layout)
    out, lse = rpa_launch.launch(*batch, options, cache, True, chosen)
    want, want_lse = reference.attend("test", *batch, **options._asdict(), compute_dtype=torch.float64)
    tokens = int(batch.cu_q_lens[batch.num_seqs[0]])
    assert out.dtype == batch.q.dtype
    assert (out.double() - want).norm() <= (LIMITS[batch.q.dtype] if limit is None else limit) * want.norm()
    assert (out[tokens:] == 0).all()
    assert (lse[tokens:] == -torch.inf).all()
    torch.testing.assert_close(lse[:tokens].double(), want_lse[:tokens], atol=1e-5, rtol=1e-5)
    return out


@pytest.mark.parametrize(
    ("plan", "window", "soft_cap", "with_sinks", "kv_layout"),
    [
        (split_and_long, None, None, False, "NHD"),
        (split_and_long, None, 3.0, True, "HND"),
        (split_and_long, 1, None, True, "NHD"),
        (split_and_long, 15, None, False, "HND"),
        (split_and_long, 16, 3.0, True, "NHD"),
        (split_and_long, 17, None, False, "NHD"),
        (split_and_long, 100, None, True, "HND"),
        (all_split, None, None, False, "HND"),
        (all_split, 17, 3.0, True, "NHD"),
    ],
)
def test_options(plan, window, soft_cap, with_sinks, kv_layout):
    sinks = torch.tensor([-1.0, 0.5, -torch.inf, 2.0]) if with_sinks else None
    # Emulating a merge costs most, and there is one for every row and head of a block.
    batch = make_batch(LENGTHS[:4] if plan is all_split else LENGTHS, kv_layout=kv_layout, window=window)
    scales = {"k_scale": 2.0, "v_scale": 0.5}
    compare(batch, plan(batch), sliding_window=window, soft_cap=soft_cap, sinks=sinks, kv_layout=kv_layout, **scales)


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size"),
    [
        ((1, 1), 3, 1),
        ((5, 1), 80, 16),
        ((6, 2), 64, 5),
        ((3, 3), 128, 32),
        ((12, 2), 240, 8),
        ((8, 1), 256, 48),
        ((20, 1), 16, 64),
    ],
)
def test_sizes(heads, head_dim, page_size):
    """Groups and head dims that are no powers of two, pages smaller and larger than a tile and not a power of two."""
    lengths = [(1, 70), (2, 33), (19, 64), (1, 3)]
    compare(make_batch(lengths, heads=heads, head_dim=head_dim, page_size=page_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "kv_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
)
def test_dtypes(dtype, kv_dtype):
    batch = make_batch([(1, 20), (6, 9)], dtype=dtype, kv_dtype=kv_dtype, heads=(2, 1))
    compare(batch, k_scale=0.5, v_scale=0.125)


@pytest.mark.parametrize(
    "kv_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
)
def test_bfloat16_but_for_its_products(monkeypatch, kv_dtype):
    """All of the kernel but tl.dot in bfloat16: loads, scales, statistics, stores, with products in float32."""
    monkeypatch.setattr(rpa_launch, "dot_dtype", lambda q, kv: torch.float32)
    batch = make_batch([(1, 20), (6, 9)], dtype=torch.bfloat16, kv_dtype=kv_dtype, heads=(2, 1))
    compare(batch, k_scale=0.5, v_scale=0.125, limit=6e-3)  # the interpreter cuts the result to 8 bits, unrounded


SHRUNK = {"decode": DECODE16, "mixed": MIXED16, "prefill": PREFILL16}


@pytest.mark.parametrize("case", SHRUNK)
def test_sequences_of_the_tpu_tests(case):
    """A sixteenth of their lengths, 32/8 heads as 8/2, and the plans that a device of four cores would get."""
    lengths = [(max(1, q // 16), max(1, q // 16, kv // 16)) for q, kv in SHRUNK[case]]
    compare(make_batch(lengths, heads=(8, 2), head_dim=64, page_size=16, dtype=torch.float16))


def test_random_batches():
    """Which block is whose: lengths at random, many of them zero, padding of every size."""
    generator = torch.Generator().manual_seed(5)

    def up_to(most: int) -> int:
        return int(torch.randint(most + 1, (), generator=generator))

    for case in range(9):
        lengths = []
        for _ in range(up_to(5)):
            q_len = up_to(3) * up_to(7)
            lengths.append((q_len, q_len + up_to(20)))
        batch = make_batch(
            lengths,
            heads=(2, 1),
            spare_rows=up_to(20),
            spare_seqs=up_to(9),
            generator=torch.Generator().manual_seed(case),
        )
        if batch.q.shape[0]:
            compare(batch, (None, split_and_long(batch), all_split(batch))[case % 3])


def test_nothing_to_do():
    for batch in (make_batch([]), make_batch([(0, 4), (0, 0)]), make_batch([], spare_seqs=0)):
        out, lse = rpa.ragged_paged_attention_lse(*batch)
        assert out.shape == batch.q.shape
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
    empty = make_batch([(0, 4)], spare_rows=0)
    out, lse = rpa.ragged_paged_attention_lse(*empty)
    assert out.shape == (0, 4, 16)
    assert lse.shape == (0, 4)


def test_positions_past_32768():
    """A window at the end of a long sequence: 16-bit positions would wrap, and pages before it are not there."""
    batch = make_batch([(2, 70_000)], heads=(2, 1), page_size=64, window=40)
    compare(batch, sliding_window=40)


def test_large_logits_do_not_overflow():
    batch = make_batch([(3, 50), (20, 50)])
    compare(batch._replace(q=batch.q * 1e4), split_and_long(batch), limit=1e-5)


def test_second_run_equals_first_and_lse_changes_nothing():
    batch = make_batch(LENGTHS[:4], window=9)
    options = {"sm_scale": 0.25, "sliding_window": 9}
    first = rpa.ragged_paged_attention(*batch, **options)
    assert torch.equal(first, rpa.ragged_paged_attention(*batch, **options))
    assert torch.equal(first, rpa.ragged_paged_attention_lse(*batch, **options)[0])


def test_strided_arguments():
    batch = make_batch([(1, 20), (12, 33)])
    want = rpa.ragged_paged_attention(*batch, sm_scale=0.25)
    q = torch.stack([batch.q, batch.q], -1)[..., 0]  # elements two apart
    pages = torch.full((*batch.kv_pages.shape[:3], 20), torch.nan)[..., 4:]
    pages.copy_(batch.kv_pages)
    table = batch.page_indices.t().contiguous().t()
    lens = torch.stack([batch.kv_lens, batch.kv_lens], 1)[:, 0]
    got = rpa.ragged_paged_attention(
        q, pages, lens, table, batch.cu_q_lens.repeat_interleave(2)[::2], batch.num_seqs, sm_scale=0.25
    )
    assert torch.equal(got, want)


def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = triton.runtime.interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, debug=True))  # what TRITON_DEBUG=1 does on a GPU


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_indices": [[0, 9, 1], [3, 4, 5]]}, "a page that kv_pages does not have"),
        ({"page_indices": [[0, -1, 1], [3, 4, 5]]}, "a page that kv_pages does not have"),
        ({"kv_lens": [1, 9]}, "more query rows"),
        ({"cu_q_lens": [0, 2, 9]}, "past the rows of q"),
    ],
)
def test_wrong_values_stop_the_kernel_in_checked_mode(monkeypatch, change, message):
    good = {"page_indices": [[0, 1, 2], [3, 4, 5]], "kv_lens": [9, 9], "cu_q_lens": [0, 2, 3]}

    def call(values):
        index = {name: torch.tensor(value, dtype=torch.int32) for name, value in values.items()}
        return rpa.ragged_paged_attention(
            torch.ones(3, 2, 16), torch.ones(6, 4, 2, 16), **index, num_seqs=torch.tensor([2], dtype=torch.int32)
        )

    checked(monkeypatch)
    assert (call(good) == 1).all()
    with pytest.raises(triton.runtime.errors.InterpreterError, match=message):
        call({**good, **change})


def test_mistakes_are_refused_before_anything_is_launched():
    batch = make_batch([(2, 5), (1, 6)])
    for change, message in (
        ({"sliding_window": 0}, "sliding_window is 0; it must be positive"),
        ({"kv_layout": "NDH"}, "kv_layout is 'NDH'; use 'NHD'"),
        ({"sinks": torch.zeros(3)}, r"sinks is \(3,\)"),
        ({"mask_value": -1.0}, "mask_value is -1.0"),
    ):
        with pytest.raises(ValueError, match="opreg::ragged_paged_attention_lse: .*" + message):
            rpa.ragged_paged_attention_lse(*batch, **change)
    with pytest.raises(ValueError, match=r"kv_lens is torch.int64; it must be torch.int32"):
        rpa.ragged_paged_attention(*batch._replace(kv_lens=batch.kv_lens.long()))


def test_mask_value_has_no_effect():
    batch = make_batch([(1, 9), (4, 4)])
    plain = rpa.ragged_paged_attention(*batch, sm_scale=0.25)
    assert torch.equal(plain, rpa.ragged_paged_attention(*batch, sm_scale=0.25, mask_value=-1e4))


def test_negative_views_are_read_as_what_they_show():
    batch = make_batch([(5, 18), (1, 29), (2, 2)], head_dim=16, poison=False)
    sinks = torch.linspace(-1.0, 1.0, batch.q.shape[1])
    want = rpa.ragged_paged_attention(**batch._asdict(), sm_scale=0.25, sinks=sinks)
    shown = {name: x if name == "kv_pages" else torch._neg_view(-x) for name, x in batch._asdict().items()}
    assert torch.equal(rpa.ragged_paged_attention(**shown, sm_scale=0.25, sinks=torch._neg_view(-sinks)), want)
    assert "negative view" in str(rpa.why_not(**{**batch._asdict(), "kv_pages": torch._neg_view(batch.kv_pages)}))
