"""Gradients asked of an op without backward formula: an error, eager and compiled, or a line in the log."""

import logging
from typing import Annotated

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from opreg import register_op
from opreg.errors import AutogradError

# torch's own warning about the same, from a hook on the result, comes before the error.
pytestmark = pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")


@register_op("t_no_formula::scale")
def scale(x: Annotated[Tensor, "n"], by: Annotated[Tensor, "n"] | None = None) -> Annotated[Tensor, "n"]:
    return x * 2 if by is None else x * by


@register_op("t_no_formula::pair")
def pair(xs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return xs[0] * 1, (xs[1] * 2).long()


@register_op("t_no_formula::each")
def each(xs: list[Tensor]) -> list[Tensor]:
    return [x * 2 for x in xs]


@register_op("t_no_formula::fill", mutates_args=("out", "more"))
def fill(x: Annotated[Tensor, "n"], out: Annotated[Tensor, "n"], more: list[Tensor] | None = None) -> None:
    # Past torch, as a kernel in C++ does.
    for one in (out, *(more or ())):
        one.detach().numpy()[:] = x.detach().numpy()


def wants() -> Tensor:
    return torch.ones(3, requires_grad=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: scale(wants()),
        lambda: scale(torch.ones(3), wants()),
        lambda: scale.overload(wants()),
        lambda: pair([wants(), torch.ones(3)])[0],
        lambda: each([torch.ones(3), wants()])[1],
        lambda: scale(scale(wants())),
    ],
    ids=["first", "optional", "overload", "list", "list of results", "twice"],
)
def test_backward_is_an_error_that_names_the_op_and_the_cure(call) -> None:
    result = call()
    torch.testing.assert_close(result.detach() > 0, torch.ones(3, dtype=torch.bool))
    with pytest.raises(AutogradError, match=r"t_no_formula::\w+: backward was called, .*register_autograd"):
        result.sum().backward()


def test_where_no_gradient_is_wanted_nothing_changes() -> None:
    x = wants()
    with torch.no_grad():
        assert not scale(x).requires_grad
    assert not scale(x.detach()).requires_grad
    assert [type(result) for result in each([x])] == [torch.Tensor]
    assert not pair([x, x])[1].requires_grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_backward_of_a_compiled_graph_is_the_same_error(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    @register_op(f"t_no_formula::graph_{backend}")
    def scaled(x: Annotated[Tensor, "n d"], by: Tensor | None = None, s: float = 2.0) -> Annotated[Tensor, "n d"]:
        return x * s

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: scaled(x @ w, s=3.0).relu() + w.sum(), backend=backend, fullgraph=True)
    with caplog.at_level(logging.WARNING, logger="opreg"):
        for rows in (3, 5, 7):
            x, w = torch.ones(rows, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
            result = compiled(x, w)
            assert result[0, 0] == 28
            with pytest.raises(AutogradError, match=rf"graph_{backend}: backward was called, .*register_autograd"):
                result.sum().backward()
            with torch.no_grad():
                assert compiled(x, w)[0, 0] == 28
    assert not [record for record in caplog.records if record.name == "opreg"]


def test_a_compiled_graph_of_lists_refuses_as_well() -> None:
    compiled = torch.compile(lambda x: each([x, x + 1])[1] * 2, backend="aot_eager", fullgraph=True)
    result = compiled(wants())
    assert result.tolist() == [8, 8, 8]
    with pytest.raises(AutogradError, match="t_no_formula::each: backward was called"):
        result.sum().backward()


def test_a_gradient_past_the_op_still_passes_in_a_compiled_graph() -> None:
    x, y = wants(), wants()
    compiled = torch.compile(lambda x, y: scale(x.detach()) * y, backend="aot_eager", fullgraph=True)
    compiled(x, y).sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [2, 2, 2]
    assert x.grad is None


def test_a_formula_may_come_after_a_graph_that_refuses() -> None:
    @register_op("t_no_formula::later")
    def later(x: Annotated[Tensor, "n"]) -> Annotated[Tensor, "n"]:
        return x * 2

    def run() -> Tensor:
        torch._dynamo.reset()
        x = wants()
        torch.compile(lambda x: later(x), backend="aot_eager", fullgraph=True)(x).sum().backward()
        assert x.grad is not None
        return x.grad

    with pytest.raises(AutogradError):
        run()
    later.register_autograd(
        lambda ctx, grad: grad * ctx.factor, setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", 2)
    )
    assert run().tolist() == [2, 2, 2]
    x = wants()
    later(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]


def test_a_graph_traced_without_dynamo_logs_once_that_no_gradient_passes(caplog: pytest.LogCaptureFixture) -> None:
    @register_op("t_no_formula::exported")
    def exported(x: Annotated[Tensor, "n"]) -> Annotated[Tensor, "n"]:
        return x * 2

    with caplog.at_level(logging.WARNING, logger="opreg"):
        for _ in range(2):
            make_fx(lambda x: exported(x + 1), tracing_mode="fake")(wants())
    (line,) = [record.getMessage() for record in caplog.records if record.name == "opreg"]
    assert line.startswith("t_no_formula::exported: compiled with inputs that require gradients")


def test_a_formula_may_come_after_the_first_call() -> None:
    @register_op("t_no_formula::late")
    def late(x: Annotated[Tensor, "n"]) -> Annotated[Tensor, "n"]:
        return x * 2

    x = wants()
    late(x)
    late.register_autograd(lambda ctx, grad: grad * 2)
    (grad,) = torch.autograd.grad(late(x).sum(), x)
    assert grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("way", ["direct", "overload", "aot_eager"])
def test_what_an_op_writes_carries_no_gradient_and_that_is_logged_once(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill.op.gradless_logged = False
    torch._dynamo.reset()
    call = {"direct": fill, "overload": fill.overload}.get(way) or torch.compile(fill, backend=way, fullgraph=True)
    out = torch.zeros(3)
    with caplog.at_level(logging.WARNING, logger="opreg"):
        with torch.no_grad():
            call(wants(), out)
        assert not [record for record in caplog.records if record.name == "opreg"]
        call(wants(), out)
        call(wants(), out)
    assert out.tolist() == [1, 1, 1]
    assert not out.requires_grad
    (line,) = [record.getMessage() for record in caplog.records if record.name == "opreg"]
    assert line.startswith("t_no_formula::fill: called with inputs that require gradients, but it writes out, more")


@pytest.mark.parametrize("way", ["direct", "overload", "list"])
def test_a_write_over_what_a_backward_needs_is_an_error(way: str) -> None:
    x, out = wants(), torch.full((3,), 2.0)
    loss = (x * out).sum()
    if way == "list":
        fill(torch.zeros(3), torch.zeros(3), [out])
    else:
        (fill if way == "direct" else fill.overload)(torch.zeros(3), out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_of_inference_mode_may_be_written() -> None:
    with torch.inference_mode():
        out = torch.zeros(3)
    fill(torch.ones(3), out)
    assert out.tolist() == [1, 1, 1]
