"""The step's keys and values land in their slots and nowhere else, and the attention that follows sees them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from opreg.kernels.pallas.rpa import ragged_paged_attention
from opreg.kernels.pallas.rpa_blocks import Blocks
from opreg.kernels.pallas.rpa_update import quantise, ragged_paged_attention_update, write_step

# (query rows, cached tokens): one token, a run over pages and the block's end, none, one that fills a page exactly,
# the first.
SEQUENCES = [(1, 18), (37, 60), (0, 5), (16, 32), (1, 1)]


def make_step(layout, kv_dtype, page_size=16, heads=(4, 2), head_dim=128, seed=0):
    rng = np.random.default_rng(seed)
    query_heads, kv_heads = heads
    kv_dtype = jnp.dtype(kv_dtype)
    tokens = sum(n for n, _ in SEQUENCES) + 3
    width = max(-(-n // page_size) for _, n in SEQUENCES)
    pages = sum(-(-n // page_size) for _, n in SEQUENCES) + 1
    order = iter(rng.permutation(pages))
    table = np.full((len(SEQUENCES), width), 10**6, np.int32)
    for i, (_, n) in enumerate(SEQUENCES):
        for j in range(-(-n // page_size)):
            table[i, j] = next(order)
    dims = (page_size, 2 * kv_heads) if layout == "NHD" else (2 * kv_heads, page_size)
    q, k, v = (
        jnp.asarray(rng.standard_normal((tokens, n, head_dim)), jnp.bfloat16) for n in (query_heads, kv_heads, kv_heads)
    )
    cache = jnp.asarray(rng.standard_normal((pages, *dims, head_dim)) * 20).astype(kv_dtype)
    lengths = np.array([n for _, n in SEQUENCES], np.int32)
    starts = np.cumsum([0, *(n for n, _ in SEQUENCES)]).astype(np.int32)
    return q, k, v, cache, *(jnp.asarray(a) for a in (lengths, table, starts, np.array([len(SEQUENCES)], np.int32)))


def expected_cache(step, layout, page_size, k_scale, v_scale):
    """The cache after the step, one token after another."""
    _, k, v, cache, _, table, starts, _ = step
    k, v = quantise(k, cache.dtype, k_scale), quantise(v, cache.dtype, v_scale)
    for i, (rows, length) in enumerate(SEQUENCES):
        for r in range(rows):
            page, offset = divmod(length - rows + r, page_size)
            token = int(starts[i]) + r
            new = jnp.stack([k[token], v[token]], axis=1).reshape(-1, k.shape[-1])
            at = (int(table[i, page]), offset) if layout == "NHD" else (int(table[i, page]), slice(None), offset)
            cache = cache.at[at].set(new)
    return cache


def bits(x):
    return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize(("layout", "kv_dtype"), [("NHD", "bfloat16"), ("HND", "bfloat16"), ("HND", "int8")])
def test_the_cache_is_exactly_what_it_should_be(layout, kv_dtype):
    scale = 1 / 40 if kv_dtype == "int8" else None
    page_size = 32 if kv_dtype == "int8" else 16
    step = make_step(layout, kv_dtype, page_size)
    write = functools.partial(
        write_step,
        kv_layout=layout,
        k_scale=scale,
        v_scale=scale,
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    got = jax.jit(write)(*step)
    assert not interpret_pallas_call.races.races_found
    np.testing.assert_array_equal(bits(got), bits(expected_cache(step, layout, page_size, scale, scale)))


@pytest.mark.slow
def test_the_step_attends_to_what_it_wrote():
    """The same bits as writing first and attending then."""
    step = make_step("NHD", "float8_e4m3fn", heads=(2, 2))
    q, rest = step[0], step[4:]
    options = {
        "sm_scale": 0.1,
        "k_scale": 0.5,
        "v_scale": 0.5,
        "kv_layout": "NHD",
        "blocks": Blocks(32, 32, 32, 32),
        "interpret": pltpu.InterpretParams(),
    }
    out, cache = jax.jit(functools.partial(ragged_paged_attention_update, **options))(*step)
    wanted = expected_cache(step, "NHD", 16, 0.5, 0.5)
    np.testing.assert_array_equal(bits(cache), bits(wanted))
    again = jax.jit(functools.partial(ragged_paged_attention, **options))(q, wanted, *rest)
    np.testing.assert_array_equal(bits(out), bits(again))


def test_quantise_saturates_and_rounds_to_even():
    values = jnp.asarray([1e6, -1e6, 0.5, 1.5, 2.5, -0.5])
    np.testing.assert_array_equal(quantise(values, jnp.int8, None), [127, -128, 0, 2, 2, 0])
    assert quantise(values, jnp.float8_e4m3fn, None).astype(jnp.float32)[:2].tolist() == [448.0, -448.0]
    assert quantise(values, jnp.float8_e5m2, 2.0).astype(jnp.float32)[:2].tolist() == [57344.0, -57344.0]


def test_quantise_divides_when_compiled():
    """-0.375 / 0.03 is -12.5 in float32; times the reciprocal it is a little more, and rounds to -13."""
    every = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    values = every[np.abs(every.astype(np.float32)) < 4]
    wanted = np.clip(np.rint(values.astype(np.float32) / np.float32(0.03)), -128, 127).astype(np.int8)
    made = jax.jit(lambda x: quantise(x, jnp.int8, 0.03))(values)
    np.testing.assert_array_equal(made, wanted)


def test_keys_of_another_shape_are_refused():
    q, k, v, *rest = make_step("NHD", "bfloat16")
    with pytest.raises(ValueError, match=r"v is \(57, 2, 128\); 58 tokens for kv_pages"):
        write_step(q, k, v[1:], *rest)
