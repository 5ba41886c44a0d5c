"""HAZARDS 1, 5 and 6: memory that is kept, moved, shared or never written; caches that answer for the wrong call."""

from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import register_op

from .case import Case


def writes_a_window(ns: str) -> Any:
    """Zeroes the first value of its input through as_strided, as a sink for masked positions."""

    @register_op(f"{ns}::masked")
    def masked(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        x.as_strided((1,), (1,), x.storage_offset()).zero_()
        return x * 2

    return masked


def window_of_a_copy(ns: str) -> Any:
    @register_op(f"{ns}::masked")
    def masked(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        x = x.clone(memory_format=torch.contiguous_format)
        if x.numel():
            x.as_strided((1,), (1,)).zero_()
        return x * 2

    return masked


def writes_an_option(ns: str) -> Any:
    """Scales an optional bias in place, which most calls leave out."""

    @register_op(f"{ns}::biased")
    def biased(x: Annotated[Tensor, "t d"], bias: Annotated[Tensor, "d"] | None = None) -> Annotated[Tensor, "t d"]:
        return x * 2 if bias is None else x * 2 + bias.mul_(0.5)

    return biased


def reads_an_option(ns: str) -> Any:
    @register_op(f"{ns}::biased")
    def biased(x: Annotated[Tensor, "t d"], bias: Annotated[Tensor, "d"] | None = None) -> Annotated[Tensor, "t d"]:
        return x * 2 if bias is None else x * 2 + bias * 0.5

    return biased


def returns_its_output(ns: str) -> Any:
    """Returns a view of the output that the caller handed in."""

    @register_op(f"{ns}::into", mutates_args=("out",))
    def into(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return out.copy_(x * 2).view(out.shape)

    return into


def returns_a_copy_of_it(ns: str) -> Any:
    @register_op(f"{ns}::into", mutates_args=("out",))
    def into(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return out.copy_(x * 2).clone()

    return into


def points_elsewhere(ns: str) -> Any:
    """Gives its output other memory instead of filling the memory it has."""

    @register_op(f"{ns}::into", mutates_args=("out",))
    def into(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> None:
        out.data = x * 2

    return into


def fills(ns: str) -> Any:
    @register_op(f"{ns}::into", mutates_args=("out",))
    def into(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> None:
        torch.mul(x, 2, out=out)

    return into


def transposes_in_place(ns: str) -> Any:
    """Transposes its input's sizes and strides in place; not a single value is written."""

    @register_op(f"{ns}::columns")
    def columns(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "d"]:
        return x.t_().sum(1)

    return columns


def transposed_view(ns: str) -> Any:
    @register_op(f"{ns}::columns")
    def columns(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "d"]:
        return x.t().sum(1)

    return columns


def overlaps_itself(ns: str) -> Any:
    """Returns one row as many: all rows are the same memory, and writing one of them writes all."""

    @register_op(f"{ns}::mean_rows")
    def mean_rows(x: Annotated[Tensor, "t d"]) -> Tensor:
        return x.mean(0, keepdim=True).expand_as(x)

    @mean_rows.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(1, x.shape[1]).expand(x.shape[0], x.shape[1])

    return mean_rows


def rows_of_their_own(ns: str) -> Any:
    @register_op(f"{ns}::mean_rows")
    def mean_rows(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x.mean(0, keepdim=True).expand_as(x)

    return mean_rows


def keeps_its_input(ns: str) -> Any:
    """Keeps its last input for a debugger: Inductor writes other values into that memory, and it is never freed."""
    last: list[Tensor] = []

    @register_op(f"{ns}::twice")
    def twice(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        last[:] = [x.view(-1) if x.is_contiguous() else x]
        return x * 2

    return twice


def keeps_nothing(ns: str) -> Any:
    last: list[tuple[int, ...]] = []

    @register_op(f"{ns}::twice")
    def twice(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        last[:] = [tuple(x.shape)]
        return x * 2

    return twice


def cache_by_address(ns: str) -> Any:
    """Caches a packed weight by its address, where an optimiser has since written another weight."""
    packed: dict[int, Tensor] = {}

    @register_op(f"{ns}::linear")
    def linear(x: Annotated[Tensor, "t d"], w: Annotated[Tensor, "e d"]) -> Annotated[Tensor, "t e"]:
        if w.data_ptr() not in packed:
            packed[w.data_ptr()] = w.t().contiguous()
        return x @ packed[w.data_ptr()]

    return linear


def cache_of_a_table(ns: str) -> Any:
    tables: dict[int, Tensor] = {}

    @register_op(f"{ns}::linear")
    def linear(x: Annotated[Tensor, "t d"], w: Annotated[Tensor, "e d"]) -> Annotated[Tensor, "t e"]:
        if x.shape[0] not in tables:  # depends on the size alone, so it answers for every call of that size
            tables[x.shape[0]] = torch.arange(x.shape[0], dtype=torch.float32, device=x.device)
        return x @ w.t() + tables[x.shape[0]][:, None].to(x.dtype)

    return linear


def cache_by_size(ns: str) -> Any:
    """Caches a number computed from the values by the size: right for the first call of each size."""
    seen: dict[tuple[int, ...], float] = {}

    @register_op(f"{ns}::scaled")
    def scaled(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        largest = seen.setdefault(tuple(x.shape), float(x.abs().sum()) + 1)
        return x / largest

    return scaled


def no_cache(ns: str) -> Any:
    @register_op(f"{ns}::scaled")
    def scaled(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x / (float(x.abs().sum()) + 1)

    return scaled


def last_output_forgotten(ns: str) -> Any:
    """Fills all tensors of a list of outputs but the last."""

    @register_op(f"{ns}::spread", mutates_args={"outs": "written"})
    def spread(x: Annotated[Tensor, "t d"], outs: list[Annotated[Tensor, "t d"]]) -> None:
        for out in outs[:-1]:
            out.copy_(x)

    return spread


def every_output(ns: str) -> Any:
    @register_op(f"{ns}::spread", mutates_args={"outs": "written"})
    def spread(x: Annotated[Tensor, "t d"], outs: list[Annotated[Tensor, "t d"]]) -> None:
        for out in outs:
            out.copy_(x)

    return spread


def sums_a_tail(ns: str) -> Any:
    """Pads integers to a multiple of four with whatever torch.empty found, and sums all of them."""

    @register_op(f"{ns}::count")
    def count(ids: Annotated[Tensor, "t", torch.int64]) -> Annotated[Tensor, "1"]:
        padded = ids.new_empty(-(-ids.shape[0] // 4) * 4)
        padded[: ids.shape[0]] = ids
        return padded.sum().reshape(1) % 1000

    return count


def sums_zeros(ns: str) -> Any:
    @register_op(f"{ns}::count")
    def count(ids: Annotated[Tensor, "t", torch.int64]) -> Annotated[Tensor, "1"]:
        padded = ids.new_zeros(-(-ids.shape[0] // 4) * 4)
        padded[: ids.shape[0]] = ids
        return padded.sum().reshape(1) % 1000

    return count


def half_of_a_list(ns: str) -> Any:
    """Says that it writes one list, and writes a tensor of the other one, too."""

    @register_op(f"{ns}::move", mutates_args=("dst",))
    def move(src: list[Annotated[Tensor, "t d"]], dst: list[Annotated[Tensor, "t d"]]) -> None:
        for one, other in zip(src, dst, strict=True):
            other.copy_(one)
        src[-1].zero_()

    return move


def one_list(ns: str) -> Any:
    @register_op(f"{ns}::move", mutates_args=("dst",))
    def move(src: list[Annotated[Tensor, "t d"]], dst: list[Annotated[Tensor, "t d"]]) -> None:
        for one, other in zip(src, dst, strict=True):
            other.copy_(one)

    return move


def ignores_offset(ns: str) -> Any:
    """The kernel reads from where the memory begins, not from where the tensor does."""
    op = sums_rows(ns)
    op.register_kernel("cpu", from_the_start)
    return op


def from_the_start(x: Tensor) -> Tensor:
    x = x.contiguous()
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory[: x.numel()].view(x.shape).cumsum(0)


def sums_rows(ns: str) -> Any:
    @register_op(f"{ns}::cumulate")
    def cumulate(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x.cumsum(0)

    return cumulate


def pops_the_list(ns: str) -> Any:
    """Takes the last tensor out of a list that belongs to the caller."""

    @register_op(f"{ns}::fold")
    def fold(xs: Annotated[list[Tensor], "t d"]) -> Annotated[Tensor, "t d"]:
        total = xs.pop().clone()
        for x in xs:
            total = total + x
        return total

    return fold


def reads_the_list(ns: str) -> Any:
    @register_op(f"{ns}::fold")
    def fold(xs: Annotated[list[Tensor], "t d"]) -> Annotated[Tensor, "t d"]:
        return sum(xs[1:], xs[0].clone())

    return fold


def inference_inside(ns: str) -> Any:
    """Computes in inference mode of its own: no later backward can save the result."""

    @register_op(f"{ns}::scores")
    def scores(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        with torch.inference_mode():
            return x.softmax(-1)

    return scores


def modes_of_the_caller(ns: str) -> Any:
    @register_op(f"{ns}::scores")
    def scores(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x.softmax(-1)

    return scores


CASES = (
    Case(5, "write through as_strided", "writes", writes_a_window, window_of_a_copy),
    Case(5, "write to an optional tensor", "writes", writes_an_option, reads_an_option),
    Case(5, "write to one of two lists", "writes", half_of_a_list, one_list),
    Case(5, "returns its output", "aliasing", returns_its_output, returns_a_copy_of_it),
    Case(5, "gives an output other memory", "writes", points_elsewhere, fills),
    Case(5, "transposes in place", "writes", transposes_in_place, transposed_view),
    Case(5, "a result that overlaps itself", "aliasing", overlaps_itself, rows_of_their_own),
    Case(5, "keeps its input", "state", keeps_its_input, keeps_nothing),
    Case(6, "cache by address", "repeat", cache_by_address, cache_of_a_table),
    Case(6, "cache by size", "repeat", cache_by_size, no_cache),
    Case(1, "last of a list forgotten", "outputs", last_output_forgotten, every_output),
    Case(1, "sums an undefined tail", "outputs", sums_a_tail, sums_zeros),
    Case(15, "ignores the offset", "kernel memory/from_the_start", ignores_offset, sums_rows),
    Case(5, "takes from the caller's list", "writes", pops_the_list, reads_the_list),
    Case(6, "inference mode inside", "modes", inference_inside, modes_of_the_caller),
)
