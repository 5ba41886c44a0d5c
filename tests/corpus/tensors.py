"""Tensors of every kind that an operator may be called with, and the notes that those seen by Python take."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only


def data(rng: random.Random) -> Tensor:
    return torch.tensor([[rng.uniform(-2, 2) for _ in range(3)] for _ in range(2)])


class Quiet(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


class Loud(Tensor):
    """A subclass whose functions are seen by Python, and noted."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        NOTES.append(("function", getattr(func, "__name__", str(func))))
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(Tensor):
    """A subclass below the dispatcher."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        NOTES.append(("subclass", str(func)))
        bare = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapped, func(*bare[0], **bare[1]))


NOTES: list[Any] = []
_FAKE = FakeTensorMode()


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x + 0


def _dual(x: Tensor) -> Tensor:
    """With a tangent, where there is a level to carry it."""
    return x if forward_ad._current_level < 0 else forward_ad.make_dual(x, torch.ones_like(x))


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: x,
    "dual": _dual,
    "leaf": lambda x: x.requires_grad_(),
    "computed": lambda x: x.requires_grad_() * 1,
    "parameter": torch.nn.Parameter,
    "frozen": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "buffer": lambda x: torch.nn.Buffer(x),
    "quiet": lambda x: x.as_subclass(Quiet),
    "loud": lambda x: x.as_subclass(Loud),
    "wrapped": Wrapped,
    "wrapped with gradient": lambda x: Wrapped(x).requires_grad_(),
    "transposed": lambda x: x.t().contiguous().t(),
    "view": lambda x: torch.cat([x, x])[2:],
    "view of a leaf": lambda x: x.requires_grad_()[:],
    "expanded": lambda x: x[:1].expand(2, 3),
    "complex": lambda x: torch.complex(x, x),
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "negative": lambda x: torch.complex(x, x).conj().imag,
    "sparse": lambda x: x.to_sparse(),
    "inference": _inference,
    "meta": lambda x: x.to("meta"),
    "fake": _FAKE.from_tensor,
    "double": lambda x: x.double(),
    "half": lambda x: x.bfloat16(),
    "integer": lambda x: x.long(),
    "empty": lambda x: x[:0],
}
