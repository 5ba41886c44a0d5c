"""Gradients of JAX functions in torch: gradcheck of both orders, vmap, functional transforms, a training run."""

from __future__ import annotations

import gc
import weakref

import jax.numpy as jnp
import pytest
import torch

import opreg
from opreg.jax_bridge import jax_cache_info

FUNCTIONS = {
    "product": (lambda a, b: jnp.sin(a) * b, [(3,), (3,)]),
    "matrix product": (lambda a, b: jnp.tanh(a @ b), [(2, 3), (3, 2)]),
    "two results": (lambda a, b: {"s": (a * b).sum(), "p": jnp.exp(a / 3)}, [(3,), (3,)]),
    "one result unused": (lambda a, b: (a * a * b, b), [(2,), (2,)]),
}


def flat(result):
    return tuple(result.values()) if isinstance(result, dict) else result


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.complex128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_first_and_second_order(name, dtype):
    fn, shapes = FUNCTIONS[name]
    args = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]

    def call(*tensors):
        return flat(opreg.call_jax(fn, tensors))

    assert torch.autograd.gradcheck(call, args)
    assert torch.autograd.gradgradcheck(call, args)


def test_gradients_of_complex_functions():
    test_gradcheck_first_and_second_order("product", torch.complex128)


def test_only_what_needs_a_gradient_gets_one():
    def f(x, index, y, n):
        return x[index] * y * n, index + 1

    x = torch.randn(5, requires_grad=True)
    index, y = torch.tensor([0, 3, 3]), torch.randn(3)
    out, moved = opreg.call_jax(f, (x, index, y, 2))
    assert not moved.requires_grad
    assert moved.tolist() == [1, 4, 4]
    out.sum().backward()
    expected = torch.zeros(5).index_add(0, index, 2 * y)
    torch.testing.assert_close(x.grad, expected)
    with torch.no_grad():
        assert not opreg.call_jax(f, (x, index, y, 2))[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gradient_has_the_type_of_its_tensor(dtype):
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    opreg.call_jax(lambda a: (a.astype(jnp.float32) ** 2).sum(), (x,)).backward()
    assert x.grad.dtype is dtype
    assert x.grad.tolist() == [2, 2, 2]


def test_a_graph_keeps_its_function_alive_and_no_longer():
    x = torch.ones(3, requires_grad=True)
    f = lambda a: a * a  # noqa: E731
    alive = weakref.ref(f)
    out = opreg.call_jax(f, (x,))
    del f
    gc.collect()
    out.sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    del out
    gc.collect()
    assert alive() is None


def test_backward_is_traced_once():
    def f(a):
        return jnp.cos(a)

    x = torch.ones(3, requires_grad=True)
    opreg.call_jax(f, (x,)).sum().backward()
    before = jax_cache_info().traces
    for _ in range(3):
        opreg.call_jax(f, (x,)).sum().backward()
    assert jax_cache_info().traces == before


def test_an_overwritten_argument_is_noticed():
    x = torch.ones(3, requires_grad=True)
    y = x * 1
    out = opreg.call_jax(lambda a: a * a, (y,))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_vmap_and_functional_gradients():
    def f(a, b):
        return jnp.dot(a, b), jnp.sin(a)

    a, b = torch.randn(4, 3), torch.randn(3)
    dots, sines = torch.vmap(lambda x: opreg.call_jax(f, (x, b)))(a)
    torch.testing.assert_close(dots, a @ b)
    torch.testing.assert_close(sines, a.sin())
    columns = torch.vmap(lambda x, y: opreg.call_jax(f, (x, y))[0], in_dims=(1, 0))(a.t().contiguous(), a)
    torch.testing.assert_close(columns, (a * a).sum(1))
    nested = torch.vmap(torch.vmap(lambda x: opreg.call_jax(jnp.cumsum, (x,))))(torch.ones(2, 3, 4))
    torch.testing.assert_close(nested, torch.ones(2, 3, 4).cumsum(-1))
    per_row = torch.vmap(torch.func.grad(lambda x: opreg.call_jax(f, (x, b))[1].sum()))(a)
    torch.testing.assert_close(per_row, a.cos())
    jacobian = torch.func.jacrev(lambda x: opreg.call_jax(jnp.sin, (x,)))(b)
    torch.testing.assert_close(jacobian, torch.diag(b.cos()))
    hessian = torch.func.jacrev(torch.func.jacrev(lambda x: opreg.call_jax(lambda v: (v**3).sum(), (x,))))(b)
    torch.testing.assert_close(hessian, torch.diag(6 * b))


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_module_with_a_jax_layer_trains_like_the_torch_one(compiled):
    def layer(x, w, b):
        return jnp.maximum(x @ w + b, 0)

    class Net(torch.nn.Module):
        def __init__(self, through_jax):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.w1 = torch.nn.Parameter(torch.randn(4, 16, generator=generator) * 0.5)
            self.b1 = torch.nn.Parameter(torch.zeros(16))
            self.w2 = torch.nn.Parameter(torch.randn(16, 1, generator=generator) * 0.3)
            self.through_jax = through_jax

        def forward(self, x):
            hidden = (
                opreg.call_jax(layer, (x, self.w1, self.b1)) if self.through_jax else (x @ self.w1 + self.b1).relu()
            )
            return hidden @ self.w2

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 4, generator=generator)
    y = x.prod(1, keepdim=True).tanh()

    def train(net):
        run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled and net.through_jax else net
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(run(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, plain = train(Net(True)), train(Net(False))
    assert ours[-1] < 0.2 * ours[0]
    assert ours == pytest.approx(plain, rel=2e-3)
