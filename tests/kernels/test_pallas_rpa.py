"""The Pallas ragged paged attention kernel in interpret mode, race detector on, against loops in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from opreg.kernels.pallas.rpa import ragged_paged_attention, ragged_paged_attention_lse
from opreg.kernels.pallas.rpa_blocks import Blocks

SMALL = Blocks(tokens_per_block=32, tokens_per_tile=16, kv_per_block=64, kv_per_chunk=32)


@dataclasses.dataclass
class Case:
    """A batch with NaN in every page, and part of a page, that no sequence owns."""

    q: np.ndarray
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
    dtype=jnp.bfloat16,
    kv_dtype=None,
    pad=(5, 2),
    seed=0,
):
    """`sequences` is a list of (query rows, cached tokens); `pad` adds rows and sequences that are not in use."""
    rng = np.random.default_rng(seed)
    query_heads, kv_heads = heads
    kv_dtype = jnp.dtype(dtype if kv_dtype is None else kv_dtype)
    tokens = sum(n for n, _ in sequences) + pad[0]
    room = len(sequences) + pad[1]
    width = max([-(-n // page_size) for _, n in sequences], default=1) + 1
    pages = sum(-(-n // page_size) for _, n in sequences) + 2
    q = jnp.asarray(rng.standard_normal((tokens, query_heads, head_dim)), dtype)
    poison = 127 if kv_dtype == jnp.int8 else math.nan
    cache = np.full((pages, page_size, 2 * kv_heads, head_dim), poison, np.float32)
    page_indices = np.full((room, width), 10**6, np.int32)
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
    cu = np.zeros(room + 1, np.int32)
    cu[1 : len(sequences) + 1] = np.cumsum([n for n, _ in sequences])
    cu[len(sequences) + 1 :] = 10**6
    kv_lens = np.full(room, 10**6, np.int32)
    kv_lens[: len(sequences)] = [n for _, n in sequences]
    if layout == "HND":
        cache = cache.swapaxes(1, 2)
    return Case(
        q,
        jnp.asarray(cache).astype(kv_dtype),
        keys,
        values,
        kv_lens,
        page_indices,
        cu,
        np.array([len(sequences)]),
        layout,
    )


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


def interpreter():
    return pltpu.InterpretParams(detect_races=True)


def run(case, *, blocks=SMALL, **options):
    out, lse = ragged_paged_attention_lse(
        *case.arguments(), kv_layout=case.layout, blocks=blocks, interpret=interpreter(), **options
    )
    assert not interpret_pallas_call.races.races_found
    return np.asarray(out.astype(jnp.float32)), np.asarray(lse)


def error(actual, expected):
    """Relative root-mean-square error."""
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def check(case, *, blocks=SMALL, **options):
    expected, expected_lse = oracle(case, **options)
    if "sinks" in options:
        options["sinks"] = jnp.asarray(options["sinks"])
    out, lse = run(case, blocks=blocks, **options)
    rows = case.cu_q_lens[len(case.keys)]
    limit = 1e-5 if case.q.dtype == jnp.float32 else 1e-2
    assert error(out[:rows], expected[:rows]) < limit
    assert np.abs(lse[:rows] - expected_lse[:rows]).max() < (1e-5 if case.q.dtype == jnp.float32 else 4e-2)
    assert (out[rows:] == 0).all()
    assert (lse[rows:] == -np.inf).all()


MIXED = [(1, 40), (5, 18), (0, 9), (20, 70), (1, 1), (16, 16), (40, 100), (1, 129)]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mixed_batch(layout, dtype):
    check(make_case(MIXED, layout=layout, dtype=jnp.dtype(dtype)), sm_scale=0.1)
