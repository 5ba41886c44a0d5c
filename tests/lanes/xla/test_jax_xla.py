"""JAX functions in the lazy graphs of torch_xla (PJRT_DEVICE=CPU): values, refusals, gradients, openxla."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as metrics

import opreg
from opreg.jax_bridge import JaxArgumentError, jax_cache_info

Pair = collections.namedtuple("Pair", "left right")
device = torch_xla.device()


def sin_add(a, b):
    return jnp.sin(a) + b


def test_values_and_structures_belong_to_the_call():
    x = torch.randn(3, 4)

    def f(tree, flag):
        return {"total": tree["a"].sum(), "n": None} if flag else Pair(tree["a"].T, [tree["b"] * 2])

    on_xla = {"a": x.to(device), "b": x.to(device)}
    for flag in (True, False, True):
        got, want = opreg.call_jax(f, (on_xla, flag)), opreg.call_jax(f, ({"a": x, "b": x}, flag))
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert left.device.type == "xla"
            torch.testing.assert_close(left.cpu(), right)


def test_nothing_runs_before_the_sync():
    x = torch.randn(4, 4).to(device)
    torch_xla.sync(wait=True)
    metrics.clear_all()
    out = opreg.call_jax(sin_add, (opreg.call_jax(sin_add, (x, x)), x)) + 1
    assert metrics.metric_data("ExecuteTime") is None
    torch_xla.sync(wait=True)
    assert metrics.metric_data("ExecuteTime")[0] == 1
    torch.testing.assert_close(out.cpu(), (x.cpu().sin() + x.cpu()).sin() + x.cpu() + 1)


def test_64_bit_values_are_exact():
    assert opreg.call_jax(lambda a: a + 1, (torch.tensor([2**40 + 1]).to(device),)).cpu().tolist() == [2**40 + 2]
    tiny = torch.tensor([1 + 2.0**-40], dtype=torch.float64)
    assert torch.equal(opreg.call_jax(lambda a: a * 2, (tiny.to(device),)).cpu(), tiny * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int8, torch.uint8, torch.int32])
def test_dtypes(dtype):
    x = (torch.arange(8) % 3).to(dtype)
    out = opreg.call_jax(lambda a: jnp.concatenate([a, a]), (x.to(device),))
    assert out.dtype is dtype
    assert torch.equal(out.cpu(), torch.cat([x, x]))


def test_static_values_are_told_apart_by_type():
    f = lambda a, v: jnp.asarray(v) + 0 * a.sum().astype(jnp.asarray(v).dtype)  # noqa: E731
    x = torch.ones(2).to(device)
    assert [opreg.call_jax(f, (x, v)).dtype for v in (1, 1.0)] == [torch.int32, torch.float32]


REFUSED = {
    "mixed devices": (
        lambda x: opreg.call_jax(sin_add, (x, torch.ones(2))),
        JaxArgumentError,
        r"different devices: args\[0\] on xla:0, args\[1\] on cpu",
    ),
    "linear algebra": (
        lambda x: opreg.call_jax(jnp.linalg.cholesky, (torch.eye(2).to(device),)),
        opreg.KernelError,
        "needs lapack_spotrf_ffi, which only JAX's own runtime has",
    ),
    "callback": (
        lambda x: opreg.call_jax(lambda a: (jax.debug.print("{}", a), a)[1], (x,)),
        opreg.KernelError,
        "needs xla_ffi_python_cpu_callback",
    ),
    "unsigned": (
        lambda x: opreg.call_jax(lambda a: a.astype(jnp.uint32), (x,)),
        JaxArgumentError,
        "dtype uint32, which torch_xla would hand over as torch.int32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_at_the_call_and_spoils_nothing(name):
    call, error, words = REFUSED[name]
    x = torch.ones(2).to(device)
    y = x + 1
    with pytest.raises(error, match=words):
        call(x)
    torch_xla.sync()
    assert y.cpu().tolist() == [2, 2]


def test_gradients_and_second_order():
    x = torch.randn(3)
    on_xla = x.to(device).requires_grad_()
    out = opreg.call_jax(lambda a: jnp.sin(a) * a, (on_xla,)).sum()
    (first,) = torch.autograd.grad(out, on_xla, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), on_xla)
    torch.testing.assert_close(first.cpu(), x.cos() * x + x.sin())
    torch.testing.assert_close(second.cpu(), 2 * x.cos() - x * x.sin())


def test_openxla_takes_it_as_one_graph():
    torch._dynamo.reset()
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    compiled = torch.compile(lambda a, b: opreg.call_jax(sin_add, (a * 2, b)).relu(), backend="openxla", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x.to(device), y.to(device)).cpu(), ((x * 2).sin() + y).relu())


def test_random_keys_as_data():
    key = torch.tensor([0, 7], dtype=torch.int32)
    f = lambda k: jax.random.uniform(jax.random.wrap_key_data(k.astype(jnp.uint32)), (4,))  # noqa: E731
    torch.testing.assert_close(opreg.call_jax(f, (key.to(device),)).cpu(), opreg.call_jax(f, (key,)))


def test_a_function_is_lowered_once_for_all_its_calls():
    a, b = torch.randn(8, 8).to(device), torch.randn(8, 8).to(device)
    opreg.call_jax(sin_add, (a, b))
    before = jax_cache_info().traces
    for _ in range(3):
        out = opreg.call_jax(sin_add, (opreg.call_jax(sin_add, (a, b)), b))
        torch_xla.sync()
    assert jax_cache_info().traces == before
    torch.testing.assert_close(out.cpu(), torch.sin(torch.sin(a.cpu()) + b.cpu()) + b.cpu())
