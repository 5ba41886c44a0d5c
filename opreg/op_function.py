"""The type of what register_op returns, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from typing_extensions import ParamSpec, TypeVar

from .spec import OpSpec

if TYPE_CHECKING:
    from . import select
    from .op import Op

# Defaults, so that `Op` alone means an op of any signature.
P = ParamSpec("P", default=...)
R = TypeVar("R", default=Any)
R_co = TypeVar("R_co", covariant=True, default=Any)

Inputs = Callable[[torch.device, torch.dtype, torch.Generator], Iterable[dict[str, Any]]]


class OpFunction(Protocol[P, R_co]):
    """Type of what register_op returns: called like the decorated function, with Op's methods as attributes."""

    op: Op[Any, Any]
    name: str
    spec: OpSpec
    overload: torch._ops.OpOverload
    register_kernel: Callable[..., Any]
    register_fake: Callable[..., Any]
    register_autograd: Callable[..., None]
    register_vmap: Callable[..., Any]
    register_sharding: Callable[..., None]
    register_inputs: Callable[[Inputs], Inputs]
    samples: Callable[..., Iterator[dict[str, Any]]]
    tolerance: Callable[..., None]
    explain: Callable[..., select.Explanation]
    check: Callable[[], Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
