"""From what the checks saw to the lines of the report: a state, a sentence and the command that shows it again."""

from __future__ import annotations

from .. import fake, registry
from ..op import Op
from ..spec import REFERENCE, KernelSpec
from . import outputs
from .report import FAILED, OK, SKIPPED, Report
from .tally import ORDER, Tally


def write(
    report: Report, op: Op[..., object], tally: Tally, kernels: list[KernelSpec], truth: KernelSpec | None
) -> None:
    """Add one line per check to the report, in the order of ORDER, then one per kernel."""
    report.by_input = tally.by_input
    for check in [*ORDER, *(f"kernel {kernel.name}" for kernel in op.kernels)]:
        if check in tally.found:
            _failed(report, op, tally, check)
        elif check in tally.passed:
            report.add(check, OK, _detail(op, tally, check, truth, report.device))
        elif check in tally.skipped:
            report.add(check, SKIPPED, tally.skipped[check])


def _failed(report: Report, op: Op[..., object], tally: Tally, check: str) -> None:
    where, problem = tally.found[check][0]
    others = len({text for _, text in tally.found[check]}) - 1
    more = f" (and {others} more)" if others else ""
    command = reproduce(op, report.device, report.seed, check, where)
    report.add(check, FAILED, f"{where}: {problem}{more}" if where else f"{problem}{more}", command)


def reproduce(op: Op[..., object], device: str, seed: int, check: str, where: str) -> str:
    """The command that shows a finding again; it imports the op's module where no installed package registers it."""
    parts = [f"opreg check {op.name}"]
    module = op.body.__module__
    installed = {point.module.partition(".")[0] for point in registry.packages()}
    if module.partition(".")[0] not in installed and module != "__main__":
        parts.append(f"--import {module}")
    parts.append(f"--device {device}")
    if check.startswith("kernel ") and check != f"kernel {REFERENCE}":
        parts.append(f"--kernel {check.removeprefix('kernel ')}")
    if where.startswith("input "):
        parts.append(f"--input {where.split()[1].rstrip(',')}")
    parts.append(f"--seed {seed}")
    return " ".join(parts)


def _detail(op: Op[..., object], tally: Tally, check: str, truth: KernelSpec | None, device: str) -> str:
    count = tally.passed[check]
    if check == "fake":
        return f"{fake.fake_source(op)}; {count} shapes and layouts"
    if check == "compile" and device == "xla":
        return "openxla, static sizes, no graph break"
    if check == "compile":
        return "aot_eager and inductor, static and dynamic sizes, no graph break"
    if check == "outputs":
        results = [] if device == "xla" else ["results"]
        return "every value is written: " + ", ".join([*(arg.name for arg in outputs.outputs(op)), *results])
    if check == "writes":
        return f"as declared: {', '.join(op.spec.mutates) or 'nothing'}"
    if check == "modes" and device == "xla" and op.spec.layer_arg is not None:
        return "no_grad, gradients wanted, and inference mode where torch_xla can make its views, agree"
    if check == "modes":
        return "no_grad, inference mode and gradients wanted agree"
    if check.startswith("kernel "):
        defines = truth is not None and check == f"kernel {truth.name}"
        return f"{'defines the op' if defines else 'equals the reference'} on {count} calls"
    return ""
