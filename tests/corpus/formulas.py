"""HAZARDS 8 and 9: formulas, batching rules and fakes that are right for the usual call only."""

from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import register_op

from .case import Case


def _square(ns: str) -> Any:
    @register_op(f"{ns}::square")
    def square(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x * x

    return square


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def good_formula(ns: str) -> Any:
    square = _square(ns)
    square.register_autograd(lambda ctx, grad: grad * 2 * ctx.saved_tensors[0], setup_context=_save)
    return square


def views_its_gradient(ns: str) -> Any:
    """The backward formula calls .view on the incoming gradient, which is strided behind a transposed result."""
    square = _square(ns)

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x = ctx.saved_tensors[0]
        return (grad.view(-1) * x.reshape(-1) * 2).view(x.shape)

    square.register_autograd(backward, setup_context=_save)
    return square


def reads_its_gradient_flat(ns: str) -> Any:
    """The backward formula reads the incoming gradient as if it were contiguous."""
    square = _square(ns)

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x = ctx.saved_tensors[0]
        try:
            flat = grad.as_strided(x.shape, (x.shape[1], 1))
        except RuntimeError:
            flat = grad.contiguous()
        return flat * 2 * x

    square.register_autograd(backward, setup_context=_save)
    return square


def writes_its_gradient(ns: str) -> Any:
    """The backward formula scales the incoming gradient in place, which other branches of the graph read."""
    square = _square(ns)
    square.register_autograd(lambda ctx, grad: grad.mul_(2) * ctx.saved_tensors[0], setup_context=_save)
    return square


def writes_what_it_saved(ns: str) -> Any:
    """The backward formula reuses the saved input as its buffer."""
    square = _square(ns)

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0].data.mul_(2).mul_(grad).clone()

    square.register_autograd(backward, setup_context=_save)
    return square


def saves_in_the_module(ns: str) -> Any:
    """Saves its input in a variable of the module: two calls, and the first one's gradient is of the second."""
    square = _square(ns)
    saved: dict[str, Tensor] = {}

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        saved["x"] = inputs[0]

    square.register_autograd(lambda ctx, grad: grad * 2 * saved["x"], setup_context=setup)
    return square


def forgets_to_sum(ns: str) -> Any:
    """The bias is added to every row, but its gradient is not summed over the rows."""

    @register_op(f"{ns}::shift")
    def shift(x: Annotated[Tensor, "t d"], b: Annotated[Tensor, "d"]) -> Annotated[Tensor, "t d"]:
        return x + b

    shift.register_autograd(lambda ctx, grad: (grad.clone(), grad[0].clone()))
    return shift


def sums(ns: str) -> Any:
    @register_op(f"{ns}::shift")
    def shift(x: Annotated[Tensor, "t d"], b: Annotated[Tensor, "d"]) -> Annotated[Tensor, "t d"]:
        return x + b

    shift.register_autograd(lambda ctx, grad: (grad.clone(), grad.sum(0)))
    return shift


def _mean(ns: str) -> Any:
    @register_op(f"{ns}::centre")
    def centre(x: Annotated[Tensor, "*n d"]) -> Annotated[Tensor, "*n d"]:
        return x - x.mean(-1, keepdim=True)

    return centre


def batch_first_only(ns: str) -> Any:
    """The batching rule takes for granted that the batch is the first dim."""
    centre = _mean(ns)

    @centre.register_vmap
    def _(info: Any, in_dims: Any, x: Tensor) -> Any:
        return centre(x), 0

    return centre


def batch_anywhere(ns: str) -> Any:
    centre = _mean(ns)

    @centre.register_vmap
    def _(info: Any, in_dims: Any, x: Tensor) -> Any:
        return centre(x.movedim(in_dims[0], 0)), 0

    return centre


def wrong_out_dim(ns: str) -> Any:
    """The batching rule moves the batch to the front and says that it is at the back."""
    centre = _mean(ns)

    @centre.register_vmap
    def _(info: Any, in_dims: Any, x: Tensor) -> Any:
        return centre(x.movedim(in_dims[0], 0)), -1

    return centre


def fake_on_the_cpu(ns: str) -> Any:
    """The fake names no device, so for a graph on an accelerator the result is on the CPU."""

    @register_op(f"{ns}::sums")
    def sums(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x.sum(-1)

    @sums.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty(x.shape[0], dtype=x.dtype)

    return sums


def fake_on_its_device(ns: str) -> Any:
    @register_op(f"{ns}::sums")
    def sums(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x.sum(-1)

    @sums.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty(x.shape[0], dtype=x.dtype, device=x.device)

    return sums


def stays_float32(ns: str) -> Any:
    """Computes in float32, as it should, and forgets to return to the input's dtype."""

    @register_op(f"{ns}::norm")
    def norm(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        x = x.float()
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    return norm


def returns_to_its_dtype(ns: str) -> Any:
    @register_op(f"{ns}::norm")
    def norm(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        y = x.float()
        return (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype)

    return norm


def fake_keeps_format(ns: str) -> Any:
    """The fake keeps its input's memory format (empty_like); the kernel always returns rows."""

    @register_op(f"{ns}::plus")
    def plus(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x.contiguous() + 1

    @plus.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    return plus


def fake_makes_rows(ns: str) -> Any:
    @register_op(f"{ns}::plus")
    def plus(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x.contiguous() + 1

    @plus.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return plus


def upper_bound(ns: str) -> Any:
    """The number of results depends on the values; the fake promises the most there can be."""

    @register_op(f"{ns}::positive")
    def positive(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x[x > 0]

    @positive.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.numel())

    return positive


def unknown_size(ns: str) -> Any:
    @register_op(f"{ns}::positive")
    def positive(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x[x > 0]

    @positive.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(torch.library.get_ctx().new_dynamic_size())

    return positive


CASES = (
    Case(8, "formula needs a contiguous gradient", "gradients", views_its_gradient, good_formula),
    Case(8, "formula misreads a strided gradient", "gradients", reads_its_gradient_flat, good_formula),
    Case(8, "formula writes its gradient", "gradients", writes_its_gradient, good_formula),
    Case(8, "formula writes what it saved", "gradients", writes_what_it_saved, good_formula),
    Case(8, "formula saves in the module", "gradients", saves_in_the_module, good_formula),
    Case(8, "formula forgets a sum", "gradients", forgets_to_sum, sums),
    Case(8, "rule for the first dim only", "vmap", batch_first_only, batch_anywhere),
    Case(8, "rule names another dim", "vmap", wrong_out_dim, batch_anywhere),
    Case(8, "fake on the CPU", "fake", fake_on_the_cpu, fake_on_its_device),
    Case(8, "stays in float32", "fake", stays_float32, returns_to_its_dtype),
    Case(8, "fake keeps a memory format", "fake", fake_keeps_format, fake_makes_rows),
    Case(8, "size depends on values", "fake", upper_bound, unknown_size),
)
