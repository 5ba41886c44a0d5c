"""Formulas against finite differences, and batching rules against a loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
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
    names = [op.spec.args[place].name for place in places]
    try:
        return True, next(_habits(function, given, names), None)
    except Exception as error:  # as above
        return True, describe(error)


def _habits(function: Callable[..., Any], given: list[torch.Tensor], names: list[str]) -> Iterator[str]:
    """What finite differences do not show: gradients that arrive expanded or strided, two calls before one backward,
    gradients wanted of one input only, and what the formula writes."""

    def gradients(
        weights: list[torch.Tensor], inputs: list[torch.Tensor] | None = None, results: Any = None
    ) -> list[torch.Tensor]:
        leaves = given if inputs is None else inputs
        results = function(*leaves) if results is None else results
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(results, wanted, weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g.clone() for g, w in zip(found, wanted, strict=True)]

    results = function(*given)
    if not results:
        return
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    before = [tensor.detach().clone() for tensor in (*weights, *given)]
    expected = gradients(weights)
    for name, tensor, old in zip(
        (*("the incoming gradient" for _ in weights), *names), (*weights, *given), before, strict=True
    ):
        if not torch.equal(tensor.detach(), old):
            yield f"the formula writes {name} in place, which others read too; work on a copy"
            return

    def differs(found: list[torch.Tensor], reference: list[torch.Tensor], what: str) -> Iterator[str]:
        for name, one, other in zip(names, found, reference, strict=True):
            if not torch.allclose(one, other, rtol=1e-9, atol=1e-9, equal_nan=True):
                yield f"the gradient of {name} {what}"

    ones = [torch.ones_like(r) for r in results]
    expanded = [torch.ones((), dtype=r.dtype, device=r.device).expand(r.shape) for r in results]
    arrivals = [
        ("that is not contiguous", [_transposed(w) for w in weights], expected),
        ("that is every second element of a buffer", [torch.stack([w, -w], -1)[..., 0] for w in weights], expected),
        ("of a sum, whose strides are 0", expanded, gradients(ones)),
    ]
    for what, arriving, reference in arrivals:
        try:
            found = gradients(arriving)
        except Exception as error:  # the formula may raise anything
            yield f"the formula fails on an incoming gradient {what}: {describe(error)}"
            return
        yield from differs(found, reference, f"is another for an incoming gradient {what}")
    first = function(*given)
    function(*(leaf.detach().mul(0.5).requires_grad_() for leaf in given))
    again = gradients(weights, results=first)
    yield from differs(again, expected, "is another where the op was called again before the backward pass")
    for place in range(len(given)) if len(given) > 1 else ():
        alone = [leaf.detach().clone().requires_grad_(index == place) for index, leaf in enumerate(given)]
        made = function(*alone)
        if not made:
            continue
        if len(made) == len(weights) and not torch.allclose(
            gradients(weights, alone, made)[0], expected[place], rtol=1e-9, atol=1e-9, equal_nan=True
        ):
            yield f"the gradient of {names[place]} is another where no other input wants one"


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Same values, first and last dim swapped in memory."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


def check_vmap(op: Op[Any, Any], call: Call) -> tuple[bool, str | None]:
    """(whether it could be run, what differs) for the batching rule: two samples of all tensors, and of each alone; the
    batch as first and as last dim."""
    places = [
        index
        for index, (arg, value) in enumerate(zip(op.spec.args, call.args, strict=True))
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not arg.layer
    ]
    if not places or op.spec.mutates:
        return False, None
    groups = [(places, 0), (places, -1), *(([place], 0) for place in places if len(places) > 1)]
    for group, dim in groups:
        samples = [(call.args[p].detach(), call.args[p].detach() * 0.5 + 0.25) for p in group]
        values = [torch.stack(pair, dim) for pair in samples]

        def function(*tensors: torch.Tensor, group: list[int] = group) -> Any:
            args = list(call.args)
            for place, tensor in zip(group, tensors, strict=True):
                args[place] = tensor
            return op.call_with(op.function, tuple(args))

        names = ", ".join(op.spec.args[p].name for p in group) + (" in the last dim" if dim else "")
        try:
            loop = [tensors_of(function(*(pair[i] for pair in samples))) for i in range(2)]
            batched = tensors_of(torch.vmap(function, in_dims=dim)(*values))
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
