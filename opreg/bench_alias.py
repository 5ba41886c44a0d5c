"""`opreg bench --framework alias`: CPU time to compile a graph of mutating calls with the alias guard and without.

The guard works while a graph is lowered; a compiled graph runs none of it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from torch import Tensor

from .bench import Timing, summary
from .bench_rows import Row, rows
from .errors import KernelError
from .op import register_op

CALLS = 32
_serial = itertools.count()


def alias_guard(rounds: int = 5) -> Iterator[Row]:
    """Compile times with and without the guard, interleaved."""

    @register_op(f"opreg_bench::into_{next(_serial)}", mutates_args=("out",))
    def into(out: Annotated[Tensor, "t d"], x: Annotated[Tensor, "t d"]) -> None:
        out.copy_(x)

    def run(x: Tensor) -> Tensor:
        for _ in range(CALLS):
            out = torch.empty_like(x)
            into(out, x)
            x = out
        return x

    taken: dict[str, list[float]] = {"with the guard": [], "without it": []}
    before = os.environ.get("OPREG_ALIAS_GUARD")
    try:
        _compile_once(run)  # imports
        for _ in range(rounds):
            for way, samples in taken.items():
                os.environ["OPREG_ALIAS_GUARD"] = "1" if way == "with the guard" else "0"
                samples.append(_compile_once(run))
    finally:
        if before is None:
            os.environ.pop("OPREG_ALIAS_GUARD", None)
        else:
            os.environ["OPREG_ALIAS_GUARD"] = before
    timings: dict[str, Timing] = {way: summary(samples) for way, samples in taken.items()}
    yield from rows(f"compiling {CALLS} mutating calls", timings, "without it")


def _compile_once(run: Callable[[Tensor], Tensor]) -> float:
    """CPU seconds of one compile from nothing."""
    import torch._functorch.config
    import torch._inductor.config

    torch._dynamo.reset()
    x = torch.ones(4, 4)
    started = time.process_time()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        result = torch.compile(run, fullgraph=True)(x)
    seconds = time.process_time() - started
    if not torch.equal(result, x):
        raise KernelError("the compiled graph of the benchmark is wrong")
    return seconds
