"""Gradients asked of an op without backward formula: an error in eager mode, a line in the log when compiled."""

import logging
from typing import Annotated

import pytest
import torch
from torch import Tensor

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


def test_a_compiled_graph_says_once_that_no_gradient_passes(caplog: pytest.LogCaptureFixture) -> None:
    x = wants()
    with caplog.at_level(logging.WARNING, logger="opreg"):
        for backend in ("aot_eager", "eager"):
            torch._dynamo.reset()
            torch.compile(lambda x: scale(x + 1), backend=backend, fullgraph=True)(x)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "opreg"]
    assert line.startswith("t_no_formula::scale: compiled with inputs that require gradients")


def test_tensors_in_a_list_are_seen_by_compilers_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="opreg"):
        torch.compile(lambda x: pair([x, x])[0], backend="aot_eager", fullgraph=True)(wants())
    assert any(record.getMessage().startswith("t_no_formula::pair: compiled") for record in caplog.records)


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
        assert not caplog.records
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
