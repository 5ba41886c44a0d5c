"""HAZARD 6 and 8: operators that change the process they run in, or depend on the mode they are called in."""

from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import register_op

from .case import Case


def twice(ns: str) -> Any:
    @register_op(f"{ns}::twice")
    def twice(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x * 2

    return twice


def switches_gradients(ns: str) -> Any:
    """Switches gradients on for a part of its work and never back."""

    @register_op(f"{ns}::twice")
    def twice(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        torch.set_grad_enabled(not torch.is_grad_enabled())
        return x * 2

    return twice


def switches_back(ns: str) -> Any:
    @register_op(f"{ns}::twice")
    def twice(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        with torch.no_grad():
            return x * 2

    return twice


def default_dtype(ns: str) -> Any:
    """Makes float64 the default dtype of the process while it builds a table."""

    @register_op(f"{ns}::twice")
    def twice(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        torch.set_default_dtype(torch.float64)
        return x * torch.full((), 2, dtype=x.dtype, device=x.device)

    return twice


def threads(ns: str) -> Any:
    """Sets the number of threads of the whole process, for its own loop."""

    @register_op(f"{ns}::twice")
    def twice(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        torch.set_num_threads(torch.get_num_threads() % 2 + 1)
        return x * 2

    return twice


def seeds(ns: str) -> Any:
    """Seeds torch's global generator, so that every later draw of the model is the same."""

    @register_op(f"{ns}::noise")
    def noise(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        torch.manual_seed(0)
        return x + torch.rand(x.shape, device=x.device).to(x.dtype)

    return noise


def own_generator(ns: str) -> Any:
    @register_op(f"{ns}::noise")
    def noise(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        generator = torch.Generator().manual_seed(0)
        return x + torch.rand(x.shape, generator=generator).to(x)

    return noise


def seeds_python(ns: str) -> Any:
    """Seeds Python's own random numbers."""
    import random

    @register_op(f"{ns}::noise")
    def noise(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        random.seed(0)
        return x + random.random()

    return noise


def own_python_generator(ns: str) -> Any:
    import random

    @register_op(f"{ns}::noise")
    def noise(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x + random.Random(0).random()

    return noise


def precision(ns: str) -> Any:
    """Lets all matrix products of the process be less exact."""

    @register_op(f"{ns}::gram")
    def gram(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "d d"]:
        torch.set_float32_matmul_precision("medium")
        return x.t() @ x

    return gram


def precision_left(ns: str) -> Any:
    @register_op(f"{ns}::gram")
    def gram(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "d d"]:
        return x.t() @ x

    return gram


def result_wants_gradients(ns: str) -> Any:
    """Returns a leaf that requires gradients, which no graph ever gives."""

    @register_op(f"{ns}::twice")
    def twice(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return (x * 2).detach().requires_grad_()

    return twice


def input_wants_gradients(ns: str) -> Any:
    """Makes its input require gradients, to differentiate inside, and leaves it so."""

    @register_op(f"{ns}::slope")
    def slope(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        with torch.enable_grad():
            x.requires_grad_()
            return torch.autograd.grad((x * x).sum(), x)[0]

    return slope


def copy_wants_gradients(ns: str) -> Any:
    @register_op(f"{ns}::slope")
    def slope(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            return torch.autograd.grad((x * x).sum(), x)[0]

    return slope


def version_counter(ns: str) -> Any:
    """Uses the version counter as a cache key, which tensors of inference mode do not have."""
    seen: dict[tuple[int, int], int] = {}

    @register_op(f"{ns}::twice")
    def twice(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        seen[0, x._version] = 1
        return x * 2

    return twice


def depends_on_mode(ns: str) -> Any:
    """Takes its quick, less exact path where gradients are off: other numbers in evaluation than in training."""

    @register_op(f"{ns}::soft")
    def soft(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x.softmax(-1) if torch.is_grad_enabled() else (x.half().float().softmax(-1)).to(x.dtype)

    return soft


def in_every_mode(ns: str) -> Any:
    @register_op(f"{ns}::soft")
    def soft(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x.softmax(-1)

    return soft


def first_call(ns: str) -> Any:
    """Builds its table in the first call, and returns before it has used it."""
    ready: list[bool] = []

    @register_op(f"{ns}::rotate")
    def rotate(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        if not ready:
            ready.append(True)
            return x.clone()
        return x * 2

    return rotate


CASES = (
    Case(6, "switches gradients", "state", switches_gradients, switches_back),
    Case(6, "changes the default dtype", "state", default_dtype, twice),
    Case(6, "changes the number of threads", "state", threads, twice),
    Case(6, "changes the precision of products", "state", precision, precision_left),
    Case(6, "seeds torch's generator", "repeat", seeds, own_generator),
    Case(6, "seeds Python's generator", "state", seeds_python, own_python_generator),
    Case(6, "first call differs", "repeat", first_call, twice),
    Case(8, "result requires gradients", "modes", result_wants_gradients, twice),
    Case(5, "makes its input require gradients", "writes", input_wants_gradients, copy_wants_gradients),
    Case(8, "no inference mode", "modes", version_counter, twice),
    Case(8, "depends on the grad mode", "modes", depends_on_mode, in_every_mode),
)
