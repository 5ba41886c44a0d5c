"""Ragged paged attention in jax.numpy against the torch kernel, and which of the two a lowered graph holds."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from opreg.kernels.pallas import rpa_xla
from opreg.kernels.pallas.rpa_blocks import ANY_CHIP, attached_chip
from opreg.kernels.pallas.rpa_why_not import why_not
from opreg.ops import kv_cache_update, ragged_paged_attention_lse, ragged_paged_attention_update
from opreg.ops.paged_attention_inputs import make_batch

import opreg

# More rows than a tile has and more positions than a block, one of each, a sequence without rows, a page exactly.
LENGTHS = [(5, 18), (1, 300), (0, 9), (37, 530), (1, 1), (16, 16)]

CASES = {
    "plain": {},
    "every option": {
        "kv_layout": "HND",
        "sliding_window": 40,
        "soft_cap": 5.0,
        "sinks": torch.linspace(-1.0, 2.0, 4),
        "mask_value": -1e9,
    },
    "int8": {"kv_dtype": torch.int8, "k_scale": 0.03, "v_scale": 0.05, "sliding_window": 1 << 40},
    "float8": {"kv_dtype": torch.float8_e4m3fn, "kv_layout": "HND", "k_scale": 0.5, "v_scale": 2.0},
    "bfloat16": {"dtype": torch.bfloat16, "sliding_window": 300, "heads": (6, 2), "head_dim": 24},
    "float16, large pages": {"dtype": torch.float16, "page_size": 320, "heads": (3, 3)},
}
SLOW = ["float8", "bfloat16", "float16, large pages"]
SHAPES = ("dtype", "kv_dtype", "heads", "head_dim", "page_size")


def make_call(name, *, poison=True):
    """Arguments and options of a case, with NaN wherever nothing may be read."""
    case = {"page_size": 16, **CASES[name]}
    shapes = {key: case.pop(key) for key in SHAPES if key in case}
    layout, window = case.get("kv_layout", "NHD"), case.get("sliding_window")
    batch = make_batch(LENGTHS, kv_layout=layout, window=window, poison=poison, **shapes)
    return batch, {"sm_scale": batch.q.shape[2] ** -0.5, **case}


def relative_rms(got, want):
    got, want = got.double(), want.double()
    return float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt())


LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
def test_attention(name):
    batch, options = make_call(name)
    out, lse = opreg.call_jax(rpa_xla.rpa_plain_lse, batch, options)
    with opreg.use_kernel(ragged_paged_attention_lse.name, "cpu/rpa_torch_lse"):
        want, want_lse = ragged_paged_attention_lse(*batch, **options)
    rows = sum(rows for rows, _ in LENGTHS)
    assert out.dtype is batch.q.dtype
    assert relative_rms(out[:rows], want[:rows]) < LIMITS[out.dtype]
    torch.testing.assert_close(lse[:rows], want_lse[:rows], rtol=1e-5, atol=1e-5)
    assert (out[rows:] == 0).all()
    assert (lse[rows:] == -torch.inf).all()


@pytest.mark.parametrize("name", ["plain", pytest.param("int8", marks=pytest.mark.slow)])
def test_update(name):
    batch, options = make_call(name, poison=False)
    heads = batch.kv_pages.shape[2] // 2
    k, v = torch.randn(2, batch.q.shape[0], heads, batch.q.shape[2])
    arguments = (batch.q, k, v, *batch[1:])
    pages, out = opreg.call_jax(rpa_xla.rpa_plain_update, arguments, options)
    with opreg.use_kernel(ragged_paged_attention_update.name, "cpu/rpa_torch_update"):
        want = ragged_paged_attention_update(*arguments, **options)  # writes batch.kv_pages
    assert torch.equal(pages, batch.kv_pages)
    assert relative_rms(out, want) < LIMITS[out.dtype]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_slots(layout):
    call = dict(zip("k v".split(), torch.randn(2, 7, 2, 16), strict=True))
    pages = torch.randn(6, 4, 4, 16)  # page_size and 2*heads are both 4
    slots = torch.tensor([11, -1, 0, 5, 4, -1, 23])
    got = opreg.call_jax(rpa_xla.kv_cache_update, (*call.values(), pages, slots), {"kv_layout": layout})
    with opreg.use_kernel(kv_cache_update.name, "reference"):
        kv_cache_update(**call, kv_pages=pages, slot_mapping=slots, kv_layout=layout)
    assert torch.equal(got, pages)


def empty_call(tokens, room, pages):
    shapes = [(tokens, 4, 16), (pages, 4, 4, 16)], [(room,), (room, 3), (room + 1,), (1,)]
    return [jnp.zeros(s) for s in shapes[0]] + [jnp.zeros(s, jnp.int32) for s in shapes[1]]


@pytest.mark.parametrize(("tokens", "room", "pages"), [(0, 2, 3), (5, 0, 3), (5, 2, 0)])
def test_nothing_to_do(tokens, room, pages):
    out, lse = rpa_xla.rpa_plain_lse(*empty_call(tokens, room, pages))
    assert out.shape == (tokens, 4, 16)
    assert (out == 0).all()
    assert (lse == -jnp.inf).all()


def lowered(fn, platform, **options):
    """The graph of one call of the Llama kind."""
    shapes = [((64, 8, 128), jnp.bfloat16), ((16, 32, 4, 128), jnp.bfloat16)]
    shapes += [(shape, jnp.int32) for shape in ((4,), (4, 4), (5,), (1,))]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(functools.partial(fn, **options)).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_of_the_graph_chooses():
    assert "tpu_custom_call" in lowered(rpa_xla.rpa, "tpu")
    assert "tpu_custom_call" not in lowered(rpa_xla.rpa, "cpu")
    assert "tpu_custom_call" not in lowered(rpa_xla.rpa_plain, "tpu")


def test_what_the_tpu_kernel_refuses_is_said():
    batch, _ = make_call("plain")
    assert why_not(*batch) is None
    assert "page_size 16 with HND pages of int8" in why_not(
        batch.q, batch.kv_pages.transpose(1, 2).to(torch.int8), *batch[2:], kv_layout="HND"
    )
    assert "q is float16, in which a TPU does not compute" in why_not(batch.q.half(), *batch[1:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"soft_cap": -1.0}, "soft_cap is -1.0; it must be finite and positive"),
        ({"kv_layout": "DNH"}, "kv_layout is 'DNH'; use 'NHD' or 'HND'"),
        ({"sinks": jnp.zeros(3)}, r"sinks is \(3,\); it needs one value per query head, \(4,\)"),
    ],
)
def test_mistakes_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        rpa_xla.rpa_plain(*empty_call(5, 2, 3), **change)


def test_the_chip_on_the_bus(tmp_path: Path):
    assert attached_chip(tmp_path) == ANY_CHIP
    for slot, (vendor, device) in enumerate([("0x8086", "0x006f"), ("0x1ae0", "0x0001"), ("0x1ae0", "0x0063")]):
        folder = tmp_path / str(slot)
        folder.mkdir()
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")
    assert attached_chip(tmp_path) == "v5e"
