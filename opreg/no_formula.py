"""Calls of an op without backward formula on tensors that require gradients.

torch would record what the kernel happens to do inside: some gradient in eager mode, with a warning, and none from a
kernel in C++ or in a compiled graph. Here such a call gives results whose backward is an error that says what is
missing; forward alone stays allowed, since models are served with parameters that require gradients. A compiled graph
cannot hold the error: it treats the results as constants, which is logged when it is traced. Nor can a tensor that an
op writes in place: a cache would hold every step's graph. That is logged, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .errors import AutogradError

if TYPE_CHECKING:
    from .op import Op

_log = logging.getLogger("opreg")


class _Opaque(torch.autograd.Function):
    """Results of a call that no gradient can pass."""

    @staticmethod
    def forward(
        ctx: Any, name: str, run: Callable[[], Any], outside: list[TreeSpec], *tensors: torch.Tensor
    ) -> tuple[Any, ...]:
        ctx.name = name
        leaves, structure = tree_flatten(run())
        outside.append(structure)
        return tuple(leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AutogradError(
            f"{ctx.name}: backward was called, but the op has no backward formula; register one with "
            "register_autograd, or call the op under torch.no_grad() or on tensors that are detached"
        )


def call(op: Op, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The op's kernel on `args`, of which some tensor requires a gradient."""
    structure: list[TreeSpec] = []
    leaves = _Opaque.apply(op.name, lambda: op.call_with(run, args), structure, *_tensors(args))  # type: ignore[no-untyped-call]
    return tree_unflatten(leaves, structure[0])


def traced(op: Op, args: Sequence[Any]) -> None:
    """Log, once per op, that a graph is being made in which no gradient passes the op."""
    if op.gradless_logged or op.has_autograd or not torch.is_grad_enabled():
        return
    if not any(tensor.requires_grad for tensor in _tensors(args)):
        return
    if op.spec.mutates:
        written(op)
        return
    op.gradless_logged = True
    _log.warning(
        "%s: compiled with inputs that require gradients, but it has no backward formula: no gradient passes it. "
        "Register one with register_autograd, or compile under torch.no_grad()",
        op.name,
    )


def written(op: Op) -> None:
    """Log, once per op, that it was called with inputs that require gradients, which do not reach what it writes."""
    if op.gradless_logged:
        return
    op.gradless_logged = True
    _log.warning(
        "%s: called with inputs that require gradients, but it writes %s in place, and no gradient passes what an op "
        "writes. Call it under torch.no_grad(), or train with an op that returns its results",
        op.name,
        ", ".join(op.spec.mutates),
    )


def _tensors(args: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among the arguments, those in lists as well."""
    flat = [t for value in args for t in (value if isinstance(value, (list, tuple)) else (value,))]
    return [t for t in flat if isinstance(t, torch.Tensor)]
