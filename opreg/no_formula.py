"""Calls of an op without backward formula on tensors that require gradients.

torch would record what the kernel happens to do inside: some gradient in eager mode, with a warning, and none from a
kernel in C++ or in a compiled graph. Here such a call gives results whose backward is an error that says what is
missing; forward alone stays allowed, since models are served with parameters that require gradients. The same holds
for compiled graphs: the backward graph calls an operator that raises. What an op writes in place cannot hold the error
(a cache would hold every step's graph), nor can a graph that is traced without Dynamo (the first sight of the op comes
too late). These two are logged.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from . import _compat, library
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
        raise _error(ctx.name)


def _error(name: str) -> AutogradError:
    return AutogradError(
        f"{name}: backward was called, but the op has no backward formula; register one with register_autograd, or "
        "call the op under torch.no_grad() or on tensors that are detached"
    )


def call(op: Op, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The op's kernel on `args`, of which some tensor requires a gradient."""
    structure: list[TreeSpec] = []
    leaves = _Opaque.apply(op.name, lambda: op.call_with(run, args), structure, *_tensors(args))  # type: ignore[no-untyped-call]
    return tree_unflatten(leaves, structure[0])


def traced(op: Op, args: Sequence[Any]) -> None:
    """See to it that a graph that is being made holds the error, or log, once per op, that no gradient passes."""
    if op.gradless_logged or op.refuses_gradients or op.has_autograd or not torch.is_grad_enabled():
        return
    if not any(tensor.requires_grad for tensor in _tensors(args)):
        return
    if op.spec.mutates:
        written(op)
        return
    if not library.has_keyword_tensors(op.overload):
        _refuse_in_graphs(op)
        if torch._guards.CompileContext.current_compile_id() is not None:
            return  # Dynamo runs the fake before anything differentiates the graph
    op.gradless_logged = True
    _log.warning(
        "%s: compiled with inputs that require gradients, but it has no backward formula: no gradient passes it. "
        "Register one with register_autograd, or compile under torch.no_grad()",
        op.name,
    )


_RAISES = "opreg::no_gradient"


@functools.cache
def _raising() -> torch._ops.OpOverload:
    """The operator that stands in backward graphs where a formula is missing."""

    def no_gradient(grad: torch.Tensor, size: list[int], dtype: torch.dtype, op: str) -> torch.Tensor:
        raise _error(op)

    def shaped(grad: torch.Tensor, size: list[int], dtype: torch.dtype, op: str) -> torch.Tensor:
        return grad.new_empty(size, dtype=dtype)

    made = library.define(_RAISES, "(Tensor grad, SymInt[] size, ScalarType dtype, str op) -> Tensor")
    library.implement(_RAISES, no_gradient)
    library.fake(_RAISES, shaped)
    return made


def _refuse_in_graphs(op: Op) -> None:
    """Give torch a formula that raises when it is computed, and gives way to one that is registered later."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any, **keyword_only_inputs: Any) -> None:
        if op.has_autograd:
            if op.formula[1] is not None:
                op.formula[1](ctx, inputs, output, **keyword_only_inputs)
            return
        ctx.opreg_wanted = tree_map(lambda v: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else None, inputs)

    def backward(ctx: Any, *grads: Any) -> Any:
        if op.has_autograd and op.formula[0] is not None:
            return op.formula[0](ctx, *grads)
        grad = next(leaf for leaf in tree_leaves(grads) if isinstance(leaf, torch.Tensor))

        def refuse(wanted: Any) -> Any:
            if isinstance(wanted, list):
                return [refuse(one) for one in wanted]
            return None if wanted is None else _raising()(grad, wanted[0], wanted[1], op.name)

        return tuple(refuse(wanted) for wanted in ctx.opreg_wanted)

    op.refuses_gradients = True
    library.autograd(op.name, backward, setup_context)


def _has_tangent(tensor: torch.Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:
        return False  # autograd is off here, or there are no views of such a tensor, and so no dual ones


def tangents(op: Op, args: Sequence[Any]) -> None:
    """AutogradError for dual tensors: their tangents would be dropped, and a derivative be zero without a word."""
    if op.jvp is not None:
        return
    # Nobody is to see that we ask.
    with _disable_current_modes(), torch._C.DisableTorchFunction(), _compat.not_in_jit_trace():
        dual = any(_has_tangent(_compat.unbatched(tensor)) for tensor in _tensors(args))
    if dual:
        raise AutogradError(
            f"{op.name}: called with a dual tensor, but operators have no forward-mode derivative; take reverse "
            "mode (torch.autograd.grad, torch.func.vjp), or hand in the primal alone"
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
