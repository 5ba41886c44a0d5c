"""The CPU kernels of gdn_attention over the whole matrix, each call against the recurrence in float64."""

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
from opreg.kernels.cpu import gdn, gdn_torch
from opreg.ops.gdn_attention_inputs import clone_call

spec = importlib.util.spec_from_file_location("gdn_matrix", Path(__file__).with_name("gdn_matrix.py"))
assert spec is not None
assert spec.loader is not None
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)
CASES = matrix.cases()
SETS = [name for name, _ in gdn.INSTRUCTION_SETS]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=matrix.name)
def test_every_kernel_of_this_cpu(case: dict[str, Any]) -> None:
    call = matrix.make(case)
    want = matrix.truth(call)
    for name in ("torch", *SETS[: SETS.index(gdn.instruction_set()) + 1]):
        got = clone_call(call)
        if name == "torch":
            gdn_torch.gdn_attention_torch(**got)
        else:
            bound = inspect.signature(gdn.gdn_attention).bind(**got)
            bound.apply_defaults()
            gdn._run(name, *bound.arguments.values())
        matrix.compare(got, want, call)


def test_every_two_levels_meet() -> None:
    for a, b in (("length", "dims"), ("io", "state"), ("ratio", "width"), ("flat", "tp")):
        assert {(c[a], c[b]) for c in CASES} == {(i, j) for i in matrix.AXES[a] for j in matrix.AXES[b]}
