"""Whether every value of a mutated output is defined after the call: two runs over two different poisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..context import current_layer
from ..op import Op
from ..spec import ArgSpec
from .eager import run
from .samples import Call, restore_state, tensors_of

_OUTPUT_NAMES = {"out", "output", "outputs", "result", "dst"}


def starts_as(op: Op[Any, Any], arg: ArgSpec) -> str:
    """How a mutated argument starts: as the author said, else "written" for what looks like an output, else "state".

    Looks like an output: every dim is a name that another argument has too, the first one a name of an argument that is
    only read (a cache has a number of slots or pages of its own). Without a contract the name decides, and in a layer
    op, which keeps its caches elsewhere, any mutated argument is an output.
    """
    if arg.start is not None:
        return arg.start
    if arg.shape is None:
        words = arg.name.split("_")
        return "written" if _OUTPUT_NAMES & {arg.name, words[0], words[-1]} or op.spec.layer_arg else "state"
    others = [a for a in op.spec.args if a is not arg and a.shape is not None]
    named = {name for a in others for name in (a.shape.names if a.shape else ())}
    read = {name for a in others if not a.mutated for name in (a.shape.names if a.shape else ())}
    named |= {a.name for a in op.spec.args if a.type == "SymInt"}
    read |= {a.name for a in op.spec.args if a.type == "SymInt"}
    dims = arg.shape.dims
    if any(dim.kind == "any" or (dim.kind == "star" and not dim.names) for dim in dims):
        return "state"
    if dims and not set(dims[0].names) <= read:
        return "state"
    return "written" if all(name in named for name in arg.shape.names) else "state"


def outputs(op: Op[Any, Any]) -> list[ArgSpec]:
    """Mutated arguments of which every value must be defined after the call."""
    return [arg for arg in op.spec.args if arg.mutated and not arg.layer and starts_as(op, arg) != "state"]


def poison(tensor: torch.Tensor, which: int) -> torch.Tensor:
    """A value no kernel computes, of the tensor's dtype: NaN and a large odd number, or two patterns of bits."""
    if tensor.is_floating_point() or tensor.is_complex():
        value: float = float("nan") if which == 0 else -13331.0 if torch.finfo(tensor.dtype).max > 2e4 else -113.0
        return torch.full_like(tensor, value)
    if tensor.dtype is torch.bool:
        return torch.full_like(tensor, bool(which))
    return torch.full_like(tensor, (0x5B, 0x2D)[which])


def check_outputs(op: Op[Any, Any], fn: Callable[..., Any], call: Call) -> Iterator[tuple[str, str]]:
    """Problems with the mutated outputs of one call of the op's runner (which fills "zeros" and "tail" arguments)."""
    judged = outputs(op)
    if not judged:
        return
    runs = []
    for which in (0, 1):
        args = _poisoned(op, call, judged, which)
        run(op, fn, call, args)
        runs.append(args)
    for index, arg in enumerate(op.spec.args):
        if arg not in judged:
            continue
        pairs = zip(tensors_of(runs[0][index]), tensors_of(runs[1][index]), strict=True)
        if arg.start == "tail":
            yield from _written_tail(op, call, arg, runs[0][index])
        for one, other in pairs:
            survived = _same(one, poison(one, 0)) & _same(other, poison(other, 1))
            if survived.any():
                place = [int(i) for i in survived.nonzero()[0]]
                yield (
                    "outputs",
                    f"{int(survived.sum())} of {one.numel()} values of {arg.name} are not written, first at {place}: "
                    f"the caller sees what the memory held before; write them, or say how it starts: "
                    f"mutates_args={{'{arg.name}': 'zeros'}} ('tail', 'state')",
                )
            elif not _same(one, other).all() and arg.start is not None:
                differ = int((~_same(one, other)).sum())
                yield (
                    "outputs",
                    f"{differ} of {one.numel()} values of {arg.name} depend on what the memory held before, though it "
                    f"starts as '{arg.start}'; overwrite it, or declare mutates_args={{'{arg.name}': 'state'}}",
                )


def _written_tail(op: Op[Any, Any], call: Call, arg: ArgSpec, value: Any) -> Iterator[tuple[str, str]]:
    """Rows past the number of tokens that the kernel wrote after the framework had zeroed them."""
    given = next((v for a, v in zip(op.spec.args, call.args, strict=True) if a.name == "num_actual_tokens"), None)
    if given is None:
        handle = next((v for a, v in zip(op.spec.args, call.args, strict=True) if a.layer), None)
        given = None if handle is None else getattr(current_layer(handle)[1], "num_actual_tokens", None)
    for tensor in tensors_of(value) if given is not None else ():
        wrong = int(tensor[given:].count_nonzero())
        if wrong:
            yield (
                "outputs",
                f"{wrong} values of {arg.name} past row num_actual_tokens={given} are not zero: the framework has "
                "zeroed that tail, and the kernel wrote into it; write the rows of actual tokens only",
            )


def overwritten(op: Op[Any, Any], fn: Callable[..., Any], call: Call) -> bool:
    """Whether what the mutated outputs held before makes no difference: only then may they be made by torch.empty."""
    runs = []
    for which in (0, 1):
        args = _poisoned(op, call, outputs(op), which)
        runs.append(run(op, fn, call, args).all)
    return all(bool(_same(one, other).all()) for one, other in zip(*runs, strict=True))


def check_results(op: Op[Any, Any], fn: Callable[..., Any], call: Call) -> Iterator[tuple[str, str]]:
    """Results that are, or depend on, memory from torch.empty: with such memory filled by torch they change."""
    if not op.spec.returns or torch.Tag.nondeterministic_seeded in op.spec.tags:
        return
    # Both under deterministic algorithms, so that only the filling differs.
    with _filled_memory(False):
        expected = run(op, fn, call).results
    with _filled_memory(True):
        filled = run(op, fn, call).results
    for index, (one, other) in enumerate(zip(expected, filled, strict=False)):
        if one.shape != other.shape or not other.numel():
            continue
        changed = ~_same(one, other)
        if changed.any():
            other_poison = torch.full_like(other, _fill_value(other.dtype))
            raw = bool(_same(other, other_poison)[changed].all())
            place = [int(i) for i in changed.nonzero()[0]]
            yield (
                "outputs",
                f"{int(changed.sum())} of {one.numel()} values of result {index} "
                f"{'are not written' if raw else 'depend on memory that was never written'}, first at {place}: "
                "torch.empty gives what earlier tensors left there; write all of it, or start from torch.zeros",
            )


def _fill_value(dtype: torch.dtype) -> Any:
    """What torch fills new memory with under use_deterministic_algorithms."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).max


@contextmanager
def _filled_memory(fill_it: bool) -> Iterator[None]:
    """Deterministic algorithms, and memory of torch.empty filled with NaN or the largest integer, or left as it is."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = fill_it  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _poisoned(op: Op[Any, Any], call: Call, judged: list[ArgSpec], which: int) -> tuple[Any, ...]:
    args = call.fresh()
    for arg, value in zip(op.spec.args, args, strict=True):
        if arg in judged:
            for tensor in tensors_of(value):
                with torch.no_grad():
                    tensor.copy_(poison(tensor, which))
    return args


def _same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if one.is_floating_point() or one.is_complex():
        return (one == other) | (one.isnan() & other.isnan())
    return one == other


def check_profiling(op: Op[Any, Any], call: Call) -> str | None:
    """What a profiling run (metadata None) leaves undefined, or changes that it should not."""
    from ..context import current_context, forward_context

    context = current_context()
    if op.spec.layer_arg is None or context is None:
        return None
    args = _poisoned(op, call, outputs(op), 0)
    saved = call.save_state()
    with torch.no_grad(), forward_context(layers=context.layers, metadata=None):
        result = op.call_with(op.overload, args)
    values = [*tensors_of(result)]
    for arg, value in zip(op.spec.args, args, strict=True):
        if arg in outputs(op):
            values += tensors_of(value)
    if any(value.count_nonzero() for value in values):
        return "a profiling run (metadata None) leaves something other than zeros in an output"
    changed = [path for path, (now, before) in zip(call.state, saved, strict=True) if not _same(now, before).all()]
    restore_state(saved)
    return f"a profiling run (metadata None) changes the layer's {', '.join(changed)}" if changed else None
