"""The Triton gdn_attention compiled for sm_90 with no GPU, as a call at Qwen3-Next's sizes launches it.

The calls are made with tensors that hold no data, so that they also prove that the host reads none.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Made:
    """One compiled kernel: its grid's size, registers a thread, bytes spilled and shared, whether on tensor cores."""

    name: str
    programs: int
    registers: int
    spilled: int
    shared: int
    products: int


def compiled(*args: str) -> list[Made]:
    """What compile_gdn.py makes."""
    # Without the interpreter, which replaces the compiler for the whole process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_gdn.py")), *args]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return [Made(name, *map(int, rest)) for name, *rest in map(str.split, run.stdout.splitlines())]


@pytest.fixture(scope="module")
def qwen() -> list[Made]:
    """What was compiled for Qwen3-Next in bfloat16."""
    return compiled("qwen")


def test_no_kernel_spills_a_register_at_qwen3_next_sizes(qwen: list[Made]) -> None:
    names = [kernel.name for kernel in qwen]
    # Other arguments are another kernel: a state in bfloat16, drafts, checkpoints.
    for name, at_least in (("run_tokens", 3), ("finish", 3), ("run_chunks", 2)):
        assert names.count(name) >= at_least
    assert {"plan_chunks", "convolve_chunks", "solve_chunks"} <= set(names)
    for kernel in qwen:
        assert kernel.spilled == 0, kernel
        assert kernel.registers < 255, kernel
        # Of 227 KB on a multiprocessor: two programs find room.
        assert kernel.shared <= 113 * 1024, kernel
    assert {kernel.name for kernel in qwen if kernel.products} == {"solve_chunks", "run_chunks"}


def test_a_decode_step_and_one_prompt_fill_132_multiprocessors(qwen: list[Made]) -> None:
    most = {name: max(k.programs for k in qwen if k.name == name) for name in {k.name for k in qwen}}
    assert most["run_tokens"] == 64 * 32 * 4
    # A prompt's chunks come one after the other; 32 heads times 4 blocks of V at once.
    assert most["run_chunks"] == 128
    assert most["solve_chunks"] >= 2048 // 64 * 32


# The sizes of tests/kernels/gdn_matrix.py, the smallest and the largest, and blocks of 16 rows of V.
SIZES = ["128x128", "64x64", "32x32", "64x128", "256x64", "32x256", "256x256", "16x16", "64x16", "128x16"]


def check(dtype: str, *sizes: str) -> None:
    """A decode step, drafts and a prompt at each of the sizes: tensor cores in chunks, and nothing spilled."""
    made = compiled(dtype, *sizes)
    assert {k.name: k.spilled for k in made if k.spilled} == {}
    for name in ("solve_chunks", "run_chunks"):
        found = [k for k in made if k.name == name]
        assert found or set(sizes) <= {"256x64", "256x256"}, f"{name} was not compiled"
        assert all(k.products for k in found)
    assert [k.name for k in made].count("run_tokens") >= 2 * len(sizes)


@pytest.mark.parametrize(
    ("dtype", "sizes"), [("float16", ["256x256"]), ("bfloat16", ["32x32"]), ("float32", ["64x64"])]
)
def test_nothing_is_spilled_at_other_sizes(dtype: str, sizes: list[str]) -> None:
    check(dtype, *sizes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_nothing_is_spilled_at_any_size(dtype: str) -> None:
    check(dtype, *SIZES)


def test_figures_are_shown(qwen: list[Made], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print()
        for kernel in qwen:
            print(
                f"sm_90 {kernel.name}: {kernel.registers} registers, {kernel.spilled} spilled, {kernel.shared} shared"
            )
    assert {k.name for k in qwen} >= {"run_tokens", "run_chunks", "solve_chunks", "convolve_chunks", "finish"}
