"""The torch_tpu executor against a stand-in for torch.tpu.pallas.jax_op, on CPU tensors (there is no TPU here).

The stand-in takes what torch_tpu 0.2.0's own code takes (annotated parameters of a few types, static values inferred
from these, donated arguments left invalid) and refuses the rest; the schema is the one that the wheel's code makes.
"""

from __future__ import annotations

import inspect
import sys
import types

import jax
import jax.numpy as jnp
import pytest
import torch

import opreg
from opreg import jax_bridge_executors, jax_bridge_tpu
from opreg.jax_bridge import jax_cache_info

SCHEMA = "(Tensor[] donated, Tensor[] kept, SymInt[] places, str program) -> Tensor[]"
ARRAYS = list[jax.Array]


def jax_op(name, fn, /, *, donate_argnums=None):
    signature = inspect.signature(inspect.unwrap(fn), eval_str=True)
    kinds = {p.name: p.annotation for p in signature.parameters.values()}
    assert kinds == {"donated": ARRAYS, "kept": ARRAYS, "places": list[int], "program": str}
    assert signature.return_annotation == ARRAYS
    assert name.count("::") == 1
    jitted = jax.jit(fn, static_argnums=(2, 3), donate_argnums=donate_argnums, keep_unused=True)

    def run(donated, kept, places, program):
        jax_op.calls.append((len(donated), tuple(places)))
        arrays = [[jnp.array(tensor.numpy()) for tensor in tensors] for tensors in (donated, kept)]
        results = jitted(*arrays, tuple(places), program)
        for tensor in donated:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -99)
        return [torch.from_numpy(jax.device_get(result).copy()) for result in results]

    return torch.library.custom_op(name, run, mutates_args=(), schema=SCHEMA)


@pytest.fixture(scope="module")
def operator():
    """The executor's operator, made once: torch forgets no operator."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torch_tpu", "torch.tpu", "torch.tpu.pallas"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["torch.tpu.pallas"].jax_op = jax_op
        return jax_bridge_tpu._operator()


@pytest.fixture
def tpu(operator, monkeypatch):
    """Tensors on the CPU go the way of tensors on 'tpu'."""
    monkeypatch.setitem(jax_bridge_executors.EXECUTORS, "cpu", jax_bridge_executors.EXECUTORS["tpu"])
    monkeypatch.setattr(jax_op, "calls", [], raising=False)
    return jax_op


def tree_of(t, n):
    return {"s": t["a"] + n, "parts": [t["b"].sum(), None]}


def test_pytrees_static_values_and_64_bits_go_through_one_operator(tpu):
    for n in (2, 2.5, 2):
        given = {"a": torch.ones(2, 3), "b": torch.arange(4) + 2**40}
        found = opreg.call_jax(tree_of, (given, n))
        assert found["s"].tolist() == [[1 + n] * 3] * 2
        assert found["parts"][0].item() == 6 + 2**42
        assert found["parts"][1] is None
    assert tpu.calls == [(0, ())] * 3


def test_a_shape_is_traced_once_for_the_user(tpu):
    fn = lambda x: x * 3  # noqa: E731
    before = jax_cache_info().traces
    for _ in range(2):
        assert opreg.call_jax(fn, (torch.ones(2),)).tolist() == [3, 3]
    assert jax_cache_info().traces == before + 1


@opreg.register_jax_op("opregjaxtpu::append", mutates_args=("cache",))
def append(new: jax.Array, cache: jax.Array, at: int) -> jax.Array:
    return jax.lax.dynamic_update_slice(cache, new, (at, 0)), new.sum()


def test_a_written_argument_is_donated_and_gets_its_new_value(tpu):
    cache = torch.zeros(4, 2)
    total = torch.ops.opregjaxtpu.append(torch.ones(1, 2), cache, 2)  # not the direct call, which keeps its runner
    assert (total.item(), cache.sum(1).tolist()) == (2, [0, 0, 2, 0])
    assert tpu.calls == [(1, (1,))]


def test_a_view_and_an_argument_given_twice_are_not_donated(tpu):
    base = torch.zeros(8, 2)
    torch.ops.opregjaxtpu.append(torch.ones(1, 2), base[4:], 1)
    assert base.sum(1).tolist() == [0, 0, 0, 0, 0, 2, 0, 0]
    same = torch.ones(2, 2)
    torch.ops.opregjaxtpu.append(same, same, 0)
    assert same.sum(1).tolist() == [2, 2]
    assert tpu.calls == [(0, ())] * 2


def test_gradients_come_through_it(tpu):
    x = torch.randn(3, requires_grad=True)
    opreg.call_jax(lambda a: jnp.sin(a).sum(), (x,)).backward()
    torch.testing.assert_close(x.grad, x.detach().cos())
    assert len(tpu.calls) == 2


def test_an_op_made_from_jax_and_a_kernel_may_name_tpu():
    assert "tpu" in append.op.kernels[0].device_types
    assert jax_bridge_executors.EXECUTORS["tpu"] is jax_bridge_tpu.on_tpu


def test_without_torch_tpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tpu", None)
    with pytest.raises(opreg.KernelError, match=r"run on 'tpu' through torch_tpu.*pip install 'torch_tpu>=0.2.0'"):
        jax_bridge_tpu._find_jax_op()
