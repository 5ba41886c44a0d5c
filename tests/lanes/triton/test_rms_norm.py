"""The Triton rms_norm: numbers in the interpreter (TRITON_INTERPRET=1), machine code from the compiler."""

import os
import subprocess
import sys

import pytest
import torch
from opreg.kernels.reference.rms_norm import rms_norm as reference
from opreg.kernels.triton.rms_norm import rms_norm, warps, why_not
from opreg.ops import rms_norm as op

SIZES = [(1, 1), (7, 64), (2, 3, 100), (3, 128), (2, 1000), (0, 8), (1, 4096)]


# fp32 statistics: what is left is one rounding to the result's dtype.
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float16, 5e-4)])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_against_the_reference(shape, dtype, allowed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    got, expected = rms_norm(x, weight, 1e-5), reference(x.float(), weight.float(), 1e-5)
    assert got.dtype == dtype
    assert got.shape == x.shape
    if x.numel():
        assert (got.float() - expected).square().mean().sqrt() <= allowed * expected.square().mean().sqrt()


def test_strided_rows_and_columns():
    wide = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    weight = torch.linspace(0.5, 2, 32)
    for x in (wide[:, ::2], wide[:, :32], wide[::2, 16:48], wide.T[:, :6].T[:, :32]):
        torch.testing.assert_close(rms_norm(x, weight), reference(x, weight), rtol=1e-5, atol=1e-6)


def test_small_values_need_eps():
    x = torch.full((2, 16), 1e-20)
    torch.testing.assert_close(rms_norm(x, torch.ones(16), 1e-6), x * 1e3)


def test_refusals():
    weight = torch.ones(8)
    assert why_not(torch.ones(2, 8), weight) is None
    assert "float64" in why_not(torch.ones(2, 8, dtype=torch.float64), weight)
    assert "at most 65536" in why_not(torch.empty(1, 65537), weight)


def test_it_is_the_kernel_of_cuda_and_xpu():
    from opreg.select import explain

    for device in ("cuda", "xpu"):
        assert explain(op.op, device).selected.name == "triton/rms_norm"


COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from opreg.kernels.triton.rms_norm import rms_norm_rows, warps

for block in (64, 1024, 4096, 16384, 65536):
    signature = {"x": "*bf16", "weight": "*bf16", "y": "*bf16", "stride": "i32", "columns": "i32", "eps": "fp32"}
    source = ASTSource(rms_norm_rows, {**signature, "BLOCK": "constexpr"}, constexprs={"BLOCK": block})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps(block)})
    assert made.asm["cubin"]
    local = re.findall(r"\\.local", made.asm["ptx"])
    print(block, len(made.asm["cubin"]), len(local))
"""


def test_compiles_for_sm90_without_local_memory():
    # Without the interpreter, which replaces the compiler for the whole process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [int(block) for block, _, _ in lines] == [64, 1024, 4096, 16384, 65536]
    assert all(int(local) == 0 for _, _, local in lines)


def test_warps_keep_a_thread_at_16_elements_where_the_chip_allows():
    assert [warps(block) for block in (1, 512, 1024, 8192, 65536)] == [1, 1, 2, 16, 16]


def test_negative_views_are_read_as_what_they_show():
    x, weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), torch.linspace(0.5, 2, 64)
    got = rms_norm(torch._neg_view(-x), torch._neg_view(-weight))
    assert torch.equal(got, rms_norm(x, weight))
