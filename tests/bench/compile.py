"""Cold compile and warm forward of a 32-layer model: whole-graph Inductor, opreg, and a split whose pieces go to
Inductor through AOTAutograd with its cache (what a splitter without structural keys does).

python tests/bench/compile.py [layers [rounds]]     each cold cell is a fresh process with fresh caches; CPU seconds."""

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

LIB = torch.library.Library("opreg_bench", "DEF")
LIB.define("attn(Tensor q, Tensor k, Tensor v, Tensor(a!) out, str name) -> ()")


def attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, name: str) -> None:
    torch.mul(q, k, out=out)


LIB.impl("attn", attn, "CPU")
torch.library.register_fake("opreg_bench::attn", lambda q, k, v, out, name: None, lib=LIB)
ON = ["opreg_bench::attn"]
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
        torch.ops.opreg_bench.attn(q, k, v, out, self.name)
        x = x + self.o(out)
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(f"layers.{i}") for i in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def by_cache(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
    """Every piece to compile_fx; torch's own caches find the like ones."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx

    from opreg.graph import split_graph

    split = split_graph(gm, on=ON)
    runs: dict[int, Any] = {}
    for index, module in split.build_all().items():
        nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
        values = [n.meta["example_value"] for n in nodes]
        with tracing(TracingContext(values[0].fake_mode)):
            runs[index] = compile_fx(module, values)
    split.same = list(range(len(split.pieces)))
    for index, run in runs.items():
        split.use(index, run)
    return split.function()


def compiled(way: str, model: nn.Module) -> Callable[..., torch.Tensor]:
    made: Callable[..., torch.Tensor]
    if way == "whole":
        made = torch.compile(model, fullgraph=True, dynamic=False)
    elif way == "by cache":
        made = torch.compile(model, backend=by_cache, fullgraph=True, dynamic=False)
    else:
        options = {"split_on": ON, "inner": "eager" if way == "opreg eager" else "inductor"}
        made = torch.compile(model, backend="opreg", fullgraph=True, dynamic=False, options=options)
    return made


def cpu() -> float:
    own, kids = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + kids.ru_utime + kids.ru_stime


def cold(way: str, layers: int) -> None:
    """One fresh process: CPU seconds of the first call, the compiler's children included."""
    import torch._dynamo
    import torch._inductor.compile_fx

    torch.set_num_threads(1)
    with torch.no_grad():
        warm = torch.compile(lambda x: x + 1)
        warm(torch.ones(3))
        torch._dynamo.reset()
        model, x = Model(layers), torch.randn(16, WIDTH)
        fn = compiled(way, model)
        start, clock = cpu(), time.perf_counter()
        fn(x)
        print(json.dumps([cpu() - start, time.perf_counter() - clock]))


def fresh(way: str, layers: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, __file__, "--cold", way, str(layers)], env=env, capture_output=True, text=True, check=True
        )
    found: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def warm(layers: int, rounds: int) -> None:
    """All ways in one process, in random order every round; CPU time of this thread."""
    torch.set_num_threads(1)
    ways = ["whole", "by cache", "opreg"]
    model, x = Model(layers), torch.randn(16, WIDTH)
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        fns: dict[str, Callable[..., torch.Tensor]] = {"eager": model}
        want = model(x)
        for way in ways:
            copy = Model(layers)
            copy.load_state_dict(model.state_dict())
            fns[way] = compiled(way, copy)
            torch.testing.assert_close(fns[way](x), want, rtol=1e-3, atol=1e-3)
        for fn in fns.values():
            for _ in range(20):
                fn(x)
        for _ in range(rounds):
            for name in random.sample(list(fns), len(fns)):
                start = time.thread_time_ns()
                for _ in range(5):
                    fns[name](x)
                times.setdefault(name, []).append((time.thread_time_ns() - start) / 5000)
    base = statistics.median(times["whole"])
    print(f"warm forward, {layers} layers, us of CPU: median [p10] and ratio of medians to the whole graph")
    for name, found in times.items():
        found.sort()
        median = statistics.median(found)
        print(f"  {name:10s} {median:9.0f} [{found[len(found) // 10]:7.0f}]  {median / base:5.2f}")


def main() -> None:
    if sys.argv[1:2] == ["--cold"]:
        cold(sys.argv[2], int(sys.argv[3]))
        return
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    ways = ["whole", "by cache", "opreg", "opreg eager"]
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in random.sample(ways, len(ways)):
            found[way].append(fresh(way, layers)[0])
    base = statistics.median(found["whole"])
    print(f"cold compile, {layers} layers, CPU s (opreg eager is Dynamo, splitting and keys alone)")
    for way in ways:
        median = statistics.median(found[way])
        print(
            f"  {way:12s} {median:6.2f}  {median / base:5.2f} of the whole graph   {[round(t, 2) for t in found[way]]}"
        )
    warm(layers, 60)


if __name__ == "__main__":
    main()
