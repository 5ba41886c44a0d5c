"""The Pallas attention and cache write in interpret mode under random calls of rpa_fuzz.py, against float64."""

import functools
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from opreg.kernels.pallas.rpa import ragged_paged_attention_lse
from opreg.kernels.pallas.rpa_blocks import Blocks
from opreg.kernels.pallas.rpa_update import write_step
from opreg.kernels.pallas.rpa_why_not import why_not

spec = importlib.util.spec_from_file_location("rpa_fuzz", Path(__file__).with_name("rpa_fuzz.py"))
assert spec is not None
assert spec.loader is not None
fuzz = importlib.util.module_from_spec(spec)
sys.modules["rpa_fuzz"] = fuzz  # dataclasses look their module up
spec.loader.exec_module(fuzz)

LIMITS = fuzz.Limits(
    query=(torch.float32, torch.bfloat16),
    cache=(torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8),
    head_dims=(16, 64, 128),
    page_sizes=(8, 16, 32),
    groups=(1, 2, 3),
    kv_heads=(1, 2),
    most_seqs=4,
    most_rows=40,
    most_tokens=120,
    far=0,
    strides=False,
    odd_scales=False,
    whole_pages=True,
)
TILES = Blocks(tokens_per_block=32, tokens_per_tile=16, kv_per_block=64, kv_per_chunk=32)
# 11: a cache of no pages; 22: a window of more positions than an int32 holds.
SEEDS = [pytest.param(seed, marks=[] if seed in (0, 11, 22) else [pytest.mark.slow]) for seed in range(25)]


def to_jax(x: torch.Tensor) -> jax.Array:
    exact = x if x.dtype == torch.int32 else x.float()  # float32 holds every number of the other dtypes
    return jnp.asarray(exact.numpy()).astype(str(x.dtype).removeprefix("torch."))


def to_torch(x: jax.Array, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(jax.device_get(x.astype(jnp.float32))).to(dtype)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_and_write(seed: int) -> None:
    # The next call in place of one that the kernel refuses, so that no seed goes untested.
    calls = (fuzz.make(seed + 1000 * more, LIMITS) for more in range(50))
    call = next(call for call in calls if why_not(*call.arguments, **call.options) is None)
    q, kv, *index = map(to_jax, call.arguments)
    options = dict(call.options)
    if options["sinks"] is not None:
        options["sinks"] = to_jax(options["sinks"])
    interpret = pltpu.InterpretParams(detect_races=True, random_seed=seed)
    run = jax.jit(functools.partial(ragged_paged_attention_lse, **options, blocks=TILES, interpret=interpret))
    out, lse = run(q, kv, *index)
    pages_there = call.arguments[1].shape[0] > 0  # where there are none, no kernel runs, and nothing can race
    assert not (pages_there and interpret_pallas_call.races.races_found), str(call)
    torch_out, torch_lse = to_torch(out, call.arguments[0].dtype), to_torch(lse, torch.float32)
    # q is scaled before it is rounded for the product, so in bfloat16 each logit is off by up to 2**-9 of itself.
    slack = 4.0 if call.arguments[0].dtype is torch.bfloat16 else 2.0
    assert fuzz.wrong(call, torch_out, torch_lse, fuzz.expected(call), slack=slack) is None, str(call)
    _, after, _, _ = fuzz.step(call)
    scales = {name: options[name] for name in ("k_scale", "v_scale", "kv_layout")}
    write = jax.jit(functools.partial(write_step, **scales, interpret=interpret))
    pages = write(q, to_jax(call.new_keys), to_jax(call.new_values), kv, *index)
    assert not (pages_there and interpret_pallas_call.races.races_found), f"write: {call}"
    got, want = to_torch(pages, torch.float32), after.float()
    assert bool(((got == want) | (got.isnan() & want.isnan())).all()), f"cache after write: {call}"
