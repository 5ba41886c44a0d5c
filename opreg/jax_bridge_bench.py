"""`opreg bench --framework jax`: what a call of a JAX function costs, beside bare jax.jit and other bridges.

8x8 float32, two arguments, one result, results awaited. Then calls inside a compiled graph and what entering one costs,
64 MiB arguments beside a copy of them, and where torch_xla is installed, what recording a call costs in a lazy graph,
beside torch_xla's own call_jax, and what moving a tensor to XLA's device costs.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from . import library
from .bench import Timing, interleave, per_call, summary
from .bench_rows import Row, rows
from .jax_bridge import call_jax
from .jax_bridge_arrays import runtime
from .op import register_op
from .transfer import to_device

_LARGE = 16 << 20  # float32 in 64 MiB
_SERIAL = itertools.count()


def sin_add(a: Any, b: Any) -> Any:
    return runtime().jax.numpy.sin(a) + b


def sin_add_tree(tree: Any, factor: Any) -> Any:
    return runtime().jax.numpy.sin(tree["a"]) * factor + tree["b"]


@register_op("opreg_bench::sin_add_torch")
def sin_add_torch(a: Annotated[Tensor, "*n"], b: Annotated[Tensor, "*n"]) -> Annotated[Tensor, "*n"]:
    """The same in torch, as an operator."""
    return torch.sin(a) + b


def jax_calls() -> Iterator[Row]:
    """All rows; those of torch_xla where it is installed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield from _small()
            yield from _in_a_graph()
            yield from _entered()
            yield from _large()
            if importlib.util.find_spec("torch_xla"):
                yield from _recorded()
                yield from _transferred()
    finally:
        torch.set_num_threads(threads)


def _small() -> Iterator[Row]:
    jax = runtime().jax
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    ja, jb = jax.numpy.asarray(a.numpy()), jax.numpy.asarray(b.numpy())
    names = {"a": a, "b": b, "ja": ja, "jb": jb, "f": sin_add, "g": sin_add_tree, "call": call_jax}
    names |= {"jit": jax.jit(sin_add), "to": jax.dlpack.from_dlpack, "back": from_dlpack, "t": {"a": a, "b": b}}
    calls = {
        "jax.jit": "jit(ja, jb).block_until_ready()",
        "call_jax": "call(f, (a, b))",
        "call_jax, a dict and a number": "call(g, (t, 2.5))",
        "DLPack round trip": "back(jit(to(a), to(b)))",
    }
    if importlib.util.find_spec("torchax"):
        names["torchax"] = _torchax_call(names["jit"], a, b)
        calls["torchax"] = "torchax()"
    timings = per_call({name: (text, names) for name, text in calls.items()}, number=200, rounds=40)
    yield from rows("8x8, two in, one out", timings, "jax.jit")


def _torchax_call(jitted: Callable[..., Any], a: Tensor, b: Tensor) -> Callable[[], Any]:
    """torchax's call_jax of a jitted function, on its own tensors in its own environment."""
    environment = importlib.import_module("torchax").default_env()
    interop = importlib.import_module("torchax.interop")
    with environment:
        ta, tb = a.to("jax"), b.to("jax")

    def call() -> Any:
        with environment:
            return interop.call_jax(jitted, ta, tb).jax().block_until_ready()

    return call


def _in_a_graph(many: int = 20) -> Iterator[Row]:
    """Cost of one call inside an Inductor graph, (a graph with `many` calls - one with 1) / (many - 1), and of a graph
    with one, entry included."""
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    ways = {**_ways(), _BY_HAND: _by_hand()}
    graphs = {}
    for way, fn in ways.items():
        for count in (1, many):
            graph = torch.compile(_repeated(fn, count), fullgraph=True)
            graph(a, b)
            graphs[f"{way} {count}"] = ("g(a, b)", {"g": graph, "a": a, "b": b})
        graphs[way] = ("f(a, b)", {"f": fn, "a": a, "b": b})
    raw = per_call(graphs, number=50, rounds=40)
    for way in ways:
        slope = (raw[f"{way} {many}"].median - raw[f"{way} 1"].median) / (many - 1)
        yield Row("in a compiled graph", way, slope, "its eager call", slope / raw[way].median)
    yield from rows("a compiled graph of one call", {way: raw[f"{way} 1"] for way in ways}, _BY_HAND)


def _entered() -> Iterator[Row]:
    """What Dynamo takes to enter a graph, guards included, by what it holds; the graph itself computes nothing."""
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    result = (torch.randn(8, 8),)
    calls = {}
    torch._dynamo.reset()  # torch 2.9 counts the graphs of the section before
    for way, fn in _ways().items():
        graph = torch.compile(_repeated(fn, 1), fullgraph=True, backend=lambda module, inputs: lambda *given: result)
        graph(a, b)
        calls[way] = ("g(a, b)", {"g": graph, "a": a, "b": b})
    yield from rows("entering a compiled graph", per_call(calls, number=100, rounds=100), "an op of torch.library")


_BY_HAND = "jax.jit in an op of torch.library"


def _ways() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The same by call_jax, and in torch as an operator of opreg and as one of torch.library."""
    plain = _library_op("sin_add_plain", lambda a, b: torch.sin(a) + b)
    return {
        "call_jax": lambda x, y: call_jax(sin_add, (x, y)),
        "an op in torch": lambda x, y: sin_add_torch(x, y),
        "an op of torch.library": lambda x, y: plain(x, y),
    }


def _by_hand() -> Callable[[Tensor, Tensor], Tensor]:
    """jax.jit between numpy views and a copy of its result, as an operator of torch.library."""
    jitted, numpy = runtime().jax.jit(sin_add), runtime().numpy
    made = _library_op("sin_add_by_hand", lambda a, b: torch.from_numpy(numpy.array(jitted(a.numpy(), b.numpy()))))
    return lambda x, y: made(x, y)


def _library_op(name: str, kernel: Callable[..., Any]) -> Callable[..., Tensor]:
    qualname = f"opreg_bench::{name}"
    if not library.is_defined(qualname):
        library.define_with_public_calls(
            qualname, "(Tensor a, Tensor b) -> Tensor", kernel, lambda a, b: torch.empty_like(a)
        )
    made: Callable[..., Tensor] = library.overload(qualname)
    return made


def _repeated(fn: Callable[[Tensor, Tensor], Tensor], count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """`count` calls in a row, in a function whose code no other has: graphs of one code are searched in turn."""
    names: dict[str, Any] = {"fn": fn}
    name = f"run{next(_SERIAL)}"  # Dynamo takes equal codes of equal names for one
    lines = [f"def {name}(x, y):", *["    x = fn(x, y)"] * count, "    return x"]
    exec(compile("\n".join(lines), "<opreg bench>", "exec"), names)
    made: Callable[[Tensor, Tensor], Tensor] = names[name]
    return made


def _large() -> Iterator[Row]:
    jax = runtime().jax
    x = torch.randn(_LARGE)
    array = jax.numpy.asarray(x.numpy())
    few, twice = (lambda a: a[:8] + 1), (lambda a: a * 2)
    jit_few, jit_twice = jax.jit(few), jax.jit(twice)
    calls: dict[str, Callable[[], Any]] = {
        "a copy": x.clone,
        "little out: jax.jit": lambda: jit_few(array).block_until_ready(),
        "little out: call_jax": lambda: call_jax(few, (x,)),
        "as much out: jax.jit": lambda: jit_twice(array).block_until_ready(),
        "as much out: call_jax": lambda: call_jax(twice, (x,)),
    }
    yield from rows("64 MiB in", interleave(calls, seconds=1.0), "a copy")


def _recorded(calls: int = 50, rounds: int = 40) -> Iterator[Row]:
    """What recording a call costs; nothing runs between the syncs, which are left out."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    xla = importlib.import_module("torch_xla")
    theirs = importlib.import_module("torch_xla.core.xla_builder").call_jax
    a, b = (torch.randn(8, 8).to("xla") for _ in range(2))
    ways: dict[str, Callable[[], Any]] = {
        "torch_xla's call_jax": lambda: theirs(sin_add, (a, b)),
        "call_jax": lambda: call_jax(sin_add, (a, b)),
        "torch's own ops": lambda: torch.sin(a) + b,
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            call()
            start = time.thread_time()
            for _ in range(calls):
                call()
            taken[way].append((time.thread_time() - start) / calls)
        xla.sync()
    yield from rows("recording on XLA", {way: summary(found) for way, found in taken.items()}, "torch_xla's call_jax")


def _transferred() -> Iterator[Row]:
    """64 MiB from the host to XLA's device."""
    x = torch.randn(_LARGE)
    ways: dict[str, Callable[[], Any]] = {
        "memcpy": x.clone,
        '.to("xla")': lambda: x.to("xla"),
        "to_device": lambda: to_device(x, "xla"),
        "to_device, shared": lambda: to_device(x, "xla", share=True),
    }
    found: dict[str, Timing] = interleave(ways, seconds=2.0)
    yield from rows("64 MiB to XLA", found, "memcpy")
