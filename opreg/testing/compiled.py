"""Eager against compiled: aot_eager and Inductor, static and dynamic, one graph for many sizes, nothing removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from .. import fake, library
from ..errors import ContractError
from ..op import Op
from ..spec import ArgSpec
from .eager import Crashed, Refused, describe, run, seeded
from .fakes import depends_on_values, row_dims
from .outcome import Outcome, differ
from .outputs import outputs, overwritten
from .samples import Call, restore_state, tensors_of

BACKENDS = ("aot_eager", "inductor")


def of_tensors(op: Op[Any, Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """The op as a function of all arguments of which only the tensors count; the others are constants of `args`."""
    names = [arg.name for arg in op.spec.args if arg.keyword_only]
    split = len(op.spec.args) - len(names)
    fn, constants = op.function, [None if tensors_of(value) else value for value in args]

    def call(*given: Any) -> Any:
        values = [value if value is not None else constant for value, constant in zip(given, constants, strict=True)]
        return fn(*values[:split], **dict(zip(names, values[split:], strict=True)))

    return call


def only_tensors(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value if tensors_of(value) else None for value in args)


def _compile(fn: Callable[..., Any], backend: Any, dynamic: bool) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)


def _outcome(op: Op[Any, Any], fn: Callable[..., Any], call: Call) -> Outcome:
    """As eager.run, for a function of all arguments in order."""
    args, saved = call.fresh(), call.save_state()
    try:
        with torch.no_grad(), seeded():
            result = fn(*only_tensors(args))
        written = [t for arg, v in zip(op.spec.args, args, strict=True) if arg.mutated for t in tensors_of(v)]
        return Outcome(result, written, [tensor.clone() for tensor in call.state.values()])
    finally:
        restore_state(saved)


def check_opcheck(op: Op[..., Any], call: Call) -> str | None:
    """torch's own opcheck. Of an op that keeps state it cannot compare eager with traced: it runs the op several times
    on one state. check_dead_outputs and check_compiled do that with the state put back. Nor can it where results hold
    NaN, which it takes for a difference."""
    args, saved = call.fresh(), call.save_state()
    if op.has_autograd:  # then opcheck also compares the gradients of eager with those of a traced graph
        for arg, value in zip(op.spec.args, args, strict=True):
            for tensor in () if arg.layer else tensors_of(value):
                tensor.requires_grad_(tensor.is_floating_point())
    named = {arg.name: value for arg, value in zip(op.spec.args, args, strict=True)}
    keywords = {arg.name: named.pop(arg.name) for arg in op.spec.args if arg.keyword_only}
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    partly = op.spec.keeps_state or _any_nan(op, call)
    try:
        with seeded():
            found = library.opcheck(op.overload, tuple(named.values()), keywords, tests if partly else None)
    finally:
        restore_state(saved)
    failed = {name: text for name, text in found.items() if text != "SUCCESS"}
    if not failed:
        return None
    name, text = next(iter(failed.items()))
    return f"torch.library.opcheck, {name}: {(text.strip().splitlines() or [''])[0][:300]}"


def _any_nan(op: Op[Any, Any], call: Call) -> bool:
    try:
        return any(bool(tensor.isnan().any()) for tensor in run(op, op.overload, call).all)
    except (Refused, Crashed):
        return False  # reported by the eager checks


def check_compiled(op: Op[Any, Any], call: Call, backend: str, dynamic: bool) -> str | None:
    """How the compiled op differs from eager on one call, graph breaks and errors included."""
    what = f"{backend}, {'dynamic' if dynamic else 'static'} sizes"
    eager = of_tensors(op, call.args)
    try:
        expected = _outcome(op, eager, call)
    except Exception as error:  # reported by the eager checks
        raise Crashed(describe(error)) from error
    try:
        actual = _outcome(op, _compile(eager, backend, dynamic), call)
    except Exception as error:  # whatever the compiler or the op raises is the finding
        return f"{what}: {_first_line(error)}"
    if torch.Tag.nondeterministic_seeded in op.spec.tags:
        return None
    found = differ(expected, actual, 0.0)
    return None if found is None else f"{what}: {found}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


def check_fresh_outputs(op: Op[Any, Any], call: Call, backend: str) -> str | None:
    """The usual caller: `out = torch.empty_like(x); op(..., out)` inside the graph. Values, and nothing removed."""
    made = [arg.name for arg in op.spec.args if arg.mutated and not arg.layer]
    if not made or {arg.name for arg in outputs(op)} != set(made):
        return None
    try:
        if not overwritten(op, op.overload, call):
            return None
    except (Refused, Crashed):
        return None  # reported by the eager checks
    places = [index for index, arg in enumerate(op.spec.args) if arg.name in made]
    inner = of_tensors(op, call.args)

    def model(*given: Any) -> Any:
        values = list(given)
        for place in places:
            if values[place] is not None and not isinstance(values[place], list):
                values[place] = torch.empty_like(values[place])
        result = inner(*values)
        return [values[place] for place in places], result

    return _same(op, call, model, backend, "outputs made in the graph")


def check_dead_outputs(op: Op[Any, Any], call: Call, backend: str) -> str | None:
    """A call whose outputs nobody reads, and two calls in a row: the layer's state must change as in eager."""
    if not call.state or not op.spec.layer_arg:
        return None
    places = [index for index, arg in enumerate(op.spec.args) if arg.mutated and not arg.layer]
    inner = of_tensors(op, call.args)

    def model(*given: Any) -> Any:
        for _ in range(2):
            values = list(given)
            for place in places:
                if isinstance(values[place], torch.Tensor):
                    values[place] = values[place].clone()
            inner(*values)
        return ()

    return _same(op, call, model, backend, "two calls with unused outputs")


def _same(op: Op[Any, Any], call: Call, model: Callable[..., Any], backend: str, what: str) -> str | None:
    try:
        expected = _outcome(op, model, call)
        actual = _outcome(op, _compile(model, backend, False), call)
    except Exception as error:  # as above
        return f"{backend}, {what}: {_first_line(error)}"
    if torch.Tag.nondeterministic_seeded in op.spec.tags:
        return None
    found = differ(expected, actual, 0.0)
    return None if found is None else f"{backend}, {what}: {found}"


def check_alias_after_clone(op: Op[Any, Any], call: Call, backend: str) -> Iterator[str]:
    """`y = x.clone(); op(y, x)`: the compiler removes the clone, and the op gets x twice (pytorch #198031)."""
    values = list(zip(op.spec.args, call.args, strict=True))
    for place, (arg, out) in enumerate(values):
        if not arg.mutated or arg.layer or not isinstance(out, torch.Tensor):
            continue
        for source, (other, value) in enumerate(values):
            if other.mutated or other.layer or not isinstance(value, torch.Tensor) or value.shape != out.shape:
                continue
            if value.dtype != out.dtype or not value.is_contiguous():
                continue
            inner = of_tensors(op, call.args)

            def model(*given: Any, place: int = place, source: int = source, inner: Any = inner) -> Any:
                mine = list(given)
                mine[place] = mine[source].clone()
                result = inner(*mine)
                return mine[place], result

            found = _same(op, call, model, backend, f"{arg.name} = {other.name}.clone() before the call")
            if found is not None:
                yield found
            return


def check_one_graph(op: Op[Any, Any], call: Call) -> str | None:
    """How many graphs three row counts need under dynamic=True; the kernel is left out, the sizes may mean nothing."""
    marks = row_dims(op, call.args)
    if not any(_any_rows(rows) for rows in marks) or depends_on_values(op, call):
        return None
    counter = CompileCounterWithBackend("aot_eager")

    def make_outputs(args: tuple[Any, ...]) -> Any:
        made = op.call_with(fake.Fake(op), args)
        return tuple(made) if isinstance(made, list) else made

    # A float argument would make torch trace twice to learn that it may stay a number.
    with torch._dynamo.config.patch(specialize_float=True), _runner(op, call, op.gather(make_outputs)):
        compiled = _compile(of_tensors(op, call.args), counter, True)
        for rows in (101, 67, 640):  # none is the size of another dim, which torch would take for the same symbol
            args = _resize(op, call.args, rows)
            if args is None:
                return None
            try:
                with torch.no_grad():
                    compiled(*only_tensors(args))
            except ContractError:
                return None
            except Exception as error:  # as above
                return f"{rows} rows, dynamic sizes: {_first_line(error)}"
    if counter.frame_count > 1:
        return f"{counter.frame_count} graphs for 3 row counts under dynamic=True; the fake pins a size to a number"
    return None


def _any_rows(marks: Any) -> bool:
    return any(map(_any_rows, marks)) if isinstance(marks, list) else bool(marks)


class _runner:
    """Replaces what computes the op on the call's device."""

    def __init__(self, op: Op[Any, Any], call: Call, stand_in: Callable[..., Any]) -> None:
        self.op, self.stand_in = op, stand_in
        self.device = op.device_of(call.args)

    def __enter__(self) -> None:
        self.op.calls.reset()
        self.op.calls.use(self.device, self.stand_in)

    def __exit__(self, *exc: object) -> None:
        self.op.calls.reset()


def _resize(op: Op[Any, Any], args: tuple[Any, ...], count: int) -> tuple[Any, ...] | None:
    """The call with `count` rows for the first contract name (or, without contracts, the first dim); zeros inside."""
    try:
        sizes = dict(fake.bind(op.spec, args).sizes)
    except ContractError:
        return None
    firsts = (a.shape.dims[0] for a in op.spec.args if a.shape and a.shape.dims and a.shape.dims[0].names)
    dim = next((d for d in firsts if d.kind in ("name", "star")), None)
    if dim is not None:
        name = dim.names[0]
        old = sizes[name]
        if old == ():
            return None
        sizes[name] = (count, *old[1:]) if isinstance(old, tuple) else count
        if isinstance(old, int) and any(arg.name == name for arg in op.spec.args):
            return None  # an int argument gives the size; it would have to change too

    def resized(arg: ArgSpec, value: Any, rows: Any) -> Any:
        if rows is None:
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(resized(arg, *pair) for pair in zip(value, rows, strict=True))
        if arg.shape is None:
            shape = [count if row and dim is None else size for size, row in zip(value.shape, rows, strict=True)]
        else:
            shape = _shape(arg.shape, value, sizes)
        return torch.zeros(shape, dtype=value.dtype, device=value.device)

    return tuple(resized(*triple) for triple in zip(op.spec.args, args, row_dims(op, args), strict=True))


def _shape(shape: Any, value: torch.Tensor, sizes: dict[str, Any]) -> list[int]:
    made: list[int] = []
    for dim in shape.dims:
        if dim.kind == "star":
            count = value.dim() - len(shape.dims) + 1
            made += sizes[dim.names[0]] if dim.names else value.shape[len(made) : len(made) + count]
        else:
            made.append(value.shape[len(made)] if dim.kind == "any" else dim.size(sizes))
    return made


__all__ = ["BACKENDS", "Refused", "check_compiled", "check_one_graph", "run"]
