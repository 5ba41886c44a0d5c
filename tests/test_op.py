"""register_op from the outside: what it returns, how it is called, how it compiles, what it refuses."""

import threading
from typing import Annotated

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from opreg import (
    ContractError,
    DuplicateOpError,
    LayerName,
    RegistrationError,
    SignatureError,
    current_layer,
    forward_context,
    register_op,
    use_kernel,
)


@register_op("t_op::scale")
def scale(x: Annotated[Tensor, "*n d"], w: Annotated[Tensor, "d"], by: float = 2.0) -> Annotated[Tensor, "*n d"]:
    """Scale rows."""
    return x * w * by


@register_op("t_op::attend", mutates_args=("out",), kind="attention")
def attend(x: Annotated[Tensor, "t c"], out: Annotated[Tensor, "t c"], layer_name: LayerName) -> None:
    """Multiply by the layer."""
    layer, _ = current_layer(layer_name)
    out.copy_(x * layer)


@register_op("t_op::unannotated")
def unannotated(x: Tensor, ws: list[Tensor], bias: Tensor | None = None, *, n: int = 1) -> Tensor:
    """No contract: the fake runs the body."""
    return torch.stack(ws).sum(0) * x * n if bias is None else x + bias


X, W = torch.arange(12.0).reshape(3, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_is_a_plain_function_of_the_same_name_and_arity():
    assert scale.__name__ == "scale"
    assert scale.__doc__ == "Scale rows."
    assert scale.__module__ == __name__
    assert scale.name == "t_op::scale"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'w'"):
        scale(X)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        scale(X, W, z=1)


def test_eager_equals_the_operator():
    expected = X * W * 2
    assert torch.equal(scale(X, W), expected)
    assert torch.equal(torch.ops.t_op.scale(X, W), expected)
    assert torch.equal(scale(w=W, x=X, by=1.0), X * W)
    assert torch.equal(unannotated(X, [W, W], n=3), 6 * W * X)
    assert torch.equal(unannotated(X, [], bias=W), X + W)


def test_bare_decorator_takes_name_from_module_and_function():
    @register_op
    def halve(x: Tensor) -> Tensor:
        return x / 2

    namespace = __name__.split(".")[0]
    assert halve.name == f"{namespace}::halve"
    assert torch.equal(halve(X), X / 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic)
    def model(x, w):
        return scale(scale(x, w) + 1, w, 0.5)

    for rows in (3, 5):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(model(x, W), scale(scale(x, W) + 1, W, 0.5))


def test_compiling_the_op_itself():
    torch.testing.assert_close(torch.compile(scale, fullgraph=True)(X, W), X * W * 2)


def test_one_graph_for_many_sizes():
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm

    model = torch.compile(lambda x, w: scale(x, w) + 1, backend=backend, fullgraph=True, dynamic=True)
    for rows in (2, 3, 7, 30):
        model(torch.randn(rows, 4), W)
    assert len(graphs) == 1


def test_wrong_sizes_are_refused_in_every_way_of_calling():
    message = r"t_op::scale: dim 'd' is 7 in w but 4 in x\. Called with x: f32\[3, 4\] \('\*n d'\), w: f32\[7\] \('d'\)"
    wrong = torch.ones(7)
    for call in (scale, torch.ops.t_op.scale, scale.overload):
        with pytest.raises(ContractError, match=message):
            call(X, wrong)
    with pytest.raises(Exception, match="dim 'd' is 7 in w but 4 in x"):
        torch.compile(scale, fullgraph=True, dynamic=False)(X, wrong)


class Tagged(Tensor):
    """A tensor subclass that must not be bypassed."""

    calls: list = []  # noqa: RUF012 - a log for the test

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_see_the_operator():
    Tagged.calls.clear()
    result = scale(X.as_subclass(Tagged), W)
    assert scale.overload in Tagged.calls
    assert isinstance(result, Tagged)


def test_fake_mode_make_fx_and_meta():
    with FakeTensorMode() as mode:
        fake = scale(mode.from_tensor(X), mode.from_tensor(W))
    assert fake.shape == X.shape
    graph = make_fx(lambda x, w: scale(x, w))(X, W).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [scale.overload]
    assert scale(X.to("meta"), W.to("meta")).device.type == "meta"


def test_function_mode_and_profiler_see_the_operator():
    from torch.overrides import TorchFunctionMode

    seen = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Spy():
        scale(X, W)
    assert scale.overload in seen
    with torch.autograd.profiler.profile() as prof:
        scale(X, W)
    assert "t_op::scale" in {event.name for event in prof.function_events}


def test_dispatch_mode_sees_the_operator_on_plain_tensors():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    scale(X, W)  # the first call of a device always goes through the dispatcher; the direct path starts with the second
    with Spy():
        scale(X, W)
    assert seen[0] is scale.overload


def test_export_keeps_the_operator():
    class Model(torch.nn.Module):
        def forward(self, x, w):
            return scale(x, w)

    for strict in (False, True):
        program = torch.export.export(Model(), (X, W), strict=strict)
        assert scale.overload in {node.target for node in program.graph.nodes}


def test_threads_call_at_once():
    results = []

    def work():
        for _ in range(50):
            results.append(torch.equal(scale(X, W), X * W * 2))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 200


def model(x):
    first = torch.empty_like(x)
    attend(x, first, "layers.0")
    second = torch.empty_like(x)
    attend(first, second, "layers.1")
    return second + 1


LAYERS = {"layers.0": 2.0, "layers.1": 3.0}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_layers_are_found_by_name(backend):
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with forward_context(layers=LAYERS, metadata="step"):
        torch.testing.assert_close(model(X), X * 6 + 1)
        torch.testing.assert_close(compiled(X), X * 6 + 1)
    with forward_context(layers={"layers.0": 5.0, "layers.1": 1.0}, metadata="step"):
        torch.testing.assert_close(compiled(X), X * 5 + 1)


def test_torch_ops_takes_a_plain_string_for_the_layer():
    out = torch.empty_like(X)
    with forward_context(layers=LAYERS, metadata="step"):
        torch.ops.t_op.attend(X, out, "layers.1")
    torch.testing.assert_close(out, X * 3)


def test_layer_names_are_inputs_of_the_graph():
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm.graph)
        return gm

    with forward_context(layers=LAYERS, metadata="step"):
        torch.compile(model, backend=backend, fullgraph=True)(X)
    (graph,) = graphs
    handles = [node.args[2] for node in graph.nodes if node.target is attend.overload]
    assert [handle.op for handle in handles] == ["placeholder", "placeholder"]
    assert not any("layers" in str(arg) for node in graph.nodes for arg in node.args if isinstance(arg, str))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_profiling_run_zeroes_outputs_and_calls_no_kernel(compiled):
    run = torch.compile(model, fullgraph=True) if compiled else model
    with forward_context(layers={"layers.0": None, "layers.1": None}, metadata=None):
        assert torch.equal(run(X), torch.ones_like(X))
    out = torch.full_like(X, float("nan"))
    with forward_context(layers=LAYERS):
        attend(X, out, "layers.0")
    assert torch.equal(out, torch.zeros_like(X))


def test_the_same_declaration_may_be_met_twice_but_no_other():
    def declare(by: float):
        if by == 1.0:

            @register_op("t_op::twice")
            def twice(x: Tensor) -> Tensor:
                return x * 2
        else:

            @register_op("t_op::twice")
            def twice(x: Tensor) -> Tensor:
                return x * 3 + 1

        return twice

    assert declare(1.0) is declare(1.0)
    with pytest.raises(DuplicateOpError, match=r"t_op::twice is already registered at .*test_op.py:\d+ with another"):
        declare(2.0)


def test_another_schema_under_the_name_shows_both():
    def again(x: Tensor, y: Tensor) -> Tensor: ...

    with pytest.raises(DuplicateOpError, match=r"schema \(Tensor x, Tensor w, float by=2.0\) -> Tensor \(this one: "):
        register_op("t_op::scale")(again)


def test_a_foreign_operator_of_the_name_is_refused():
    library = torch.library.Library("t_op_foreign", "FRAGMENT")
    library.define("f(Tensor x) -> Tensor")

    def f(x: Tensor) -> Tensor: ...

    with pytest.raises(DuplicateOpError, match="already a torch operator, defined outside opreg"):
        register_op("t_op_foreign::f")(f)
    # The failed name is free again in the registry, and the foreign operator is untouched.
    with pytest.raises(DuplicateOpError, match="already a torch operator"):
        register_op("t_op_foreign::f")(f)


@pytest.mark.parametrize("name", ["scale", "a:b", "a::b::c", "1a::b", "a::b.c"])
def test_names_are_checked(name):
    with pytest.raises(RegistrationError, match="write 'namespace::name'"):
        register_op(name)(lambda x: x)


def test_only_functions_are_decorated():
    with pytest.raises(SignatureError, match="decorates Python functions; got builtin_function_or_method"):
        register_op("t_op::sin")(torch.sin)


def test_autograd_formula_and_its_absence():
    @register_op("t_op::cube")
    def cube(x: Annotated[Tensor, "*n"]) -> Annotated[Tensor, "*n"]:
        return x**3

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    cube.register_autograd(lambda ctx, g: 3 * g * ctx.saved_tensors[0] ** 2, setup_context=setup_context)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cube, (x,))
    assert torch.autograd.gradcheck(torch.compile(cube, backend="aot_eager", fullgraph=True), (x,))
    with pytest.raises(RegistrationError, match="mutates out, so it can have no backward formula"):
        attend.register_autograd(lambda ctx, g: g)


def test_vmap_rule_gets_every_argument():
    @register_op("t_op::shift")
    def shift(x: Annotated[Tensor, "*n"], by: float = 1.0, *, flip: bool = False) -> Annotated[Tensor, "*n"]:
        return -(x + by) if flip else x + by

    @shift.register_vmap
    def rule(info, in_dims, x, by, *, flip):
        assert in_dims[1:] == (None, None)
        return shift(x, by, flip=flip), in_dims[0]

    assert torch.equal(torch.func.vmap(shift)(X), X + 1)


def test_fake_order_explicit_beats_contract():
    @register_op("t_op::first_rows")
    def first_rows(x: Annotated[Tensor, "t d"], n: int) -> Annotated[Tensor, "n d"]:
        return x[:n].clone()

    with FakeTensorMode() as mode:
        assert first_rows(mode.from_tensor(X), 2).shape == (2, 4)
    first_rows.register_fake(lambda x, n: x.new_empty(n, 99))
    with FakeTensorMode() as mode:
        assert first_rows(mode.from_tensor(X), 2).shape == (2, 99)
    with pytest.raises(SignatureError, match=r"fake has parameters \(x, m\) but the op has \(x, n\)"):
        first_rows.register_fake(lambda x, m: x)


def test_output_dtype_may_follow_another_argument():
    from opreg import like

    @register_op("t_op::follow")
    def follow(
        i: Annotated[Tensor, "t", torch.int32], q: Annotated[Tensor, "t d"]
    ) -> tuple[Annotated[Tensor, "t", like("q")], Annotated[Tensor, "d t", torch.float64]]:
        return q[:, 0] * i, q.T.double().contiguous()

    i = torch.arange(3, dtype=torch.int32)
    torch.library.opcheck(follow.overload, (i, X))
    with pytest.raises(
        ContractError, match=r"i has dtype torch.int64; it must be torch.int32; convert with .to\(torch.int32\)"
    ):
        follow(i.long(), X)


def test_use_kernel_inside_a_compiled_call():
    @register_op("t_op::which")
    def which(x: Annotated[Tensor, "*n"]) -> Annotated[Tensor, "*n"]:
        return x * 0

    @which.register_kernel("cpu")
    def fast(x: Tensor) -> Tensor:
        return x * 0 + 1

    compiled = torch.compile(lambda x: which(x), backend="aot_eager", fullgraph=True)
    assert compiled(X).unique().tolist() == [1.0]
    with use_kernel("t_op::which", "reference"):
        assert compiled(X).unique().tolist() == [0.0]
    assert compiled(X).unique().tolist() == [1.0]


def test_a_parameter_named_mode_works_in_eager_and_is_explained_where_compilers_fail(caplog):
    @register_op("t::with_mode", mutates_args="out")
    def with_mode(x: Tensor, out: Tensor, mode: int) -> None:
        out.copy_(x * mode)

    out = torch.zeros(3)
    with_mode(torch.ones(3), out, 3)
    assert out.tolist() == [3, 3, 3]
    with pytest.raises(Exception, match="argument 'mode'"):
        torch.compile(lambda x, out: with_mode(x, out, 3), backend="aot_eager")(torch.ones(3), out)
    assert any("t::with_mode: a parameter named 'mode'" in record.getMessage() for record in caplog.records)
