"""The Pallas ragged paged attention kernel in interpret mode, race detector on, against loops in float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from opreg.kernels.pallas import rpa_prefill
from opreg.kernels.pallas.rpa import ragged_paged_attention, ragged_paged_attention_lse
from opreg.kernels.pallas.rpa_blocks import Blocks
from opreg.kernels.pallas.rpa_pages import pack_words, unpack

# One tile per block and one chunk per KV block: less code to compile, which is what these tests spend their time on.
ONE_TILE = Blocks(tokens_per_block=16, tokens_per_tile=16, kv_per_block=32, kv_per_chunk=32)
TILES = Blocks(tokens_per_block=32, tokens_per_tile=16, kv_per_block=64, kv_per_chunk=32)

SINKS = np.array([0.5, -1.0, 2.0, 0.0])

FAR = 10**6  # what index arrays hold where nothing may be read


@dataclasses.dataclass
class Case:
    """A batch with NaN in every page, and part of a page, that no sequence owns."""

    q: jax.Array
    kv_pages: jax.Array
    keys: list
    values: list
    kv_lens: np.ndarray
    page_indices: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: np.ndarray
    layout: str

    def arguments(self):
        arrays = (self.kv_lens, self.page_indices, self.cu_q_lens, self.num_seqs)
        return (self.q, self.kv_pages, *(jnp.asarray(a, jnp.int32) for a in arrays))


def make_case(
    sequences,
    *,
    heads=(4, 2),
    head_dim=128,
    page_size=16,
    layout="HND",
    dtype="bfloat16",
    kv_dtype=None,
    tokens=None,
    room=None,
    width=None,
    pages=None,
    seed=0,
):
    """`sequences` is a list of (query rows, cached tokens); 5 rows, 2 sequences and 2 pages more are padding."""
    rng = np.random.default_rng(seed)
    query_heads, kv_heads = heads
    kv_dtype = jnp.dtype(dtype if kv_dtype is None else kv_dtype)
    tokens = sum(n for n, _ in sequences) + 5 if tokens is None else tokens
    room = len(sequences) + 2 if room is None else room
    width = max([-(-n // page_size) for _, n in sequences], default=1) + 1 if width is None else width
    pages = sum(-(-n // page_size) for _, n in sequences) + 2 if pages is None else pages
    q = jnp.asarray(rng.standard_normal((tokens, query_heads, head_dim)), dtype)
    cache = np.full((pages, page_size, 2 * kv_heads, head_dim), 127 if kv_dtype == jnp.int8 else math.nan, np.float32)
    page_indices = np.full((room, width), FAR, np.int32)
    free = list(rng.permutation(pages))
    keys, values = [], []
    for i, (_, n) in enumerate(sequences):
        new = rng.standard_normal((n, 2 * kv_heads, head_dim)).astype(np.float32)
        if kv_dtype == jnp.int8:
            new = np.clip(np.round(new * 30), -127, 127)
        new = np.asarray(jnp.asarray(new).astype(kv_dtype).astype(jnp.float32))
        for j in range(-(-n // page_size)):
            page = page_indices[i, j] = free.pop()
            part = new[j * page_size : (j + 1) * page_size]
            cache[page, : len(part)] = part
        keys.append(new[:, 0::2].astype(np.float64))
        values.append(new[:, 1::2].astype(np.float64))
    cu = np.full(room + 1, FAR, np.int32)
    cu[: len(sequences) + 1] = np.cumsum([0, *(n for n, _ in sequences)])
    kv_lens = np.full(room, FAR, np.int32)
    kv_lens[: len(sequences)] = [n for _, n in sequences]
    stored = jnp.asarray(cache.swapaxes(1, 2) if layout == "HND" else cache).astype(kv_dtype)
    return Case(q, stored, keys, values, kv_lens, page_indices, cu, np.array([len(sequences)]), layout)


def oracle(case, *, sm_scale=1.0, sliding_window=None, soft_cap=None, k_scale=1.0, v_scale=1.0, sinks=None):
    """One row and one head at a time, in float64."""
    q = np.asarray(case.q.astype(jnp.float32)).astype(np.float64)
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for i, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        start, end = case.cu_q_lens[i], case.cu_q_lens[i + 1]
        for token in range(start, end):
            position = len(keys) - (end - token)
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            for head in range(q.shape[1]):
                h = head * keys.shape[1] // q.shape[1]
                logits = keys[first : position + 1, h] @ q[token, head] * (sm_scale * k_scale)
                if soft_cap is not None:
                    logits = soft_cap * np.tanh(logits / soft_cap)
                if sinks is not None:
                    logits = np.append(logits, sinks[head])
                lse[token, head] = np.logaddexp.reduce(logits)
                weights = np.exp(logits - lse[token, head])[: position + 1 - first]
                out[token, head] = weights @ values[first : position + 1, h] * v_scale
    return out, lse


def kernel(layout, blocks, **options):
    """The kernel with its options bound, traced and compiled once for all batches of one shape."""
    if "sinks" in options:
        options["sinks"] = jnp.asarray(options["sinks"], jnp.float32)
    # The seed shuffles the grid: steps are declared independent, so their order may not matter.
    interpret = pltpu.InterpretParams(detect_races=True, random_seed=1)
    bound = functools.partial(
        ragged_paged_attention_lse, kv_layout=layout, blocks=blocks, interpret=interpret, **options
    )
    return jax.jit(bound)


def relative_error(actual, expected):
    """Relative root-mean-square error."""
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def check(case, run, **options):
    out, lse = (np.asarray(x.astype(jnp.float32)) for x in run(*case.arguments()))
    assert not interpret_pallas_call.races.races_found
    expected, expected_lse = oracle(case, **options)
    rows = case.cu_q_lens[len(case.keys)]
    exact = case.q.dtype == jnp.float32
    if rows:
        assert relative_error(out[:rows], expected[:rows]) < (1e-5 if exact else 1e-2)
        assert np.abs(lse[:rows] - expected_lse[:rows]).max() < (1e-4 if exact else 5e-2)
    assert (out[rows:] == 0).all()
    assert (lse[rows:] == -np.inf).all()


def check_one(sequences, blocks=ONE_TILE, options=None, **case_options):
    case = make_case(sequences, **case_options)
    options = {} if options is None else options
    check(case, kernel(case.layout, blocks, **options), **options)


BATCHES = {
    "mixed": [(1, 40), (5, 18), (0, 9), (20, 70), (1, 1), (16, 16), (1, 97)],
    "decode": [(1, n) for n in (1, 16, 17, 64, 65, 100)],
    "one prefill": [(50, 50)],
    "whole pages": [(16, 64), (32, 96)],
    "nothing": [],
}


def check_batches(layout, **options):
    """Lengths are data: one executable serves any mix, with several tiles, products and chunks."""
    shape = {"tokens": 64, "room": 9, "width": 8, "pages": 24, "layout": layout, **options}
    run = kernel(layout, TILES, sm_scale=0.1)
    for seed, sequences in enumerate(BATCHES.values()):
        check(make_case(sequences, **shape, seed=seed), run, sm_scale=0.1)


def test_batches_of_one_compiled_shape(monkeypatch):
    monkeypatch.setattr(rpa_prefill, "ROWS_PER_PRODUCT", 32)
    check_batches("HND", heads=(2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("heads", [(4, 2), (8, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_of_many_shapes(monkeypatch, layout, heads, dtype):
    monkeypatch.setattr(rpa_prefill, "ROWS_PER_PRODUCT", 32)
    check_batches(layout, heads=heads, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("sliding_window", [None, 5, 128])
def test_eight_bit_caches_and_windows(layout, kv_dtype, sliding_window):
    scale = 1 / 30 if kv_dtype == "int8" else 0.5
    options = {"sm_scale": 0.1, "k_scale": scale, "v_scale": scale, "sliding_window": sliding_window, "soft_cap": 50.0}
    sequences = [(1, 130), (40, 170), (16, 16)]
    check_one(sequences, blocks=TILES, options=options, layout=layout, page_size=32, kv_dtype=kv_dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "head_dim"), [("HND", 16), ("HND", 192), ("NHD", 256), ("NHD", 80)])
def test_rows_that_are_not_one_register_wide(layout, head_dim):
    options = {"sm_scale": 0.1, "sinks": SINKS[:2]}
    check_one([(1, 40), (18, 33)], options=options, layout=layout, heads=(2, 1), head_dim=head_dim)


def test_every_option_at_once_in_float32():
    """Window, cap, sinks and scales together, token-major, in float32 to 1e-5."""
    options = {
        "sm_scale": 0.2,
        "sliding_window": 21,
        "soft_cap": 3.0,
        "k_scale": 0.5,
        "v_scale": 2.0,
        "sinks": SINKS,
    }
    check_one([(1, 70), (19, 90), (3, 5)], options=options, layout="NHD", dtype="float32")


def test_token_major_bfloat16():
    check_one([(1, 40), (18, 33)], options={"sm_scale": 0.1}, layout="NHD", page_size=8)


def test_float8_cache_and_heads_that_fill_no_register():
    options = {"sm_scale": 0.1, "k_scale": 0.5, "v_scale": 0.25}
    check_one([(1, 40), (3, 33)], options=options, heads=(3, 1), head_dim=64, page_size=32, kv_dtype="float8_e4m3fn")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "bfloat16"])
def test_values_come_out_of_their_words(dtype):
    """Every finite bit pattern, subnormals included, at every place of a 32-bit word."""
    kind = jnp.dtype(dtype)
    count = 4 // kind.itemsize
    bits = np.arange(2 ** (8 * kind.itemsize), dtype=np.uint16 if count == 2 else np.uint8)
    values = bits.view(kind).astype(np.float32)
    if kind != jnp.int8:
        values = values[np.isfinite(values)]
    stored = values.astype(kind)
    rows = jnp.asarray(stored[: stored.size // count * count].reshape(1, count, -1))
    words = pack_words(rows)[0]
    for place in range(count):
        expected = np.asarray(rows[0, place].astype(jnp.float32))
        np.testing.assert_array_equal(np.asarray(unpack(words[0], place, kind, jnp.float32)), expected)


def test_positions_past_32768():
    """Positions do not fit 16 bits, and only the window's pages are read: the others are NaN, their numbers wild."""
    options = {"sm_scale": 0.1, "sliding_window": 40}
    case = make_case([(1, 33_000), (3, 32_770)], heads=(2, 1), page_size=128, pages=520)
    seen = np.zeros(case.kv_pages.shape[0], bool)
    for row, (length, queries) in enumerate(((33_000, 1), (32_770, 3))):
        first = (length - queries - 39) // 128
        seen[case.page_indices[row, first : -(-length // 128)]] = True
        case.page_indices[row, :first] = FAR
    case.kv_pages = jnp.where(seen[:, None, None, None], case.kv_pages, jnp.nan)
    check(case, kernel("HND", dataclasses.replace(ONE_TILE, kv_per_block=128, kv_per_chunk=128), **options), **options)


def test_the_race_detector_is_awake():
    """A copy that nobody waits for is seen; without this, "no race" above would mean nothing."""

    def body(x, out, buffer, semaphore):
        copy = pltpu.make_async_copy(x, buffer, semaphore)
        copy.start()
        out[...] = buffer[...]
        copy.wait()

    call = pl.pallas_call(
        body,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager"),
    )
    jax.block_until_ready(call(jnp.ones((8, 128))))
    assert interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_layout": "HDN"}, "kv_layout is 'HDN'"),
        ({"q": jnp.zeros((4, 4, 128), jnp.float16)}, "q is float16, in which a TPU does not compute"),
        ({"q": jnp.zeros((4, 4, 64), jnp.bfloat16)}, "q has head_dim 64 but kv_pages has 128"),
        ({"q": jnp.zeros((4, 3, 128), jnp.bfloat16)}, "q has 3 heads and kv_pages 2"),
        ({"kv_pages": jnp.zeros((4, 4, 8, 128), jnp.bfloat16)}, "a multiple of 16 tokens"),
        ({"kv_pages": jnp.zeros((4, 3, 16, 128), jnp.bfloat16)}, "has 3 combined heads"),
        ({"kv_pages": jnp.zeros((4, 16, 2, 128), jnp.int8), "kv_layout": "NHD"}, "must be a multiple of 4"),
        (
            {
                "q": jnp.zeros((4, 4, 192), jnp.bfloat16),
                "kv_pages": jnp.zeros((4, 16, 4, 192), jnp.bfloat16),
                "kv_layout": "NHD",
            },
            "above 128 it must be a multiple of 128",
        ),
        ({"kv_lens": jnp.zeros((3,), jnp.int32)}, "cu_q_lens (4,)"),
        ({"kv_lens": jnp.zeros((2,), jnp.float32)}, "kv_lens is float32"),
        ({"sinks": jnp.zeros((2,))}, "sinks is (2,)"),
        ({"page_indices": jnp.zeros((2, 2**17), jnp.int32)}, "bytes of scalar memory"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"mask_value": -1.0}, "mask_value is -1.0"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0"),
        ({"sm_scale": math.inf}, "sm_scale is inf"),
        ({"blocks": Blocks(24, 16, 64, 64)}, "blocks.tokens_per_block is 24"),
    ],
)
def test_what_cannot_be_taken_is_refused(change, message):
    arguments = {
        "q": jnp.zeros((4, 4, 128), jnp.bfloat16),
        "kv_pages": jnp.zeros((4, 4, 16, 128), jnp.bfloat16),
        "kv_lens": jnp.zeros((2,), jnp.int32),
        "page_indices": jnp.zeros((2, 3), jnp.int32),
        "cu_q_lens": jnp.zeros((3,), jnp.int32),
        "num_seqs": jnp.zeros((1,), jnp.int32),
        "kv_layout": "HND",
    }
    with pytest.raises(ValueError, match=r"ragged_paged_attention \(pallas\)") as caught:
        ragged_paged_attention(**{**arguments, **change})
    assert message in str(caught.value)


def test_no_rows_at_all():
    case = make_case([], tokens=0)
    assert ragged_paged_attention(*case.arguments(), kv_layout="HND").shape == (0, 4, 128)
