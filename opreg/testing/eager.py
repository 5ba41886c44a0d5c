"""Checks that call a kernel directly: writes, aliasing, unwritten outputs, repetition, agreement with the reference."""

from __future__ import annotations

import dis
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from .. import select
from ..errors import OpregError
from ..op import Op
from ..spec import KernelSpec
from . import process
from .audit import audit, user_line
from .compare import DEFAULT_RMS
from .outcome import Outcome, differ
from .samples import Call, named_tensors, restore_state, tensors_of


class Refused(Exception):
    """The author's own code said, with a raise statement, that it does not take this call."""


class Crashed(Exception):
    """A call failed otherwise: the sentence for the report."""


def deliberate(error: BaseException) -> bool:
    """Whether the error comes from a raise statement (or torch._check), not from the depths of an operator."""
    if isinstance(error, OpregError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code: types.CodeType = trace.tb_frame.f_code
    names = {step.offset: step.opname for step in dis.get_instructions(code)}
    return names.get(trace.tb_lasti, "") in ("RAISE_VARARGS", "RERAISE")


def describe(error: BaseException) -> str:
    """'ValueError: first line of the message at file.py:12 (line)'."""
    import traceback

    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]} at {user_line(traceback.extract_tb(error.__traceback__))}"


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draws from the global generators are the same each time and leave no trace."""
    # torch.manual_seed takes 5 ms where no accelerator is initialised: it notes a traceback for each kind.
    generators = [torch.default_generator]
    for backend in (torch.cuda, torch.xpu):
        generators += backend.default_generators if backend.is_initialized() else ()
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def attempt(run: Callable[[], Any], mode: AbstractContextManager[Any] | None = None) -> Any:
    """Result of `run` (under no_grad, or another mode), or Refused or Crashed. The process stays as it was."""
    try:
        with process.kept(), mode or torch.no_grad(), seeded():
            return run()
    except Exception as error:  # the code under test may raise anything; every kind is reported
        if deliberate(error):
            raise Refused(describe(error)) from error
        raise Crashed(f"raises {describe(error)}") from error


def run(
    op: Op[Any, Any],
    fn: Callable[..., Any],
    call: Call,
    args: tuple[Any, ...] | None = None,
    mode: AbstractContextManager[Any] | None = None,
) -> Outcome:
    """One call of a kernel (or the op) with fresh arguments; the layer's tensors are put back afterwards."""
    given = call.fresh() if args is None else args
    saved = call.save_state()
    try:
        result = attempt(lambda: op.call_with(fn, given), mode)
        written = [t for arg, value in zip(op.spec.args, given, strict=True) if arg.mutated for t in tensors_of(value)]
        state = [tensor.clone() for tensor in call.state.values()]
    finally:
        restore_state(saved)
    return Outcome(result, written, state)


def refusal(op: Op[Any, Any], kernel: KernelSpec, args: tuple[Any, ...]) -> str | None:
    """Why a kernel does not take a call; Crashed where its predicate fails or answers neither None nor a sentence."""
    predicate = select.load_predicate(op, kernel)
    if predicate is None:
        return None
    try:
        answer: Any = select.refusal(op, predicate, args)
    except Exception as error:  # as above
        raise Crashed(f"why_not raises {describe(error)}") from error
    if answer is not None and (not isinstance(answer, str) or not answer):
        raise Crashed(f"why_not answers {answer!r}; it returns None to accept, or the reason for refusing as a string")
    return answer


def check_writes(
    op: Op[Any, Any], fn: Callable[..., Any], call: Call, thorough: bool = True
) -> Iterator[tuple[str, str]]:
    """(check, problem) about what a kernel writes and returns, seen on one call; thorough: on the same call twice."""
    args = call.fresh()
    named = dict(named_tensors(op, args))
    mutated = {name for name in named if name.split("[")[0] in op.spec.mutates}
    tensors = {**named, **{f"layer state {path}": tensor for path, tensor in call.state.items()}}
    saved = call.save_state()
    try:
        lists = [
            (arg.name, value, list(value))
            for arg, value in zip(op.spec.args, args, strict=True)
            if isinstance(value, list)
        ]
        found = audit(lambda: attempt(lambda: op.call_with(fn, args)), tensors, mutated, watch=thorough)
        yield from _lists(lists)
        again = found
        if thorough and (found.foreign or tensors_of(found.result)):
            again = audit(lambda: attempt(lambda: op.call_with(fn, args)), tensors, mutated)
        yield from _writes(op, found, mutated)
        if again is not found:
            yield from _foreign(op, found.foreign, again.foreign)
        yield from _aliases(op, found.result, None if again is found else again.result, tensors)
    finally:
        restore_state(saved)


def _lists(lists: list[tuple[str, list[Any], list[Any]]]) -> Iterator[tuple[str, str]]:
    """Lists of the caller that hold something else after the call; through the dispatcher a kernel gets a copy."""
    for name, now, before in lists:
        if len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True)):
            yield (
                "writes",
                f"changes the caller's list {name} ({len(before)} elements became {len(now)}); copy it first",
            )


def _writes(op: Op[Any, Any], found: Any, mutated: set[str]) -> Iterator[tuple[str, str]]:
    for name, write in found.written.items():
        if name in mutated:
            continue
        what = f"writes {name} ({write.by}, {write.where})"
        if name.startswith("layer state"):
            if not op.spec.keeps_state:
                layer = op.spec.layer_arg.name if op.spec.layer_arg else "layer_name"
                yield (
                    "state",
                    f"{what}, but a call whose outputs are unused is removed; add '{layer}' to mutates_args",
                )
        else:
            base = name.split("[")[0]
            yield "writes", f"{what}, but mutates_args does not name '{base}'; add it, or work on a copy"
    for name, count in found.outside.items():
        yield "writes", f"{count} bytes beside the elements of {name} were written: strides or offset are ignored"
    for name, how in found.moved.items():
        yield "writes", f"{name}: {how}"


def check_process(op: Op[Any, Any], fn: Callable[..., Any], call: Call) -> str | None:
    """What a call changes of the process it runs in, which belongs to the caller."""
    args, saved = call.fresh(), call.save_state()
    changed: list[str] = []

    def watched() -> None:
        before = process.snapshot()
        op.call_with(fn, args)
        changed.extend(process.changes(before))

    try:
        with process.kept(everything=True):
            process.seed_others()
            attempt(watched)
    finally:
        restore_state(saved)
    return f"changes the process's {'; '.join(changed)}; put it back, or do without" if changed else None


def _foreign(op: Op[Any, Any], first: list[Any], second: list[Any]) -> Iterator[tuple[str, str]]:
    again = {write.storage for write in second}
    for write in first:
        if write.storage in again:
            if op.spec.keeps_state:
                return
            yield (
                "state",
                f"writes a tensor that is no argument ({write.by}, {write.where}): compilers do not see it, so a call "
                "may be removed, repeated or moved; make it an argument named in mutates_args",
            )
            return


def _aliases(op: Op[Any, Any], first: Any, second: Any, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    declared = [bool(r.alias_info) for r in op.overload._schema.returns]
    if any(declared):
        return
    for index, tensor in enumerate(tensors_of(first)):
        if tensor.numel() and any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            yield "aliasing", f"elements of result {index} share memory (expand, stride 0); return .contiguous()"
    owners = {tensor.untyped_storage()._cdata: name for name, tensor in tensors.items() if tensor.numel()}
    seen: dict[int, int] = {}
    for index, tensor in enumerate(tensors_of(first)):
        if tensor.numel() == 0:
            continue
        storage = tensor.untyped_storage()._cdata
        if storage in owners:
            yield "aliasing", f"result {index} shares memory with {owners[storage]}; return a copy (.clone())"
        elif storage in seen:
            yield "aliasing", f"results {seen[storage]} and {index} share memory; return a copy of one"
        elif any(storage == t.untyped_storage()._cdata for t in tensors_of(second) if t.numel()):
            yield (
                "aliasing",
                f"two calls return the same memory as result {index}: the second overwrites the first; "
                "allocate the result in each call",
            )
        seen[storage] = index


def tolerance(op: Op[Any, Any], dtype: torch.dtype) -> float:
    if dtype in op.tolerances:
        return op.tolerances[dtype][0]
    return DEFAULT_RMS.get(dtype, 1e-5)


def widen(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments with tensors of `dtype` turned into float32."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.float() if value.dtype == dtype else value
        if isinstance(value, (list, tuple)):
            return type(value)(one(item) for item in value)
        return value

    return tuple(one(value) for value in args)


def repeats(op: Op[Any, Any], fn: Callable[..., Any], call: Call) -> str | None:
    """What differs between two calls with equal arguments, or that the global generator was used undeclared."""
    declared = torch.Tag.nondeterministic_seeded in op.spec.tags
    if not declared:
        args, saved = call.fresh(), call.save_state()

        def draws() -> bool:
            torch.default_generator.manual_seed(1)  # a kernel that seeds with attempt's own 0 must not look innocent
            before = torch.get_rng_state()
            op.call_with(fn, args)
            return not torch.equal(before, torch.get_rng_state())

        try:
            drawn = attempt(draws)
        finally:
            restore_state(saved)
        if drawn:
            return (
                "draws from torch's global generator, so compilers may drop or repeat a call; "
                "add tags=torch.Tag.nondeterministic_seeded, or take the random numbers as an argument"
            )
    first, second = run(op, fn, call), run(op, fn, call)
    found = differ(first, second, 0.0)
    return None if found is None else f"two calls with equal arguments differ: {found}"
