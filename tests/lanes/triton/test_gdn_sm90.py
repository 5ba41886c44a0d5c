"""The Triton gdn_attention compiled for sm_90 with no GPU, at Qwen3-Next's sizes in bfloat16: registers, spills."""

import os
import subprocess
import sys

COMPILE = """
import re, subprocess, sys, tempfile
from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from opreg.kernels.reference.gdn_args import Sizes
from opreg.kernels.triton import gdn_batch, gdn_chunk, gdn_conv, gdn_decode
from opreg.kernels.triton.gdn_launch import AT_MOST, CHANNELS, CHUNK, STAGES, WARPS, block_rows

sizes = Sizes(16, 32, 128, 128, 4, 8192, 1, 1, 1)
MODEL = "out z qkvz ba conv_state weights shift q_in k_in v_in q_out k_out v_out solved mixed".split()
TYPES = {
    **dict.fromkeys(MODEL, "*bf16"),
    **dict.fromkeys(["rate", "sums"], "*fp32"),
    **dict.fromkeys(["chunk_owner", "chunk_number", "first_chunk", "starts", "slots"], "*i32"),
    "initial": "*u8",
    "x": "*i16",
    **dict.fromkeys(["bias", "sources", "accepted", "tokens", "checkpoint_tokens", "checkpoint_slots"], None),
}
EVERY = {"HK": 16, "HV": 32, "K": 128, "V": 128, "W": 4, "FLAT": False, "C": CHUNK, "BV": block_rows(sizes)}
EVERY |= {"COLUMNS": 1, "CHECKPOINTS": 1, "AT_MOST": AT_MOST, "ABOVE": AT_MOST, "PRECISION": "tf32", "STAGES": STAGES}
EVERY |= {"R": 4, "BLOCK": CHANNELS}
FIXED = {"out_stride", "z_stride", "qkvz_stride", "ba_stride", "conv_stride", "ssm_stride", "x_stride"}


def figures(fn, **change):
    constants, signature, attributes = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        given = {**TYPES, **change}.get(name, "i32")
        if name in EVERY or given is None:
            signature[name], constants[(i,)] = "constexpr", {**EVERY, **change}.get(name)
        else:
            signature[name] = given
            # What the launcher finds out: pointers of whole tensors, and strides, are multiples of 16.
            if name in FIXED or (given[0] == "*" and name not in gdn_batch.INDICES):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, constexprs=constants, attrs=attributes)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS.get(fn.__name__, 4)})
    assert made.asm["cubin"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, = re.findall("Used ([0-9]+) registers", said)
    spilled = sum(map(int, re.findall("([0-9]+) bytes spill", said)))
    ptx = made.asm["ptx"]
    print(fn.__name__, registers, spilled, made.metadata.shared, "wgmma.mma_async" in ptx or "mma.sync" in ptx)


STATE = sys.argv[1]
figures(gdn_decode.run_tokens, ssm_state=STATE)
figures(gdn_decode.run_tokens, ssm_state=STATE, accepted="*i32", tokens="*i64", initial=None, COLUMNS=4)
figures(gdn_conv.finish, conv_state="*i16")
figures(gdn_conv.finish, conv_state="*i16", accepted="*i32", tokens="*i64", initial=None, COLUMNS=4)
figures(gdn_batch.plan_chunks)
figures(gdn_conv.convolve_chunks, bias="*bf16")
figures(gdn_chunk.solve_chunks)
figures(gdn_chunk.run_chunks, ssm_state=STATE)
figures(gdn_chunk.run_chunks, ssm_state=STATE, checkpoint_tokens="*i32", checkpoint_slots="*i32", CHECKPOINTS=8)
"""


def test_no_kernel_spills_a_register() -> None:
    # Without the interpreter, which replaces the compiler for the whole process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, "*fp32"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    print(run.stdout)
    assert len(lines) == 9
    assert all(int(spilled) == 0 for _, _, spilled, _, _ in lines)
    # A program of 256 threads and 255 registers leaves room for one on a multiprocessor of 65536 registers.
    assert all(int(registers) < 255 for _, registers, _, _, _ in lines)
    # 227 KB are the most shared memory of one program; two chunks in flight must leave room for a second program.
    assert all(int(shared) <= 113 * 1024 for _, _, _, shared, _ in lines)
    assert {name for name, _, _, _, tensor_cores in lines if tensor_cores == "True"} == {"solve_chunks", "run_chunks"}
