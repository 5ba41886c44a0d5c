"""What opreg itself costs, beside torch's own ways in the same run: `opreg bench --framework`.

Sections: eager calls of three signatures, calls inside a compiled graph, registration, forward context, splitting, and
compiling and running a model of 32 layers. Every figure is a ratio beside its baseline; absolute times move with the
machine.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from . import guard, registry
from .bench import Timing, interleave, per_call
from .bench_alias import alias_guard
from .bench_compile import cold_compiles, further_layers, warm_forwards
from .bench_process import processes
from .bench_rows import Row, rows
from .bench_split import splits
from .context import current_layer, forward_context
from .op import register_op

# No call may return its input: torch refuses custom_ops that do, and graphs hand one call's result to the next.
_OUT, _OTHER = torch.zeros(4), torch.zeros(4)


def _one(x: Tensor) -> Tensor:
    return _OTHER if x is _OUT else _OUT


def _five(out: Tensor, z: Tensor, q: Tensor, k: Tensor, v: Tensor, phase: str) -> None:
    del phase


def _eighteen(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    e: Tensor,
    f: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    i: int,
    j: int,
    k: float,
    m: float,
    n: bool,
    p: bool,
    q: str,
    r: int | None,
    s: float | None,
    t: int,
) -> Tensor:
    return _OTHER if a is _OUT else _OUT


_CASES: tuple[tuple[str, Callable[..., Any], tuple[str, ...], str], ...] = (
    ("1 tensor -> tensor", _one, (), "f(x)"),
    ("5 tensors + str, 2 mutated", _five, ("out", "z"), "f(x, x1, x2, x3, x4, 'prefill')"),
    (
        "5 tensors, 3 optional, 10 scalars",
        _eighteen,
        (),
        "f(x, x1, x2, x3, x4, x1, None, None, 1, 2, 1.0, 2.0, True, False, 'nhd', None, None, 3)",
    ),
)
_serial = itertools.count()


def _torch_ways(name: str, fn: Callable[..., Any], mutates: tuple[str, ...], schema: str) -> dict[str, Any]:
    """The same function as define+impl and as custom_op."""
    from . import library

    def fake(*args: Any) -> Any:
        return None if mutates else torch.empty(4)

    qualname = f"opreg_bench_lib::{name}"
    library.define_with_public_calls(qualname, schema, fn, fake)
    custom = library.custom_op(f"opreg_bench_custom::{name}", fn, mutates, fake)
    return {"define+impl": library.overload(qualname), "custom_op": custom}


def _ways(index: int) -> tuple[dict[str, Any], str]:
    _, fn, mutates, expression = _CASES[index]
    name = f"{fn.__name__.strip('_')}_{next(_serial)}"
    op = register_op(f"opreg_bench::{name}", mutates_args=mutates)(fn)
    op.register_fake(_fake_like(fn, mutates))
    ways: dict[str, Any] = {"opreg": op}
    if guard.native() is not None:
        ways["opreg, Python guard"] = _with_python_guard(f"opreg_bench::python_{name}", fn, mutates)
    ways.update({"opreg overload": op.overload, **_torch_ways(name, fn, mutates, op.spec.schema)})
    return ways, expression


def _with_python_guard(name: str, fn: Callable[..., Any], mutates: tuple[str, ...]) -> Any:
    """The op as it is called where the native guard is not built."""
    op = register_op(name, mutates_args=mutates)(fn)
    op.register_fake(_fake_like(fn, mutates))
    with guard.python():
        op.op.calls._write()
    return op


def _fake_like(fn: Callable[..., Any], mutates: tuple[str, ...]) -> Callable[..., Any]:
    """A fake with the op's own parameters, as register_fake wants it."""

    def fake(*args: Any) -> Any:
        return None if mutates else torch.empty(4)

    fake.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
    parameters = inspect.signature(fn).parameters.values()
    return fake if all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) else fn


class _Subclass(Tensor):
    """What no guard lets pass."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def eager_calls(rounds: int = 60) -> Iterator[Row]:
    """Calls in plain eager, grad mode on and no input that wants a gradient; the same under no_grad; and with a
    subclass of Tensor, where the guard says no. `opreg` uses the guard that `opreg doctor` names."""
    x = [torch.randn(4) for _ in range(5)]
    names = {"x": x[0], "x1": x[1], "x2": x[2], "x3": x[3], "x4": x[4]}
    for index, (label, fn, _, _) in enumerate(_CASES):
        ways, expression = _ways(index)
        calls = {way: (expression, {**names, "f": function}) for way, function in ways.items()}
        calls["plain Python"] = (expression, {**names, "f": fn})
        yield from rows(f"eager: {label}", per_call(calls, rounds=rounds), "define+impl")
        del calls["custom_op"], calls["opreg overload"]
        with torch.no_grad():
            yield from rows(f"eager, no_grad: {label}", per_call(calls, rounds=rounds), "define+impl")
        refused = {**names, "x": x[0].as_subclass(_Subclass)}
        slow = {way: (expression, {**refused, "f": ways[way]}) for way in ways if way != "custom_op"}
        yield from rows(f"eager, slow path: {label}", per_call(slow, rounds=rounds), "define+impl")


def compiled_calls(rounds: int = 60, many: int = 40) -> Iterator[Row]:
    """Cost of one call inside an Inductor graph: (a graph with `many` calls - one with 1) / (many - 1)."""
    x = [torch.randn(4) for _ in range(5)]
    for index, (label, _, mutates, _) in enumerate(_CASES):
        ways, expression = _ways(index)
        ways = {way: ways[way] for way in ("opreg", "define+impl", "custom_op")}
        graphs: dict[str, tuple[str, dict[str, Any]]] = {}
        for way, function in ways.items():
            for calls in (1, many):
                compiled = torch.compile(_repeated(function, expression, calls, bool(mutates)), fullgraph=True)
                with torch.no_grad():
                    compiled(*x)
                arguments = {f"y{i}": t for i, t in enumerate(x)}
                graphs[f"{way} {calls}"] = ("g(y0, y1, y2, y3, y4)", {"g": compiled, **arguments})
        with torch.no_grad():
            raw = per_call(graphs, number=50, rounds=rounds)
        slopes = {}
        for way in ways:
            one, all_calls = raw[f"{way} 1"], raw[f"{way} {many}"]
            slope = (all_calls.median - one.median) / (many - 1)
            slopes[way] = Timing(slope, slope, slope)
        yield from rows(f"in a compiled graph: {label}", slopes, "define+impl")


def _repeated(function: Any, expression: str, calls: int, mutating: bool) -> Callable[..., Any]:
    """A program that calls the op `calls` times so that none can be left out."""

    def mutate(x: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, x4: Tensor) -> Tensor:
        for _ in range(calls):
            function(x, x1, x2, x3, x4, "prefill")
        return x + 1

    source = "def pure(x, x1, x2, x3, x4):\n    total = []\n"
    source += (
        f"    for _ in range({calls}):\n        x = {expression}\n        total.append(x)\n    return total[-1] + 1\n"
    )
    namespace: dict[str, Any] = {"f": function}
    exec(compile(source, "<opreg bench>", "exec"), namespace)
    return mutate if mutating else namespace["pure"]


def registration(count: int = 60) -> Iterator[Row]:
    """Registering one op with its fake, and recording it to be registered at its first use."""
    from . import library

    signature = inspect.signature(_registered, eval_str=True)

    names: list[str] = []

    def name() -> None:
        """Names are literals in programs, so that making them is not timed."""
        names[:] = [f"opreg_bench::reg_{next(_serial)}" for _ in range(count)]

    def opreg() -> None:
        for qualname in names:
            register_op(qualname)(_registered)

    def vllm_style() -> None:
        for qualname in names:
            library.define_with_public_calls(qualname, library.infer_schema(signature, ()), _registered, _registered)

    def custom_op() -> None:
        for qualname in names:
            library.custom_op(qualname, _registered, (), _registered)

    def recorded() -> None:
        with registry.deferred():
            opreg()

    ways = {"opreg": opreg, "opreg, deferred": recorded, "define+impl": vllm_style, "custom_op": custom_op}
    for way in ways.values():
        name()
        way()
    names.clear()
    timings = interleave(ways, seconds=0.5, rounds=5, clock=time.thread_time, before=name)
    each = {w: Timing(t.median / count, t.low / count, t.high / count) for w, t in timings.items()}
    yield from rows("registration: one op with its fake", each, "define+impl")


def _registered(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return torch.empty_like(x)


class _Global:
    """What the field does: a module global that a context manager sets."""

    layers: dict[str, Any] | None = None


@contextmanager
def _set_global(layers: dict[str, Any], metadata: Any) -> Iterator[None]:
    before, _Global.layers = _Global.layers, layers
    try:
        yield
    finally:
        _Global.layers = before


_bare: ContextVar[dict[str, Any] | None] = ContextVar("opreg_bench", default=None)


def _from_global(name: str) -> Any:
    layers = _Global.layers
    if layers is None:
        raise LookupError(name)
    return layers[name]


def _from_contextvar(name: str) -> Any:
    return _bare.get()[name]  # type: ignore[index]


def forward_contexts() -> Iterator[Row]:
    """Looking a layer up, and entering and leaving a context."""
    layers = {f"layers.{i}": i for i in range(64)}
    _Global.layers = layers
    token = _bare.set(layers)
    context = forward_context(layers=layers, metadata="step")
    try:
        with forward_context(layers=layers, metadata="step"):
            timings = per_call(
                {
                    "current_layer": ("f('layers.7')", {"f": current_layer}),
                    "bare ContextVar": ("f('layers.7')", {"f": _from_contextvar}),
                    "module global": ("f('layers.7')", {"f": _from_global}),
                }
            )
        yield from rows("forward context: look-up", timings, "module global")
        whole = "\n        with make(layers=layers, metadata='step'): pass"
        enter = per_call(
            {
                "enter and leave": ("c.__enter__(); c.__exit__()", {"c": context}),
                "made, entered and left": (whole, {"make": forward_context, "layers": layers}),
                "contextmanager on a module global": (whole, {"make": _set_global, "layers": layers}),
            },
            number=500,
        )
        yield from rows("forward context: enter and leave", enter, "contextmanager on a module global")
    finally:
        _bare.reset(token)
        _Global.layers = None


def selections() -> Iterator[Row]:
    """A call of an op whose kernel is chosen by a predicate, which accepts it, beside one without."""

    def kernel(x: Tensor) -> Tensor:
        return _OTHER

    def accepts(x: Tensor) -> str | None:
        return None

    calls: dict[str, tuple[str, dict[str, Any]]] = {}
    x = torch.randn(4)
    for way, predicate in (("one kernel", None), ("two kernels, one predicate", accepts)):
        op = register_op(f"opreg_bench::chosen_{next(_serial)}")(_one)
        op.register_kernel("cpu", kernel, why_not=predicate)
        calls[way] = ("f(x)", {"f": op, "x": x})
    yield from rows("choice of the kernel", per_call(calls), "one kernel")


def _jax_calls() -> Iterator[Row]:
    from .jax_bridge_bench import jax_calls  # it needs jax

    return jax_calls()


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "eager": eager_calls,
    "compiled": compiled_calls,
    "registration": registration,
    "context": forward_contexts,
    "choice": selections,
    "process": processes,
    "split": splits,
    "cold": cold_compiles,
    "layers": further_layers,
    "warm": warm_forwards,
    "alias": alias_guard,
    "jax": _jax_calls,
}
