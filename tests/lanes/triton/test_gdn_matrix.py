"""The Triton gdn_attention in the interpreter over the whole matrix of tests/kernels/gdn_matrix.py."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from opreg.kernels.triton.gdn import gdn_attention
from opreg.ops.gdn_attention_inputs import clone_call

path = Path(__file__).parents[2] / "kernels" / "gdn_matrix.py"
spec = importlib.util.spec_from_file_location("gdn_matrix", path)
assert spec is not None
assert spec.loader is not None
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)


@pytest.mark.slow
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("case", matrix.cases(), ids=matrix.name)
def test_against_the_recurrence_in_float64(case: dict[str, Any]) -> None:
    call = matrix.make(case)
    got = clone_call(call)
    gdn_attention(**got)
    matrix.compare(got, matrix.truth(call), call)
