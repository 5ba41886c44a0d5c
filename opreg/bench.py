"""Fair timing: alternatives run once per round in random order in one process; medians, quartiles and ratios.

A busy host is slower by half for minutes at a time, so figures of two runs cannot be compared; ratios within one can.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one alternative: median, lower and upper quartile over the rounds."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def summary(samples: list[float]) -> Timing:
    """Median and quartiles of one alternative's samples."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[last // 4], ordered[(3 * last) // 4])


def interleave(
    alternatives: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 2.0,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], Any] | None = None,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time whole calls: every alternative once per round, in random order; at least `rounds` rounds and `seconds`.

    Every alternative is called once before, so that compilation and first-touch costs are not in the figures; `before`
    is called before each call that is timed.
    """
    for run in alternatives.values():
        run()
    order = list(alternatives)
    samples: dict[str, list[float]] = {name: [] for name in alternatives}
    shuffle = random.Random(seed)
    start = time.perf_counter()
    while len(samples[order[0]]) < rounds or time.perf_counter() - start < seconds:
        shuffle.shuffle(order)
        for name in order:
            if before is not None:
                before()
            begin = clock()
            alternatives[name]()
            samples[name].append(clock() - begin)
    return {name: summary(samples[name]) for name in alternatives}


def per_call(
    calls: Mapping[str, tuple[str, Mapping[str, Any]]], *, number: int = 2000, rounds: int = 60, seed: int = 0
) -> dict[str, Timing]:
    """Time calls that last nanoseconds: {name: (expression, its names)}, e.g. {"op": ("f(x)", {"f": f, "x": x})}.

    Each is a generated loop of `number` calls; the empty loop is measured in every round and subtracted. CPU time of
    this thread, so that other processes count less.
    """
    loops = {name: _loop(expression, names) for name, (expression, names) in calls.items()}
    empty = _loop("", {})
    samples: dict[str, list[float]] = {name: [] for name in loops}
    order, shuffle = list(loops), random.Random(seed)
    enabled = gc.isenabled()
    gc.disable()
    try:
        for loop in loops.values():
            loop(number)
        for _ in range(rounds):
            shuffle.shuffle(order)
            base = empty(number)
            for name in order:
                samples[name].append((loops[name](number) - base) / number / 1e9)
    finally:
        if enabled:
            gc.enable()
    return {name: summary(found) for name, found in samples.items()}


def _loop(expression: str, names: Mapping[str, Any]) -> Callable[[int], int]:
    arguments = ", ".join(f"{name}={name}" for name in names)
    source = (
        f"def loop(_n{', ' if arguments else ''}{arguments}):\n    _start = _clock()\n    for _ in range(_n):\n"
        f"        {expression or 'pass'}\n    return _clock() - _start\n"
    )
    namespace: dict[str, Any] = {**names, "_clock": time.thread_time_ns}
    exec(compile(source, "<opreg bench>", "exec"), namespace)
    loop: FunctionType = namespace["loop"]
    return loop
