"""The matrix of gdn_attention: few enough calls that every two levels of any two axes meet in one of them."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from opreg.kernels.reference import gdn as reference
from opreg.ops.gdn_attention_inputs import Heads, clone_call, make_call

Call = dict[str, Any]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
AXES: dict[str, tuple[Any, ...]] = {
    "length": (0, 1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 257, 2048),
    "dims": ((128, 128), (64, 64), (32, 32), (64, 128), (256, 64), (32, 256)),
    "ratio": (1, 2, 3, 4, 8),
    "width": (2, 3, 4, 5),
    "tp": (1, 2, 4),
    "io": (BF16, FP16, FP32),
    "state": (FP32, BF16, FP16),
    "flat": (False, True),
    "bias": (False, True),
    "shuffled": (False, True),
    "known": (False, True),
}
OUT = {FP32: 1e-5, BF16: 5e-3, FP16: 1e-3}


def cases() -> list[dict[str, Any]]:
    """Levels of every axis, by a greedy search: of 40 random candidates the one with most pairs not yet seen."""
    chooser = random.Random(0)
    names = list(AXES)
    left = {(a, i, b, j) for a, b in itertools.combinations(names, 2) for i, j in _products(a, b)}
    found = []
    while left:
        a, i, b, j = min(left)
        candidates = []
        for _ in range(40):
            at = {name: chooser.randrange(len(AXES[name])) for name in names}
            candidates.append({**at, a: i, b: j})
        best = max(candidates, key=lambda at: len(_pairs(at) & left))
        left -= _pairs(best)
        found.append({name: AXES[name][level] for name, level in best.items()})
    return found


def _products(a: str, b: str) -> Iterator[tuple[int, int]]:
    return itertools.product(range(len(AXES[a])), range(len(AXES[b])))


def _pairs(at: dict[str, int]) -> set[tuple[str, int, str, int]]:
    return {(a, at[a], b, at[b]) for a, b in itertools.combinations(AXES, 2)}


def name(case: dict[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.").replace(", ", "x") for value in case.values())


def make(case: dict[str, Any]) -> Call:
    """A sequence of the case's length among a decode, an empty one and a short prompt; one key head on this rank."""
    heads = Heads(case["tp"], case["tp"] * case["ratio"], *case["dims"], case["width"], case["tp"])
    lens = [5, case["length"], 0, 1] if case["shuffled"] else [1, 0, case["length"], 5]
    known = [n == 1 or case["known"] for n in lens]
    more = {"dtype": case["io"], "state_dtype": case["state"], "flat": case["flat"], "bias": case["bias"]}
    return make_call(lens, heads, initial=known, padding=2, **more)


def truth(call: Call) -> Call:
    want = clone_call(call)
    reference._gdn_attention(torch.float64, **want)
    return want


def compare(got: Call, want: Call, before: Call) -> None:
    """Outputs and states within rounding; z, inputs of the convolution and slots that nobody owns bit for bit."""
    starts = want["non_spec_query_start_loc"].diff().tolist()
    slots = want["non_spec_state_indices_tensor"].tolist()
    used = [slot for slot, n in zip(slots, starts, strict=True) if n]
    rest = [slot for slot in range(want["ssm_state"].shape[0]) if slot not in used]
    limit = OUT[want["z"].dtype]
    assert _rms(got["core_attn_out"], want["core_attn_out"]) < limit
    assert _rms(got["ssm_state"][used], want["ssm_state"][used]) < max(limit, OUT[want["ssm_state"].dtype])
    assert torch.equal(got["z"], want["z"])
    assert torch.equal(got["conv_state"][used], want["conv_state"][used])
    for state in ("conv_state", "ssm_state"):
        torch.testing.assert_close(got[state][rest], before[state][rest], rtol=0, atol=0, equal_nan=True)


def _rms(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-30))
