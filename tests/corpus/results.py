"""HAZARDS 1, 4, 8, 12, 14: what an op returns and takes beyond single tensors: named, optional, counted, in tuples."""

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from opreg import LayerName, current_layer, forward_context, register_op

from .case import Case


class Attended(NamedTuple):
    """An output and the log-sum-exp of its row."""

    out: Annotated[Tensor, "t d"]
    lse: Annotated[Tensor, "t"]


def _softmax(x: Tensor) -> Attended:
    lse = x.logsumexp(-1)
    return Attended((x - lse[:, None]).exp(), lse)


def fields_swapped(ns: str) -> Any:
    """The kernel returns the fields in the other order; of one column both have a number of elements in common."""
    op = fields_in_order(ns)
    op.register_kernel("cpu", swapped)
    return op


def swapped(x: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _softmax(x)
    return lse, out


def fields_in_order(ns: str) -> Any:
    @register_op(f"{ns}::softmax")
    def softmax(x: Annotated[Tensor, "t d"]) -> Attended:
        return _softmax(x)

    return softmax


def always_says_yes(ns: str) -> Any:
    """The weights come back only on request; the fake has them always."""
    op = says_when(ns)

    @op.register_fake
    def _(x: Tensor, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        return torch.empty_like(x), torch.empty_like(x)

    return op


def says_when(ns: str) -> Any:
    @register_op(f"{ns}::route")
    def route(x: Annotated[Tensor, "t d"], return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        weights = x.softmax(-1)
        return weights * x, weights if return_weights else None

    return route


def kernel_keeps_it_back(ns: str) -> Any:
    """The kernel forgets that the weights may be asked for."""
    op = says_when(ns)
    op.register_kernel("cpu", never)
    return op


def never(x: Tensor, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    return x.softmax(-1) * x, None


def counts_differently(ns: str) -> Any:
    """The kernel counts the padding, too."""
    op = counts(ns)
    op.register_kernel("cpu", with_padding)
    return op


def with_padding(x: Tensor, block: int = 4) -> tuple[Tensor, int]:
    return x.relu(), -(-x.shape[0] // block) * block


def counts(ns: str) -> Any:
    @register_op(f"{ns}::pack")
    def pack(x: Annotated[Tensor, "t d"], block: int = 4) -> tuple[Tensor, int]:
        return x.relu(), x.shape[0]

    return pack


class Slots:
    """A layer with a cache."""

    def __init__(self) -> None:
        self.cache = torch.zeros(8, 4)


class Step:
    """What a step says of its batch."""

    num_actual_tokens = 2


def _layered(op: Any, layers: dict[str, Slots]) -> Any:
    @op.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        with forward_context(layers=layers, metadata=Step()):
            x = torch.randn(3, 4, generator=generator).to(dtype)
            yield {"x": x, "out": torch.empty_like(x), "layer_name": "model.layers.1"}

    return op


def first_layer_always(ns: str) -> Any:
    """Finds its layer in a list of its own, and always the first one."""
    layers = {f"model.layers.{index}": Slots() for index in range(2)}

    @register_op(f"{ns}::mix", mutates_args=("out",), kind="attention")
    def mix(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], layer_name: LayerName) -> None:
        layer = layers["model.layers.0"]
        out.copy_(layer.cache[: x.shape[0]] + x)

    return _layered(mix, layers)


def counts_its_calls(ns: str) -> Any:
    """Takes the layers in the order of its calls, and stores into whose turn it is."""
    layers = {f"model.layers.{index}": Slots() for index in range(2)}
    turn = iter([*layers] * 100_000)

    @register_op(f"{ns}::keep", mutates_args=("out",), kind="attention")
    def keep(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], layer_name: LayerName) -> None:
        layers[next(turn)].cache[: x.shape[0]] = x
        out.copy_(x)

    return _layered(keep, layers)


def stores_by_name(ns: str) -> Any:
    @register_op(f"{ns}::keep", mutates_args=("out",), kind="attention")
    def keep(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], layer_name: LayerName) -> None:
        layer, _ = current_layer(layer_name)
        layer.cache[: x.shape[0]] = x
        out.copy_(x)

    return _layered(keep, {f"model.layers.{index}": Slots() for index in range(2)})


def layer_by_name(ns: str) -> Any:
    @register_op(f"{ns}::mix", mutates_args=("out",), kind="attention")
    def mix(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], layer_name: LayerName) -> None:
        layer, _ = current_layer(layer_name)
        out.copy_(layer.cache[: x.shape[0]] + x)

    return _layered(mix, {f"model.layers.{index}": Slots() for index in range(2)})


def writes_the_tail(ns: str) -> Any:
    """Says that the framework zeroes the padding, and then computes it as well."""

    @register_op(f"{ns}::gelu", mutates_args={"out": "tail"})
    def gelu(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], num_actual_tokens: int) -> None:
        out.copy_(torch.nn.functional.gelu(x))

    return _padded(gelu)


def leaves_the_tail(ns: str) -> Any:
    @register_op(f"{ns}::gelu", mutates_args={"out": "tail"})
    def gelu(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], num_actual_tokens: int) -> None:
        out[:num_actual_tokens].copy_(torch.nn.functional.gelu(x[:num_actual_tokens]))

    return _padded(gelu)


def _padded(op: Any) -> Any:
    @op.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        x = torch.randn(6, 4, generator=generator).to(dtype)
        yield {"x": x, "out": torch.empty_like(x), "num_actual_tokens": 4}

    return op


# Unusual and right.


def fixed_tuples(ns: str) -> Any:
    """Tuples of numbers and of tensors, used as such: as a key, and unpacked."""

    @register_op(f"{ns}::rotate")
    def rotate(
        x: Annotated[Tensor, "t d"],
        cos_sin: Annotated[tuple[Tensor, Tensor], "t d"],
        scale: tuple[float, float] = (1.0, 1.0),
        order: tuple[int, ...] | None = None,
    ) -> Annotated[Tensor, "t d"]:
        cos, sin = cos_sin
        factor = {scale: scale[0] * scale[1]}[scale]
        return x * cos * factor + (sin if order is None else sin * len(order))

    return rotate


def optional_list(ns: str) -> Any:
    """Residuals that need not be there."""

    @register_op(f"{ns}::add_all")
    def add_all(
        x: Annotated[Tensor, "t d"], residuals: Annotated[list[Tensor], "t d"] | None = None
    ) -> Annotated[Tensor, "t d"]:
        return x.clone() if residuals is None else x + sum(residuals)

    return add_all


def optional_buffers(ns: str) -> Any:
    """Buffers that are written, if there are any."""

    @register_op(f"{ns}::keep", mutates_args={"buffers": "state"})
    def keep(x: Annotated[Tensor, "t d"], buffers: Annotated[list[Tensor] | None, "t d"] = None) -> None:
        for buffer in buffers or ():
            buffer.copy_(x)

    return keep


def optional_result(ns: str) -> Any:
    """One result, which may be None."""

    @register_op(f"{ns}::bias")
    def bias(x: Annotated[Tensor, "t d"], wanted: bool = True) -> Tensor | None:
        return x.mean(0) if wanted else None

    return bias


CASES = (
    Case(12, "fields in another order", "kernel results/swapped", fields_swapped, fields_in_order),
    Case(8, "fake of an optional result", "fake", always_says_yes, says_when),
    Case(12, "forgets an optional result", "kernel results/never", kernel_keeps_it_back, says_when),
    Case(12, "another number", "kernel results/with_padding", counts_differently, counts),
    Case(4, "always the first layer", "state", first_layer_always, layer_by_name),
    Case(4, "layers in the order of calls", "state", counts_its_calls, stores_by_name),
    Case(1, "computes the padding", "outputs", writes_the_tail, leaves_the_tail),
)

UNUSUAL = (fixed_tuples, optional_list, optional_buffers, optional_result)
