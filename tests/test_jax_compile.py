"""call_jax inside graphs: torch.compile with static and dynamic sizes, make_fx, torch.export, opcheck, fakes."""

from __future__ import annotations

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import opreg
from opreg import jax_bridge, library
from opreg.jax_bridge import jax_cache_clear, jax_cache_info, jax_cache_limits

Pair = collections.namedtuple("Pair", "left right")


def split_up(x, scale=1, **more):
    return {"z": [x * scale, (x.sum(), None)], "a": Pair(x.T, x[1:])} | {k: v + 1 for k, v in more.items()}


class Layer:
    def __init__(self, factor):
        self.factor = factor

    def apply(self, x):
        return x * self.factor


layer = Layer(3)
jitted = jax.jit(lambda x: x * 5)
constant = np.full(4, 2.0, np.float32)


def captured():
    factor = 7
    return lambda x: x * factor


seven = captured()


def check_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        torch.testing.assert_close(left, right)


CALLS = {
    "pytree": lambda x: opreg.call_jax(split_up, (x, 2), {"extra": x}),
    "keyword": lambda x: opreg.call_jax(split_up, (x,), {"scale": 2.5, "b": x, "a": x}),
    "partial": lambda x: opreg.call_jax(functools.partial(split_up, scale=3), (x,)),
    "method": lambda x: opreg.call_jax(layer.apply, (x,)),
    "jitted": lambda x: opreg.call_jax(jitted, (x,)),
    "library": lambda x: opreg.call_jax(jnp.cumsum, (x,), {"axis": -1}),
    "lambda": lambda x: opreg.call_jax(lambda a: a * 2, (x + 1,)) * 2,
    "closure": lambda x: opreg.call_jax(seven, (x,)),
    "numpy": lambda x: opreg.call_jax(lambda a, b: a + b, (x, constant)),
    "nested": lambda x: opreg.call_jax(lambda t: t["b"][0] - t["a"].left, ({"b": [x], "a": Pair(x + 1, None)},)),
    "none": lambda x: opreg.call_jax(lambda: jnp.arange(3.0), ()) + x[0, 0],
}


@pytest.mark.parametrize("name", CALLS)
def test_dynamo_makes_one_graph(name):
    call = CALLS[name]
    x = torch.randn(3, 4)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    check_equal(torch.compile(call, fullgraph=True, backend=backend)(x), call(x))
    assert len(graphs) == 1
    assert sum(node.target is library.overload("opreg::jax_call") for node in graphs[0].graph.nodes) == 1


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_inductor_equals_eager(dynamic):
    def model(x, y):
        both = opreg.call_jax(split_up, (x * 2, 3), {"y": y})
        return both["z"][0] + both["y"], both["a"].right.relu()

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for rows in (4, 9) if dynamic else (4,):
        x, y = torch.randn(rows, 6), torch.randn(rows, 6)
        check_equal(compiled(x, y), model(x, y))


@pytest.mark.parametrize(
    ("fn", "sizes"),
    [
        pytest.param(lambda x: x + 1, "n", marks=pytest.mark.slow),
        (lambda x: jnp.concatenate([x, x, x[:1]]), "2 * n + 1"),
        pytest.param(lambda x: x[::2], "(n + 1) // 2", marks=pytest.mark.slow),
        (lambda x: x[: x.shape[0] // 3], "n // 3"),
        (lambda x: jnp.pad(x, ((2, 3), (0, 0)))[:8], "min(n + 5, 8)"),
        pytest.param(lambda x: x.reshape(-1), "n * 4", marks=pytest.mark.slow),
        (lambda x: jnp.zeros((x.shape[0] % 5 + 1, 2)), "n % 5 + 1"),
        (lambda x: jnp.ones((x.shape[0] ** 2,)), "n ** 2"),
    ],
)
def test_one_graph_for_many_sizes(fn, sizes):
    def run(x):
        return opreg.call_jax(fn, (x,))

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=frames)
    for n in (7, 9, 13, 31):
        x = torch.randn(n, 4)
        out = compiled(x)
        assert out.shape[0] == eval(sizes, {"n": n, "min": min})
        torch.testing.assert_close(out, run(x))
    assert frames.frame_count == 1


def test_sizes_that_jax_must_know_become_numbers_and_the_log_says_why(caplog):
    def fn(x):
        return x.reshape(2, -1).sum(0)

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: opreg.call_jax(fn, (x,)), fullgraph=True, dynamic=True, backend=frames)
    with caplog.at_level("INFO", "opreg.jax"):
        for n in (4, 6):
            x = torch.randn(n)
            torch.testing.assert_close(compiled(x), x.reshape(2, -1).sum(0))
    assert frames.frame_count == 2
    assert "sizes become numbers" in caplog.text
    assert "divide evenly" in caplog.text


def test_a_symbolic_integer_argument_is_a_static_value():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: opreg.call_jax(lambda a, n: a * n, (x, x.shape[0])), fullgraph=True, dynamic=True, backend="eager"
    )
    for n in (2, 5):
        assert compiled(torch.ones(n)).tolist() == [n] * n


def test_static_values_are_told_apart_by_type_in_graphs_too():
    def run(x, value):
        return opreg.call_jax(lambda a, v: jnp.asarray(v) + 0 * a.sum().astype(jnp.asarray(v).dtype), (x, value))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    x = torch.ones(2)
    assert [compiled(x, v).dtype for v in (1, 1.0, True)] == [run(x, v).dtype for v in (1, 1.0, True)]


def make_scale(factor):
    return lambda x, _=None: x * factor


held = {"fn": make_scale(2), "jitted": jax.jit(make_scale(2)), "method": Layer(2), "static": make_scale(2)}
CHANGES = {
    "fn": (lambda x: opreg.call_jax(held["fn"], (x,)), lambda: make_scale(3)),
    "jitted": (lambda x: opreg.call_jax(held["jitted"], (x,)), lambda: jax.jit(make_scale(3))),
    "method": (lambda x: opreg.call_jax(held["method"].apply, (x,)), lambda: Layer(3)),
    "static": (lambda x: opreg.call_jax(lambda a, f: f(a), (x, held["static"])), lambda: make_scale(3)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_function_of_the_same_code_is_another_function(name, monkeypatch):
    call, make = CHANGES[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)).item() == 2
    monkeypatch.setitem(held, name, make())
    assert compiled(torch.ones(1)).item() == 3


def same_name(first):
    class Result(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor

    class Other(NamedTuple):
        b: torch.Tensor
        a: torch.Tensor

    Other.__qualname__, Other.__name__ = Result.__qualname__, Result.__name__
    kind = Result if first else Other
    return kind, lambda x: kind(a=x + 1, b=x + 2)


def test_results_are_rebuilt_with_their_own_class_not_one_of_its_name():
    (first, make_first), (second, make_second) = same_name(True), same_name(False)

    def both(x):
        return make_first(x), make_second(x)

    compiled = torch.compile(lambda x: opreg.call_jax(both, (x,)), fullgraph=True, backend="eager")
    for out, kind in zip(compiled(torch.ones(1)), (first, second), strict=True):
        assert type(out) is kind
        assert (out.a.item(), out.b.item()) == (2, 3)


def test_entering_a_graph_looks_at_nothing_of_the_bridge():
    """Each guard costs some ns at every call: those on the bridge's own functions would be more than on the user's."""
    guards = []

    def call(x):
        return opreg.call_jax(split_up, (x, 2), {"extra": x})

    torch._dynamo.reset()
    torch._dynamo.optimize("eager", nopython=True, guard_export_fn=guards.extend)(call)(torch.randn(3, 4))
    names = [guard.name if isinstance(guard.name, str) else guard.name() for guard in guards]
    assert any("split_up" in name for name in names)
    assert [name for name in names if "jax_bridge" in name] == []


def test_gradients_through_inductor():
    def model(x, w):
        return (opreg.call_jax(lambda a, b: jnp.tanh(a @ b), (x, w)) * 2).sum()

    torch._dynamo.reset()
    x, w = torch.randn(4, 3), torch.randn(3, 5, requires_grad=True)
    torch.compile(model, fullgraph=True)(x, w).backward()
    got, w.grad = w.grad, None
    (2 * torch.tanh(x @ w)).sum().backward()
    torch.testing.assert_close(got, w.grad)


def test_the_unchanged_side_of_a_graph_does_not_trace_again():
    def fn(a):
        return a * 3

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: opreg.call_jax(fn, (x,)) + 1, fullgraph=True, backend="aot_eager")
    compiled(torch.ones(4))
    before = jax_cache_info()
    for _ in range(3):
        compiled(torch.ones(4))
    assert jax_cache_info().traces == before.traces
    assert jax_cache_info().calls == before.calls + 3


def test_a_graph_survives_eviction_and_clearing():
    compiled = torch.compile(lambda x: opreg.call_jax(lambda a: a * 11, (x,)), fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)).item() == 11
    try:
        jax_cache_limits(entries=1)
        opreg.call_jax(split_up, (torch.ones(2, 2),))
        assert compiled(torch.ones(1)).item() == 11
        jax_cache_clear()
        assert compiled(torch.ones(1)).item() == 11
    finally:
        jax_cache_limits(entries=512)


def test_make_fx_and_fake_tensors():
    x = torch.randn(3, 4)
    graph = make_fx(CALLS["pytree"], tracing_mode="symbolic")(x)
    check_equal(graph(torch.ones(5, 6)), CALLS["pytree"](torch.ones(5, 6)))
    with torch._subclasses.FakeTensorMode():
        fake = opreg.call_jax(split_up, (torch.empty(3, 4, dtype=torch.bfloat16), 2))
    assert fake["a"].left.shape == (4, 3)
    assert fake["a"].left.dtype is torch.bfloat16


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_size(strict):
    class Model(torch.nn.Module):
        def forward(self, x):
            return opreg.call_jax(split_up, (x, 2))["z"][0].relu()

    rows = torch.export.Dim("rows", min=3, max=64)
    program = torch.export.export(Model(), (torch.randn(4, 3),), dynamic_shapes={"x": {0: rows}}, strict=strict)
    for n in (3, 9):
        x = torch.randn(n, 3)
        torch.testing.assert_close(program.module()(x), (x * 2).relu())


SAMPLES = {
    "one": (lambda a: a * 2, [torch.randn(3, 4)]),
    "two results": (lambda a, b: (a @ b, a.T), [torch.randn(3, 4), torch.randn(4, 2)]),
    "gradients": (
        lambda a, b: (jnp.tanh(a) * b, b + 1),
        [torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)],
    ),
    "strided": (lambda a: a.sum(0), [torch.randn(4, 6)[:, ::2]]),
    "integers": (lambda a, i: a[i], [torch.randn(5, requires_grad=True), torch.tensor([0, 3])]),
    "zero size": (lambda a: a + 1, [torch.randn(0, 3)]),
    "bfloat16": (lambda a: a + 1, [torch.randn(2, 3).bfloat16()]),
}


@pytest.mark.parametrize(
    "name",
    [name if name in ("gradients", "integers") else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLES],
)
def test_opcheck(name):
    fn, tensors = SAMPLES[name]
    function = jax_bridge.find_function(fn)
    leaves, tree = jax.tree.flatten((tuple(tensors), {}))
    program, _ = jax_bridge.find_program(function, tree, leaves)
    result = library.opcheck(library.overload("opreg::jax_call"), (tensors, program.name), {})
    assert set(result.values()) == {"SUCCESS"}, result


def test_a_graph_that_names_a_program_of_another_process_is_told_so():
    with pytest.raises(opreg.KernelError, match=r"no JAX program 'gone#00\.1' in this process.*torch\.export\.export"):
        library.overload("opreg::jax_call")([torch.ones(1)], "gone#00.1")


def test_results_a_graph_cannot_hold_are_named():
    @jax.tree_util.register_pytree_node_class
    class Box:
        def __init__(self, item):
            self.item = item

        def tree_flatten(self):
            return (self.item,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    fn = lambda a: Box(a + 1)  # noqa: E731
    assert opreg.call_jax(fn, (torch.ones(1),)).item.item() == 2
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"Box, which torch.compile cannot rebuild inside a graph"):
        torch.compile(lambda x: opreg.call_jax(fn, (x,)), fullgraph=True, backend="eager")(torch.ones(1))


def test_inductor_s_code_calls_the_bridge_without_the_dispatcher():
    fn = torch.compile(lambda x: opreg.call_jax(split_up, (x * 2, 3))["z"][0] + 1, fullgraph=True)
    x = torch.randn(4, 4)
    out, (code,) = run_and_get_code(fn, x)
    torch.testing.assert_close(out, x * 6 + 1)
    assert "= _opreg_jax_call([" in code
    assert "torch.ops.opreg.jax_call.default(" not in code
