"""HAZARDS 8, 9, 15 and formulas: fakes that differ from what is real, sizes that become numbers, layouts, gradients."""

from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import register_op

from .case import Case


def fake_dtype(ns: str) -> Any:
    """The fake keeps the input's dtype; the kernel returns int64."""

    @register_op(f"{ns}::argtop")
    def argtop(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x.argmax(-1)

    @argtop.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0])

    return argtop


def fake_dtype_right(ns: str) -> Any:
    @register_op(f"{ns}::argtop")
    def argtop(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t", torch.int64]:
        return x.argmax(-1)

    return argtop


def fake_rounding(ns: str) -> Any:
    """The contract rounds down, the kernel up: wrong for odd sizes only."""

    @register_op(f"{ns}::pool")
    def pool(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t//2 d"]:
        return x[::2].clone()

    return pool


def fake_rounding_right(ns: str) -> Any:
    @register_op(f"{ns}::pool")
    def pool(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "(t+1)//2 d"]:
        return x[::2].clone()

    return pool


def fake_strides(ns: str) -> Any:
    """The fake is contiguous, the result is a transposed tensor."""

    @register_op(f"{ns}::swap")
    def swap(x: Annotated[Tensor, "t d"]) -> Tensor:
        return (x + 1).t()

    @swap.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[1], x.shape[0])

    return swap


def fake_strides_right(ns: str) -> Any:
    @register_op(f"{ns}::swap")
    def swap(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "d t"]:
        return (x + 1).t()

    return swap


def follows_input_strides(ns: str) -> Any:
    """The fake is contiguous; the kernel's result has the strides of its input, transposed ones too."""

    @register_op(f"{ns}::plus")
    def plus(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x + 1

    @plus.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    return plus


def follows_contract(ns: str) -> Any:
    @register_op(f"{ns}::plus")
    def plus(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x + 1

    return plus


def squeezes(ns: str) -> Any:
    """Squeezes: one row too many dims gone where there is a single row."""

    @register_op(f"{ns}::sums")
    def sums(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x.sum(-1, keepdim=True).squeeze()

    @sums.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0])

    return sums


def squeezes_one(ns: str) -> Any:
    @register_op(f"{ns}::sums")
    def sums(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x.sum(-1, keepdim=True).squeeze(-1)

    @sums.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0])

    return sums


def no_rows(ns: str) -> Any:
    """Takes the largest value of all rows, of which there may be none."""

    @register_op(f"{ns}::scale")
    def scale(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x / x.max()

    return scale


def no_rows_right(ns: str) -> Any:
    @register_op(f"{ns}::scale")
    def scale(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x / x.max() if x.numel() else x.clone()

    return scale


def int_of_size(ns: str) -> Any:
    """The fake converts a size with int(): one graph per number of tokens, and no error."""

    @register_op(f"{ns}::rows")
    def rows(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x.sum(-1)

    @rows.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(int(x.shape[0]))

    return rows


def size_itself(ns: str) -> Any:
    @register_op(f"{ns}::rows")
    def rows(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x.sum(-1)

    @rows.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0])

    return rows


def branch_on_size(ns: str) -> Any:
    """The fake branches on the number of tokens."""

    @register_op(f"{ns}::chunks")
    def chunks(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x[:4] * 2

    @chunks.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(min(x.shape[0], 4), x.shape[1])

    return chunks


def no_branch(ns: str) -> Any:
    @register_op(f"{ns}::chunks")
    def chunks(x: Annotated[Tensor, "t d"]) -> Tensor:
        return (x[:4] * 2).contiguous()

    @chunks.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(torch.sym_min(x.shape[0], 4), x.shape[1])

    return chunks


def loop_over_size(ns: str) -> Any:
    """The body, which is the fake too, loops over the rows in Python."""

    @register_op(f"{ns}::cumulate")
    def cumulate(x: Annotated[Tensor, "t d"]) -> Tensor:
        total, rows = x.new_zeros(x.shape[1]), []
        for i in range(x.shape[0]):
            total = total + x[i]
            rows.append(total)
        return torch.stack(rows) if rows else x.clone()

    return cumulate


def loop_with_contract(ns: str) -> Any:
    @register_op(f"{ns}::cumulate")
    def cumulate(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        total, rows = x.new_zeros(x.shape[1]), []
        for i in range(x.shape[0]):
            total = total + x[i]
            rows.append(total)
        return torch.stack(rows) if rows else x.clone()

    return cumulate


def predicate_pins(ns: str) -> Any:
    """why_not counts tiles with int() of a symbolic size."""

    @register_op(f"{ns}::tiles")
    def tiles(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x * 2

    @tiles.register_kernel("cpu", why_not=lambda x: "ragged" if len(range(int(x.shape[0]))) % 2 else None)
    def fast(x: Tensor) -> Tensor:
        return x + x

    return tiles


def predicate_free(ns: str) -> Any:
    @register_op(f"{ns}::tiles")
    def tiles(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x * 2

    @tiles.register_kernel("cpu", why_not=lambda x: "ragged" if x.shape[0] % 2 else None)
    def fast(x: Tensor) -> Tensor:
        return x + x

    return tiles


def view_of_anything(ns: str) -> Any:
    """Uses .view, which a transposed tensor refuses."""

    @register_op(f"{ns}::pairs")
    def pairs(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t"]:
        return x.view(-1).view(x.shape).sum(-1)

    return pairs


def reshape_of_anything(ns: str) -> Any:
    @register_op(f"{ns}::pairs")
    def pairs(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t"]:
        return x.reshape(-1).view(x.shape).sum(-1)

    return pairs


def assumes_contiguous(ns: str) -> Any:
    """Reads memory as if every tensor were contiguous: other numbers for a slice."""

    @register_op(f"{ns}::flat")
    def flat(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x.as_strided(x.shape, (x.shape[1], 1)) * 2

    return flat


def makes_contiguous(ns: str) -> Any:
    @register_op(f"{ns}::flat")
    def flat(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x.contiguous().as_strided(x.shape, (x.shape[1], 1)) * 2

    return flat


def wrong_formula(ns: str) -> Any:
    """The backward formula forgets the inner derivative."""

    @register_op(f"{ns}::square")
    def square(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x * x

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    square.register_autograd(lambda ctx, grad: grad * ctx.saved_tensors[0], setup_context=setup)
    return square


def right_formula(ns: str) -> Any:
    @register_op(f"{ns}::square")
    def square(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x * x

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    square.register_autograd(lambda ctx, grad: 2 * grad * ctx.saved_tensors[0], setup_context=setup)
    return square


def wrong_rule(ns: str) -> Any:
    """The batching rule normalises over the batch, too."""

    @register_op(f"{ns}::center")
    def center(x: Annotated[Tensor, "*n d"]) -> Annotated[Tensor, "*n d"]:
        return x - x.mean(-1, keepdim=True)

    @center.register_vmap
    def _(info: Any, in_dims: Any, x: Tensor) -> Any:
        return x - x.mean((in_dims[0], -1), keepdim=True), in_dims[0]

    return center


def right_rule(ns: str) -> Any:
    @register_op(f"{ns}::center")
    def center(x: Annotated[Tensor, "*n d"]) -> Annotated[Tensor, "*n d"]:
        return x - x.mean(-1, keepdim=True)

    @center.register_vmap
    def _(info: Any, in_dims: Any, x: Tensor) -> Any:
        return center(x.movedim(in_dims[0], 0)), 0

    return center


CASES = (
    Case(8, "fake of another dtype", "fake", fake_dtype, fake_dtype_right),
    Case(8, "odd sizes", "fake", fake_rounding, fake_rounding_right),
    Case(8, "fake of other strides", "fake", fake_strides, fake_strides_right),
    Case(8, "follows its input's strides", "fake", follows_input_strides, follows_contract),
    Case(8, "a single row", "fake", squeezes, squeezes_one),
    Case(8, "no rows", "layouts", no_rows, no_rows_right),
    Case(9, "int() of a size", "symbolic", int_of_size, size_itself),
    Case(9, "branch on a size", "symbolic", branch_on_size, no_branch),
    Case(9, "loop over a size", "symbolic", loop_over_size, loop_with_contract),
    Case(9, "predicate with int()", "symbolic", predicate_pins, predicate_free),
    Case(15, "view of a strided tensor", "layouts", view_of_anything, reshape_of_anything),
    Case(15, "assumes contiguous memory", "layouts", assumes_contiguous, makes_contiguous),
    Case(8, "wrong backward formula", "gradients", wrong_formula, right_formula),
    Case(8, "wrong batching rule", "vmap", wrong_rule, right_rule),
)
