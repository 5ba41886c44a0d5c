"""What the alias guard costs: CPU time to compile a graph of mutating calls with it and without, and copies it adds.

    python tests/bench/alias.py [--calls 32] [--rounds 5]

The guard works while a graph is lowered; a compiled graph runs none of it. Prints medians of CPU time, their ratio, and
the copies in the generated code, which are equal where nothing is shared.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from opreg import register_op


@register_op("bench_alias::into", mutates_args=("out",))
def into(out: Annotated[Tensor, "t d"], x: Annotated[Tensor, "t d"]) -> None:
    out.copy_(x)


def graph(calls: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for _ in range(calls):
            out = torch.empty_like(x)
            into(out, x)
            x = out
        return x

    return run


def compile_once(calls: int, guard: bool) -> tuple[float, int]:
    """(CPU seconds, copies in the generated code) of one compile from nothing."""
    os.environ["OPREG_ALIAS_GUARD"] = "1" if guard else "0"
    torch._dynamo.reset()
    x = torch.ones(4, 4)
    started = time.process_time()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        result, codes = run_and_get_code(torch.compile(graph(calls), fullgraph=True), x)
    seconds = time.process_time() - started
    if not torch.equal(result, x):
        raise SystemExit("the compiled graph is wrong")
    return seconds, "\n".join(codes).count("= empty_strided")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    compile_once(args.calls, True)  # imports
    found: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    for _ in range(args.rounds):
        for guard in (True, False):
            found[guard].append(compile_once(args.calls, guard))
    seconds = {guard: statistics.median(s for s, _ in runs) for guard, runs in found.items()}
    for guard in (True, False):
        print(f"guard {'on ' if guard else 'off'}  {seconds[guard]:.2f} s  {found[guard][0][1]} allocations")
    print(f"on / off  {seconds[True] / seconds[False]:.3f}")


if __name__ == "__main__":
    main()
