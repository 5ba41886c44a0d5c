"""The same call in the modes that callers use: inference mode, and with inputs that require gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..op import Op
from .eager import Crashed, Refused, run
from .outcome import Outcome, differ
from .samples import Call, tensors_of


def check_modes(op: Op[Any, Any], call: Call, rms: float = 0.0) -> Iterator[str]:
    """How results differ between no_grad, inference mode, grad mode and a call of which gradients are wanted, by more
    than `rms`."""
    try:
        expected = run(op, op.function, call)
    except (Refused, Crashed):
        return  # reported by the other checks
    for tensor in expected.results:
        if tensor.requires_grad:
            yield "a result requires gradients under no_grad; return it detached"
            return
        if tensor.is_inference():
            yield "a result is an inference tensor, which no later backward may save; leave the mode to the caller"
            return
        if type(tensor) is not torch.Tensor:
            yield f"a result is a {type(tensor).__name__}; return a plain torch.Tensor"
            return
    with torch.inference_mode():
        # Made in here, so that they are tensors of inference mode, as a model's are.
        yield from _differs(op, call, call.fresh(), torch.inference_mode(), expected, "in inference mode", True, rms)
    yield from _differs(op, call, call.fresh(), torch.enable_grad(), expected, "in grad mode", True, rms)
    given = _wanting(op, call)
    if given is not None:
        # An op without a formula may well fail there (numpy(), out=): the caller sees that. Other numbers he does not.
        yield from _differs(
            op, call, given, torch.enable_grad(), expected, "where inputs require gradients", False, rms
        )
        for arg, before, after in zip(op.spec.args, _wanting(op, call) or given, given, strict=True):
            if [t.requires_grad for t in tensors_of(before)] != [t.requires_grad for t in tensors_of(after)]:
                yield f"changes whether {arg.name} requires gradients; work on a detached copy"


def _wanting(op: Op[Any, Any], call: Call) -> tuple[Any, ...] | None:
    """The call with gradients wanted of everything that is only read; None if nothing can have a gradient."""
    args, found = call.fresh(), False
    if op.spec.mutates:
        return None  # what writes its arguments is no function that has gradients
    for arg, value in zip(op.spec.args, args, strict=True):
        if arg.layer or arg.mutated:
            continue
        for tensor in tensors_of(value):
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.requires_grad_()
                found = True
    return args if found else None


def _differs(
    op: Op[Any, Any],
    call: Call,
    args: tuple[Any, ...],
    mode: AbstractContextManager[Any],
    expected: Outcome,
    what: str,
    loud: bool,
    rms: float,
) -> Iterator[str]:
    try:
        actual = run(op, op.function, call, args, mode)
    except (Refused, Crashed) as error:
        if loud:
            yield f"{what} it {'refuses: ' if isinstance(error, Refused) else ''}{error}"
        return
    if torch.Tag.nondeterministic_seeded in op.spec.tags:
        return
    found = differ(expected, actual, rms)
    if found is not None:
        yield f"{what} the results are others: {found}"
