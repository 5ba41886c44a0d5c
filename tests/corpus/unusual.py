"""Operators that are unusual and right: nothing may be said against them."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from opreg import LayerName, current_layer, forward_context, like, register_op


def random_with_seed(ns: str) -> Any:
    """Random numbers from a seed that is an argument: the same call gives the same numbers."""

    @register_op(f"{ns}::dropout")
    def dropout(x: Annotated[Tensor, "t d"], seed: int = 7, p: float = 0.5) -> Annotated[Tensor, "t d"]:
        generator = torch.Generator().manual_seed(seed)
        return torch.where(torch.rand(x.shape, generator=generator).to(x.device) < p, 0, x)

    return dropout


def random_with_generator(ns: str) -> Any:
    """Random numbers from a generator that is an argument, or from none."""

    @register_op(f"{ns}::jitter", tags=torch.Tag.nondeterministic_seeded)
    def jitter(x: Annotated[Tensor, "t d"], generator: torch.Generator | None = None) -> Annotated[Tensor, "t d"]:
        return x + torch.rand(x.shape, generator=generator, device=x.device).to(x.dtype)

    @jitter.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        for rows, drawn in ((3, generator), (5, None)):
            yield {"x": torch.randn(rows, 4, generator=generator).to(dtype), "generator": drawn}

    return jitter


def random_with_required_generator(ns: str) -> Any:
    """Random numbers from a generator that is an argument: the same state gives the same numbers."""

    @register_op(f"{ns}::jitter")
    def jitter(x: Annotated[Tensor, "t d"], generator: torch.Generator) -> Annotated[Tensor, "t d"]:
        return x + torch.rand(x.shape, generator=generator, device=x.device).to(x.dtype)

    return jitter


def random_with_tag(ns: str) -> Any:
    """Random numbers of torch's global generator, and says so."""

    @register_op(f"{ns}::gumbel", tags=torch.Tag.nondeterministic_seeded)
    def gumbel(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t"]:
        return (x - torch.empty_like(x).exponential_().log()).amax(-1)

    return gumbel


def masked(ns: str) -> Any:
    """Every result is zero, and most are for some inputs."""

    @register_op(f"{ns}::keep")
    def keep(x: Annotated[Tensor, "t d"], mask: Annotated[Tensor, "t", torch.bool]) -> Annotated[Tensor, "t d"]:
        return x * mask[:, None] * 0

    return keep


def optional_option(ns: str) -> Any:
    """An option that changes the number of terms, and an optional tensor in the middle."""

    @register_op(f"{ns}::affine")
    def affine(
        x: Annotated[Tensor, "t d"],
        scale: Annotated[Tensor, "d"] | None,
        shift: Annotated[Tensor, "d"] | None = None,
        activation: Literal["none", "silu"] = "none",
    ) -> Annotated[Tensor, "t d"]:
        y = x if scale is None else x * scale
        y = y if shift is None else y + shift
        return torch.nn.functional.silu(y) if activation == "silu" else y.clone()

    return affine


def layer_state(ns: str) -> Any:
    """Updates its layer's state in place and returns what it held."""

    @register_op(f"{ns}::conv_step", mutates_args=("layer_name",))
    def conv_step(x: Annotated[Tensor, "t d"], layer_name: LayerName) -> Annotated[Tensor, "t d"]:
        layer, _ = current_layer(layer_name)
        y = x + layer.state
        layer.state.copy_(x.sum(0))
        return y

    @conv_step.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        for rows in (3, 6):
            layer = SimpleNamespace(state=torch.randn(4, generator=generator))
            with forward_context(layers={"u.0": layer}, metadata=SimpleNamespace(step=1)):
                yield {"x": torch.randn(rows, 4, generator=generator), "layer_name": "u.0"}

    return conv_step


def keyword_tensors(ns: str) -> Any:
    """Takes everything by keyword."""

    @register_op(f"{ns}::gate")
    def gate(*, x: Annotated[Tensor, "t d"], by: Annotated[Tensor, "t"], power: int = 2) -> Annotated[Tensor, "t d"]:
        return x * by[:, None] ** power

    return gate


def big_constant(ns: str) -> Any:
    """A table of the module, read by every call and written by none."""
    table = torch.arange(4096.0).sin()

    @register_op(f"{ns}::embed")
    def embed(ids: Annotated[Tensor, "t", torch.int64]) -> Annotated[Tensor, "t 4", torch.float32]:
        return table.view(-1, 4)[ids].clone()

    return embed


def table_on_demand(ns: str) -> Any:
    """A table that the first call of a size makes, of the size alone."""

    @cache
    def table(size: int) -> Tensor:
        return torch.arange(size, dtype=torch.float32).cos()

    @register_op(f"{ns}::rotate")
    def rotate(x: Annotated[Tensor, "t d", torch.float32]) -> Annotated[Tensor, "t d"]:
        return x * table(x.shape[1]).to(x.device)

    return rotate


def integers(ns: str) -> Any:
    """Integers in, integers out."""

    @register_op(f"{ns}::ranks")
    def ranks(x: Annotated[Tensor, "t", torch.int64]) -> Annotated[Tensor, "t", torch.int64]:
        return x.argsort(stable=True).argsort()

    return ranks


def booleans(ns: str) -> Any:
    """A mask."""

    @register_op(f"{ns}::above")
    def above(x: Annotated[Tensor, "t d"], y: Annotated[Tensor, "d"]) -> Annotated[Tensor, "t d", torch.bool]:
        return x > y

    return above


def complex_numbers(ns: str) -> Any:
    """Complex numbers in and out."""

    @register_op(f"{ns}::turn")
    def turn(
        x: Annotated[Tensor, "t d", torch.complex64], angle: Annotated[Tensor, "d", torch.float32]
    ) -> Annotated[Tensor, "t d"]:
        return x * torch.polar(torch.ones_like(angle), angle)

    return turn


def scalar_result(ns: str) -> Any:
    """One number for all, as a tensor without dims."""

    @register_op(f"{ns}::mean_square")
    def mean_square(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, ""]:
        return x.square().sum() / (x.numel() + 1)

    return mean_square


def only_numbers(ns: str) -> Any:
    """No tensor argument at all."""

    @register_op(f"{ns}::alibi")
    def alibi(heads: int, slope: float = 0.5) -> Tensor:
        return torch.full((heads,), slope).cumprod(0)

    @alibi.register_fake
    def _(heads: int, slope: float = 0.5) -> Tensor:
        return torch.empty(heads)

    @alibi.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        yield {"heads": 3}
        yield {"heads": 8, "slope": 0.25}

    return alibi


def list_of_results(ns: str) -> Any:
    """A list of tensors, as many as there were."""

    @register_op(f"{ns}::scale_all")
    def scale_all(xs: list[Annotated[Tensor, "t d"]], by: float = 2.0) -> list[Tensor]:
        return [x * by for x in xs]

    return scale_all


def strided_result(ns: str) -> Any:
    """A transposed result, and the fake says so."""

    @register_op(f"{ns}::columns")
    def columns(x: Annotated[Tensor, "t d"]) -> Tensor:
        return (x.contiguous() + 1).t()

    @columns.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[1]).t()

    return columns


def other_dtypes(ns: str) -> Any:
    """Quantises: a result of 8 bits with its scale."""

    @register_op(f"{ns}::quantize")
    def quantize(
        x: Annotated[Tensor, "t d"],
    ) -> tuple[Annotated[Tensor, "t d", torch.int8], Annotated[Tensor, "t", torch.float32]]:
        scale = x.float().abs().amax(-1).clamp_min(1e-6) / 127
        return (x.float() / scale[:, None]).round().to(torch.int8), scale

    return quantize


def follows_another(ns: str) -> Any:
    """Dtype and device of its second tensor."""

    @register_op(f"{ns}::gather")
    def gather(
        ids: Annotated[Tensor, "t", torch.int64], rows: Annotated[Tensor, "n d"]
    ) -> Annotated[Tensor, "t d", like("rows")]:
        return rows[ids]

    @gather.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        for count in (4, 7):
            yield {"ids": torch.arange(count) % 3, "rows": torch.randn(3, 5, generator=generator).to(dtype)}

    return gather


def refuses(ns: str) -> Any:
    """Wants an even number of columns, and says so with a raise statement."""

    @register_op(f"{ns}::halves")
    def halves(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d//2"]:
        if x.shape[1] % 2:
            raise ValueError(f"halves needs an even number of columns, got {x.shape[1]}")
        return x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]

    return halves


def in_half_the_dtypes(ns: str) -> Any:
    """A kernel for float32 only, which says so."""

    @register_op(f"{ns}::cube")
    def cube(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x * x * x

    @cube.register_kernel("cpu", why_not=lambda x: None if x.dtype is torch.float32 else "for float32 only")
    def fast(x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() ** 3)

    return cube


def nan_on_purpose(ns: str) -> Any:
    """NaN marks what is not there."""

    @register_op(f"{ns}::mark")
    def mark(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return torch.where(x > 0, x, torch.nan)

    @mark.register_kernel("cpu")
    def fast(x: Tensor) -> Tensor:
        return x.masked_fill(x <= 0, torch.nan)

    return mark


def in_place_all(ns: str) -> Any:
    """Writes each tensor of a list of caches, and returns nothing."""

    @register_op(f"{ns}::age", mutates_args=("caches",))
    def age(caches: list[Annotated[Tensor, "n d"]], by: float = 0.5) -> None:
        for each in caches:
            each.mul_(by)

    return age


def several_results(ns: str) -> Any:
    """Results of several shapes and kinds, with a formula that handles gradients of one of them."""

    @register_op(f"{ns}::moments")
    def moments(x: Annotated[Tensor, "t d"]) -> tuple[Annotated[Tensor, "t"], Annotated[Tensor, "t"]]:
        return x.mean(-1), x.square().mean(-1)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    def backward(ctx: Any, mean: Tensor, square: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (mean[:, None] + 2 * x * square[:, None]) / x.shape[1]

    moments.register_autograd(backward, setup_context=setup)
    return moments


def unique_values(ns: str) -> Any:
    """As many results as there are different values."""

    @register_op(f"{ns}::distinct")
    def distinct(x: Annotated[Tensor, "t", torch.int64]) -> tuple[Tensor, Tensor]:
        return torch.unique(x, return_counts=True)

    @distinct.register_fake
    def _(x: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.library.get_ctx().new_dynamic_size()
        return x.new_empty(size), x.new_empty(size)

    return distinct


def no_contract(ns: str) -> Any:
    """No contract: the body on fake tensors is the fake."""

    @register_op(f"{ns}::swiglu")
    def swiglu(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.nn.functional.silu(a) * b

    return swiglu


UNUSUAL: tuple[Callable[[str], Any], ...] = (
    random_with_seed,
    random_with_generator,
    random_with_required_generator,
    random_with_tag,
    masked,
    optional_option,
    layer_state,
    keyword_tensors,
    big_constant,
    table_on_demand,
    integers,
    booleans,
    complex_numbers,
    scalar_result,
    only_numbers,
    list_of_results,
    strided_result,
    other_dtypes,
    follows_another,
    refuses,
    in_half_the_dtypes,
    nan_on_purpose,
    in_place_all,
    several_results,
    unique_values,
    no_contract,
)
