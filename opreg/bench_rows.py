"""Rows of `opreg bench --framework`: each a time beside its baseline's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .bench import Timing


@dataclass(frozen=True)
class Row:
    """One line: what was timed, how long it took, and how often the baseline's time that is."""

    section: str
    what: str
    seconds: float
    baseline: str
    ratio: float


def rows(section: str, timings: dict[str, Timing], baseline: str) -> Iterator[Row]:
    base = timings[baseline].median
    for what, timing in timings.items():
        yield Row(section, what, timing.median, baseline, timing.median / base)


def beside(section: str, timings: dict[str, Timing], baseline: str) -> Iterator[Row]:
    """opreg's own row once more, beside another baseline of the same run."""
    yield Row(section, "opreg", timings["opreg"].median, baseline, timings["opreg"].median / timings[baseline].median)
