"""What compiles Triton kernels for sm_90 with no GPU share: launches that compile, and print a line for each kernel.

A line has the kernel's name, its programs, registers a thread, bytes spilled, bytes of shared memory, and 1 where it
uses tensor cores. For processes of their own: the interpreter, in which the tests run, replaces the compiler.
"""

import re
import subprocess
import tempfile

import triton
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


def install():
    """From here on a launch only compiles."""
    JITFunction.run = launched
