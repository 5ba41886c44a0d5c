"""Ops that Inductor may see through: the body is compiled into the graph, fused with what stands around it.

A kernel called from a graph reads and writes memory of its own. Where the body is plain torch, Inductor can compute it
in the loops of its neighbours, which no kernel can beat for small work; so fusion takes part in the choice like a
kernel, with a priority. It is a decomposition below autograd: contract, fake and backward formula stay the op's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from . import devices, select
from .errors import RegistrationError
from .spec import Fusion

if TYPE_CHECKING:
    from .op import Op

TARGET = "inductor"
"""What register_kernel is given in place of a function."""

_installed: set[torch._ops.OpOverload] = set()


def make(
    op: Op[..., Any],
    device_types: str | Iterable[str] | None,
    requires: str | Iterable[str],
    why_not: str | Callable[..., str | None] | None,
    priority: int,
) -> Fusion:
    """What register_kernel(..., "inductor") was told; RegistrationError unless the body says everything the op does."""
    if not op.spec.has_body:
        raise RegistrationError(f"{op.name}: the kernel 'inductor' needs a body to compile, and this op has none")
    if op.spec.mutates or op.spec.layer_arg is not None:
        raise RegistrationError(
            f"{op.name}: the kernel 'inductor' is for functional ops; this one writes its arguments or its layer"
        )
    if requires or why_not is not None:
        raise RegistrationError(f"{op.name}: the kernel 'inductor' takes any call, so it has no requires= or why_not=")
    types = (device_types,) if isinstance(device_types, str) else device_types
    return Fusion(None if types is None else tuple(devices.check(t, op.name) for t in types), priority)


def facts(op: Op[..., Any]) -> str:
    """What decides, for cache keys: AOTAutograd's holds the op, not what it was decomposed into."""
    forced = select.forced_kernel(op)
    kernels = [(k.name, k.device_types, k.priority, k.missing() is None) for k in op.kernels]
    return f"{op.fusion} {forced[0].name if forced else None} {kernels}"


def install_if_inductor(op: Op[..., Any]) -> None:
    """Give Inductor the body as a decomposition, once, if Inductor is loaded at all."""
    if op.fusion is None or op.overload in _installed or "torch._inductor.decomposition" not in sys.modules:
        return
    from torch._inductor import decomposition

    from .fake import fake_source

    _installed.add(op.overload)

    def see_through(args: tuple[Any, ...]) -> Any:
        if select.why_not_fused(op, op.device_of(args)) is not None:
            return NotImplemented
        made = op.call_with(op.body, args)
        if fake_source(op) != "contract":
            return made
        # What the contract's fake promised to the rest of the graph.
        return tuple(t.contiguous() for t in made) if isinstance(made, tuple) else made.contiguous()

    # Inductor hands out a table that it made of the first one, and keeps.
    for table in (decomposition.decompositions, decomposition.select_decomp_table()):
        table.setdefault(op.overload, op.gather(see_through))
