"""Every shipped op: torch's own opcheck, compiled equal to eager, and one graph for many sizes."""

from collections.abc import Iterator
from typing import Any

import opreg.ops  # noqa: F401 - registers the shipped ops
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from opreg import library, registry
from opreg.fake import Fake, bind
from opreg.op import Op
from opreg.testing.samples import Call, registered_calls, restore_state, tensors_of

OPS = [op for op in registry.all_ops() if op.name.startswith("opreg::")]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def calls(op: Op[Any, Any], most: int = 3) -> Iterator[Call]:
    for index, call in enumerate(registered_calls(op)):
        if index == most:
            return
        yield call


def run(op: Op[Any, Any], fn: Any, call: Call) -> list[torch.Tensor]:
    """Results, written arguments and the layer's tensors after one call, which leaves the layer as it was."""
    args, saved = call.fresh(), call.save_state()
    result = fn(*only_tensors(args))
    written = [value for arg, value in zip(op.spec.args, args, strict=True) if arg.mutated]
    after = [tensor.clone() for value in (result, *written, *call.state.values()) for tensor in tensors_of(value)]
    restore_state(saved)
    return after


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def of_tensors(op: Op[Any, Any], args: tuple[Any, ...]) -> Any:
    """The op as a function of its tensor arguments; the others are constants, as they are in a model's code."""
    names = [arg.name for arg in op.spec.args if arg.keyword_only]
    split = len(op.spec.args) - len(names)
    fn, constants = op.function, [None if tensors_of(value) else value for value in args]

    def call(*given: Any) -> Any:
        values = [value if value is not None else constant for value, constant in zip(given, constants, strict=True)]
        return fn(*values[:split], **dict(zip(names, values[split:], strict=True)))

    return call


def only_tensors(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value if tensors_of(value) else None for value in args)


def test_all_shipped_ops_are_here() -> None:
    assert len(OPS) >= 5


@every_op
def test_has_inputs(op: Op[Any, Any]) -> None:
    assert sum(1 for _ in calls(op)) >= 2


@every_op
def test_opcheck(op: Op[Any, Any]) -> None:
    keyword_only = {arg.name for arg in op.spec.args if arg.keyword_only}
    for call in calls(op):
        named = {arg.name: value for arg, value in zip(op.spec.args, call.fresh(), strict=True)}
        args = tuple(value for name, value in named.items() if name not in keyword_only)
        saved = call.save_state()
        found = library.opcheck(op.overload, args, {name: named[name] for name in keyword_only})
        restore_state(saved)
        assert set(found.values()) == {"SUCCESS"}, (call.label, found)


@every_op
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(op: Op[Any, Any], backend: str) -> None:
    for call in calls(op, 2):
        torch._dynamo.reset()
        eager = of_tensors(op, call.args)
        compiled = torch.compile(eager, backend=backend, fullgraph=True, dynamic=False)
        assert_same(run(op, compiled, call), run(op, eager, call))


@every_op
# A float argument would make torch trace twice to learn that it may stay a number; the two would count as two graphs.
@torch._dynamo.config.patch(specialize_float=True)
def test_one_graph_for_many_sizes(op: Op[Any, Any], request: pytest.FixtureRequest) -> None:
    """Other numbers of tokens never compile again. The kernel is replaced: such sizes need not mean anything to it."""
    call = next(iter(calls(op)))
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(of_tensors(op, call.args), backend=counter, fullgraph=True, dynamic=True)
    op.calls.use("cpu", op.gather(lambda args: make_outputs(op, args)))
    request.addfinalizer(op.calls.reset)
    for rows in (101, 7, 640, 53):  # none is the size of another dim, which torch would take for the same symbol
        args = resize(op, call.args, rows)
        expected = [tensor.shape for tensor in tensors_of(make_outputs(op, args))]
        assert [tensor.shape for tensor in tensors_of(compiled(*only_tensors(args)))] == expected
    assert counter.frame_count == 1


def make_outputs(op: Op[Any, Any], args: tuple[Any, ...]) -> Any:
    """What the fake says, as real zeros."""
    made = op.call_with(Fake(op), args)
    return tuple(made) if isinstance(made, list) else made


def resize(op: Op[Any, Any], args: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The call with another size for the first dim of the contract, wherever its name occurs; values mean nothing."""
    sizes = dict(bind(op.spec, args).sizes)
    name = next(arg.shape.dims[0].names[0] for arg in op.spec.args if arg.shape and arg.shape.names)
    sizes[name] = (rows, *sizes[name][1:]) if isinstance(sizes[name], tuple) else rows
    found = []
    for arg, value in zip(op.spec.args, args, strict=True):
        if isinstance(value, torch.Tensor) and arg.shape is not None:
            shape: list[int] = []
            for dim, old in zip(arg.shape.dims, value.shape, strict=False):
                if dim.kind == "star":
                    shape.extend(sizes[dim.names[0]])
                else:
                    shape.append(old if dim.kind == "any" else dim.size(sizes))
            value = torch.zeros(shape, dtype=value.dtype)
        found.append(value)
    return tuple(found)
