"""One eager call, asked everything: each kernel against the reference, writes, outputs, repeats, the fake, modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import select
from ..errors import OpregError, UnknownOpError
from ..op import Op
from ..spec import REFERENCE, KernelSpec
from . import eager, fakes, modes, outputs, remember
from .compare import difference
from .eager import Crashed, Refused
from .outcome import Outcome, differ
from .samples import Call
from .tally import Tally


class OneCall:
    """The kernels of one op that run on a device, and everything that is asked of one eager call of them."""

    def __init__(self, op: Op[Any, Any], device: str, kernel: str | None) -> None:
        self.op, self.device = op, device
        self.tally = Tally()
        self.kernels: list[KernelSpec] = []
        self.refused: dict[str, str] = {}
        self.memories: dict[str, remember.Memory] = {}
        for spec in op.kernels:
            if kernel is not None and spec.name not in (kernel, REFERENCE):
                continue
            why = None if spec.takes(device) else f"for {spec.devices}, not {device}"
            why = why or spec.missing()
            if why is not None:
                self.tally.skipped[f"kernel {spec.name}"] = why
                continue
            try:
                fn = select.load(op, spec)
                select.load_predicate(op, spec)
            except OpregError as error:
                self.tally.record(f"kernel {spec.name}", "", f"cannot be loaded: {error}")
                continue
            self.kernels.append(spec)
            self.memories[spec.name] = remember.Memory(fn)
        self.truth = next((k for k in self.kernels if k.name == REFERENCE), self.kernels[-1] if self.kernels else None)

    @contextmanager
    def through(self, kernel: KernelSpec) -> Iterator[Callable[..., Any]]:
        """The function that runs one kernel as the op would: contract check, fills, layer look-up."""
        with select.use_kernel(self.op.name, kernel.name):
            yield self.op.calls.runner(self.device)

    def run_kernel(self, kernel: KernelSpec, call: Call, args: tuple[Any, ...] | None = None) -> Outcome:
        with self.through(kernel) as fn:
            return eager.run(self.op, fn, call, args)

    def truth_kernel(self) -> KernelSpec:
        if self.truth is None:
            raise UnknownOpError(f"{self.op.name}: no kernel")
        return self.truth

    def eager(self, call: Call, where: str, dtype: torch.dtype, expected: Outcome, thorough: bool) -> None:
        for kernel in self.kernels:
            name = f"kernel {kernel.name}"
            try:
                why = eager.refusal(self.op, kernel, call.fresh())
            except Crashed as error:
                self.tally.record(name, where, str(error))
                continue
            if why is not None:
                self.refused.setdefault(kernel.name, f"refuses {where}: {why}")
                continue
            try:
                self.kernel(kernel, call, where, dtype, expected, thorough)
            except (Refused, Crashed) as error:
                cure = "; refuse such calls in why_not" if kernel.name != REFERENCE else ""
                self.tally.record(name, where, f"{verb(error)}{error}, which the reference takes{cure}")
        try:
            real = eager.run(self.op, self.op.overload, call)
        except (Refused, Crashed) as error:
            self.tally.record("contract", where, f"the op {verb(error)}{error}")
            return
        self.tally.record("fake", where, fakes.check_fake(self.op, call, real))
        if not thorough:
            return
        self.tally.record("fake", where, fakes.check_device(self.op, call))
        self.tally.record("modes", where, next(modes.check_modes(self.op, call), None))
        if self.op.spec.layer_arg is not None:
            self.tally.record("state", where, outputs.check_profiling(self.op, call))

    def kernel(
        self,
        kernel: KernelSpec,
        call: Call,
        where: str,
        dtype: torch.dtype,
        expected: Outcome,
        thorough: bool,
    ) -> None:
        name = f"kernel {kernel.name}"
        by = "" if kernel.name == REFERENCE else f"{kernel.name} "
        # Before anything else calls the kernel: what it does in its first call counts, too.
        differs = None if kernel is self.truth else self.agree(kernel, call, dtype, expected)
        self.tally.record(name, where, differs)
        if kernel is self.truth and thorough:
            again = self.run_kernel(kernel, call)
            if torch.Tag.nondeterministic_seeded not in self.op.spec.tags:
                changed = differ(expected, again, 0.0)
                self.tally.record("repeat", where, prefix("the first call differs from the next: ", changed))
        with self.through(kernel) as fn:
            problems = [*eager.check_writes(self.op, fn, call, thorough)]
            judged = ["writes", "aliasing"]
            if thorough or "=" in call.label:  # a row more or less is where kernels forget to write
                judged.append("outputs")
                problems += outputs.check_outputs(self.op, fn, call)
                problems += outputs.check_results(self.op, fn, call)
            for check in judged:
                if not any(found == check for found, _ in problems):
                    self.tally.record(check, where, None)
            for check, problem in problems:
                self.tally.record(check, where, by + problem)
            if thorough:
                memory = self.memories[kernel.name]
                self.tally.record("repeat", where, prefix(by, eager.repeats(self.op, fn, call)))
                self.tally.record("repeat", where, prefix(by, remember.check_caches(self.op, fn, memory, call)))
                self.tally.record("state", where, prefix(by, remember.check_kept(self.op, fn, call)))
                self.tally.record("state", where, prefix(by, eager.check_process(self.op, fn, call)))

    def agree(self, kernel: KernelSpec, call: Call, dtype: torch.dtype, expected: Outcome) -> str | None:
        """How a kernel's results differ from the reference's, or None.

        In a 16-bit dtype the reference also runs on inputs widened to float32: a reference written in plain torch
        rounds at every step and is then the less exact of the two.
        """
        if torch.Tag.nondeterministic_seeded in self.op.spec.tags:
            return None
        rms = eager.tolerance(self.op, dtype)
        actual = self.run_kernel(kernel, call)
        found = differ(expected, actual, rms)
        if found is None or dtype not in (torch.float16, torch.bfloat16):
            return found
        try:
            exact = self.run_kernel(self.truth_kernel(), call, eager.widen(call.fresh(), dtype))
        except (Refused, Crashed):
            return found
        rounded = [e.to(a.dtype) for e, a in zip(exact.all, actual.all, strict=False)]
        return None if difference(rounded, actual.all, rms) is None else found


def verb(error: BaseException) -> str:
    return "refuses: " if isinstance(error, (Refused, OpregError)) else ""


def prefix(text: str, problem: str | None) -> str | None:
    return None if problem is None else text + problem
