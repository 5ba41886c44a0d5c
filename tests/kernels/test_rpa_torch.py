"""The vectorised kernel against the loop-written truth in float64, over everything the operator offers."""

import pytest
import torch
from opreg.kernels.cpu import rpa_torch
from opreg.kernels.reference import paged_attention as reference
from opreg.ops.paged_attention_inputs import Batch, make_batch

LENGTHS = [(5, 18), (1, 29), (20, 59), (1, 22), (0, 7), (0, 0), (3, 3), (1, 8), (33, 33), (1, 1), (1, 64)]
HALF = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).pow(2).mean().sqrt() / want.double().pow(2).mean().sqrt())


def compare(batch: Batch, limit: float, **options) -> None:
    tokens = int(batch.cu_q_lens[batch.num_seqs[0]])
    want, want_lse = reference.attend("test", *batch, **options, compute_dtype=torch.float64)
    got, lse = rpa_torch.rpa_torch_lse(*batch, **options)
    assert got.dtype == batch.q.dtype
    assert lse.dtype == torch.float32
    assert relative_rms(got, want) <= limit
    assert (got[tokens:] == 0).all()
    assert (lse[tokens:] == -torch.inf).all()
    torch.testing.assert_close(lse[:tokens].double(), want_lse[:tokens], atol=1e-5, rtol=1e-5)
    assert torch.equal(rpa_torch.rpa_torch(*batch, **options), got)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("window", [None, 1, 4, 5])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_options(kv_layout, window, soft_cap, with_sinks):
    sinks = torch.linspace(-1, 2, 4) if with_sinks else None
    batch = make_batch(LENGTHS, kv_layout=kv_layout, window=window)
    compare(batch, 1e-6, sm_scale=0.25, kv_layout=kv_layout, sliding_window=window, soft_cap=soft_cap, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kv_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
)
def test_dtypes(dtype, kv_dtype):
    batch = make_batch(LENGTHS, dtype=dtype, kv_dtype=kv_dtype)
    compare(batch, HALF[dtype], sm_scale=0.25, k_scale=0.5, v_scale=0.125)


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size"), [((1, 1), 3, 1), ((6, 2), 80, 16), ((5, 1), 7, 8), ((3, 3), 64, 5)]
)
def test_sizes(heads, head_dim, page_size):
    compare(make_batch(LENGTHS, heads=heads, head_dim=head_dim, page_size=page_size), 1e-6, sm_scale=head_dim**-0.5)


def test_long_prompts_are_cut_into_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(rpa_torch, "SCORES_AT_ONCE", 1 << 10)
    compare(make_batch(LENGTHS, window=9), 1e-6, sm_scale=0.25, sliding_window=9)


def test_no_sequence_and_no_row():
    for batch in (make_batch([]), make_batch([(0, 4), (0, 0)])):
        out, lse = rpa_torch.rpa_torch_lse(*batch)
        assert out.shape == batch.q.shape
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("kernels", [reference, rpa_torch])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    "kv_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
)
def test_update_writes_its_slots_and_nothing_else(kernels, kv_layout, kv_dtype):
    generator = torch.Generator().manual_seed(1)
    k, v = (200 * torch.randn(6, 2, 8, generator=generator) for _ in range(2))
    pages = torch.zeros(3, 4, 4, 8, dtype=kv_dtype)
    cache = pages.clone() if kv_layout == "NHD" else pages.transpose(1, 2).contiguous()
    slots = torch.tensor([11, -1, 0, 5, 4, -1])
    kernels.kv_cache_update(k, v, cache, slots, kv_layout=kv_layout, k_scale=2.0, v_scale=0.25)
    largest = 127 if kv_dtype == torch.int8 else torch.finfo(kv_dtype).max
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for place, new, scale in ((0, k, 2.0), (1, v, 0.25)):
                scaled = (new[token] / scale).clamp(-largest - (kv_dtype == torch.int8), largest)
                pages[slot // 4, slot % 4, place::2] = (scaled.round() if kv_dtype == torch.int8 else scaled).to(
                    kv_dtype
                )
    want = pages if kv_layout == "NHD" else pages.transpose(1, 2)
    assert torch.equal(cache.float(), want.float())


def test_update_copies_bits_where_dtypes_agree():
    k, v = torch.randn(2, 2, 8), torch.full((2, 2, 8), torch.inf)
    cache = torch.zeros(1, 4, 4, 8)
    rpa_torch.kv_cache_update(k, v, cache, torch.tensor([1, 3], dtype=torch.int32))
    assert torch.equal(cache[0, [1, 3], 0::2], k)
    assert torch.equal(cache[0, [1, 3], 1::2], v)


BAD = [
    ({"sliding_window": 0}, "sliding_window is 0; it must be positive"),
    ({"soft_cap": 0.0}, "soft_cap is 0.0; it must be finite and positive"),
    ({"mask_value": -1.0}, "mask_value is -1.0"),
    ({"k_scale": 0.0}, "k_scale is 0.0"),
    ({"sm_scale": float("nan")}, "sm_scale is nan"),
    ({"kv_layout": "NDH"}, "kv_layout is 'NDH'; use 'NHD'"),
    ({"sinks": torch.zeros(3)}, r"sinks is \(3,\); it needs one value per query head, \(4,\)"),
    (
        {"kv_lens": torch.tensor([5, 99, 0, 0], dtype=torch.int32)},
        r"kv_lens\[1\] is 99, but a sequence has room for 3 pages x 4",
    ),
    (
        {"kv_lens": torch.tensor([1, 6, 0, 0], dtype=torch.int32)},
        r"sequence 0 has 2 query rows .* but kv_lens\[0\] is 1",
    ),
    ({"kv_lens": torch.tensor([5, 6, 0, 0])}, r"kv_lens is torch.int64; it must be torch.int32"),
    ({"kv_lens": torch.tensor([5, 6, 0], dtype=torch.int32)}, "page_indices has 4 rows but kv_lens has 3"),
    (
        {"cu_q_lens": torch.tensor([0, 2, 1, 0, 0], dtype=torch.int32)},
        r"cu_q_lens\[2\] is 1, less than cu_q_lens\[1\] = 2",
    ),
    ({"cu_q_lens": torch.tensor([0, 2, 7, 0, 0], dtype=torch.int32)}, r"cu_q_lens\[2\] is 7, but q has 6 rows"),
    ({"cu_q_lens": torch.tensor([1, 2, 3, 0, 0], dtype=torch.int32)}, r"cu_q_lens\[0\] is 1; it must be 0"),
    ({"num_seqs": torch.tensor([5], dtype=torch.int32)}, "num_seqs is 5, but the index tensors hold 4 sequences"),
    ({"num_seqs": torch.tensor([1, 1], dtype=torch.int32)}, "num_seqs has 2 values"),
    ({"q": torch.zeros(6, 3, 16)}, "q has 3 heads and kv_pages 2"),
    ({"q": torch.zeros(6, 4, 8)}, "q has head_dim 8 but kv_pages has 16"),
    ({"q": torch.zeros(6, 4, 16, dtype=torch.float64)}, "q is torch.float64; use one of"),
    ({"kv_pages": torch.zeros(6, 4, 3, 16)}, "has 3 combined heads"),
]


@pytest.mark.parametrize("kernel", [reference.ragged_paged_attention_lse, rpa_torch.rpa_torch_lse])
@pytest.mark.parametrize(("change", "message"), BAD)
def test_mistakes(kernel, change, message):
    arguments = make_batch([(2, 5), (1, 6)])._asdict()
    arguments.update({name: value for name, value in change.items() if name in arguments})
    options = {name: value for name, value in change.items() if name not in arguments}
    with pytest.raises(ValueError, match="opreg::ragged_paged_attention_lse: .*" + message):
        kernel(*arguments.values(), **options)


@pytest.mark.parametrize("kernel", [reference.ragged_paged_attention, rpa_torch.rpa_torch])
def test_page_out_of_range(kernel):
    batch = make_batch([(2, 5), (1, 6)])
    batch.page_indices[1, 1] = 6
    with pytest.raises(ValueError, match=r"page_indices\[1, 1\] is 6, but kv_pages has 6 pages; it must be 0 to 5"):
        kernel(*batch)


@pytest.mark.parametrize("kernels", [reference, rpa_torch])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"slot_mapping": torch.tensor([0, 8])},
            r"slot_mapping\[1\] is 8; slots are .* 0 to 7 for 2 pages of 4 tokens",
        ),
        ({"slot_mapping": torch.tensor([-2, 1])}, r"slot_mapping\[0\] is -2"),
        ({"slot_mapping": torch.tensor([0])}, r"slot_mapping is \(1,\); it needs one slot per token"),
        ({"slot_mapping": torch.tensor([0.0, 1.0])}, "slot_mapping is torch.float32; use torch.int32 or torch.int64"),
        ({"k": torch.zeros(2, 1, 8)}, r"k is \(2, 1, 8\); .* needs \(tokens, 2, 8\)"),
        ({"v": torch.zeros(3, 2, 8)}, "k has 2 tokens but v has 3"),
        ({"kv_pages": torch.zeros(2, 4, 4, 8, dtype=torch.int32)}, "kv_pages is torch.int32; use one of"),
    ],
)
def test_update_mistakes(kernels, change, message):
    arguments = {"k": torch.zeros(2, 2, 8), "v": torch.zeros(2, 2, 8), "kv_pages": torch.zeros(2, 4, 4, 8)}
    arguments |= {"slot_mapping": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError, match="opreg::kv_cache_update: .*" + message):
        kernels.kv_cache_update(*arguments.values())
