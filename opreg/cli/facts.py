"""What `list` and `show` say about an op, in one place, so that text and JSON cannot differ."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

from opreg import devices, select
from opreg.errors import OpregError
from opreg.op import Op
from opreg.spec import KernelSpec


@dataclass(frozen=True)
class KernelFacts:
    """One kernel on the device in question: state is "used", "ready", "missing" or "other device"."""

    spec: KernelSpec
    state: str
    why: str


@dataclass(frozen=True)
class OpFacts:
    """One op on the device in question. note: why nothing better runs; error: why the choice could not be made."""

    op: Op
    device: str
    selected: str | None
    kernels: tuple[KernelFacts, ...]
    note: str
    error: str | None

    @property
    def devices(self) -> list[str]:
        return device_types(self.op)

    def json(self) -> dict[str, Any]:
        """The op's entry in --json; its keys are fixed by schema_version."""
        return {
            "name": self.op.name,
            "kind": self.op.spec.kind,
            "schema": self.op.spec.schema,
            "mutates": [*self.op.spec.mutates],
            "devices": self.devices,
            "kernels": [
                {
                    "name": kernel.spec.name,
                    "devices": [*(kernel.spec.device_types or ("any",))],
                    "priority": kernel.spec.priority,
                    "state": kernel.state,
                    "why": kernel.why,
                }
                for kernel in self.kernels
            ],
            "selected": self.selected,
            "source": self.op.spec.source,
        }


def device_types(op: Op) -> list[str]:
    """Device types that have a kernel of their own, then "any" where some kernel runs everywhere."""
    named = {name for kernel in op.kernels for name in kernel.device_types or ()}
    order = [name for name in devices.KNOWN if name in named] + sorted(named.difference(devices.KNOWN))
    return [*order, "any"] if any(kernel.device_types is None for kernel in op.kernels) else order


def comes_from(op: Op, point: EntryPoint) -> bool:
    """Whether the op was declared in the top-level package that an entry point names."""
    return op.body.__module__.partition(".")[0] == point.module.partition(".")[0]


def look(op: Op, device: str) -> OpFacts:
    """Everything about `op` on a device type. A forced choice that cannot be made is a fact, not an exception."""
    try:
        explanation = select.explain(op, device)
        forced = select.forced_kernel(op)
    except OpregError as error:
        kernels = tuple(_kernel(kernel, "unknown", "", device) for kernel in op.kernels)
        return OpFacts(op, device, None, kernels, str(error), str(error))
    kernels = tuple(_kernel(d.kernel, d.state, d.why, device) for d in explanation.decisions)
    selected = explanation.selected
    broken = None
    if forced is not None:
        kernel, who = forced
        note = f"forced by {who}"
        if selected is None:
            reason = kernel.missing() or f"it is for {kernel.devices}, not {device}"
            note = broken = f"{who} forces {kernel.name}, which cannot run here: {reason}"
    else:
        better = [k for k in kernels if k.state == "missing" and _beats(k.spec, selected)]
        note = "; ".join(f"{k.spec.name} {k.why}" for k in better)
        if selected is None:
            note = note or "no kernel for this device"
    return OpFacts(op, device, selected.name if selected else None, kernels, note, broken)


def _kernel(kernel: KernelSpec, state: str, why: str, device: str) -> KernelFacts:
    # A kernel for another device is told apart from one whose package is absent too: both must be put right to use it.
    if state == "other device":
        why = kernel.missing() or ""
    elif state in ("used", "ready") and kernel.why_not is not None:
        why = why or "decides per call"
    return KernelFacts(kernel, state, why)


def _beats(kernel: KernelSpec, selected: KernelSpec | None) -> bool:
    return selected is None or kernel.priority > selected.priority
