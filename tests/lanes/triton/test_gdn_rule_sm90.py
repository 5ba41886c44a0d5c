"""The Triton gated_delta_rule and its gradients compiled for sm_90 with no GPU, as a call of 2048 tokens launches them.

The calls are made with tensors that hold no data, so that they also prove that the host reads none.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {"step_rule", "solve_rule", "run_rule", "back_rule", "part_rule", "share_rule"}


def ceilings(dtype: str, size: str) -> dict[str, int]:
    """Bytes that ptxas spills at most, written and read, of kernels for which no tiles were found that spill none."""
    if dtype == "bfloat16":
        return {"share_rule": 80, "run_rule": 24 if size == "16x16" else 0}
    # Products of float32 hold three parts of every operand.
    found = {"share_rule": 128, "part_rule": 32, "run_rule": 32}
    return {**found, "run_rule": 1772, "back_rule": 384} if size == "256x256" else found


def compiled(*args: str) -> list[tuple[str, int, int, int, int, int]]:
    """(name, programs, registers, spilled, shared, tensor cores) of what compile_gdn_rule.py makes."""
    # Without the interpreter, which replaces the compiler for the whole process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_gdn_rule.py")), *args]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return [(name, *map(int, rest)) for name, *rest in map(str.split, run.stdout.splitlines())]


def check(dtype: str, rule: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = compiled(dtype, rule, size)
    with capsys.disabled():
        for name, _, registers, spilled, shared, _ in made:
            print(
                f"\nsm_90 {dtype} {rule} {size} {name}: {registers} registers, {spilled} spilled, {shared} shared",
                end="",
            )
    assert {name for name, *_ in made} == KERNELS
    for name, _, _, spilled, shared, products in made:
        assert spilled <= ceilings(dtype, size).get(name, 0), name
        # What GPUs of compute capability 8.6 and 8.9 have; two programs find room in the 227 KB of this one.
        assert shared <= 99 * 1024, name
        assert products == (name != "step_rule"), name


@pytest.mark.parametrize(
    ("dtype", "rule", "size"),
    [
        ("bfloat16", "gdn", "128x128"),
        ("bfloat16", "gdn2", "64x64"),
        ("float32", "kda", "128x128"),
        ("float32", "gdn", "64x64"),
    ],
)
def test_they_fit_sm_90(dtype: str, rule: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(dtype, rule, size, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["128x128", "64x64", "256x256", "16x16", "64x128"])
@pytest.mark.parametrize("rule", ["gdn", "kda", "gdn2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_they_fit_sm_90_at_other_sizes(dtype: str, rule: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(dtype, rule, size, capsys)
