"""Compiles the Triton gated_delta_rule for sm_90 with no GPU, and prints one line for each kernel that was made.

Arguments: `dtype rule KxV` each, rule one of gdn, kda, gdn2. A process of its own, because the interpreter, in which
the tests run, replaces the compiler.
"""

import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext

import torch
import triton
from opreg.kernels.triton import gdn_rule
from opreg.ops.gated_delta_rule import make_rule_call
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

target = GPUTarget("cuda", 90, 32)
backend = make_backend(target)
seen = set()
VECTORS = {"gdn": (False,) * 3, "kda": (True, False, False), "gdn2": (True,) * 3}


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
gdn_rule.on_device = lambda _: nullcontext()

for dtype, rule, size in zip(*[iter(sys.argv[1:])] * 3, strict=True):
    more = {"device": "meta", "dtype": getattr(torch, dtype), "generator": torch.Generator()}
    for length in (1, 2048):
        call = make_rule_call((1, length, 16, 32, *map(int, size.split("x"))), VECTORS[rule], **more)
        out, state = gdn_rule.gated_delta_rule(**call)
    gdn_rule.gated_delta_rule_backward(out, state, **call)
