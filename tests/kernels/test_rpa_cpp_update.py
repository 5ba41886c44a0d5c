"""Cache writes in C++, alone and fused with attention: bit for bit what torch's casts write, and nothing else."""

import pytest
import torch
from opreg.kernels.cpu import rpa_torch
from opreg.kernels.cpu.rpa_cpp_update import rpa_cpp_fused, rpa_cpp_write
from opreg.kernels.reference import paged_attention as reference
from opreg.ops.paged_attention_inputs import make_batch

KV_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("scales", [(None, None), (0.37, 3.0)])
def test_every_magnitude_is_rounded_as_torch_does(
    dtype: torch.dtype, kv_dtype: torch.dtype, scales: tuple[float | None, float | None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    # From below the smallest subnormal of e4m3fn to beyond the largest half, ties between neighbours included.
    exponent = torch.randint(-30, 20, (512, 2, 16), generator=generator)
    mantissa = torch.randint(256, 512, (512, 2, 16), generator=generator) / 256
    k = (mantissa * 2.0**exponent * torch.where(exponent % 2 == 0, 1, -1)).to(dtype)
    k[0, 0, :2] = torch.tensor([0.0, -0.0])
    v = k.flip(0)
    for kv_layout, shape in (("NHD", (64, 8, 4, 16)), ("HND", (64, 4, 8, 16))):
        want, got = torch.zeros(shape, dtype=kv_dtype), torch.zeros(shape, dtype=kv_dtype)
        slots = torch.randperm(512, generator=generator)
        options = {"kv_layout": kv_layout, "k_scale": scales[0], "v_scale": scales[1]}
        rpa_torch.kv_cache_update(k, v, want, slots, **options)
        rpa_cpp_write(k, v, got, slots, **options)
        assert torch.equal(bits(got), bits(want))


def test_rows_without_a_slot_are_skipped_and_strides_are_followed() -> None:
    wide = torch.randn(7, 2, 2, 8)
    stored = torch.zeros(3, 2, 4, 4, 8)
    slots = torch.tensor([11, -1, 0, 5, 4, -1, 2], dtype=torch.int32)
    want = stored.clone()
    rpa_cpp_write(wide[:, 0], wide[:, 1, :, :].half(), stored[:, 1], slots)
    reference.kv_cache_update(wide[:, 0], wide[:, 1].half(), want[:, 1], slots)
    assert torch.equal(stored, want)
    rpa_cpp_write(wide[:0, 0], wide[:0, 1], stored[:, 1], slots[:0])
    assert torch.equal(stored, want)


def test_a_slot_out_of_range_writes_nothing() -> None:
    cache = torch.zeros(2, 4, 4, 8)
    for slots, message in (([0, 8], r"slot_mapping\[1\] is 8"), ([0, -2], r"slot_mapping\[1\] is -2")):
        with pytest.raises(ValueError, match=r"opreg::kv_cache_update: " + message):
            rpa_cpp_write(torch.ones(2, 2, 8), torch.ones(2, 2, 8), cache, torch.tensor(slots))
    with pytest.raises(ValueError, match=r"slot_mapping is torch\.float32"):
        rpa_cpp_write(torch.ones(2, 2, 8), torch.ones(2, 2, 8), cache, torch.zeros(2))
    assert (cache == 0).all()


@pytest.mark.parametrize("fused", [reference.ragged_paged_attention_update, rpa_torch.rpa_torch_update, rpa_cpp_fused])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("window", [None, 5])
def test_fused_is_write_then_attend(fused, kv_layout: str, kv_dtype: torch.dtype, window: int | None) -> None:
    lengths = [(5, 18), (1, 29), (0, 9), (20, 40), (3, 3), (1, 4)]
    batch = make_batch(lengths, kv_dtype=kv_dtype, kv_layout=kv_layout, window=window)
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(batch.q.shape[0], 2, 16, generator=generator) for _ in range(2))
    k[30:] = v[30:] = torch.nan  # padding
    slots = torch.full((batch.q.shape[0],), -1)
    for i, (q_len, kv_len) in enumerate(lengths):
        for r in range(q_len):
            position = kv_len - q_len + r
            slots[int(batch.cu_q_lens[i]) + r] = batch.page_indices[i, position // 4] * 4 + position % 4
    options = {"kv_layout": kv_layout, "k_scale": 0.05, "v_scale": 0.1}
    want = batch.kv_pages.clone()
    reference.kv_cache_update(k, v, want, slots, **options)
    options |= {"sm_scale": 0.25, "sliding_window": window, "soft_cap": 4.0}
    attended = reference.ragged_paged_attention(*batch._replace(kv_pages=want), **options)
    out = fused(batch.q, k, v, *batch[1:], **options)
    assert torch.equal(bits(batch.kv_pages), bits(want))
    torch.testing.assert_close(out, attended, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [reference.ragged_paged_attention_update, rpa_torch.rpa_torch_update, rpa_cpp_fused])
def test_fused_refuses_before_it_writes(fused) -> None:
    batch = make_batch([(5, 18), (1, 29)], poison=False)
    before = batch.kv_pages.clone()
    k = torch.ones(batch.q.shape[0], 2, 16)
    with pytest.raises(ValueError, match=r"opreg::ragged_paged_attention_update: k has 8 tokens but q has 9"):
        fused(batch.q, k[1:], k[1:], *batch[1:])
    with pytest.raises(ValueError, match=r"opreg::ragged_paged_attention_update: kv_lens\[1\] is 99"):
        fused(batch.q, k, k, *batch._replace(kv_lens=torch.tensor([18, 99, 0, 0], dtype=torch.int32))[1:])
    with pytest.raises(ValueError, match=r"opreg::ragged_paged_attention_update: soft_cap is 0\.0"):
        fused(batch.q, k, k, *batch[1:], soft_cap=0.0)
    assert torch.equal(batch.kv_pages, before)
