"""check_op: everything `opreg check` does to one op, as a Report."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from .. import fake, registry, select
from ..errors import OpregError, UnknownOpError
from ..op import Op
from ..spec import REFERENCE, KernelSpec
from . import compiled, eager, fakes, gradients, modes, outputs, process, remember, variants, verdict
from .compare import difference
from .eager import Crashed, Refused
from .report import Report
from .samples import Call, registered_calls, tensors_of
from .tally import Tally

log = logging.getLogger("opreg")


class Checker:
    """One check of one op: its calls, its kernels and the tally."""

    def __init__(
        self, op: Op[Any, Any], device: str, seed: int, kernel: str | None, index: int | None, compilers: bool
    ) -> None:
        self.op, self.device, self.seed, self.index, self.compilers = op, device, seed, index, compilers
        self.tally = Tally()
        self.report = Report(op.name, device, seed)
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

    @property
    def dtypes(self) -> list[torch.dtype]:
        declared = list(self.op.tolerances) or [torch.float32]
        return sorted(declared, key=lambda dtype: dtype is not torch.float32)

    def run(self) -> Report:
        if self.truth is None:
            self.tally.skipped["inputs"] = f"no kernel can run on {self.device}"
        else:
            for position, dtype in enumerate(self.dtypes):
                self._dtype(dtype, main=position == 0)
            if not self.op.tolerances:
                self._undeclared(torch.bfloat16)
            if not self.report.inputs:
                self.tally.skipped.setdefault(
                    "inputs",
                    "none are registered and none could be made from the contract; add some with register_inputs",
                )
        self._finish()
        return self.report

    def _calls(self, dtype: torch.dtype) -> Iterator[Call]:
        if self.op.inputs is not None:
            return registered_calls(self.op, self.device, dtype, self.seed)
        return variants.from_contract(self.op, self.device, dtype, self.seed)

    def _dtype(self, dtype: torch.dtype, main: bool) -> None:
        iterator = enumerate(self._calls(dtype))
        while True:
            try:
                position, call = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # register_inputs is the author's code
                self.tally.record("inputs", f"{dtype}", f"register_inputs raises {eager.describe(error)}")
                return
            if self.index is not None and position != self.index:
                continue
            # Derived calls come from the first two: a variant tests how memory is addressed, not more values.
            self._call(call, dtype, main, deep=main and (position < 2 or self.index is not None))

    def _call(self, call: Call, dtype: torch.dtype, main: bool, deep: bool) -> None:
        op = self.op
        registered = op.inputs is not None
        where = call.label if main else f"{call.label}, {str(dtype).removeprefix('torch.')}"
        try:
            fake.bind(op.spec, call.args)
            expected = self._run(self._truth(), call)
        except (Refused, Crashed, OpregError) as error:
            if call.certain and (registered or (isinstance(error, Crashed) and not self._meaning_matters)):
                self.tally.record("contract", where, f"the reference {_verb(error)}{error}")
            return
        self.report.inputs += main
        self.tally.record("contract", where, None)
        self._eager(call, where, dtype, expected, thorough=main)
        # Dynamo takes no torch.Generator into a graph, and says so; without one the op compiles like any other.
        compilers = self.compilers and not any(isinstance(value, torch.Generator) for value in call.args)
        if main and call.certain:
            if compilers:
                self.tally.record("opcheck", where, compiled.check_opcheck(op, call))
            self._symbolic(call, where)
        if deep:
            for variant in self._variants(call):
                self._variant(variant, call, dtype, expected)
            for option in variants.options(op, call):
                self._option(option, dtype)
            for extreme in variants.extremes(op, call):
                self._extreme(extreme)
            if compilers:
                self._compile(call, where)
        if main and op.has_autograd:
            self._optional("gradients", where, gradients.check_gradients(op, call))
        if main and op.has_vmap:
            self._optional("vmap", where, gradients.check_vmap(op, call))

    def _optional(self, check: str, where: str, answer: tuple[bool, str | None]) -> None:
        ran, problem = answer
        if ran:
            self.tally.record(check, where, problem)
        elif check not in self.tally.passed and check not in self.tally.found:
            self.tally.skipped[check] = "no input is small enough, or float64 is refused; register a small one"

    # One call, eager.

    @contextmanager
    def _through(self, kernel: KernelSpec) -> Iterator[Callable[..., Any]]:
        """The function that runs one kernel as the op would: contract check, fills, layer look-up."""
        with select.use_kernel(self.op.name, kernel.name):
            yield self.op.calls.runner(self.device)

    def _run(self, kernel: KernelSpec, call: Call, args: tuple[Any, ...] | None = None) -> eager.Outcome:
        with self._through(kernel) as fn:
            return eager.run(self.op, fn, call, args)

    def _truth(self) -> KernelSpec:
        if self.truth is None:
            raise UnknownOpError(f"{self.op.name}: no kernel")
        return self.truth

    def _eager(self, call: Call, where: str, dtype: torch.dtype, expected: eager.Outcome, thorough: bool) -> None:
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
                self._kernel(kernel, call, where, dtype, expected, thorough)
            except (Refused, Crashed) as error:
                cure = "; refuse such calls in why_not" if kernel.name != REFERENCE else ""
                self.tally.record(name, where, f"{_verb(error)}{error}, which the reference takes{cure}")
        try:
            real = eager.run(self.op, self.op.overload, call)
        except (Refused, Crashed) as error:
            self.tally.record("contract", where, f"the op {_verb(error)}{error}")
            return
        self.tally.record("fake", where, fakes.check_fake(self.op, call, real.results))
        if not thorough:
            return
        self.tally.record("fake", where, fakes.check_device(self.op, call))
        self.tally.record("modes", where, next(modes.check_modes(self.op, call), None))
        if self.op.spec.layer_arg is not None:
            self.tally.record("state", where, outputs.check_profiling(self.op, call))

    def _kernel(
        self,
        kernel: KernelSpec,
        call: Call,
        where: str,
        dtype: torch.dtype,
        expected: eager.Outcome,
        thorough: bool,
    ) -> None:
        name = f"kernel {kernel.name}"
        by = "" if kernel.name == REFERENCE else f"{kernel.name} "
        # Before anything else calls the kernel: what it does in its first call counts, too.
        differs = None if kernel is self.truth else self._agree(kernel, call, dtype, expected)
        self.tally.record(name, where, differs)
        if kernel is self.truth and thorough:
            again = self._run(kernel, call)
            if torch.Tag.nondeterministic_seeded not in self.op.spec.tags:
                changed = difference(expected.all, again.all, 0.0)
                self.tally.record("repeat", where, _prefix("the first call differs from the next: ", changed))
        with self._through(kernel) as fn:
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
                self.tally.record("repeat", where, _prefix(by, eager.repeats(self.op, fn, call)))
                self.tally.record("repeat", where, _prefix(by, remember.check_caches(self.op, fn, memory, call)))
                self.tally.record("state", where, _prefix(by, remember.check_kept(self.op, fn, call)))
                self.tally.record("state", where, _prefix(by, eager.check_process(self.op, fn, call)))

    def _agree(self, kernel: KernelSpec, call: Call, dtype: torch.dtype, expected: eager.Outcome) -> str | None:
        """How a kernel's results differ from the reference's, or None.

        In a 16-bit dtype the reference also runs on inputs widened to float32: a reference written in plain torch
        rounds at every step and is then the less exact of the two.
        """
        if torch.Tag.nondeterministic_seeded in self.op.spec.tags:
            return None
        rms = eager.tolerance(self.op, dtype)
        actual = self._run(kernel, call)
        found = difference(expected.all, actual.all, rms)
        if found is None or dtype not in (torch.float16, torch.bfloat16):
            return found
        try:
            exact = self._run(self._truth(), call, eager.widen(call.fresh(), dtype))
        except (Refused, Crashed):
            return found
        rounded = [e.to(a.dtype) for e, a in zip(exact.all, actual.all, strict=False)]
        return None if difference(rounded, actual.all, rms) is None else found

    # Calls derived from one call.

    def _variants(self, call: Call) -> Iterator[Call]:
        for name in variants.LAYOUTS:
            changed = variants.layouts(self.op, call, name)
            if changed is None:
                continue
            if self._takes(changed):
                yield changed
            else:
                # One of them is refused: each alone then, in the one layout that has all three traits.
                if name == "odd strides":
                    single = (variants.layouts(self.op, call, name, arg.name) for arg in self.op.spec.args)
                    yield from (one for one in single if one is not None)
        yield from variants.broadcast(self.op, call)
        for count in (0, 1):
            yield from variants.rows(self.op, call, count)

    def _takes(self, call: Call) -> bool:
        try:
            self._run(self._truth(), call)
        except Refused:
            return False
        except Crashed:
            return True
        return True

    def _variant(self, variant: Call, origin: Call, dtype: torch.dtype, expected: eager.Outcome) -> None:
        same_values = any(variant.label.endswith(name) for name in variants.LAYOUTS)
        try:
            found = self._run(self._truth(), variant)
        except Refused:
            return
        except Crashed as error:
            if same_values or not self._meaning_matters:
                self.tally.record("layouts", variant.label, f"the reference {error}")
            return
        if same_values and torch.Tag.nondeterministic_seeded not in self.op.spec.tags:
            rms = max(eager.tolerance(self.op, dtype), 1e-6)
            problem = difference(expected.all, found.all, rms)
            self.tally.record("layouts", variant.label, _prefix("the layout changes the reference's values: ", problem))
        self._eager(variant, variant.label, dtype, found, thorough=False)

    @cached_property
    def _meaning_matters(self) -> bool:
        """Whether arguments hang together by more than their sizes (indices, lengths): then calls cannot be made up."""
        if self.op.spec.layer_arg is not None:
            return True
        for arg in self.op.spec.args:
            if arg.type in ("Tensor", "Tensor?", "Tensor[]") and arg.dtype is not None:
                if not (isinstance(arg.dtype, torch.dtype) and arg.dtype.is_floating_point):
                    return True
            elif not arg.is_tensor and arg.type.startswith("SymInt"):
                return True
        calls = itertools.islice(self._calls(self.dtypes[0]), 1)
        return any(not t.is_floating_point() for call in calls for value in call.args for t in tensors_of(value))

    def _option(self, call: Call, dtype: torch.dtype) -> None:
        """The call with an option that the inputs leave at its default."""
        try:
            expected = self._run(self._truth(), call)
        except (Refused, Crashed):
            return  # made up, so it need not mean anything
        self._eager(call, call.label, dtype, expected, thorough=False)

    def _extreme(self, call: Call) -> None:
        """Where the reference gives finite numbers, kernels do."""
        if torch.Tag.nondeterministic_seeded in self.op.spec.tags:
            return
        try:
            expected = self._run(self._truth(), call)
        except (Refused, Crashed):
            return
        if not _finite(expected):
            return
        for kernel in self.kernels:
            if kernel is self.truth:
                continue
            name = f"kernel {kernel.name}"
            try:
                if eager.refusal(self.op, kernel, call.fresh()) is None:
                    found = self._run(kernel, call)
                    problem = None if _finite(found) else "gives NaN or infinity where the reference gives numbers"
                    self.tally.record(name, call.label, problem)
            except (Refused, Crashed) as error:
                self.tally.record(name, call.label, f"{_verb(error)}{error}, which the reference takes")

    def _undeclared(self, dtype: torch.dtype) -> None:
        """A dtype nobody spoke of: the op may refuse it, but what it gives must be what its fake and reference say."""
        try:
            for position, call in enumerate(self._calls(dtype)):
                if position < 2 and self.index in (None, position):
                    self._undeclared_call(call, dtype)
        except Exception as error:  # register_inputs is the author's code, and nobody said that it knows this dtype
            log.debug("%s: no inputs of %s: %s", self.op.name, dtype, error)

    def _undeclared_call(self, call: Call, dtype: torch.dtype) -> None:
        where = f"{call.label}, {str(dtype).removeprefix('torch.')}"
        if not any(t.dtype == dtype for value in call.args for t in tensors_of(value)):
            return
        try:
            expected = self._run(self._truth(), call)
            real = eager.run(self.op, self.op.overload, call)
        except (Refused, Crashed):
            return
        self.tally.record("fake", where, fakes.check_fake(self.op, call, real.results))
        for kernel in self.kernels:
            if kernel is self.truth:
                continue
            try:
                if eager.refusal(self.op, kernel, call.fresh()) is None:
                    self.tally.record(f"kernel {kernel.name}", where, self._agree(kernel, call, dtype, expected))
            except (Refused, Crashed):
                continue

    # Compilers.

    def _symbolic(self, call: Call, where: str) -> None:
        op = self.op
        problem = fakes.check_unbacked(op, call)
        if problem is None and fake.fake_source(op) in ("register_fake", "body"):
            problem = fakes.check_pinned(op, fake.make_fake(op), call, "the fake")
        for name, predicate in fakes.predicates(op, self.device):
            problem = problem or fakes.check_pinned(op, predicate, call, f"why_not of kernel {name}")
        self.tally.record("symbolic", where, problem)

    def _compile(self, call: Call, where: str) -> None:
        op = self.op
        first = "one graph" not in self.tally.skipped
        for backend in compiled.BACKENDS:
            if not first and backend == "aot_eager":
                continue
            for dynamic in (False, True) if first else (True,):
                try:
                    self.tally.record("compile", where, compiled.check_compiled(op, call, backend, dynamic))
                except Crashed:
                    return
            self.tally.record("compile", where, compiled.check_fresh_outputs(op, call, backend))
            if call.state and op.spec.layer_arg is not None:
                self.tally.record("state", where, compiled.check_dead_outputs(op, call, backend))
        for problem in compiled.check_alias_after_clone(op, call, "inductor"):
            self.tally.record("compile", where, problem)
        if first:
            self.tally.skipped["one graph"] = ""
            self.tally.record("compile", where, compiled.check_one_graph(op, call))
        torch._dynamo.reset()

    def _finish(self) -> None:
        self.tally.skipped.pop("one graph", None)
        for kernel in self.kernels:
            name = f"kernel {kernel.name}"
            if name not in self.tally.passed and name not in self.tally.found and kernel.name in self.refused:
                self.tally.skipped[name] = self.refused[kernel.name]
        verdict.write(self.report, self.op, self.tally, self.kernels, self.truth)


def _finite(outcome: eager.Outcome) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in outcome.all)


def _verb(error: BaseException) -> str:
    return "refuses: " if isinstance(error, (Refused, OpregError)) else ""


def _prefix(text: str, problem: str | None) -> str | None:
    return None if problem is None else text + problem


def check_op(
    op: Op[Any, Any] | Callable[..., Any] | str,
    *,
    device: str = "cpu",
    seed: int = 0,
    kernel: str | None = None,
    input: int | None = None,
    compilers: bool = True,
) -> Report:
    """Check an op (or its function, or its name) on one device and return the report.

    kernel: check only this kernel against the reference. input: only the registered input of this number.
    compilers: False leaves out what costs most, torch's opcheck and eager against compiled.
    Raises UnknownOpError for an op or kernel that does not exist.
    """
    found = registry.get(op) if isinstance(op, str) else getattr(op, "op", op)
    if not isinstance(found, Op):
        raise UnknownOpError(f"check_op takes what register_op returned, or its name; got {type(op).__name__}")
    if kernel is not None:
        select.kernel_named(found, kernel)
    with warnings.catch_warnings(), process.kept(everything=True):
        warnings.simplefilter("ignore")  # compilers warn about the very mistakes that the report names
        return Checker(found, device, seed, kernel, input, compilers).run()
