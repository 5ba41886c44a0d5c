"""Formulas of operators under torch.func: grad, vjp, jvp, jacobians and hessians, nested and together with vmap.

torch runs an operator's formula through an autograd.Function of its own, which it refuses inside a transform of
torch.func ("must override the setup_context staticmethod"). Here the same formula runs at the level of the transform
that asks for a gradient, and the call goes on to the transforms around it, as calls of torch's own operators do. An
operator may have a formula for tangents (forward mode) too, which torch.library has no place for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import forward_ad

from . import _compat
from .errors import AutogradError

Kernel = Callable[..., Any]


def differentiable(
    op: torch._ops.OpOverload, kernel: Kernel, backward: Kernel, setup_context: Kernel | None, jvp: Kernel | None
) -> Kernel:
    """What computes `op` under the Autograd keys: torch's own `kernel`, but the formula itself inside a transform.

    jvp: (ctx, tensors among the arguments, their tangents, None for those without) -> tangents of the results' tensors.
    Raises AutogradError for tangents where there is none: they would be dropped.
    """

    def run(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        level: Any = peek_interpreter_stack()
        # In a compiled graph the transform is entered without a word to forward_ad.
        forward = forward_ad._current_level >= 0 if level is None else level.key() == TransformType.Jvp
        if not forward and level is None:
            return kernel(keyset, *args, **kwargs)
        tensors = [tensor for arg in args for tensor in _tensors(arg)]
        if forward and any(forward_ad.unpack_dual(tensor, level=0).tangent is not None for tensor in tensors):
            if jvp is None:
                raise AutogradError(
                    f"{op.name()}: called with a dual tensor, but it has no forward-mode derivative; take reverse mode "
                    "(torch.autograd.grad, torch.func.vjp, torch.func.jacrev), or hand in the primal alone"
                )
        elif not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return kernel(keyset, *args, **kwargs)
        call = _Call(op, keyset, args, kwargs, (backward, setup_context, jvp))
        return call.rebuild(_compat.apply_at_this_level(_Formula, call, *tensors))

    return run


class _Call:
    """One call of an operator, and the arrangement of its arguments and results."""

    def __init__(
        self,
        op: torch._ops.OpOverload,
        keyset: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        formulas: tuple[Kernel, Kernel | None, Kernel | None],
    ) -> None:
        self.op, self.keyset, self.args, self.kwargs = op, keyset, args, kwargs
        self.backward, self.setup_context, self.jvp = formulas
        self.results: Any = None  # the structure of the results: a count for each list, None for each tensor

    def compute(self, ctx: Any) -> tuple[torch.Tensor, ...]:
        if self.jvp is not None:
            ctx.save_for_forward(*(tensor for arg in self.args for tensor in _tensors(arg)))
        # An autograd.Function switches gradients off, and the transforms further out want them.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            found = self.op.redispatch(self.keyset & torch._C._after_autograd_keyset, *self.args, **self.kwargs)
        if self.setup_context is not None:
            args, kwargs = torch._library.utils.fill_defaults(self.op._schema, self.args, self.kwargs)
            keyword_only = {"keyword_only_inputs": kwargs} if _has_keywords(self.op) else {}
            self.setup_context(ctx=ctx, inputs=args, output=found, **keyword_only)
        many = found if isinstance(found, tuple) else (found,)
        self.results = [len(one) if isinstance(one, list) else None for one in many], type(found)
        return tuple(tensor for one in many for tensor in _tensors(one))

    def rebuild(self, flat: tuple[Any, ...]) -> Any:
        """What the operator returns, from the tensors in it."""
        many = self.arrange(flat)
        return many if self.results[1] is tuple else many[0]

    def arrange(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        """One value for each result, of one value for each of its tensors."""
        left = iter(flat)
        return tuple(next(left) if count is None else [next(left) for _ in range(count)] for count in self.results[0])

    def needed(self, flat: tuple[bool, ...]) -> tuple[Any, ...]:
        """What torch's formulas find in ctx.needs_input_grad: a bool for each argument, a list for each list."""
        left = iter(flat)
        found: list[Any] = []
        for arg in self.args:
            each = [isinstance(one, torch.Tensor) and next(left) for one in arg] if _is_list(arg) else None
            found.append(each if each is not None else isinstance(arg, torch.Tensor) and next(left))
        return tuple(found)

    def gradients(self, found: Any) -> list[Any]:
        """The gradients of the tensors among the arguments, of what the formula returned."""
        each = found if isinstance(found, tuple) else (found,)
        if len(each) < len(self.args):
            raise RuntimeError(
                f"{self.op.name()}: the backward formula returned {len(each)} gradients for {len(self.args)} arguments"
            )
        flat: list[Any] = []
        for arg, grad in zip(self.args, each, strict=False):
            if isinstance(arg, torch.Tensor):
                flat.append(grad)
            elif _is_list(arg):
                grads = grad if grad is not None else [None] * len(arg)
                flat += [g for one, g in zip(arg, grads, strict=True) if isinstance(one, torch.Tensor)]
        return flat


class _Formula(torch.autograd.function._SingleLevelFunction):
    """A call at the level of one transform."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.opreg_call = call
        return call.compute(ctx)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        call: _Call = ctx.opreg_call
        before = ctx.needs_input_grad
        ctx.needs_input_grad = call.needed(before[1:])
        try:
            found = call.backward(ctx, *call.arrange(grads))
        finally:
            ctx.needs_input_grad = before
        return None, *call.gradients(found)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> tuple[Any, ...]:
        call: _Call = ctx.opreg_call
        if call.jvp is None:
            raise AutogradError(f"{call.op.name()}: has no forward-mode derivative")
        # It is called with tangents switched off, which the transforms further out want: so on, and none in this one.
        with forward_ad._set_fwd_grad_enabled(True):
            primals = [forward_ad.unpack_dual(tensor, level=0).primal for tensor in ctx.saved_tensors]
            found: tuple[Any, ...] = call.jvp(ctx, primals, tangents)
        return found


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(one, torch.Tensor) for one in value)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [one for one in value if isinstance(one, torch.Tensor)] if isinstance(value, (list, tuple)) else []


def _has_keywords(op: torch._ops.OpOverload) -> bool:
    return any(argument.kwarg_only for argument in op._schema.arguments)
