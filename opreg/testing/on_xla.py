"""check_op on torch_xla, whose tensors have no memory to look at: values, and what becomes of the arguments' values.

The reference computes on the CPU, each kernel on the device with the same values, so a reference of a thousand small
steps does not become a thousand compiled programs. Of an op with a layer both sides make their own layers. What needs
storages or strides is skipped with the reason.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import devices, fake
from ..errors import OpregError
from ..op import Op
from ..spec import REFERENCE, KernelSpec
from . import compiled, eager, fakes, modes, outputs, variants, verdict
from .compare import difference
from .eager import Crashed, Refused, attempt
from .one_call import OneCall, prefix, verb
from .outcome import Outcome, differ
from .report import Report
from .samples import Call, named_tensors, registered_calls, tensors_of

_SKIPPED = {
    "opcheck": "torch's opcheck compares storages, which tensors of torch_xla do not have; it runs with --device cpu",
    "outputs": "no argument is an output, and no result can be memory that nobody wrote: torch_xla's are zeros",
    "vmap": "batching rules are the same on every device; they are checked with --device cpu",
}

# XLA's compiler for the CPU takes minutes over the unrolled loop of a reference, most of them in LLVM's optimisation,
# which changes no value that a check looks at. Read when the first device is made.
_CHEAP_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@dataclass(frozen=True)
class _Sent(Call):
    """A call whose copies go to the device (None: stay where they are), as views of larger tensors where `layout` names
    one of LAYOUTS."""

    device: str | None = "xla"
    layout: str | None = None

    def fresh(self) -> tuple[Any, ...]:
        return tuple(self._send(value) for value in self.args)

    def _send(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._send(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        sent = value.detach().clone() if self.device is None else value.detach().to(self.device, copy=True)
        if self.layout is not None and sent.device.type == "xla":
            sent = variants.LAYOUTS[self.layout](sent)
        return sent.requires_grad_(value.requires_grad)


def _home(value: Any) -> Any:
    """The same with tensors on the CPU, which waits for the device."""
    if isinstance(value, (list, tuple)):
        return tuple(_home(item) for item in value)
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


class OnXla(OneCall):
    """One check of one op on torch_xla."""

    def __init__(self, op: Op[Any, Any], seed: int, kernel: str | None, index: int | None, compilers: bool) -> None:
        if "torch_xla" not in sys.modules and os.environ.get("PJRT_DEVICE") == "CPU":
            os.environ.setdefault("XLA_FLAGS", _CHEAP_COMPILES)
        devices.prepare("xla", op.name)
        super().__init__(op, "xla", kernel)
        self.seed, self.index, self.compilers = seed, index, compilers
        self.report = Report(op.name, "xla", seed)
        self.host = OneCall(op, "cpu", None)
        others = [spec for spec in self.kernels if spec.name != REFERENCE]
        if others and len(others) < len(self.kernels):
            self.kernels = others
            self.tally.skipped[f"kernel {REFERENCE}"] = "what it gives on the CPU is what the others are compared with"

    def run(self) -> Report:
        op = self.op
        if not self.kernels or self.host.truth is None:
            self.tally.skipped["inputs"] = "no kernel can run on xla, or none on cpu to compare with"
        else:
            dtypes = sorted(list(op.tolerances) or [torch.float32], key=lambda dtype: dtype is not torch.float32)
            for position, dtype in enumerate(dtypes):
                self._dtype(dtype, main=position == 0)
            self.tally.skipped.update({name: why for name, why in _SKIPPED.items() if name != "vmap" or op.has_vmap})
        for spec in self.kernels:
            name = f"kernel {spec.name}"
            if name not in self.tally.passed and name not in self.tally.found and spec.name in self.refused:
                self.tally.skipped[name] = self.refused[spec.name]
        verdict.write(self.report, op, self.tally, self.kernels, None)
        return self.report

    def _dtype(self, dtype: torch.dtype, main: bool) -> None:
        iterator = enumerate(self._calls(dtype))
        while True:
            try:
                position, (call, expected) = next(iterator)
            except StopIteration:
                return
            except (Refused, Crashed) as error:
                self.tally.record("contract", f"{dtype}", f"the reference {verb(error)}{error}")
                return
            except Exception as error:  # register_inputs is the author's code
                self.tally.record("inputs", f"{dtype}", f"register_inputs raises {eager.describe(error)}")
                return
            if self.index in (None, position):
                self._call(call, dtype, expected, main, deep=main and (position < 2 or self.index is not None))

    def _calls(self, dtype: torch.dtype) -> Iterator[tuple[_Sent, Outcome]]:
        """Calls, and what the reference gives for them on the CPU."""
        op, truth = self.op, self.host.truth_kernel()
        made: Callable[..., Iterator[Call]] = variants.from_contract if op.inputs is None else registered_calls
        if op.spec.layer_arg is None:
            for call in made(op, "cpu", dtype, self.seed):
                try:
                    yield _Sent(call.label, call.args), self.host.run_kernel(truth, call)
                except (Refused, Crashed):
                    if op.inputs is not None:
                        raise
                    # made up from the contract, so it need not mean anything
            return
        # The context of a call is open until the next call is asked for, so one device after the other.
        expected = [self.host.run_kernel(truth, call) for call in made(op, "cpu", dtype, self.seed)]
        for call, outcome in zip(made(op, "xla", dtype, self.seed), expected, strict=True):
            yield _Sent(call.label, call.args, call.state, device=None), outcome

    def _call(self, call: _Sent, dtype: torch.dtype, expected: Outcome, main: bool, deep: bool) -> None:
        op = self.op
        where = call.label if main else f"{call.label}, {str(dtype).removeprefix('torch.')}"
        self.report.inputs += main
        self._every_kernel(call, where, dtype, expected, thorough=main)
        try:
            real = eager.run(op, op.function, call)
            self.tally.record("contract", where, self._off(call, real, expected, dtype))
            self.tally.record("fake", where, fakes.check_fake(op, call, real))
        except (Refused, Crashed) as error:
            self.tally.record("contract", where, f"the op {verb(error)}{error}")
            return
        if not main:
            return
        # How much of a lazy graph is fetched at once decides how XLA fuses it, and so how it rounds.
        found = modes.check_modes(op, call, eager.tolerance(op, dtype))
        self.tally.record("modes", where, next((text for text in found if not self._for_want_of_views(text)), None))
        if op.spec.layer_arg is not None:
            self.tally.record("state", where, outputs.check_profiling(op, call))
        for name, predicate in fakes.predicates(op, "xla"):
            pinned = fakes.check_pinned(op, predicate, call, f"why_not of kernel {name}")
            self.tally.record("symbolic", where, pinned)
        if op.has_autograd:
            self.tally.record("gradients", where, self._gradients(call, dtype))
        if not deep:
            return
        for layout in variants.LAYOUTS:
            self._view(replace(call, label=f"{call.label}, all {layout}", layout=layout), dtype, expected)
        if op.spec.layer_arg is None:
            for derived in (*variants.rows(op, call, 0), *variants.rows(op, call, 1), *variants.options(op, call)):
                self._derived(derived, dtype)
        if op.spec.layer_arg is not None:
            self.tally.skipped["compile"] = (
                "a graph of openxla would keep the layer and metadata of its first run; the op refuses to be in one"
            )
        elif self.compilers:
            self.tally.record("compile", where, self._compiled(call, dtype, expected))

    def _for_want_of_views(self, problem: str) -> bool:
        """torch_xla (2.9) makes no view of a normal tensor in inference mode, and a layer holds normal ones."""
        return self.op.spec.layer_arg is not None and "Cannot set version_counter for inference tensor" in problem

    def _every_kernel(self, call: Call, where: str, dtype: torch.dtype, expected: Outcome, thorough: bool) -> None:
        for spec in self.kernels:
            name = f"kernel {spec.name}"
            try:
                why = eager.refusal(self.op, spec, call.fresh())
                if why is not None:
                    self.refused.setdefault(spec.name, f"refuses {where}: {why}")
                    continue
                self._kernel(spec, call, where, dtype, expected, thorough)
            except (Refused, Crashed) as error:
                self.tally.record(name, where, f"{verb(error)}{error}, which the reference takes")

    def _kernel(
        self, spec: KernelSpec, call: Call, where: str, dtype: torch.dtype, expected: Outcome, thorough: bool
    ) -> None:
        op, by = self.op, f"{spec.name} "
        given = call.fresh()
        with self.through(spec) as fn:
            made = eager.run(op, fn, call, given)
            first = _outcome(made)
            self.tally.record(f"kernel {spec.name}", where, self._off(call, first, expected, dtype))
            problems = [*self._changed(call, given), *self._shared(made, given)]
            judged = ["writes", "aliasing"]
            if thorough and outputs.outputs(op):
                judged.append("outputs")
                problems += outputs.check_outputs(op, fn, call)
            if thorough and torch.Tag.nondeterministic_seeded not in op.spec.tags:
                again = differ(first, _outcome(eager.run(op, fn, call)), 0.0)
                self.tally.record("repeat", where, prefix(f"{by}two calls with equal arguments differ: ", again))
        for check in judged:
            if not any(found == check for found, _ in problems):
                self.tally.record(check, where, None)
        for check, problem in problems:
            self.tally.record(check, where, by + problem)

    def _off(self, call: Call, made: Outcome, expected: Outcome, dtype: torch.dtype) -> str | None:
        """How a run on the device differs from the reference on the CPU; in 16 bits also from the reference on inputs
        widened to float32, as on other devices. The values are fetched here, errors included."""
        op, found = self.op, _outcome(made)
        if torch.Tag.nondeterministic_seeded in op.spec.tags:
            return None
        rms = eager.tolerance(op, dtype)
        differs = differ(expected, found, rms)
        if differs is None or dtype not in (torch.float16, torch.bfloat16) or op.spec.layer_arg is not None:
            return differs
        try:
            wide = Call(call.label, eager.widen(call.args, dtype))
            exact = self.host.run_kernel(self.host.truth_kernel(), wide)
        except (Refused, Crashed):
            return differs
        rounded = [one.to(other.dtype) for one, other in zip(exact.all, found.all, strict=False)]
        return None if difference(rounded, found.all, rms) is None else differs

    def _changed(self, call: Call, given: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
        """Arguments whose values are others after a call that does not say so."""
        before = dict(named_tensors(self.op, call.args))
        for name, tensor in named_tensors(self.op, given):
            base = name.split("[")[0]
            if base not in self.op.spec.mutates and differ(_only(before[name]), _only(tensor), 0.0) is not None:
                yield (
                    "writes",
                    f"writes {name} (seen in the values), but mutates_args does not name '{base}'; add it, "
                    "or work on a copy",
                )

    def _shared(self, made: Outcome, given: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
        """Results that are views: what is written into them appears in an argument, or in another result."""
        if any(bool(r.alias_info) for r in self.op.overload._schema.returns):
            return
        others = dict(named_tensors(self.op, given))
        for index, result in enumerate(made.results):
            kept = {name: _home(tensor) for name, tensor in others.items()}
            if result.numel():
                with torch.no_grad():
                    result.copy_(outputs.poison(result, 1))
            for name, tensor in others.items():
                if differ(_only(kept[name]), _only(tensor), 0.0) is not None:
                    yield "aliasing", f"result {index} shares memory with {name}; return a copy (.clone())"
            others[f"result {index}"] = result

    def _view(self, call: _Sent, dtype: torch.dtype, expected: Outcome) -> None:
        """The op on views of larger tensors: written through, read through."""
        try:
            found = self._off(call, eager.run(self.op, self.op.function, call), expected, dtype)
        except Refused:
            return
        except Crashed as error:
            found = str(error)
        self.tally.record("layouts", call.label, found)

    def _derived(self, made: Call, dtype: torch.dtype) -> None:
        """A call with fewer rows or another option, which need not mean anything."""
        call = Call(made.label, made.args)
        try:
            fake.bind(self.op.spec, call.args)
            expected = self.host.run_kernel(self.host.truth_kernel(), call)
        except (Refused, Crashed, OpregError):
            return
        self._every_kernel(_Sent(call.label, call.args), call.label, dtype, expected, thorough=False)

    def _compiled(self, call: _Sent, dtype: torch.dtype, expected: Outcome) -> str | None:
        op = self.op
        try:
            given = call.fresh()
            torch._dynamo.reset()
            program = torch.compile(compiled.of_tensors(op, given), backend="openxla", fullgraph=True, dynamic=False)
            made = eager.run(op, lambda *args, **options: program(*compiled.only_tensors(given)), call, given)
            found = self._off(call, made, expected, dtype)
        except (Refused, Crashed) as error:
            found = str(error)
        torch._dynamo.reset()
        return prefix("openxla: ", found)

    def _gradients(self, call: _Sent, dtype: torch.dtype) -> str | None:
        """How the gradients on the device differ from those on the CPU, of a sum with weights that differ."""
        op = self.op

        def gradients(args: tuple[Any, ...]) -> torch.Tensor:
            leaves = [t.requires_grad_() for value in args for t in tensors_of(value) if t.is_floating_point()]
            results = [r for r in tensors_of(op.call_with(op.function, args)) if r.requires_grad]
            weights = [torch.linspace(-1, 1, r.numel()).to(r.dtype).to(r.device).view(r.shape) for r in results]
            found = torch.autograd.grad(results, leaves, weights, allow_unused=True)
            # As one vector: a gradient that cancels to nothing is judged beside the others.
            return torch.cat([g.flatten().double() for g in found if g is not None])

        plain = Call(call.label, call.args)
        try:
            wanted = attempt(lambda: gradients(plain.fresh()), torch.enable_grad())
            found = attempt(lambda: _home(gradients(call.fresh())), torch.enable_grad())
        except (Refused, Crashed) as error:
            return f"{verb(error)}{error}"
        return differ(Outcome(wanted, [], []), Outcome(found, [], []), 4 * eager.tolerance(op, dtype))


def _only(tensor: torch.Tensor) -> Outcome:
    return Outcome(_home(tensor), [], [])


def _outcome(made: Outcome) -> Outcome:
    return Outcome(*attempt(lambda: (_home(made.result), _home(made.written), _home(made.state))))
