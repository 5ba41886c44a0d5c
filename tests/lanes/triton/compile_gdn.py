"""Compiles the Triton gdn_attention for sm_90 with no GPU, and prints one line for each kernel that was made.

Arguments: `qwen`, for Qwen3-Next's sizes, or a dtype and a number of head sizes KxV. A process of its own, because the
interpreter, in which the tests run, replaces the compiler.
"""

import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext

import torch
import triton
from opreg.kernels.triton import gdn, gdn_launch
from opreg.ops.gdn_attention_inputs import Heads, make_call
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

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


class Unreported:
    """In place of reports on caches of another convention, which need a device."""

    def report(self, device):
        return torch.empty(1, dtype=torch.int32, device=device)

    def check(self, device):
        pass


gdn.windows = gdn_launch.windows = Unreported()
bf16, meta = torch.bfloat16, {"device": "meta", "generator": torch.Generator()}


def call(lens, heads, **more):
    given = {"dtype": bf16, "flat": True, "bias": False, **meta, **more}
    return make_call(lens, heads, **given)


def drafts(heads, **more):
    """Eight sequences of two drafts."""
    made = call([3] * 8, heads, **more)
    made.update(
        num_prefills=0,
        num_spec_decodes=8,
        spec_query_start_loc=made["non_spec_query_start_loc"],
        spec_token_indx=torch.empty(24, dtype=torch.int64, device="meta"),
        spec_state_indices_tensor=torch.empty(8, 3, dtype=torch.int32, device="meta"),
        num_accepted_tokens=made["non_spec_state_indices_tensor"],
    )
    return made


def qwen3_next():
    """A decode step of 64 sequences, drafts, a prompt, one with checkpoints: the state in float32, then in bfloat16."""
    heads = Heads(16, 32, 128, 128)
    gdn.gdn_attention(**call([1] * 64, heads, flat=False))
    gdn.gdn_attention(**call([1] * 8, heads, state_dtype=bf16))
    gdn.gdn_attention(**drafts(heads))
    prompt = call([2048], heads)
    gdn.gdn_attention(**prompt)
    marks = torch.empty(5, dtype=torch.int32, device="meta")
    gdn.gdn_attention(**prompt, checkpoint_token_indx=marks, checkpoint_state_indices=marks)


if sys.argv[1] == "qwen":
    qwen3_next()
else:
    for size in sys.argv[2:]:
        heads = Heads(2, 4, *map(int, size.split("x")))
        more = {"dtype": getattr(torch, sys.argv[1]), "bias": True}
        gdn.gdn_attention(**call([1] * 8, heads, **more))
        gdn.gdn_attention(**drafts(heads, **more))
        gdn.gdn_attention(**call([2048], heads, **more))
