"""The Triton gdn_attention compiled for sm_90 with no GPU, as a call at Qwen3-Next's sizes launches it.

The calls are made with tensors that hold no data, so that they also prove that the host reads none.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

COMPILE = """
import re, subprocess, sys, tempfile
from contextlib import nullcontext
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from opreg.kernels.triton import gdn
from opreg.ops.gdn_attention_inputs import Heads, make_call

target = GPUTarget("cuda", 90, 32)
backend = make_backend(target)
seen = set()


def figures(ptx):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall("Used ([0-9]+) registers", said)[0], sum(map(int, re.findall("([0-9]+) bytes spill", said)))


def launched(kernel, *args, grid, warmup, **kwargs):
    # What JITFunction.run does up to the launch, for a GPU that is not there.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    made = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__)
    if made.hash in seen:
        return
    seen.add(made.hash)
    ptx = made.asm["ptx"]
    products = "wgmma.mma_async" in ptx or "mma.sync" in ptx
    programs = grid[0] * (grid[1] if len(grid) > 1 else 1)
    print(kernel.__name__, programs, *figures(ptx), made.metadata.shared, int(products), flush=True)


JITFunction.run = launched
gdn.on_device = lambda _: nullcontext()
bf16, meta = torch.bfloat16, dict(device="meta", generator=torch.Generator())


def call(lens, heads, **more):
    given = {"dtype": bf16, "flat": True, "bias": False, **meta, **more}
    return make_call(lens, heads, **given)


qwen = Heads(16, 32, 128, 128)
# A decode step of 64 sequences, drafts, a prompt, one with checkpoints: the state in float32, then in bfloat16.
gdn.gdn_attention(**call([1] * 64, qwen, flat=False))
gdn.gdn_attention(**call([1] * 8, qwen, state_dtype=bf16))
drafts = call([3] * 8, qwen)
drafts.update(
    num_prefills=0,
    num_spec_decodes=8,
    spec_query_start_loc=drafts["non_spec_query_start_loc"],
    spec_token_indx=torch.empty(24, dtype=torch.int64, device="meta"),
    spec_state_indices_tensor=torch.empty(8, 3, dtype=torch.int32, device="meta"),
    num_accepted_tokens=drafts["non_spec_state_indices_tensor"],
)
gdn.gdn_attention(**drafts)
prompt = call([2048], qwen)
gdn.gdn_attention(**prompt)
marks = torch.empty(5, dtype=torch.int32, device="meta")
gdn.gdn_attention(**prompt, checkpoint_token_indx=marks, checkpoint_state_indices=marks)
print("others")
gdn.gdn_attention(**call([2048], Heads(4, 8, 256, 256), dtype=torch.float16, bias=True))
gdn.gdn_attention(**call([2048], Heads(2, 4, 32, 32), bias=True))
gdn.gdn_attention(**call([2048], Heads(2, 4, 64, 64), dtype=torch.float32))
"""


@dataclass(frozen=True)
class Made:
    """One compiled kernel: its grid's size, registers a thread, bytes spilled and shared, whether on tensor cores."""

    name: str
    programs: int
    registers: int
    spilled: int
    shared: int
    products: int


@pytest.fixture(scope="module")
def made() -> tuple[list[Made], list[Made]]:
    """What was compiled for Qwen3-Next in bfloat16, and for other types and sizes."""
    # Without the interpreter, which replaces the compiler for the whole process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    both = [part.splitlines() for part in run.stdout.split("others\n")]
    qwen, others = ([Made(name, *map(int, rest)) for name, *rest in map(str.split, lines)] for lines in both)
    return qwen, others


def test_no_kernel_spills_a_register_at_qwen3_next_sizes(made: tuple[list[Made], list[Made]]) -> None:
    qwen, _ = made
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


def test_a_decode_step_and_one_prompt_fill_132_multiprocessors(made: tuple[list[Made], list[Made]]) -> None:
    most = {name: max(k.programs for k in made[0] if k.name == name) for name in {k.name for k in made[0]}}
    assert most["run_tokens"] == 64 * 32 * 4
    # A prompt's chunks come one after the other; 32 heads times 4 blocks of V at once.
    assert most["run_chunks"] == 128
    assert most["solve_chunks"] >= 2048 // 64 * 32


def test_other_types_and_sizes_use_tensor_cores_and_spill_nothing(made: tuple[list[Made], list[Made]]) -> None:
    """float16 with heads of 256, bfloat16 with heads of 32, float32 with heads of 64."""
    _, others = made
    assert [k.products for k in others if k.name in ("solve_chunks", "run_chunks")] == [1] * 6
    assert {k.name: k.spilled for k in others if k.spilled} == {}


def test_figures_are_shown(made: tuple[list[Made], list[Made]], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print()
        for kernel in [*made[0], *made[1]]:
            print(
                f"sm_90 {kernel.name}: {kernel.registers} registers, {kernel.spilled} spilled, {kernel.shared} shared"
            )
    assert {k.name for k in made[0]} >= {"run_tokens", "run_chunks", "solve_chunks", "convolve_chunks", "finish"}
