"""Serve the Qwen3-Next model of transformers with opreg's ops in the place of its attention cores, compiled.

The model is small and random, the prompts are real text, a byte a token. A continuous-batching scheduler runs them:
long prompts in chunks beside sequences that already decode, each joining when a slot and pages are free and leaving
when it is done. The whole step is one graph for any number of tokens, split at the attention ops.

Every generated token is compared with the untouched model's own generate().

    python examples/05_serve_qwen3_next.py             about a minute on two cores
    python examples/05_serve_qwen3_next.py --quick     the same, small
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from serving import untouched
from serving.engine import Engine, Run
from serving.kernels import KernelLog
from serving.model import Step, build_model, replace_cores
from serving.prompts import FULL, QUICK, make_requests
from serving.scheduler import Room
from serving.tables import table, timeline
from torch._dynamo.utils import counters
from transformers.utils import logging as transformers_logging

import opreg.backend
from opreg.graph_report import Report


@dataclass(frozen=True)
class Plan:
    """What is run: the model's layers, the requests, and less room than they would like, so that some must wait."""

    pattern: str
    lengths: tuple[tuple[int, int, int], ...]
    room: Room
    rounds: int


FULL_PLAN = Plan("GGGA" * 3, FULL, Room(slots=6, pages=40), rounds=3)
QUICK_PLAN = Plan("GAGA", QUICK, Room(slots=2, pages=9), rounds=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; 0 when every token equals the untouched model's, else 1."""
    parser = argparse.ArgumentParser(description="Serve a small Qwen3-Next with opreg's ops, and check every token.")
    parser.add_argument("--quick", action="store_true", help="4 layers, 3 short prompts, one round of timing")
    parser.add_argument("--threads", type=int, default=1, help="of both sides; more gain little on a model this small")
    args = parser.parse_args(argv)
    plan = QUICK_PLAN if args.quick else FULL_PLAN
    # One by default: on a busy machine two threads that wait for each other spin, and take ten times as long as one.
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()  # it would say that the untouched model has no GPU kernels here

    original, model = build_model(plan.pattern), build_model(plan.pattern)
    layers = replace_cores(model, plan.room)
    step = Step(model)
    eager = Engine(step, layers, plan.room)
    served = Engine(torch.compile(step, backend="opreg", fullgraph=True), layers, plan.room)
    show_model(model, plan)

    graphs = counters["stats"]["unique_graphs"]
    compiling = served.warm_up()
    with KernelLog() as log:
        run = served.serve(make_requests(plan.lengths))
    graphs = counters["stats"]["unique_graphs"] - graphs
    expected = untouched.one_by_one(original, run.requests)

    show_steps(run, plan)
    show_tokens(run, expected)
    print("\nWHICH KERNEL RAN   from opreg's log")
    print(table(("op", "kernel"), log.kernels(), left=2), *(f"  {line}" for line in log.refusals()), sep="\n")
    show_graph(run, graphs, compiling, opreg.backend.last_report())
    show_time(run, plan, original, served, eager)

    wrong = [r.name for r, tokens in zip(run.requests, expected, strict=True) if r.generated != tokens]
    if wrong:
        print(f"\nTokens of {', '.join(wrong)} differ from the untouched model's.", file=sys.stderr)
        return 1
    print(f"\nAll {run.generated} tokens of all {len(run.requests)} requests equal the untouched model's.")
    return 0


def show_model(model: torch.nn.Module, plan: Plan) -> None:
    parameters, room, threads = sum(p.numel() for p in model.parameters()) / 1e6, plan.room, torch.get_num_threads()
    print(f"transformers' Qwen3-Next: layers {plan.pattern} (G: Gated DeltaNet, A: full attention), experts in each,")
    print(f"{parameters:.1f} M random parameters in float32. {threads} thread{'s' * (threads != 1)}.")
    print(
        f"Memory: {room.slots} state slots, {room.pages} pages of {room.page_size} tokens. "
        f"At most {room.token_budget} tokens a step."
    )


def show_steps(run: Run, plan: Plan) -> None:
    mixed = sum(len(step) > 1 and min(step.values()) == 1 < max(step.values()) for step in run.steps)
    print("\nWHO RAN WHEN   one column a step   # part of the prompt   - one new token")
    print(timeline(run, 96))
    print(f"  {len(run.steps)} steps, {mixed} of them with prompts and decodes in one batch")
    print(f"  at most {run.peak_pages} of {plan.room.pages} pages in use")


def show_tokens(run: Run, expected: list[list[int]]) -> None:
    rows = []
    for request, tokens in zip(run.requests, expected, strict=True):
        same = sum(a == b for a, b in zip(request.generated, tokens, strict=True))
        text = bytes(request.prompt).decode().replace("\n", " ")
        text = text if len(text) <= 40 else text[:37] + "..."
        rows.append((request.name, text, len(request.prompt), len(tokens), same))
    print("\nTOKENS   greedy; equal: the same token as the untouched model's generate() at the same place")
    print(table(("", "prompt", "bytes", "new", "equal"), rows, left=2))


def show_graph(run: Run, graphs: int, compiling: float, report: Report) -> None:
    sizes = sorted({sum(step.values()) for step in run.steps})
    copies = Counter(p.index if p.same_as is None else p.same_as for p in report.pieces)
    borders = ["the tokens", *(p.ops[-1] for p in report.pieces if p.splitting), "the next tokens"]
    rows = []
    for index in report.distinct:
        before = sum(p.splitting for p in report.pieces[:index])
        ops, seconds = len(report.pieces[index].ops), report.seconds[index]
        rows.append((index, borders[before], borders[before + 1], ops, f"{seconds:.1f} s", f"{copies[index]}x"))
    print(f"\nGRAPH   {graphs} for every step, of {sizes[0]} to {sizes[-1]} tokens ({len(sizes)} different counts)")
    print(f"  {report.summary()}, in {compiling:.0f} s")
    print(table(("piece", "from", "to", "ops", "compiled in", "used"), rows, left=3))


def show_time(run: Run, plan: Plan, original: torch.nn.Module, served: Engine, eager: Engine) -> None:
    """Median of several rounds, the four ways in turn within each, so that a slow minute is slow for all."""
    ways = {
        "untouched generate(), one prompt after another": lambda r: untouched.one_by_one(original, r),
        "untouched generate(), all in one padded batch": lambda r: untouched.one_batch(original, r),
        "opreg, not compiled": eager.serve,
        "opreg, compiled": served.serve,
    }
    wall: dict[str, list[float]] = {way: [] for way in ways}
    busy: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(plan.rounds):
        for way, answer in ways.items():
            requests = make_requests(plan.lengths)
            before, used = time.perf_counter(), time.process_time()
            answer(requests)
            wall[way].append(time.perf_counter() - before)
            busy[way].append(time.process_time() - used)
    per_token = {way: statistics.median(busy[way]) / run.generated * 1e3 for way in ways}
    first = next(iter(per_token.values()))
    rows = [
        (way, f"{statistics.median(wall[way]) / run.generated * 1e3:.2f}", f"{ms:.2f}", f"{first / ms:.1f}x")
        for way, ms in per_token.items()
    ]
    print(f"\nTIME   ms per new token, for {run.generated} of them and their prompts; median of {plan.rounds}, in turn")
    print(table(("", "wall", "CPU", "by CPU"), rows))


if __name__ == "__main__":
    start = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - start:.0f} s in all")
    sys.exit(code)
