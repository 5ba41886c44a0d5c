"""HAZARDS 3, 7, 11, 12 and 14: kernels that differ, names that mean nothing, declarations that cannot work."""

from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import LayerName, current_layer, register_op

from .case import Case


def _softmax(ns: str) -> Any:
    @register_op(f"{ns}::soft")
    def soft(x: Annotated[Tensor, "t d"], scale: float = 1.0) -> Annotated[Tensor, "t d"]:
        return (x * scale).softmax(-1)

    @soft.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        for rows, scale in ((4, 1.0), (7, 0.5)):
            yield {"x": torch.randn(rows, 8, generator=generator).to(device, dtype), "scale": scale}

    return soft


def good_kernel(ns: str) -> Any:
    soft = _softmax(ns)

    @soft.register_kernel("cpu")
    def fast(x: Tensor, scale: float = 1.0) -> Tensor:
        e = (x * scale - (x * scale).amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True)

    return soft


def kernel_forgets_tail(ns: str) -> Any:
    """Works in blocks of four rows and forgets the last, ragged block."""
    soft = _softmax(ns)

    @soft.register_kernel("cpu")
    def fast(x: Tensor, scale: float = 1.0) -> Tensor:
        y = torch.zeros_like(x)
        for i in range(0, x.shape[0] - 3, 4):
            y[i : i + 4] = (x[i : i + 4] * scale).softmax(-1)
        return y

    return soft


def kernel_ignores_option(ns: str) -> Any:
    """Ignores an argument that the common call leaves at its default."""
    soft = _softmax(ns)

    @soft.register_kernel("cpu")
    def fast(x: Tensor, scale: float = 1.0) -> Tensor:
        return x.softmax(-1)

    return soft


def kernel_raises(ns: str) -> Any:
    """Raises for sizes it does not support, instead of refusing them in why_not."""
    soft = _softmax(ns)

    @soft.register_kernel("cpu")
    def fast(x: Tensor, scale: float = 1.0) -> Tensor:
        if x.shape[0] % 2:
            raise NotImplementedError("odd number of rows")
        return (x * scale).softmax(-1)

    return soft


def kernel_refuses(ns: str) -> Any:
    soft = _softmax(ns)

    @soft.register_kernel("cpu", why_not=lambda x, scale=1.0: "odd number of rows" if x.shape[0] % 2 else None)
    def fast(x: Tensor, scale: float = 1.0) -> Tensor:
        return (x * scale).softmax(-1)

    return soft


def kernel_misspelt(ns: str) -> Any:
    """Names a kernel function that its module does not have."""
    soft = _softmax(ns)
    soft.register_kernel("cpu", "opreg.kernels.cpu.rms_norm:rmsnorm")
    return soft


def low_precision(ns: str) -> Any:
    """Sums in half precision."""
    soft = _softmax(ns)

    @soft.register_kernel("cpu")
    def fast(x: Tensor, scale: float = 1.0) -> Tensor:
        e = (x * scale).half().exp()
        return (e / e.sum(-1, keepdim=True)).to(x.dtype)

    return soft


def predicate_answers_bool(ns: str) -> Any:
    """why_not answers True and False instead of a reason or None."""
    soft = _softmax(ns)

    @soft.register_kernel("cpu", why_not=lambda x, scale=1.0: x.shape[-1] > 4096)
    def fast(x: Tensor, scale: float = 1.0) -> Tensor:
        return (x * scale).softmax(-1)

    return soft


def random_without_tag(ns: str) -> Any:
    """Draws random numbers without saying so."""

    @register_op(f"{ns}::noise")
    def noise(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x + torch.rand_like(x)

    return noise


def random_with_tag(ns: str) -> Any:
    @register_op(f"{ns}::noise", tags=torch.Tag.nondeterministic_seeded)
    def noise(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x + torch.rand_like(x)

    return noise


def remembers(ns: str) -> Any:
    """Keeps a running number in Python and uses it in the result."""
    calls: list[int] = []

    @register_op(f"{ns}::step")
    def step(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        calls.append(1)
        return x + len(calls)

    return step


def is_told(ns: str) -> Any:
    @register_op(f"{ns}::step")
    def step(x: Annotated[Tensor, "t d"], number: int = 1) -> Annotated[Tensor, "t d"]:
        return x + number

    return step


def layer_as_string(ns: str) -> Any:
    """Names its layer with a string: a constant in every graph."""

    @register_op(f"{ns}::attend", mutates_args=("out",))
    def attend(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], layer_name: str) -> None:
        out.copy_(x)

    return attend


def layer_as_number(ns: str) -> Any:
    """Numbers its layer: as many graphs as layers."""

    @register_op(f"{ns}::attend", mutates_args=("out",))
    def attend(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], layer_idx: int) -> None:
        out.copy_(x)

    return attend


def layer_name(ns: str) -> Any:
    from types import SimpleNamespace

    from opreg import forward_context

    @register_op(f"{ns}::attend", mutates_args=("out",))
    def attend(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], layer_name: LayerName) -> None:
        out.copy_(x * current_layer(layer_name)[0].scale)

    @attend.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        with forward_context(layers={"corpus.1": SimpleNamespace(scale=0.5)}, metadata=SimpleNamespace()):
            x = torch.randn(3, 4, generator=generator)
            yield {"x": x, "out": torch.empty_like(x), "layer_name": "corpus.1"}

    return attend


def misspelt_kind(ns: str) -> Any:
    """Misspells the kind, so that no graph would be split."""

    @register_op(f"{ns}::split", kind="atention")
    def split(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x * 2

    return split


def misspelt_mutation(ns: str) -> Any:
    """Misspells the argument that it writes."""

    @register_op(f"{ns}::split", mutates_args=("output",))
    def split(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> None:
        out.copy_(x)

    return split


def spelt(ns: str) -> Any:
    @register_op(f"{ns}::split", mutates_args=("out",), kind="attention")
    def split(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> None:
        out.copy_(x)

    return split


def second_body(ns: str) -> Any:
    """Registers another operator under a name that is taken."""

    @register_op(f"{ns}::same")
    def same(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x * 2

    @register_op(f"{ns}::same")
    def other(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x * 3

    return other


def second_import(ns: str) -> Any:
    def declare() -> Any:
        @register_op(f"{ns}::same")
        def same(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
            return x * 2

        return same

    declare()
    return declare()


def tie(ns: str) -> Any:
    """Gives two kernels for one device the same priority."""
    soft = good_kernel(ns)
    soft.register_kernel("cpu", "opreg.kernels.cpu.rms_norm:rms_norm")
    return soft


def union(ns: str) -> Any:
    """Takes a tensor or a number, which no schema can say."""

    @register_op(f"{ns}::add")
    def add(x: Annotated[Tensor, "t d"], y: Tensor | float) -> Annotated[Tensor, "t d"]:
        return x + y

    return add


def one_type(ns: str) -> Any:
    @register_op(f"{ns}::add")
    def add(x: Annotated[Tensor, "t d"], y: float) -> Annotated[Tensor, "t d"]:
        return x + y

    return add


def any_keywords(ns: str) -> Any:
    """Takes **kwargs and passes them on."""

    @register_op(f"{ns}::add")
    def add(x: Annotated[Tensor, "t d"], **kwargs: float) -> Annotated[Tensor, "t d"]:
        return x + kwargs["y"]

    return add


def unknown_dim(ns: str) -> Any:
    """Promises an output dim that no input defines."""

    @register_op(f"{ns}::widen")
    def widen(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t e"]:
        return x.repeat(1, 2)

    return widen


def known_dim(ns: str) -> Any:
    @register_op(f"{ns}::widen")
    def widen(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t 2*d"]:
        return x.repeat(1, 2)

    return widen


CASES = (
    Case(3, "layer as a string", "registration", layer_as_string, layer_name),
    Case(3, "layer as a number", "registration", layer_as_number, layer_name),
    Case(7, "misspelt kind", "registration", misspelt_kind, spelt),
    Case(7, "misspelt argument", "registration", misspelt_mutation, spelt),
    Case(11, "two operators, one name", "registration", second_body, second_import),
    Case(11, "two kernels, one priority", "registration", tie, good_kernel),
    Case(12, "forgets a ragged block", "kernel kernels/fast", kernel_forgets_tail, good_kernel),
    Case(12, "ignores an option", "kernel kernels/fast", kernel_ignores_option, good_kernel),
    Case(12, "raises instead of refusing", "kernel kernels/fast", kernel_raises, kernel_refuses),
    Case(12, "kernel that is not there", "kernel cpu/rmsnorm", kernel_misspelt, good_kernel),
    Case(12, "sums in half precision", "kernel kernels/fast", low_precision, good_kernel),
    Case(12, "predicate answers a bool", "kernel kernels/fast", predicate_answers_bool, kernel_refuses),
    Case(6, "random without a tag", "repeat", random_without_tag, random_with_tag),
    Case(6, "remembers its calls", "repeat", remembers, is_told),
    Case(14, "union of types", "registration", union, one_type),
    Case(14, "keyword arguments of any name", "registration", any_keywords, one_type),
    Case(14, "output dim from nowhere", "registration", unknown_dim, known_dim),
)
