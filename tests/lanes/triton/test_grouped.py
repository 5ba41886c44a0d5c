"""The Triton segment_sum and grouped_matmul: numbers in the interpreter (TRITON_INTERPRET=1), compiled for sm_90."""

import os
import subprocess
import sys

import pytest
import torch
from opreg.kernels.triton import grouped_matmul as grouped
from opreg.kernels.triton import segment_sum as segments
from opreg.ops import grouped_matmul, segment_sum

from opreg.select import explain

# fp32 sums: what is left is the order of the sum, and one rounding to the result's dtype.
ALLOWED = [(torch.float32, 2e-6), (torch.float16, 5e-4)]


def relative_rms(got, want):
    return ((got.double() - want.double()).pow(2).mean() / want.double().pow(2).mean().clamp_min(1e-30)).sqrt().item()


@pytest.mark.parametrize(("dtype", "allowed"), ALLOWED)
@pytest.mark.parametrize(("rows", "columns", "count"), [(37, 5, 4), (1, 8, 3), (0, 8, 3), (90, 300, 2), (20, 1, 40)])
def test_segment_sum_against_the_reference(rows, columns, count, dtype, allowed):
    generator = torch.Generator().manual_seed(rows)
    data = torch.randn(rows, columns, generator=generator).to(dtype)
    ids = torch.randint(-2, count + 2, (rows,), generator=generator)
    got, want = segments.segment_sum(data, ids, count), segment_sum.op.body(data, ids, count)
    assert got.dtype is dtype
    assert got.shape == want.shape
    assert relative_rms(got, want) <= allowed
    assert torch.equal(got, segments.segment_sum(data, ids, count))
    strided = torch.stack([data, data], -1)[..., 0]
    assert torch.equal(got, segments.segment_sum(strided, ids.int(), count))


@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
def test_segment_sum_of_other_ranks(shape):
    data, ids = torch.randn(9, *shape), torch.arange(9) % 2
    torch.testing.assert_close(segments.segment_sum(data, ids, 2), segment_sum.op.body(data, ids, 2))


SIZES = [(9, 8, 6, (4, 0, 3)), (130, 40, 70, (0, 65, 64, 1)), (200, 33, 64, (0, 0)), (64, 16, 16, (64,)), (5, 4, 4, ())]


@pytest.mark.parametrize(("dtype", "allowed"), ALLOWED)
@pytest.mark.parametrize(("m", "k", "n", "sizes"), SIZES)
def test_grouped_matmul_against_the_reference(m, k, n, sizes, dtype, allowed):
    generator = torch.Generator().manual_seed(m)
    lhs = torch.randn(m, k, generator=generator).to(dtype)
    rhs = (torch.randn(len(sizes), k, n, generator=generator) * k**-0.5).to(dtype)
    group_sizes = torch.tensor(sizes, dtype=torch.int32)
    got, want = grouped.grouped_matmul(lhs, rhs, group_sizes), grouped_matmul.op.body(lhs, rhs, group_sizes)
    assert got.dtype is dtype
    assert relative_rms(got, want) <= allowed
    assert got[sum(sizes) :].eq(0).all()
    turned = rhs.transpose(1, 2).contiguous().transpose(1, 2)  # as the gradient of lhs takes the matrices
    assert torch.equal(got, grouped.grouped_matmul(lhs.t().contiguous().t(), turned, group_sizes.long()))


def test_refusals():
    rows, ids, sizes = torch.ones(2, 4), torch.zeros(2), torch.ones(1)
    assert segments.why_not(rows, ids, 1) is None
    assert "float64" in segments.why_not(rows.double(), ids, 1)
    assert "int32" in segments.why_not(rows.int(), ids, 1)
    assert grouped.why_not(rows, rows[None], sizes) is None
    assert "float64" in grouped.why_not(rows.double(), rows[None].double(), sizes)
    assert "rhs is torch.float16, but lhs is torch.float32" in grouped.why_not(rows, rows[None].half(), sizes)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_they_are_the_kernels_of_cuda_and_xpu(device):
    assert explain(segment_sum.op, device).selected.name == "triton/segment_sum"
    assert explain(grouped_matmul.op, device).selected.name == "triton/grouped_matmul"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from opreg.kernels.triton import grouped_matmul as g, segment_sum as s

def build(fn, types, constants):
    names = fn.arg_names
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
    source = ASTSource(fn=fn, signature=signature, constexprs={(names.index(k),): v for k, v in constants.items()})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert ".target sm_90" in ptx
    return ptx

for dtype in ("*fp32", "*bf16", "*fp16"):
    types = {"data": dtype, "order": "*i64", "starts": "*i64", "out": dtype}
    build(s.segment_sum_rows, types, {"ROWS": 16, "COLUMNS": 256})
    types = {"lhs": dtype, "rhs": dtype, "out": dtype, "groups": "*i64", "firsts": "*i64", "ends": "*i64"}
    ptx = build(g.grouped_matmul_tiles, types, {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32})
    assert ("mma" in ptx) == (dtype != "*fp32"), dtype
"""


def test_both_compile_for_sm_90():
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_negative_views_are_read_as_what_they_show():
    generator = torch.Generator().manual_seed(1)
    lhs, rhs = torch.randn(5, 8, generator=generator), torch.randn(2, 8, 3, generator=generator)
    sizes, ids = torch.tensor([2, 3]), torch.tensor([0, 1, 1, 0, 1])
    got = grouped.grouped_matmul(torch._neg_view(-lhs), torch._neg_view(-rhs), sizes)
    assert torch.equal(got, grouped.grouped_matmul(lhs, rhs, sizes))
    assert torch.equal(segments.segment_sum(torch._neg_view(-lhs), ids, 2), segments.segment_sum(lhs, ids, 2))
