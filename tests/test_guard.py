"""Which calls go past the dispatcher, with either guard: exactly those that mean the same there."""

import contextlib
import itertools
import json
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from opreg import RegistrationError, guard, guard_build, register_op
from opreg.cli import main
from opreg.errors import AutogradError

X = torch.arange(6.0).reshape(2, 3)
_serial = itertools.count()


@pytest.fixture(params=["python", "native"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(guard, "_loaded", ["the test's choice"])
    if request.param == "native":
        guard_build.build()  # 1.5 s where it is not in the cache
        monkeypatch.setattr(guard, "_loaded", [])
        assert guard.native() is not None, guard.in_use()
    return str(request.param)


class Spied:
    """An op and what went to its operator since."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.overload = function.overload
        self.seen = 0
        names = function.op.calls._names
        names["_operator"] = self._through

    def _through(self, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        return self.overload(*args, **kwargs)

    def direct(self, *args: Any) -> bool:
        """Whether a call goes past the dispatcher."""
        before = self.seen
        self.function(*args)
        return self.seen == before


@pytest.fixture
def op(kind: str) -> Spied:
    return spied(f"t_guard_{kind}::plain_{next(_serial)}")


def spied(name: str) -> Spied:
    @register_op(name)
    def plain(
        x: Tensor, more: list[Tensor], w: Tensor | None = None, by: float = 2.0, rest: list[Tensor] | None = None
    ) -> Tensor:
        out = x * by if w is None else x * w
        return out + sum(more) if more else out

    plain(X, [])  # writes its functions and makes the runner
    return Spied(plain)


class Quiet(Tensor):
    """A subclass that torch functions do not see."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class PassFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class PassDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


PLAIN: dict[str, tuple[Callable[[], Any], Callable[[], tuple[Any, ...]]]] = {
    "grad mode": (contextlib.nullcontext, lambda: (X, [])),
    "optional and list": (contextlib.nullcontext, lambda: (X, [X, X], X)),
    "parameter without gradient": (contextlib.nullcontext, lambda: (torch.nn.Parameter(X, requires_grad=False), [])),
    "optional list": (contextlib.nullcontext, lambda: (X, (X,), None, 2.0, [X])),
    "view": (contextlib.nullcontext, lambda: (X.T[1:], [])),
    "no_grad": (torch.no_grad, lambda: (torch.nn.Parameter(X), [])),
    "inference mode": (torch.inference_mode, lambda: (X, [], X + 1)),
    "autocast": (lambda: torch.autocast("cpu"), lambda: (X, [])),
}
OTHER: dict[str, tuple[Callable[[], Any], Callable[[], tuple[Any, ...]]]] = {
    "gradient wanted": (contextlib.nullcontext, lambda: (torch.nn.Parameter(X), [])),
    "gradient wanted of an optional": (contextlib.nullcontext, lambda: (X, [], torch.nn.Parameter(X))),
    "gradient wanted of an item": (contextlib.nullcontext, lambda: (X, [X, torch.nn.Parameter(X)])),
    "subclass": (contextlib.nullcontext, lambda: (X.as_subclass(Quiet), [])),
    "subclass as optional": (contextlib.nullcontext, lambda: (X, [], X.as_subclass(Quiet))),
    "subclass in a list": (contextlib.nullcontext, lambda: (X, [X.as_subclass(Quiet)])),
    "subclass in an optional list": (contextlib.nullcontext, lambda: (X, [], None, 2.0, [X.as_subclass(Quiet)])),
    "function mode": (PassFunctions, lambda: (X, [])),
    "dispatch mode": (PassDispatch, lambda: (X, [])),
    "profiler": (torch.autograd.profiler.profile, lambda: (X, [])),
}


def test_plain_calls_pass_the_dispatcher_by(op: Spied) -> None:
    for name, (context, arguments) in PLAIN.items():
        with context():
            args = arguments()
            assert op.direct(*args), name
            assert torch.equal(op.function(*args), op.overload(*args)), name


def test_all_other_calls_go_through_it(op: Spied) -> None:
    for name, (context, arguments) in OTHER.items():
        with context():
            assert not op.direct(*arguments()), name
    assert op.direct(X, [])


def test_another_thread_has_modes_of_its_own(op: Spied) -> None:
    found: list[bool] = []
    with PassDispatch():
        thread = threading.Thread(target=lambda: found.append(op.direct(X, [])))
        thread.start()
        thread.join()
        assert not op.direct(X, [])
    assert found == [True]


def test_fake_tensors_inside_and_outside_their_mode(op: Spied) -> None:
    with FakeTensorMode() as mode:
        fake = op.function(mode.from_tensor(X), [])
    assert type(op.function(fake, [])) is type(fake)
    assert op.function(X.to("meta"), []).device.type == "meta"


def test_tracers_record_the_operator(op: Spied) -> None:
    graph = make_fx(lambda x: op.function(x, []))(X).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [op.overload]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.trace itself, from 2.10 on
        traced = torch.jit.trace(lambda x: op.function(x, []) + 1, (X,), check_trace=False)
    assert op.overload._schema.name in {node.kind() for node in traced.graph.nodes()}
    assert torch.equal(traced(2 * X), 4 * X + 1)


def test_a_guard_that_is_loaded_by_a_traced_call_leaves_nothing_in_the_graph(
    op: Spied, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_loaded", [])

    def call(x: Tensor) -> Any:
        guard.native()
        return op.function(x, [])

    graph = make_fx(call)(X).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [op.overload]


def test_batching_rules_and_formulas(kind: str) -> None:
    @register_op(f"t_guard_{kind}::cube")
    def cube(x: Tensor) -> Tensor:
        return x**3

    cube.register_vmap(lambda info, in_dims, x: (cube(x) + 1, in_dims[0]))
    cube.register_autograd(
        lambda ctx, grad: grad * 3 * ctx.saved_tensors[0] ** 2,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    cube(X)
    assert torch.equal(torch.func.vmap(cube)(X), X**3 + 1)
    x = X.clone().requires_grad_()
    cube(x).sum().backward()
    assert torch.equal(x.grad, 3 * X**2)


def test_an_implementation_that_somebody_else_registers_is_used_from_then_on(op: Spied) -> None:
    assert op.direct(X, [])
    namespace, name = op.overload._schema.name.split("::")
    library = torch.library.Library(namespace, "FRAGMENT")

    def rule(x: Tensor, *rest: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            return op.overload(x, *rest) + 100

    library.impl(name, rule, "AutocastCPU")
    with torch.autocast("cpu"):
        assert torch.equal(op.function(X, []), 2 * X + 100)
    assert torch.equal(op.function(X, []), 2 * X)
    assert not op.direct(X, [])


def test_registrations_for_other_ops_cost_one_call_through_the_dispatcher(op: Spied) -> None:
    spied(f"{op.overload.namespace}::plain_{next(_serial)}")
    assert not op.direct(X, [])
    assert op.direct(X, [])


def test_wrong_arguments_get_the_dispatcher_s_words(op: Spied) -> None:
    for args in ((None, []), (3, []), (X, 3), (X, [3]), (X, [], 3)):
        with pytest.raises(Exception) as direct:  # noqa: PT011 - compared with what the operator raises
            op.function(*args)
        with pytest.raises(type(direct.value)) as through:
            op.overload(*args)
        assert str(direct.value) == str(through.value)


def test_a_new_kernel_is_used_by_the_next_call(op: Spied) -> None:
    @op.function.register_kernel("cpu")
    def better(
        x: Tensor, more: list[Tensor], w: Tensor | None = None, by: float = 2.0, rest: list[Tensor] | None = None
    ) -> Tensor:
        return x * 0

    assert torch.equal(op.function(X, []), 0 * X)
    assert op.direct(X, [])
    assert torch.equal(op.function(X, []), 0 * X)


def test_a_gradient_without_formula_is_an_error_in_backward(op: Spied) -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(Exception, match="backward was called, but the op has no backward formula"):
        op.function(x, []).sum().backward()
    with pytest.raises(Exception, match="backward was called, but the op has no backward formula"):
        op.function(X, [x]).sum().backward()


def test_the_native_guard_sees_what_the_dispatcher_resolves(kind: str) -> None:
    op = spied(f"t_guard_{kind}::conjugate")
    views = [torch.complex(X, X).conj(), torch.complex(X, X).conj().imag]
    assert [op.direct(view, []) for view in views] == [kind == "python"] * 2
    with torch._dispatch.python.enable_python_dispatcher():
        assert op.direct(X, []) == (kind == "python")
    for view in views:
        assert torch.equal(op.function(view, []), op.overload(view, []))


def test_every_call_through_the_dispatcher_on_demand(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("OPREG_GUARD", "off")
    op = spied(f"t_guard_{kind}::off")
    assert not op.direct(X, [])
    assert "OPREG_GUARD=off" in guard.in_use()
    monkeypatch.setenv("OPREG_GUARD", "on")
    with pytest.raises(RegistrationError, match="OPREG_GUARD='on' is unknown; it may be native, python, off"):
        guard.setting()


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("OPREG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(guard, "_loaded", [])


@pytest.mark.usefixtures("no_build")
def test_nothing_is_built_unasked_and_doctor_says_what_is_used(tmp_path: Any, capsys: Any) -> None:
    assert guard.native() is None
    assert not list(tmp_path.iterdir())
    assert main(["doctor"]) in (0, 1)
    assert "Python (the native guard is not built; run `opreg build`; a process that" in capsys.readouterr().out


@pytest.mark.usefixtures("no_build")
def test_a_build_that_does_not_load_is_named(capsys: Any) -> None:
    guard_build.target().write_bytes(b"no library")
    assert guard.native() is None
    assert "does not load" in guard.in_use()
    assert str(guard_build.target()) in guard.in_use()


@pytest.mark.usefixtures("no_build")
def test_a_failing_compiler_is_an_error_with_its_words(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("CXX", "false")
    assert main(["build", "--guard"]) == 1
    assert "cannot build the native guard: false -std=c++20" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["build", "--guard"]) == 1
    assert "install g++, or set CXX to one" in capsys.readouterr().err


def test_what_is_compiled_at_first_use_is_compiled_ahead(capsys: Any) -> None:
    assert main(["build", "opreg::rms_norm", "opreg::ragged_paged_attention", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["guard"] == str(guard_build.target())
    assert set(built["kernels"]) == {"opreg::rms_norm cpu/rms_norm", "opreg::ragged_paged_attention cpu/rpa_cpp"}
    assert built["failed"] == {}
    assert main(["build", "--guard"]) == 0
    assert capsys.readouterr().out == f"native guard: {guard_build.target()}\n"


def test_an_op_that_cannot_be_called_hides_no_other(capsys: Any) -> None:
    @register_op("t_guard::unready")
    def unready(x: Tensor) -> Tensor:
        return x + 1

    @unready.register_inputs
    def _(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
        raise OSError("no licence")

    assert main(["build", "t_guard::unready", "opreg::rms_norm"]) == 1
    said = capsys.readouterr()
    assert "ready: opreg::rms_norm cpu/rms_norm" in said.out
    assert "opreg: t_guard::unready: OSError: no licence" in said.err


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # which make_dual calls
def test_tangents_are_refused_and_not_dropped(kind: str) -> None:
    @register_op(f"t_guard_{kind}::twice")
    def twice(x: Tensor, more: list[Tensor] | None = None) -> Tensor:
        return x * 2

    x = torch.ones(3)
    for call in (twice, twice.overload):
        call(x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            assert call(x).tolist() == [2, 2, 2]
            for args in ((dual,), (x, [dual])):
                with pytest.raises(AutogradError, match=r"twice: called with a dual tensor, .*reverse mode"):
                    call(*args)
        assert call(x).tolist() == [2, 2, 2]
    # Here the tangent is gone before the operator's own implementation is called: torch.ops would not see it.
    with pytest.raises(AutogradError, match="dual tensor"):
        torch.func.jvp(twice, (x,), (x,))


def test_whether_a_tensor_has_a_tangent_is_asked_unseen_and_of_any_tensor(kind: str) -> None:
    @register_op(f"t_guard_{kind}::double")
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_vmap(lambda info, in_dims, x: (double(x), in_dims[0]))
    double(X)
    with forward_ad.dual_level():
        assert torch.equal(torch.func.vmap(double)(X), 2 * X)
        assert torch.equal(
            torch.func.vmap(lambda one: one + double(X).sum())(torch.ones(2)), 2 * X.sum() + torch.ones(2)
        )
        assert torch.equal(double(X.to_sparse()).to_dense(), 2 * X)
        with Noted() as seen:
            double(X.as_subclass(Quiet))
        assert seen.functions == ["double.default"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_whether_a_tensor_has_a_tangent_is_not_asked_of_the_tracer(kind: str) -> None:
    """torch.jit.trace ends the process where an error of its own is caught, as it was by who asked."""

    @register_op(f"t_guard_{kind}::traced_sum")
    def traced_sum(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    wanted = torch.ones(3, requires_grad=True) * 1
    traced_sum(X, X)
    with forward_ad.dual_level():
        for call in (traced_sum, traced_sum.overload):
            graph = torch.jit.trace(lambda x, call=call: call(x, x), (X,), check_trace=False).graph
            assert [node.kind() for node in graph.nodes()] == [f"t_guard_{kind}::traced_sum"]
            with pytest.raises(RuntimeError, match="Cannot insert a Tensor that requires grad as a constant"):
                torch.jit.trace(lambda x, call=call: call(x, wanted), (X,), check_trace=False)


class Noted(TorchFunctionMode):
    """What a function mode gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_function_mode_sees_the_operator_and_nothing_of_the_guard(kind: str) -> None:
    @register_op(f"t_guard_{kind}::written", mutates_args=("x",))
    def written(x: Tensor) -> None:
        x.data.zero_()

    written(X.clone())
    with Noted() as seen:
        written(X.clone())
    assert seen.functions[:2] == ["clone", "written.default"]
