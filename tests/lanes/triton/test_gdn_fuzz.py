"""The Triton gdn_attention in the interpreter under random calls of tests/kernels/gdn_fuzz.py, against float64."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from opreg.kernels.triton import gdn

path = Path(__file__).parents[2] / "kernels" / "gdn_fuzz.py"
spec = importlib.util.spec_from_file_location("gdn_fuzz", path)
assert spec is not None
assert spec.loader is not None
fuzz = importlib.util.module_from_spec(spec)
sys.modules["gdn_fuzz"] = fuzz  # dataclasses look their module up
spec.loader.exec_module(fuzz)

pytestmark = [
    pytest.mark.usefixtures("products"),
    # silu(-100) is -100 over an infinite number, which is right.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
SLACK = 1.5  # q and k are rounded once more when they are normalised
LIMITS = fuzz.Limits(
    dims=(16, 32, 64),
    widths=(1, 2, 3, 4, 5),
    ratios=(1, 2, 3),
    lengths=(0, 1, 1, 2, 3, 5, 16, 17, 33),
    most_seqs=4,
    most_tokens=60,
)
SEEDS = [pytest.param(seed, marks=[] if seed < 6 else [pytest.mark.slow]) for seed in range(300)]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_calls(seed: int) -> None:
    call = fuzz.make(seed, LIMITS)
    assert gdn.why_not(**call.arguments) is None
    written = fuzz.own(call)
    gdn.gdn_attention(**written)
    names = ("core_attn_out", "z", "conv_state", "ssm_state")
    assert fuzz.wrong(call, {name: written[name] for name in names}, fuzz.expected(call), SLACK) is None, str(call)
    again = fuzz.own(call)
    gdn.gdn_attention(**again)
    for name in names:
        assert torch.equal(fuzz._bits(written[name]), fuzz._bits(again[name])), f"second run: {call}"
