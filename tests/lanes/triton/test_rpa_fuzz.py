"""The Triton attention in the interpreter under random calls of tests/kernels/rpa_fuzz.py, against float64."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from opreg.kernels.triton import kv_cache_update, rpa, rpa_launch

path = Path(__file__).parents[2] / "kernels" / "rpa_fuzz.py"
spec = importlib.util.spec_from_file_location("rpa_fuzz", path)
assert spec is not None
assert spec.loader is not None
fuzz = importlib.util.module_from_spec(spec)
sys.modules["rpa_fuzz"] = fuzz  # dataclasses look their module up
spec.loader.exec_module(fuzz)

# tl.dot is wrong for bfloat16 in the interpreter of Triton 3.7; positive scales only, see rpa.why_not.
LIMITS = fuzz.Limits(
    query=(torch.float32, torch.float16),
    cache=(torch.float32, torch.float16, torch.int8),
    head_dims=(3, 16, 24, 64),
    groups=(1, 2, 4, 5),
    kv_heads=(1, 2),
    most_seqs=4,
    most_rows=20,
    most_tokens=90,
    far=0,
    odd_scales=False,
)
SEEDS = [pytest.param(seed, marks=[] if seed < 12 else [pytest.mark.slow]) for seed in range(300)]


@pytest.fixture(autouse=True)
def nan_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rpa_launch, "device_facts", lambda device: rpa_launch.Device(4, 227 * 1024))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_and_update(seed: int) -> None:
    call = fuzz.make(seed, LIMITS)
    assert rpa.why_not(*call.arguments, **call.options) is None
    out, lse = rpa.ragged_paged_attention_lse(*call.arguments, **call.options)
    assert fuzz.wrong(call, out, lse, fuzz.expected(call)) is None, str(call)
    slots, after, keys, values = fuzz.step(call)
    own = fuzz.make(seed, LIMITS)
    q, kv, *index = own.arguments
    out = rpa.ragged_paged_attention_update(q, own.new_keys, own.new_values, kv, *index, **own.options)
    assert fuzz.wrong(call, out, None, fuzz.expected(call, keys, values)) is None, f"update: {call}"
    assert torch.equal(fuzz.bits(kv), fuzz.bits(after)), f"cache after update: {call}"
    own = fuzz.make(seed, LIMITS)
    options = {key: own.options[key] for key in ("kv_layout", "k_scale", "v_scale")}
    kv_cache_update.kv_cache_update(
        own.new_keys, own.new_values, own.arguments[1], torch.tensor(slots, dtype=torch.int64), **options
    )
    assert torch.equal(fuzz.bits(own.arguments[1]), fuzz.bits(after)), f"cache after write: {call}"
