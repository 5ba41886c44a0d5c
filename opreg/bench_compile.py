"""`opreg bench --framework cold layers warm`: compiling and running a model of 32 like layers.

Beside whole-graph Inductor, and beside a split whose like pieces are found by the key of torch's own cache, as vLLM
does it (see bench_by_torch_key). "opreg eager" is Dynamo, splitting and keys alone.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from . import library
from .backend import opreg_backend
from .bench import Timing, summary
from .bench_by_torch_key import by_torch_key
from .bench_rows import Row, beside, rows

LAYERS = 32
TORCH_KEY = "split, key of torch's cache"


def attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, name: str) -> None:
    torch.mul(q, k, out=out)


NAMESPACE = "opreg_bench_model"
NAME = f"{NAMESPACE}::attn"
ON = [NAME]


def define_attention() -> None:
    """An opaque attention that names its layer, as a serving engine has it."""
    if not library.is_defined(NAME):
        schema = "(Tensor q, Tensor k, Tensor v, Tensor(a!) out, str name) -> ()"
        library.define_with_public_calls(NAME, schema, attn, lambda q, k, v, out, name: None)


WIDTH = 64


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.norm1, self.norm2 = Norm(), Norm()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).split(WIDTH, -1)
        out = torch.empty_like(x)
        torch.ops.opreg_bench_model.attn(q, k, v, out, self.name)
        x = x + self.o(out)
        y = self.norm2(x)
        made: torch.Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return made


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(f"layers.{i}") for i in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def compiled(way: str, model: nn.Module) -> Callable[..., torch.Tensor]:
    made: Callable[..., torch.Tensor]
    if way == "whole graph":
        made = torch.compile(model, fullgraph=True, dynamic=False)
    elif way == TORCH_KEY:
        made = torch.compile(model, backend=by_torch_key(NAME), fullgraph=True, dynamic=False)
    else:
        options: dict[str, Any] = {"split_on": ON, "inner": "eager" if way == "opreg eager" else "inductor"}
        made = torch.compile(model, backend="opreg", fullgraph=True, dynamic=False, options=options)
    return made


def cpu() -> float:
    own, kids = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + kids.ru_utime + kids.ru_stime


def cold(way: str) -> None:
    """One fresh process: CPU seconds of the first call, the compiler's children included."""
    import torch._dynamo
    import torch._inductor.compile_fx

    torch.set_num_threads(1)
    with torch.no_grad():
        warm = torch.compile(lambda x: x + 1)
        warm(torch.ones(3))
        torch._dynamo.reset()
        define_attention()
        model, x = Model(LAYERS), torch.randn(16, WIDTH)
        fn = compiled(way, model)
        start = cpu()
        fn(x)
        print(json.dumps(cpu() - start))


def fresh(way: str) -> float:
    """CPU seconds of the first call in a process of its own with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", __name__, way]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def cold_compiles(rounds: int = 2) -> Iterator[Row]:
    """The first call of a 32-layer model: CPU seconds, the compiler's children included, the least of the rounds."""
    ways = ["whole graph", TORCH_KEY, "opreg", "opreg eager"]
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in random.sample(ways, len(ways)):
            found[way].append(fresh(way))
    timings = {way: Timing(min(times), min(times), max(times)) for way, times in found.items()}
    section = f"cold compile: {LAYERS} layers, CPU time"
    yield from rows(section, timings, "whole graph")
    yield from beside(section, timings, TORCH_KEY)


def further_layers(rounds: int = 5, few: int = 8, many: int = 160) -> Iterator[Row]:
    """What one like layer more adds, Dynamo's tracing aside: CPU time in the backend for many layers less that for few.

    Every piece was compiled before, so that the difference is that of the layers; least of the rounds. By the key of
    torch's cache, where a layer takes a hundred times as long, a fifth as many layers are enough.
    """
    define_attention()
    backends: dict[str, Callable[..., Any]] = {
        "opreg": lambda gm, inputs: opreg_backend(gm, inputs, {"split_on": ON}),
        TORCH_KEY: by_torch_key(NAME),
    }
    most = {"opreg": many, TORCH_KEY: max(few + 1, many // 5)}
    found: dict[str, dict[int, float]] = {way: {} for way in backends}

    def timed(layers: int, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        for way, backend in backends.items():
            if layers not in (few, most[way]):
                continue
            backend(gm, example_inputs)
            for _ in range(rounds):
                start = time.thread_time()
                backend(gm, example_inputs)
                seconds = time.thread_time() - start
                found[way][layers] = min(seconds, found[way].get(layers, seconds))
        return gm.forward

    with torch.no_grad():
        for layers in sorted({few, *most.values()}):
            torch._dynamo.reset()
            compiled = torch.compile(Model(layers), backend=partial(timed, layers), fullgraph=True, dynamic=False)
            compiled(torch.randn(16, WIDTH))
    each = {way: (times[most[way]] - times[few]) / (most[way] - few) for way, times in found.items()}
    section = "one like layer more, Dynamo aside, CPU time"
    for way, seconds in each.items():
        yield Row(section, way, seconds, TORCH_KEY, seconds / each[TORCH_KEY])


def warm_forwards(rounds: int = 60) -> Iterator[Row]:
    """One forward of the compiled 32-layer model: all ways in one process, in random order every round."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    define_attention()
    model, x = Model(LAYERS), torch.randn(16, WIDTH)
    samples: dict[str, list[float]] = {}
    try:
        with torch.no_grad():
            fns: dict[str, Callable[..., torch.Tensor]] = {"eager": model}
            want = model(x)
            for way in ("whole graph", TORCH_KEY, "opreg"):
                copy = Model(LAYERS)
                copy.load_state_dict(model.state_dict())
                fns[way] = compiled(way, copy)
                torch.testing.assert_close(fns[way](x), want, rtol=1e-3, atol=1e-3)
            for fn in fns.values():
                for _ in range(20):
                    fn(x)
            for _ in range(rounds):
                for name in random.sample(list(fns), len(fns)):
                    start = time.thread_time()
                    for _ in range(5):
                        fns[name](x)
                    samples.setdefault(name, []).append((time.thread_time() - start) / 5)
    finally:
        torch.set_num_threads(threads)
    timings = {name: summary(found) for name, found in samples.items()}
    section = f"warm forward: {LAYERS} layers"
    yield from rows(section, timings, "whole graph")
    yield from beside(section, timings, TORCH_KEY)


if __name__ == "__main__":
    cold(sys.argv[1])
