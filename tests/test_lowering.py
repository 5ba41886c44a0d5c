"""Inductor's Python wrapper calls the kernel's function; nothing else about the graph changes."""

import subprocess
import sys
from types import FunctionType
from typing import Annotated

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from opreg import LayerName, current_layer, forward_context, register_op, use_kernel
from opreg.call_cpu import CpuCall

D = Annotated[Tensor, "*n"]


@register_op("t_lowering::add_one")
def add_one(x: D) -> D:
    return x + 1


@register_op("t_lowering::both")
def both(x: D, *, k: int = 1) -> tuple[D, D]:
    return x + k, x - k


@register_op("t_lowering::attend", mutates_args=("out",))
def attend(x: D, out: D, layer_name: LayerName) -> None:
    layer, _ = current_layer(layer_name)
    out.copy_(x * layer)


def model(x):
    out = torch.empty_like(x)
    attend(add_one(x), out, "layer")
    a, b = both(out, k=3)
    return a * b


X = torch.randn(6)
CONTEXT = {"layers": {"layer": 2.0}, "metadata": "step"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_calls_the_function_not_the_dispatcher(dynamic):
    with forward_context(**CONTEXT):
        expected = model(X)
        result, (code,) = run_and_get_code(torch.compile(model, fullgraph=True, dynamic=dynamic), X)
    torch.testing.assert_close(result, expected)
    for op in ("add_one", "both", "attend"):
        assert f"_opreg_t_lowering_{op}(" in code
        assert f"torch.ops.t_lowering.{op}.default(" not in code


@register_op("t_lowering::scaled")
def scaled(x: D, by: float = 2.0) -> D:
    return x * by


def plain(x, by):
    return x * by + 1


scaled.register_kernel("cpu", plain)


def test_cpp_wrapper_calls_an_operator_that_calls_the_function():
    def program(x):
        return scaled(model(x)) + scaled(x, 3.0)

    with forward_context(**CONTEXT):
        compiled = torch.compile(program, fullgraph=True, options={"cpp_wrapper": True})
        expected = program(X)
        result, (code,) = run_and_get_code(compiled, X)
        torch.testing.assert_close(result, expected)
        for op in ("add_one", "both", "attend", "scaled"):
            assert f'"opreg_compiled_t_lowering::{op}"' in code
        with use_kernel("t_lowering::scaled", "reference"):
            torch.testing.assert_close(compiled(X), expected - 2)
        torch.testing.assert_close(compiled(X), expected)


def test_the_function_that_cpp_calls_runs_the_kernel_s_code_where_it_means_the_same():
    def ran(run, *args, **kwargs):
        call.use(run)
        return call.function(*args, **kwargs), call.function.__code__ is run.__code__

    call = CpuCall(scaled.op.spec, (2.0,), {}, plain)
    assert ran(plain, 1.0) == (3.0, True)
    assert ran(lambda x, by: x - by, 1.0, 5.0) == (-4.0, True)
    assert ran(lambda *args: args, 1.0) == ((1.0, 2.0), False)
    assert ran(lambda x, by, more=7: (x, by, more), 1.0) == ((1.0, 2.0, 7), False)
    assert ran(lambda x, by, inner=call: x, 1.0) == (1.0, False)
    assert ran(lambda x, by: (x, by, call.function), 1.0)[1] is False, "a closure"
    other = FunctionType(plain.__code__, {}, "other")
    assert ran(other, 1.0) == (3.0, False)
    call.use(min)
    assert call.function(1.0) == 1.0

    keyword = CpuCall(both.op.spec, (), {"k": 1}, lambda x, *, k: x + k)
    assert keyword.function(1) == 2
    assert keyword.function(1, k=4) == 5
    keyword.use(lambda x, *, other=3: x)
    with pytest.raises(TypeError, match="unexpected keyword"):
        keyword.function(1)


def test_a_forced_kernel_is_heeded_inside_a_compiled_graph():
    @register_op("t_lowering::which")
    def which(x: D) -> D:
        return x * 0

    which.register_kernel("cpu", lambda x: x * 0 + 1)
    compiled = torch.compile(lambda x: which(x) + 1, fullgraph=True)
    assert compiled(X).unique().tolist() == [2.0]
    with use_kernel("t_lowering::which", "reference"):
        assert compiled(X).unique().tolist() == [1.0]
    assert compiled(X).unique().tolist() == [2.0]


def test_layout_follows_the_tags():
    seen = {}

    def declare(name, tags):
        @register_op(f"t_lowering::{name}", tags=tags)
        def op(x: Annotated[Tensor, "a b"]) -> Annotated[Tensor, "a b"]:
            seen[name] = x.stride()
            return x.contiguous().clone()

        return op

    exact = declare("exact", (torch.Tag.needs_exact_strides,))
    flexible = declare("flexible", (torch.Tag.flexible_layout,))
    x = torch.randn(8, 4)
    for op in (exact, flexible):
        torch.testing.assert_close(
            torch.compile(lambda x, op=op: op((x * 2).t()) + 1, fullgraph=True)(x), 2 * x.t() + 1
        )
    assert seen["exact"] == (1, 4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_results_of_other_sizes_or_strides_than_the_fake_s_are_an_error(dynamic):
    made = []

    @register_op(f"t_lowering::made_{dynamic}")
    def op(x: Annotated[Tensor, "a b"]) -> Annotated[Tensor, "a b"]:
        return x.clone()

    op.register_fake(torch.empty_like)  # strides of a contract are made good, those of a fake are the kernel's duty
    op.register_kernel("cpu", lambda x: made[0](x))

    def compiled(n):
        return fn(torch.ones(n, 6))

    made[:] = [torch.clone]
    fn = torch.compile(lambda x: op(x.relu()) + 1, fullgraph=True, dynamic=dynamic)
    result, (code,) = run_and_get_code(fn, torch.ones(4, 6))
    assert ".stride() != " in code
    assert result.unique().tolist() == [2.0]
    assert compiled(4).shape == (4, 6)
    if dynamic:
        assert compiled(5).shape == (5, 6)
    for wrong in (lambda x: x.new_ones(4, 5), lambda x: x.new_ones(6, 4).t(), lambda x: x.new_ones(4, 6, 1)):
        made[:] = [wrong]
        with pytest.raises(AssertionError, match=r"expected size|wrong number of dimensions"):
            compiled(4)


def test_gradients_flow_through_the_direct_call():
    @register_op("t_lowering::cube")
    def cube(x: D) -> D:
        return x**3

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    cube.register_autograd(lambda ctx, g: 3 * g * ctx.saved_tensors[0] ** 2, setup_context=setup_context)
    x = torch.randn(5, requires_grad=True)
    torch.compile(lambda x: cube(x * 2).sum(), fullgraph=True)(x).backward()
    torch.testing.assert_close(x.grad, 24 * x.detach() ** 2)


SECOND_PROCESS = """
import torch
from opreg import register_op
from torch import Tensor

@register_op("t_lowering_cache::triple")
def triple(x: Tensor) -> Tensor:
    return x * 3

result = torch.compile(lambda x: triple(x + 1).sin(), fullgraph=True)(torch.zeros(3))
assert torch.allclose(result, torch.full((3,), 3.0).sin())
from torch._dynamo.utils import counters
print("hits", counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.parametrize("cpp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_graph_from_the_disk_cache_finds_its_op(tmp_path, cpp):
    import os

    # Not the folder of the program, which Python searches for modules: Inductor names folders ab, z3, ...
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    script = tmp_path / "program.py"
    script.write_text(SECOND_PROCESS.replace("fullgraph=True", f"fullgraph=True, options={{'cpp_wrapper': {cpp}}}"))
    run = [
        subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [p.stdout.strip() for p in run] == ["hits 0", "hits 1"]


def test_programs_that_differ_in_their_op_alone_are_compiled_apart():
    @register_op("t_lowering::plus")
    def plus(x: D) -> D:
        return x + 1

    @register_op("t_lowering::times")
    def times(x: D) -> D:
        return x * 10

    def program(x, op):
        return op(x) + 0

    # Neither has been called, so that neither has code written for it.
    compiled = torch.compile(program, backend="eager", fullgraph=True)
    assert compiled(torch.ones(1), plus).item() == 2
    assert compiled(torch.ones(1), times).item() == 10
