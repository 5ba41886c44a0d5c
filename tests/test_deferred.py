"""Deferred ops: recorded without a look at their signature, registered at the first use, the same from then on."""

import copy
import functools
import inspect
import itertools
import pickle
import threading
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from opreg import DuplicateOpError, RegistrationError, SignatureError, register_op, registry, signature, splitting_ops
from opreg.cli import main

X = torch.arange(3.0)
_serial = itertools.count()


def known(name: str) -> bool:
    """Whether the dispatcher has the operator; asks nothing that would define it."""
    return name in {entry.split(".")[0] for entry in torch._C._dispatch_get_all_op_names()}


@pytest.fixture
def name() -> str:
    return f"t_deferred::op_{next(_serial)}"


def recorded(name: str, **how: Any) -> Any:
    with registry.deferred():

        @register_op(name, **how)
        def doubled(x: Tensor, by: float = 2.0) -> Tensor:
            """Twice."""
            return x * by

    assert not known(name)
    return doubled


def with_kernel(name: str, kernel: Any) -> Any:
    other = register_op(f"{name}_other")(kernel.__wrapped__)
    other.register_kernel("cpu", kernel, priority=1)
    return other


USES = {
    "call": lambda op, name: op(X),
    "torch.ops": lambda op, name: getattr(torch.ops.t_deferred, name.split("::")[1]),
    "overload": lambda op, name: op.overload._schema,
    "hash": lambda op, name: hash(op.overload),
    "spec": lambda op, name: op.spec.schema,
    "explain": lambda op, name: op.explain(),
    "op": lambda op, name: op.op.kernels,
    "list": lambda op, name: splitting_ops(),
    "show": lambda op, name: main(["show", name]),
    "compile": lambda op, name: torch.compile(lambda x: op(x), backend="eager", fullgraph=True)(X),
    "compile itself": lambda op, name: torch.compile(op, backend="eager", fullgraph=True)(X),
    "signature": lambda op, name: inspect.signature(op) and op(X),
    "partial": lambda op, name: functools.partial(op, X)(),
    "code": lambda op, name: op.__code__,
    "body of another op": lambda op, name: register_op(f"{name}_again")(op)(X),
    "kernel of another op": lambda op, name: with_kernel(name, op)(X),
}


@pytest.mark.parametrize("use", USES)
def test_an_op_is_registered_at_its_first_use(name: str, use: str) -> None:
    op = recorded(name)
    assert op.name == name
    assert repr(op) == f"<op {name}>"
    assert not known(name)
    USES[use](op, name)
    assert known(name)
    assert torch.equal(op(X), 2 * X)
    packet = getattr(torch.ops.t_deferred, name.split("::")[1])
    assert packet.default is op.overload is op.op.overload
    assert type(op.overload) is torch._ops.OpOverload
    assert op.spec is op.op.spec
    assert registry.get(name) is op.op
    assert op.op.function is op
    assert op(X, by=3.0).tolist() == [0, 3, 6]


def test_it_looks_like_the_function_and_like_any_op(name: str) -> None:
    op, other = recorded(name), register_op(f"{name}_other")(recorded(f"{name}_third").__wrapped__)
    for used in (False, True):
        assert (op.__name__, op.__doc__, op.__module__) == ("doubled", "Twice.", __name__)
        assert op.__qualname__ == other.__qualname__
        assert op.__annotations__ == other.__annotations__
        assert op.__wrapped__.__code__ is other.__wrapped__.__code__
        assert inspect.signature(op) == inspect.signature(other)
        assert {method for method in vars(other) if not method.startswith("_")} - set(dir(op)) == (
            set() if used else {"op", "spec", "overload", "name"}
        )
        assert not hasattr(op, "pytestmark")  # a look for what no op has registers nothing
        assert known(name) is used
        op(X)
    assert set(vars(other)) <= set(vars(op))
    assert op.__code__ is op.op.calls.public.__code__


@register_op("t_deferred::at_top")
def at_top(x: Tensor) -> Tensor:
    return x + 1


with registry.deferred():

    @register_op("t_deferred::at_top_late")
    def at_top_late(x: Tensor) -> Tensor:
        return x + 1


def test_it_is_pickled_and_copied_as_functions_are() -> None:
    for _ in range(2):
        for op in (at_top, at_top_late):
            assert pickle.loads(pickle.dumps(op)) is copy.deepcopy(op) is copy.copy(op) is op
        at_top_late(X)


def test_what_is_compiled_before_the_first_use_is_compiled_once(name: str) -> None:
    op, graphs = recorded(name), []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([node.target for node in gm.graph.nodes if node.op == "call_function"])
        return gm

    compiled = torch.compile(lambda x: op(x, by=3.0), backend=backend, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(X), 3 * X)
    assert graphs == [[op.overload]]


def test_a_partial_made_before_the_first_use_calls_the_op(name: str) -> None:
    op = recorded(name)
    parts = functools.partial(op, by=3.0), functools.partial(functools.partial(op), X)
    for _ in range(2):
        assert torch.equal(parts[0](X), 3 * X)
        assert torch.equal(parts[1](), 2 * X)


def test_compiled_graphs_hold_the_operator_and_follow_sizes(name: str) -> None:
    op = recorded(name)
    compiled = torch.compile(lambda x: op(x) + 1, backend="aot_eager", fullgraph=True)
    for rows in (3, 4, 5):
        x = torch.randn(rows)
        torch.testing.assert_close(compiled(x), 2 * x + 1)
    program = torch.export.export(torch.nn.ReLU(), (X,))
    assert program is not None


def test_what_is_registered_for_it_is_recorded_too(name: str) -> None:
    op = recorded(name)
    decorate = op.register_kernel("cpu", priority=3)

    def fast(x: Tensor, by: float = 2.0) -> Tensor:
        return x * by + 1

    assert decorate(fast) is fast
    assert op.register_inputs(inputs) is inputs
    op.tolerance(torch.float32, 0.1, "a test")
    op.register_autograd(lambda ctx, grad: grad * 5)
    register = op.register_fake
    assert not known(name)
    assert torch.equal(op(X), 2 * X + 1)
    assert op.op.tolerances == {torch.float32: (0.1, "a test")}
    assert [list(call) for call in op.samples()] == [["x"]]
    x = X.clone().requires_grad_()
    op(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [5, 5, 5]

    def other(x: Tensor) -> Tensor:
        return x

    with pytest.raises(SignatureError, match="fake has parameters"):
        register(other)  # held since before the first use


def inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
    yield {"x": X}


def test_what_registration_refuses_is_refused_at_every_use(name: str) -> None:
    with registry.deferred():

        @register_op(name)
        def bad(x: Tensor, layer_name: str) -> Tensor: ...

    for use in (
        lambda: bad(X, "a"),
        lambda: bad.spec.schema,
        lambda: bad.explain(),
        lambda: registry.get(name).kernels,
    ):
        with pytest.raises(SignatureError, match=r"write layer_name: LayerName.*\(recorded at .*test_deferred.py:\d+"):
            use()
    assert not known(name)
    registry.recorded.pop(name)


def test_a_kernel_that_is_refused_is_refused_at_every_use(name: str) -> None:
    op = recorded(name)
    op.register_kernel("cpu", "somewhere:a", priority=1)
    op.register_kernel("cpu", "somewhere:b", priority=1)
    for _ in range(2):
        with pytest.raises(RegistrationError, match="both have priority 1"):
            op(X)
    assert name not in {op.name for op in registry.defined_ops()}
    with pytest.raises(RegistrationError, match="both have priority 1"):
        getattr(torch.ops.t_deferred, name.split("::")[1])
    registry.recorded.pop(name)


def test_names_are_refused_at_once_and_the_second_declaration_as_ever(name: str) -> None:
    op = recorded(name)
    with registry.deferred(), pytest.raises(RegistrationError, match="write 'namespace::name'"):
        register_op("doubled")(op.__wrapped__)
    with registry.deferred():
        assert register_op(name)(op.__wrapped__) is op
    with pytest.raises(DuplicateOpError, match="already registered"):
        register_op(name)(one)


def one(x: Tensor) -> Tensor:
    return x


def test_threads_that_use_it_first_at_once(name: str) -> None:
    op, results = recorded(name), []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        results.append(torch.equal(op(X), 2 * X))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_threads_that_come_while_it_is_registered_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, found = recorded(name), []
    begun, go_on = threading.Event(), threading.Event()
    read_op = signature.read_op

    def slow(*args: Any, **how: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return read_op(*args, **how)

    monkeypatch.setattr(signature, "read_op", slow)
    looks = (lambda: op(X), lambda: op.spec, lambda: registry.get(name), lambda: op.func, lambda: op.tolerance)
    threads = [threading.Thread(target=lambda look=look: found.append(look())) for look in looks]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    threads[4].join(60)  # which asks for nothing of the op's
    assert len(found) == 1
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(found) == 5
    assert op.op is registry.get(name)
    assert name not in registry.recorded


def test_packages_may_be_loaded_deferred(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Point:
        def load(self) -> None:
            @register_op(name)
            def plugged(x: Tensor) -> Tensor:
                return x + 1

            made.append(plugged)

    point: Any = Point()
    point.name = name
    monkeypatch.setattr(registry, "packages", lambda: [point])
    assert registry.load_packages(deferred=True)[name] is None
    assert not known(name)
    assert name not in {op.name for op in registry.defined_ops()}
    assert torch.equal(made[0](X), X + 1)
    assert name in {op.name for op in registry.defined_ops()}
    assert not registry.is_deferred()


class _Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_every_attribute_of_the_spec_is_the_registered_one() -> None:
    def pair(x: Tensor) -> _Pair:
        return _Pair(x + 1, x + 2)

    with registry.deferred():
        made = register_op("t_deferred::pair")(pair)
    # Asked first: it has a default, which an op that is not registered yet must not show.
    assert made.spec.named is _Pair


def test_deferred_ops_given_to_one_program_are_compiled_apart() -> None:
    def plus(x: Tensor) -> Tensor:
        return x + 1

    def times(x: Tensor) -> Tensor:
        return x * 10

    with registry.deferred():
        late = [register_op(f"t_deferred::given_{fn.__name__}")(fn) for fn in (plus, times)]
    early = [register_op(f"t_deferred::early_{fn.__name__}")(fn) for fn in (plus, times)]
    compiled = torch.compile(lambda x, op: op(x) + 0, backend="eager", fullgraph=True)
    x = torch.ones(1)
    assert [compiled(x, op).item() for op in (*late, *early, *late)] == [2, 10, 2, 10, 2, 10]
