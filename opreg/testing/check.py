"""check_op: everything `opreg check` does to one op, as a Report."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch

from .. import fake, registry, select
from ..errors import OpregError, UnknownOpError
from ..op import Op
from . import compiled, eager, fakes, gradients, process, variants, verdict
from .eager import Crashed, Refused
from .on_xla import OnXla
from .one_call import OneCall, prefix, verb
from .outcome import Outcome, differ
from .report import Report
from .samples import Call, registered_calls, tensors_of

log = logging.getLogger("opreg")


class Checker(OneCall):
    """One check of one op: its calls, what is derived from them, and the compilers."""

    def __init__(
        self, op: Op[Any, Any], device: str, seed: int, kernel: str | None, index: int | None, compilers: bool
    ) -> None:
        super().__init__(op, device, kernel)
        self.seed, self.index, self.compilers = seed, index, compilers
        self.report = Report(op.name, device, seed)

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
            expected = self.run_kernel(self.truth_kernel(), call)
        except (Refused, Crashed, OpregError) as error:
            if call.certain and (registered or (isinstance(error, Crashed) and not self._meaning_matters)):
                self.tally.record("contract", where, f"the reference {verb(error)}{error}")
            return
        self.report.inputs += main
        self.tally.record("contract", where, None)
        self.eager(call, where, dtype, expected, thorough=main)
        # Dynamo takes no torch.Generator into a graph, and says so; without one the op compiles like any other.
        drawn = any(isinstance(value, torch.Generator) for value in call.args)
        compilers = self.compilers and not drawn
        if self.compilers and drawn:
            for check in ("opcheck", "compile"):
                self.tally.skipped.setdefault(check, "torch.compile and torch's opcheck take no torch.Generator")
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
            self.run_kernel(self.truth_kernel(), call)
        except Refused:
            return False
        except Crashed:
            return True
        return True

    def _variant(self, variant: Call, origin: Call, dtype: torch.dtype, expected: Outcome) -> None:
        same_values = any(variant.label.endswith(name) for name in variants.LAYOUTS)
        try:
            found = self.run_kernel(self.truth_kernel(), variant)
        except Refused:
            return
        except Crashed as error:
            if same_values or not self._meaning_matters:
                self.tally.record("layouts", variant.label, f"the reference {error}")
            return
        if same_values and torch.Tag.nondeterministic_seeded not in self.op.spec.tags:
            rms = max(eager.tolerance(self.op, dtype), 1e-6)
            problem = differ(expected, found, rms)
            self.tally.record("layouts", variant.label, prefix("the layout changes the reference's values: ", problem))
        self.eager(variant, variant.label, dtype, found, thorough=False)

    @cached_property
    def _meaning_matters(self) -> bool:
        """Whether arguments hang together by more than their sizes (indices, lengths): then calls cannot be made up."""
        if self.op.spec.layer_arg is not None:
            return True
        for arg in self.op.spec.args:
            if arg.type.startswith("Tensor") and not arg.layer and arg.dtype is not None:
                if not (isinstance(arg.dtype, torch.dtype) and arg.dtype.is_floating_point):
                    return True
            elif not arg.is_tensor and arg.type.startswith("SymInt"):
                return True
        calls = itertools.islice(self._calls(self.dtypes[0]), 1)
        return any(not t.is_floating_point() for call in calls for value in call.args for t in tensors_of(value))

    def _option(self, call: Call, dtype: torch.dtype) -> None:
        """The call with an option that the inputs leave at its default."""
        try:
            expected = self.run_kernel(self.truth_kernel(), call)
        except (Refused, Crashed):
            return  # made up, so it need not mean anything
        self.eager(call, call.label, dtype, expected, thorough=False)

    def _extreme(self, call: Call) -> None:
        """Where the reference gives finite numbers, kernels do."""
        if torch.Tag.nondeterministic_seeded in self.op.spec.tags:
            return
        try:
            expected = self.run_kernel(self.truth_kernel(), call)
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
                    found = self.run_kernel(kernel, call)
                    problem = None if _finite(found) else "gives NaN or infinity where the reference gives numbers"
                    self.tally.record(name, call.label, problem)
            except (Refused, Crashed) as error:
                self.tally.record(name, call.label, f"{verb(error)}{error}, which the reference takes")

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
            expected = self.run_kernel(self.truth_kernel(), call)
            real = eager.run(self.op, self.op.overload, call)
        except (Refused, Crashed):
            return
        self.tally.record("fake", where, fakes.check_fake(self.op, call, real))
        for kernel in self.kernels:
            if kernel is self.truth:
                continue
            try:
                if eager.refusal(self.op, kernel, call.fresh()) is None:
                    self.tally.record(f"kernel {kernel.name}", where, self.agree(kernel, call, dtype, expected))
            except (Refused, Crashed):
                continue

    # Compilers.

    def _symbolic(self, call: Call, where: str) -> None:
        op = self.op
        problem = fakes.check_unbacked(op, call)
        if problem is None and fake.fake_source(op) in ("register_fake", "body"):
            problem = fakes.check_pinned(op, fake.Fake(op), call, "the fake")
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


def _finite(outcome: Outcome) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in outcome.all)


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
        if device == "xla":
            return OnXla(found, seed, kernel, input, compilers).run()
        return Checker(found, device, seed, kernel, input, compilers).run()
