"""Ops that Inductor may see through: when it does, why it does not, and that nothing else changes."""

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from opreg import RegistrationError, digest, register_op, use_kernel

CALLS: list[str] = []


@register_op("t_fusion::square")
def square(x: Annotated[Tensor, "*n"]) -> Annotated[Tensor, "*n"]:
    return x * x


@square.register_kernel("cpu")
def by_hand(x: Tensor) -> Tensor:
    CALLS.append("by_hand")
    return torch.empty_like(x).copy_(x).mul_(x)


square.register_autograd(
    lambda ctx, g: 2 * g * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@pytest.fixture(autouse=True)
def as_registered() -> Iterator[None]:
    torch._dynamo.reset()
    CALLS.clear()
    op, kernels = square.op, list(square.op.kernels)
    yield
    op.fusion, op.kernels = None, kernels
    op.calls.reset()


def model(x: Tensor) -> Tensor:
    return square(x + 1) - 2


def calls_a_kernel(x: Tensor) -> bool:
    got, (code, *_) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    torch.testing.assert_close(got, (x + 1) ** 2 - 2)
    assert ("_opreg_t_fusion_square(" in code) == bool(CALLS)
    CALLS.clear()
    return "_opreg_t_fusion_square(" in code


def test_the_larger_priority_wins_and_a_change_recompiles() -> None:
    x = torch.randn(3, 4)
    assert calls_a_kernel(x)
    square.register_kernel("cpu", "inductor", priority=1)
    assert not calls_a_kernel(x)
    assert "fusion: compiled graphs compute the body, not a kernel" in str(square.explain(x))
    torch.testing.assert_close(square(x), x * x)
    assert CALLS == ["by_hand"], "eager calls still run the kernel"
    with use_kernel("t_fusion::square", "reference"):
        CALLS.clear()
        _, (code, *_) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        assert "_opreg_t_fusion_square(" in code
        assert "fusion: not in compiled graphs (use_kernel chose reference)" in str(square.explain(x))
    assert not calls_a_kernel(x)
    square.register_kernel("cpu", faster, priority=2)
    assert "fusion: not in compiled graphs (test_fusion/faster has priority 2, fusion 1)" in str(square.explain(x))
    assert calls_a_kernel(x)


def faster(x: Tensor) -> Tensor:
    return by_hand(x)


def test_gradient_and_strides_are_those_of_the_op() -> None:
    square.register_kernel(None, "inductor", priority=1)
    x = torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True)
    (want,), (got,) = (torch.autograd.grad(f(x).sum(), x) for f in (model, compiled))
    torch.testing.assert_close(got, want)
    turned = torch.randn(4, 3).t()
    made = torch.compile(lambda x: square(x), fullgraph=True)(turned)
    assert made.stride() == square(turned).stride() == (4, 1)
    torch.testing.assert_close(made, turned * turned)


def test_the_choice_is_in_the_cache_key() -> None:
    facts = [digest.of_op(square.op)]
    square.register_kernel("cpu", "inductor", priority=1)
    facts.append(digest.of_op(square.op))
    square.register_kernel("cpu", "inductor", priority=0)
    facts.append(digest.of_op(square.op))
    with use_kernel("t_fusion::square", "reference"):
        facts.append(digest.of_op(square.op))
    assert len(set(facts)) == 4


def test_ops_that_have_more_than_their_body_are_refused() -> None:
    @register_op("t_fusion::fill", mutates_args=("out",))
    def fill(out: Tensor) -> None:
        out.fill_(1)

    @register_op("t_fusion::declared")
    def declared(x: Annotated[Tensor, "n"]) -> Annotated[Tensor, "n"]: ...

    refused: list[tuple[Any, str]] = [(fill, "is for functional ops"), (declared, "needs a body to compile")]
    for op, why in refused:
        with pytest.raises(RegistrationError, match=why):
            op.register_kernel("cpu", "inductor")
    with pytest.raises(RegistrationError, match="takes any call, so it has no requires= or why_not="):
        square.register_kernel("cpu", "inductor", requires="torch")
