"""Random calls of every CPU kernel of gdn_attention against float64; see gdn_fuzz.py."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from opreg.kernels.cpu import gdn, gdn_torch
from opreg.kernels.reference import gdn as reference

spec = importlib.util.spec_from_file_location("gdn_fuzz", Path(__file__).with_name("gdn_fuzz.py"))
assert spec is not None
assert spec.loader is not None
fuzz = importlib.util.module_from_spec(spec)
sys.modules["gdn_fuzz"] = fuzz  # dataclasses look their module up
spec.loader.exec_module(fuzz)

# Seeds in blocks, one test each.
BLOCK = 25
BLOCKS = [pytest.param(b, marks=[] if b < 3 else [pytest.mark.slow], id=f"seed{b * BLOCK}") for b in range(80)]
SETS = [name for name, _ in gdn.INSTRUCTION_SETS]
SETS = SETS[: SETS.index(gdn.instruction_set()) + 1]
ORDER = list(inspect.signature(gdn.gdn_attention).parameters)
WRITTEN = ("core_attn_out", "z", "conv_state", "ssm_state")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def level(name: str) -> Callable[..., None]:
    """The C++ kernels of one instruction set."""
    return lambda **call: gdn._run(name, *(call.get(argument) for argument in ORDER))


def ran(call: Any, kernel: Callable[..., None]) -> dict[str, torch.Tensor]:
    given = fuzz.own(call)
    kernel(**given)
    return {name: given[name] for name in WRITTEN}


@pytest.mark.parametrize("block", BLOCKS)
def test_random_calls(block: int) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        call = fuzz.make(seed)
        want = fuzz.expected(call)
        tokens = sum(len(s.x) for s in call.sequences)
        torch.set_num_threads(2)
        shared = ran(call, gdn.gdn_attention)
        torch.set_num_threads(1)
        alone = ran(call, gdn.gdn_attention)
        for name in WRITTEN:
            assert torch.equal(fuzz._bits(shared[name]), fuzz._bits(alone[name])), f"{name} with two threads: {call}"
        kernels = {name: level(name) for name in SETS}
        kernels["torch"] = gdn_torch.gdn_attention_torch
        if tokens <= 12:
            kernels["reference"] = reference.gdn_attention
        for name, kernel in kernels.items():
            assert fuzz.wrong(call, ran(call, kernel), want) is None, f"{name}: {call}"
