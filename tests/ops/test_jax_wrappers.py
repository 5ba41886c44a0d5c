"""The shipped ops with JAX kernels: every kernel against the reference, gradients, edge cases."""

import importlib

import jax
import pytest
import torch

import opreg

# By name: `import opreg.ops.segment_sum as ...` gives the operator, which the package offers under the same name.
grouped = importlib.import_module("opreg.ops.grouped_matmul")
segments = importlib.import_module("opreg.ops.segment_sum")

KERNELS = {
    segments.segment_sum: ("cpu/segment_sum", "pallas/segment_sum"),
    grouped.grouped_matmul: ("cpu/grouped_matmul", "pallas/ragged_dot", "pallas/megablox"),
}


@pytest.mark.parametrize(("op", "kernel"), [(op, kernel) for op, names in KERNELS.items() for kernel in names])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_agrees_with_the_reference(op, kernel, dtype):
    ran = 0
    for call in op.samples(dtype=dtype):
        if kernel.endswith("megablox") and grouped.why_not_megablox(**call):
            continue
        with opreg.use_kernel(op.name, kernel):
            got = op(**call)
        with opreg.use_kernel(op.name, "reference"):
            want = op(**call)
        assert got.dtype is dtype
        torch.testing.assert_close(got, want, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
        ran += 1
    assert ran


def test_gradients():
    data = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 2, -1, 1, 5, 0])
    assert torch.autograd.gradcheck(lambda x: segments.segment_sum(x, ids, 3), (data,))
    lhs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rhs = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([3, 1])
    assert torch.autograd.gradcheck(lambda a, b: grouped.grouped_matmul(a, b, sizes), (lhs, rhs))


def test_the_jax_kernel_is_listed_and_refuses_with_a_reason():
    call = next(iter(grouped.grouped_matmul.samples()))
    text = str(grouped.grouped_matmul.explain(**call))
    assert "pallas/megablox: refused (wants multiples of 128, but m is 9, k is 8, n is 6)" in text
    assert "cpu/grouped_matmul: used" in text


def test_vmap():
    data, ids = torch.randn(3, 6, 2), torch.randint(-1, 5, (3, 6))
    run = lambda data, ids: segments.segment_sum(data, ids, 4)  # noqa: E731
    each = torch.stack([run(d, i) for d, i in zip(data, ids, strict=True)])
    torch.testing.assert_close(torch.vmap(run)(data, ids), each)
    shared = torch.stack([run(d, ids[0]) for d in data])
    torch.testing.assert_close(torch.vmap(run, in_dims=(0, None))(data, ids[0]), shared)
    torch.testing.assert_close(
        torch.vmap(run, in_dims=(None, 0))(data[0], ids), torch.stack([run(data[0], i) for i in ids])
    )
    lhs, rhs, sizes = torch.randn(3, 7, 4), torch.randn(3, 2, 4, 5), torch.tensor([[3, 2], [0, 7], [0, 0]])
    each = torch.stack([grouped.grouped_matmul(*x) for x in zip(lhs, rhs, sizes, strict=True)])
    torch.testing.assert_close(torch.vmap(grouped.grouped_matmul)(lhs, rhs, sizes), each)
    each = torch.stack([grouped.grouped_matmul(x, rhs[0], sizes[0]) for x in lhs])
    got = torch.vmap(grouped.grouped_matmul, in_dims=(1, None, None))(lhs.transpose(0, 1), rhs[0], sizes[0])
    torch.testing.assert_close(got, each)


def test_second_derivatives():
    data = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 2, -1, 1, 5, 0])
    assert torch.autograd.gradgradcheck(lambda x: segments.segment_sum(x, ids, 3), (data,))
    lhs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rhs = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([3, 1])
    assert torch.autograd.gradgradcheck(lambda a, b: grouped.grouped_matmul(a, b, sizes), (lhs, rhs))


def test_lowered_for_tpu_megablox_is_the_pallas_kernel():
    module = importlib.import_module("opreg.kernels.pallas.grouped_matmul")
    x, w, s = (
        jax.ShapeDtypeStruct(*spec) for spec in (((256, 128), "bfloat16"), ((2, 128, 128), "bfloat16"), ((2,), "int32"))
    )
    traced = jax.jit(module.megablox).trace(x, w, s)
    found = {p: traced.lower(lowering_platforms=(p,)).as_text().count("tpu_custom_call") for p in ("tpu", "cpu")}
    assert found == {"tpu": 1, "cpu": 0}
