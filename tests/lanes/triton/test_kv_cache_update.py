"""The Triton cache update, alone and before attention, in the interpreter: caches equal the reference's bit for bit."""

from dataclasses import replace

import pytest
import torch
import triton
from opreg.kernels.reference import paged_attention as reference
from opreg.kernels.triton import kv_cache_update as triton_update
from opreg.kernels.triton import rpa, rpa_launch
from opreg.ops.paged_attention_inputs import make_batch
from torch import Tensor

KV_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


def new_rows(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V from far below what 8 bits hold to above it, both zeros included."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-6, 3, tokens)[:, None, None]
    k, v = ((torch.randn(tokens, heads, head_dim, generator=generator) * sizes).to(dtype) for _ in range(2))
    k[0, 0, :2] = torch.tensor([0.0, -0.0])
    # Half way between neighbours of every 8-bit type, where rounding goes to even.
    v[1, 0, :6] = torch.tensor([2.5, -3.5, 1.0625, 1.1875, 1.125, -1.375])
    if dtype == torch.bfloat16:  # the interpreter of Triton 3.7 truncates casts to bfloat16
        return k, v
    return k.bfloat16().to(dtype), v.bfloat16().to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize(("scaled", "kv_layout"), [((), "NHD"), (("k_scale",), "HND"), (("k_scale", "v_scale"), "NHD")])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_caches_are_equal(kv_dtype, scaled, kv_layout):
    # The largest rows leave the range of 8 bits, not that of 16; casts to bfloat16 truncate here.
    scale = {torch.bfloat16: 0.25, torch.float16: 0.3}.get(kv_dtype, 0.03)
    k, v = new_rows(40, 3, 24, torch.float32 if kv_layout == "NHD" else torch.float16)
    filled = (torch.arange(12 * 4 * 6 * 24) % 100).to(kv_dtype).view(12, 4, 6, 24)
    got = filled if kv_layout == "NHD" else filled.transpose(1, 2).contiguous()
    want = got.clone()
    slots = torch.randperm(48, generator=torch.Generator().manual_seed(2))[:40]
    slots[7] = -1
    options = {"kv_layout": kv_layout, **dict.fromkeys(scaled, scale)}
    triton_update.kv_cache_update(k, v, got, slots.int() if kv_layout == "NHD" else slots, **options)
    reference.kv_cache_update(k, v, want, slots, **options)
    assert torch.equal(bits(got), bits(want))


def test_many_heads_take_several_programs():
    k, v = new_rows(5, 20, 128, torch.bfloat16)
    got, want = (torch.zeros(2, 4, 40, 128, dtype=torch.bfloat16) for _ in range(2))
    slots = torch.tensor([7, 0, -1, 3, 2])
    assert triton_update.blocks(20, 128) == (16, 128, 4)
    triton_update.kv_cache_update(k, v, got, slots)
    reference.kv_cache_update(k, v, want, slots)
    assert torch.equal(bits(got), bits(want))


def test_strided_rows():
    k, v = new_rows(6, 2, 16, torch.float32)
    wide = torch.stack([k, v], 1)  # k and v as slices of one projection
    columns = torch.stack([v, v], -1)[..., 0]
    slots = torch.stack([torch.arange(6), torch.zeros(6, dtype=torch.int64)], 1)[:, 0]
    got, want = torch.zeros(2, 4, 4, 16), torch.zeros(2, 4, 4, 16)
    triton_update.kv_cache_update(wide[:, 0], columns, got, slots)
    reference.kv_cache_update(k, v, want, slots)
    assert torch.equal(got, want)


def test_no_tokens():
    cache = torch.ones(2, 4, 4, 16)
    nothing = torch.zeros(0, 2, 16)
    triton_update.kv_cache_update(nothing, nothing, cache, torch.zeros(0, dtype=torch.int64))
    assert (cache == 1).all()


def test_slots_that_are_not_there():
    """They are skipped, since looking at them would wait for the device, and stop the kernel in checked mode."""
    k, v = new_rows(3, 2, 16, torch.float32)
    cache, slots = torch.zeros(2, 4, 4, 16), torch.tensor([1, 8, -2])
    triton_update.kv_cache_update(k, v, cache, slots)
    assert cache.view(8, 4, 16).any(-1).any(-1).nonzero().flatten().tolist() == [1]
    builder = triton.runtime.interpreter.interpreter_builder
    before = builder.options
    try:
        builder.options = replace(before, debug=True)  # what TRITON_DEBUG=1 does on a GPU
        with pytest.raises(triton.runtime.errors.InterpreterError, match="a slot that kv_pages does not have"):
            triton_update.kv_cache_update(k, v, cache, slots)
    finally:
        builder.options = before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_mapping": torch.zeros(2, dtype=torch.int64)}, r"slot_mapping is \(2,\); it needs one slot per token"),
        ({"slot_mapping": torch.zeros(3)}, "slot_mapping is torch.float32"),
        ({"k": torch.zeros(3, 1, 16)}, r"k is \(3, 1, 16\)"),
        ({"v_scale": -1.0}, "v_scale is -1.0"),
    ],
)
def test_mistakes(change, message):
    arguments = {"k": torch.ones(3, 2, 16), "v": torch.ones(3, 2, 16), "kv_pages": torch.zeros(2, 4, 4, 16)}
    arguments |= {"slot_mapping": torch.arange(3), **change}
    with pytest.raises(ValueError, match="opreg::kv_cache_update: .*" + message):
        triton_update.kv_cache_update(**arguments)
    assert (arguments["kv_pages"] == 0).all()


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn, torch.int8])
def test_fused(monkeypatch, kv_dtype, kv_layout):
    """Write, then attend: the cache is the reference's bit for bit, and what was written is what is read."""
    monkeypatch.setattr(rpa_launch, "device_facts", lambda device: rpa_launch.Device(4, 227 * 1024))
    lengths = [(5, 18), (1, 29), (0, 9), (20, 40), (4, 8), (3, 3)]
    batch = make_batch(lengths, kv_dtype=kv_dtype, kv_layout=kv_layout, window=9)
    k, v = (torch.nan_to_num(x) for x in (batch.q[:, :2] * 3, batch.q[:, 2:] - 1))
    k[33:] = torch.nan  # padding is not written, though entries past num_seqs name places for it
    batch.kv_lens[6:] = 40
    batch.page_indices[6:] = 0
    options = {"sm_scale": 0.25, "kv_layout": kv_layout, "sliding_window": 9}
    if kv_dtype.itemsize == 1:
        options |= {"k_scale": 0.5, "v_scale": 0.03}
    got, want = batch.kv_pages.clone(), batch.kv_pages.clone()
    out = rpa.ragged_paged_attention_update(batch.q, k, v, got, *batch[2:], **options)
    expected = reference.ragged_paged_attention_update(batch.q, k, v, want, *batch[2:], **options)
    assert torch.equal(bits(got), bits(want))
    assert not torch.equal(bits(got), bits(batch.kv_pages))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_fused_refuses_before_it_writes():
    batch = make_batch([(2, 5)])
    k = torch.ones(batch.q.shape[0], 2, 16)
    before = batch.kv_pages.clone()
    with pytest.raises(ValueError, match=r"opreg::ragged_paged_attention_update: soft_cap is -1.0"):
        rpa.ragged_paged_attention_update(batch.q, k, k, *batch[1:], soft_cap=-1.0)
    with pytest.raises(ValueError, match="k has 4 tokens but q has 5"):
        rpa.ragged_paged_attention_update(batch.q, k[1:], k[1:], *batch[1:])
    assert torch.equal(bits(batch.kv_pages), bits(before))


def test_negative_views_are_written_as_what_they_show_and_refused_as_a_cache():
    k, v = new_rows(5, 2, 24, torch.float32)
    got, want = (torch.zeros(3, 4, 4, 24) for _ in range(2))
    slots = torch.tensor([7, 0, -1, 3, 2])
    shown = (torch._neg_view(-x) for x in (k, v))
    triton_update.kv_cache_update(*shown, got, torch._neg_view(-slots))
    reference.kv_cache_update(k, v, want, slots)
    assert torch.equal(got, want)
    assert "negative view" in str(triton_update.why_not(k, v, torch._neg_view(got), slots))
