"""HAZARDS 1, 5 and 6: outputs left unwritten, writes and aliases that the schema hides, effects that vanish."""

from types import SimpleNamespace
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import LayerName, current_layer, forward_context, register_op

from .case import Case


def early_return(ns: str) -> Any:
    """Returns early for a single row and leaves the output as it was."""

    @register_op(f"{ns}::scale_into", mutates_args=("out",))
    def scale_into(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> None:
        if x.shape[0] < 2:
            return
        out.copy_(x * 2)

    return scale_into


def no_early_return(ns: str) -> Any:
    @register_op(f"{ns}::scale_into", mutates_args=("out",))
    def scale_into(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> None:
        out.copy_(x * 2)

    return scale_into


def _padded(op: Any) -> Any:
    @op.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        for tokens in (3, 5):
            x = torch.randn(6, 8, generator=generator).to(device, dtype)
            yield {"x": x, "out": torch.zeros_like(x), "num_actual_tokens": tokens}

    return op


def unwritten_tail(ns: str) -> Any:
    """Writes the rows of real tokens and leaves those of the padding."""

    @register_op(f"{ns}::gate", mutates_args=("out",))
    def gate(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], num_actual_tokens: int) -> None:
        out[:num_actual_tokens] = x[:num_actual_tokens].sigmoid()

    return _padded(gate)


def tail_by_framework(ns: str) -> Any:
    @register_op(f"{ns}::gate", mutates_args={"out": "tail"})
    def gate(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], num_actual_tokens: int) -> None:
        out[:num_actual_tokens] = x[:num_actual_tokens].sigmoid()

    return _padded(gate)


def second_output_forgotten(ns: str) -> Any:
    """Fills its second output only when there is a bias."""

    @register_op(f"{ns}::two", mutates_args=("out", "z"))
    def two(
        x: Annotated[Tensor, "t d"],
        out: Annotated[Tensor, "t d"],
        z: Annotated[Tensor, "t d"],
        bias: Annotated[Tensor, "d"] | None = None,
    ) -> None:
        out.copy_(x)
        if bias is not None:
            z.copy_(x + bias)

    return two


def both_outputs(ns: str) -> Any:
    @register_op(f"{ns}::two", mutates_args=("out", "z"))
    def two(
        x: Annotated[Tensor, "t d"],
        out: Annotated[Tensor, "t d"],
        z: Annotated[Tensor, "t d"],
        bias: Annotated[Tensor, "d"] | None = None,
    ) -> None:
        out.copy_(x)
        z.copy_(x if bias is None else x + bias)

    return two


def empty_result(ns: str) -> Any:
    """Returns memory from torch.empty of which the last row is never written."""

    @register_op(f"{ns}::shift")
    def shift(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        y[:-1] = x[1:]
        return y

    return shift


def zero_result(ns: str) -> Any:
    @register_op(f"{ns}::shift")
    def shift(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        y = torch.zeros_like(x, memory_format=torch.contiguous_format)
        y[:-1] = x[1:]
        return y

    return shift


def in_place(ns: str) -> Any:
    """Scales its input in place and does not say so."""

    @register_op(f"{ns}::norm")
    def norm(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        x.mul_(2.0)
        return x.softmax(-1)

    return norm


def out_of_place(ns: str) -> Any:
    @register_op(f"{ns}::norm")
    def norm(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return (x * 2.0).softmax(-1)

    return norm


def idempotent(ns: str) -> Any:
    """Clamps its input in place; the values of a test are inside the bounds, so nothing changes."""

    @register_op(f"{ns}::exp")
    def exp(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        x.clamp_(-1e4, 1e4)
        return x.exp()

    return exp


def clamped_copy(ns: str) -> Any:
    @register_op(f"{ns}::exp")
    def exp(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x.clamp(-1e4, 1e4).exp()

    return exp


def through_data(ns: str) -> Any:
    """Writes through .data, past autograd and version counters."""

    @register_op(f"{ns}::decay")
    def decay(x: Annotated[Tensor, "t d"], s: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        s.data.mul_(0.5)
        return x + s

    return decay


def declared(ns: str) -> Any:
    @register_op(f"{ns}::decay", mutates_args=("s",))
    def decay(x: Annotated[Tensor, "t d"], s: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        s.mul_(0.5)
        return x + s

    return decay


def through_numpy(ns: str) -> Any:
    """Writes its input through numpy, where no dispatcher looks."""

    @register_op(f"{ns}::clip")
    def clip(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        values = x.numpy()
        values[values < 0] = 0
        return torch.from_numpy(values * 2)

    return clip


def numpy_copy(ns: str) -> Any:
    @register_op(f"{ns}::clip")
    def clip(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        values = x.numpy().copy()
        values[values < 0] = 0
        return torch.from_numpy(values * 2)

    return clip


def list_element(ns: str) -> Any:
    """Overwrites one tensor of a list argument."""

    @register_op(f"{ns}::total")
    def total(xs: list[Annotated[Tensor, "t d"]]) -> Annotated[Tensor, "t d"]:
        for x in xs[1:]:
            xs[0].add_(x)
        return xs[0].clone()

    return total


def list_untouched(ns: str) -> Any:
    @register_op(f"{ns}::total")
    def total(xs: list[Annotated[Tensor, "t d"]]) -> Annotated[Tensor, "t d"]:
        return torch.stack(xs).sum(0)

    return total


def returns_input(ns: str) -> Any:
    """Returns its input where there is nothing to do."""

    @register_op(f"{ns}::drop")
    def drop(x: Annotated[Tensor, "t d"], p: float = 0.0) -> Annotated[Tensor, "t d"]:
        return x if p == 0.0 else x * (1 - p)

    return drop


def returns_copy(ns: str) -> Any:
    @register_op(f"{ns}::drop")
    def drop(x: Annotated[Tensor, "t d"], p: float = 0.0) -> Annotated[Tensor, "t d"]:
        return x.clone() if p == 0.0 else x * (1 - p)

    return drop


def same_memory_twice(ns: str) -> Any:
    """Returns two views of one buffer."""

    @register_op(f"{ns}::halves")
    def halves(x: Annotated[Tensor, "t d"]) -> tuple[Tensor, Tensor]:
        y = torch.cat([x, x + 1])
        return y[: x.shape[0]], y[x.shape[0] :]

    return halves


def two_memories(ns: str) -> Any:
    @register_op(f"{ns}::halves")
    def halves(x: Annotated[Tensor, "t d"]) -> tuple[Annotated[Tensor, "t d"], Annotated[Tensor, "t d"]]:
        return x.clone(), x + 1

    return halves


def workspace(ns: str) -> Any:
    """Returns its module's workspace, which the next call overwrites."""
    kept: dict[tuple[int, ...], Tensor] = {}

    @register_op(f"{ns}::twice")
    def twice(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        y = kept.setdefault(tuple(x.shape), torch.empty(x.shape, dtype=x.dtype))
        return torch.mul(x, 2, out=y)

    return twice


def no_workspace(ns: str) -> Any:
    @register_op(f"{ns}::twice")
    def twice(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return torch.mul(x, 2)

    return twice


def ignores_strides(ns: str) -> Any:
    """Writes its output as if it were contiguous, into the memory of others where it is a slice."""

    @register_op(f"{ns}::fill", mutates_args=("out",))
    def fill(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> None:
        flat = out.as_strided((out.numel(),), (1,))
        flat.copy_(x.reshape(-1))

    return fill


def minds_strides(ns: str) -> Any:
    @register_op(f"{ns}::fill", mutates_args=("out",))
    def fill(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> None:
        out.copy_(x)

    return fill


def resizes(ns: str) -> Any:
    """Resizes the output that the caller handed in."""

    @register_op(f"{ns}::grow", mutates_args=("out",))
    def grow(x: Annotated[Tensor, "t d"], out: Tensor) -> None:
        out.resize_(x.shape).copy_(x)

    @grow.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        yield {"x": torch.randn(3, 4, generator=generator), "out": torch.zeros(0)}

    return grow


def fits(ns: str) -> Any:
    @register_op(f"{ns}::grow", mutates_args=("out",))
    def grow(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> None:
        out.copy_(x)

    return grow


def returns_nothing(ns: str) -> Any:
    """Writes its layer's cache, returns nothing and mutates nothing that a compiler can see."""

    @register_op(f"{ns}::store")
    def store(x: Annotated[Tensor, "t d"], layer_name: LayerName) -> None:
        current_layer(layer_name)[0].cache.add_(x.sum())

    return _in_layer(store)


def _in_layer(op: Any) -> Any:
    @op.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        for rows in (3, 5):
            layer = SimpleNamespace(cache=torch.zeros(4))
            with forward_context(layers={"corpus.0": layer}, metadata=SimpleNamespace(step=1)):
                yield {"x": torch.randn(rows, 4, generator=generator), "layer_name": "corpus.0"}

    return op


def says_that_it_stores(ns: str) -> Any:
    @register_op(f"{ns}::store", mutates_args=("layer_name",))
    def store(x: Annotated[Tensor, "t d"], layer_name: LayerName) -> None:
        current_layer(layer_name)[0].cache.add_(x.sum())

    return _in_layer(store)


def functional_with_cache(ns: str) -> Any:
    """Returns a result and writes its layer's cache on the side: gone where the result is not used."""

    @register_op(f"{ns}::attend")
    def attend(x: Annotated[Tensor, "t d"], layer_name: LayerName) -> Annotated[Tensor, "t d"]:
        cache = current_layer(layer_name)[0].cache
        cache.add_(x.sum())
        return x + cache

    return _in_layer(attend)


def functional_says_so(ns: str) -> Any:
    @register_op(f"{ns}::attend", mutates_args=("layer_name",))
    def attend(x: Annotated[Tensor, "t d"], layer_name: LayerName) -> Annotated[Tensor, "t d"]:
        cache = current_layer(layer_name)[0].cache
        cache.add_(x.sum())
        return x + cache

    return _in_layer(attend)


def global_buffer(ns: str) -> Any:
    """Counts calls in a tensor of its module."""
    seen = torch.zeros(1)

    @register_op(f"{ns}::count")
    def count(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        seen.add_(1)
        return x * 2

    return count


def buffer_as_argument(ns: str) -> Any:
    @register_op(f"{ns}::count", mutates_args=("seen",))
    def count(x: Annotated[Tensor, "t d"], seen: Annotated[Tensor, "1"]) -> Annotated[Tensor, "t d"]:
        seen.add_(1)
        return x * 2

    return count


CASES = (
    Case(1, "early return", "outputs", early_return, no_early_return),
    Case(1, "unwritten tail", "outputs", unwritten_tail, tail_by_framework),
    Case(1, "second output forgotten", "outputs", second_output_forgotten, both_outputs),
    Case(1, "empty result", "outputs", empty_result, zero_result),
    Case(5, "undeclared write", "writes", in_place, out_of_place),
    Case(5, "idempotent write", "writes", idempotent, clamped_copy),
    Case(5, "write through .data", "writes", through_data, declared),
    Case(5, "write through numpy", "writes", through_numpy, numpy_copy),
    Case(5, "write to a list's tensor", "writes", list_element, list_untouched),
    Case(5, "returns its input", "aliasing", returns_input, returns_copy),
    Case(5, "results share memory", "aliasing", same_memory_twice, two_memories),
    Case(5, "returns a workspace", "aliasing", workspace, no_workspace),
    Case(5, "ignores an output's strides", "writes", ignores_strides, minds_strides),
    Case(5, "resizes an output", "writes", resizes, fits),
    Case(6, "returns nothing", "registration", returns_nothing, says_that_it_stores),
    Case(6, "functional, with a cache", "state", functional_with_cache, functional_says_so),
    Case(6, "tensor of the module", "state", global_buffer, buffer_as_argument),
)
