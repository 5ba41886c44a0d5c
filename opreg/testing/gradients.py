"""Formulas against finite differences, and batching rules against a loop."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..op import Op
from .eager import Crashed, Refused, describe, run
from .samples import Call, tensors_of

_LARGEST = 400
"""Elements of all inputs together: finite differences need two calls for each."""


def _wide(call: Call) -> Call:
    """The call in float64, where finite differences are exact to about 1e-6."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().double() if value.is_floating_point() else value
        if isinstance(value, (list, tuple)):
            return type(value)(one(item) for item in value)
        return value

    return Call(call.label, tuple(one(value) for value in call.args), call.state)


def check_gradients(op: Op[Any, Any], call: Call) -> tuple[bool, str | None]:
    """(whether it could be run, what differs) for the registered formula."""
    wide = _wide(call)
    size = sum(t.numel() for value in wide.args for t in tensors_of(value) if t.is_floating_point())
    if not 0 < size <= _LARGEST:
        return False, None
    try:
        run(op, op.overload, wide)
    except (Refused, Crashed):
        return False, None  # the op does not take float64
    places = [
        index
        for index, (arg, value) in enumerate(zip(op.spec.args, wide.args, strict=True))
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not arg.layer
    ]
    given = [wide.args[place].clone().requires_grad_() for place in places]

    def function(*tensors: torch.Tensor) -> Any:
        values = list(wide.args)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        results = [t for t in tensors_of(op.call_with(op.overload, tuple(values))) if t.is_floating_point()]
        return tuple(t for t in results if t.requires_grad)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gradcheck warns about inputs it then copes with
            torch.autograd.gradcheck(function, given, atol=1e-5, rtol=1e-3, nondet_tol=0.0)
    except Exception as error:  # a formula may raise anything; the first lines say which input differs
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return True, f"{' '.join(lines[:3])[:400]}" if type(error).__name__ == "GradcheckError" else describe(error)
    return True, None


def check_vmap(op: Op[Any, Any], call: Call) -> tuple[bool, str | None]:
    """(whether it could be run, what differs) for the batching rule: two samples of all tensors, and of each alone."""
    places = [
        index
        for index, (arg, value) in enumerate(zip(op.spec.args, call.args, strict=True))
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not arg.layer
    ]
    if not places or op.spec.mutates:
        return False, None
    groups = [places, *([place] for place in places if len(places) > 1)]
    for group in groups:
        values = [torch.stack([call.args[p].detach(), call.args[p].detach() * 0.5 + 0.25]) for p in group]

        def function(*tensors: torch.Tensor, group: list[int] = group) -> Any:
            args = list(call.args)
            for place, tensor in zip(group, tensors, strict=True):
                args[place] = tensor
            return op.call_with(op.function, tuple(args))

        names = ", ".join(op.spec.args[p].name for p in group)
        try:
            loop = [tensors_of(function(*(value[i] for value in values))) for i in range(2)]
            batched = tensors_of(torch.vmap(function)(*values))
        except Exception as error:  # a rule may raise anything
            return True, f"batched over {names}: {describe(error)}"
        for index, found in enumerate(batched):
            expected = torch.stack([one[index] for one in loop])
            if found.shape != expected.shape:
                return True, f"batched over {names}: shape {list(found.shape)} instead of {list(expected.shape)}"
            if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
                worst = float((found - expected).abs().max())
                return True, f"batched over {names}: differs from a loop by up to {worst:.1e}"
    return True, None
