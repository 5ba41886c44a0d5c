"""What opreg costs a process: its import beside torch's, and the time and memory of a thousand ops.

Each figure is taken in a process of its own, since nothing is imported or registered twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from .bench import summary
from .bench_rows import Row, rows

COUNT = 1000

_PROBE = """
import gc, inspect, json, sys, time
start = time.process_time()
import torch
middle = time.process_time()
from opreg import register_op
end = time.process_time()
from opreg import library, registry

way, count = sys.argv[1], int(sys.argv[2])

def fn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    return torch.empty_like(x)

def make(names):
    for name in names:
        if way == "define+impl":
            schema = library.infer_schema(inspect.signature(fn), ())
            library.define_with_public_calls(name, schema, fn, fn)
        else:
            register_op(name)(fn)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

registry._DEFERRED.set(way == "opreg, deferred")
make([f"opreg_bench::first_{i}" for i in range(50)])
gc.collect()
before = resident()
names = [f"opreg_bench::op_{i}" for i in range(count)]  # literals in programs, so that making them is not timed
begin = time.process_time()
make(names)
spent = time.process_time() - begin
gc.collect()
print(json.dumps([middle - start, end - middle, spent, (resident() - before) / count / 1024]))
"""


def processes(rounds: int = 3) -> Iterator[Row]:
    """CPU time of imports, and of registering many ops, with the memory that each op keeps (Linux only)."""
    ways = ("opreg", "opreg, deferred", "define+impl")
    taken: dict[str, list[list[float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        _probe("opreg", 1, folder)  # compiles the modules, as an installation does
        for _ in range(rounds):
            for way in ways:
                taken[way].append(_probe(way, COUNT, folder))
    every = [sample for samples in taken.values() for sample in samples]
    imports = {
        "opreg, after torch": summary([sample[1] for sample in every]),
        "torch": summary([sample[0] for sample in every]),
    }
    yield from rows("import", imports, "torch")
    labels = {
        way: f"{way}: {summary([sample[3] for sample in samples]).median:.1f} KiB each"
        for way, samples in taken.items()
    }
    timings = {labels[way]: summary([sample[2] for sample in samples]) for way, samples in taken.items()}
    yield from rows(f"{COUNT} ops with their fakes", timings, labels["define+impl"])


def _probe(way: str, count: int, folder: str) -> list[float]:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
    line = [sys.executable, "-c", _PROBE, way, str(count)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment, cwd=folder)
    found: list[float] = json.loads(done.stdout)
    return found
