"""What a check found: one line per check, as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

OK = "ok"
FAILED = "FAILED"
SKIPPED = "skipped"


@dataclass(frozen=True)
class Line:
    """One check of one op. state: "ok", "FAILED" or "skipped"; detail: what was seen; reproduce: a command."""

    check: str
    state: str
    detail: str = ""
    reproduce: str = ""

    def json(self) -> dict[str, str]:
        return {"check": self.check, "state": self.state, "detail": self.detail, "reproduce": self.reproduce}


@dataclass
class Report:
    """All lines about one op on one device. `ok` is False once a check failed; `str()` is what the CLI shows."""

    op: str
    device: str
    seed: int = 0
    inputs: int = 0
    lines: list[Line] = field(default_factory=list)
    by_input: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    """(check, number of the input) -> what was found with that input and the calls derived from it; empty: all well."""

    @property
    def ok(self) -> bool:
        return self.ran and not self.failed

    @property
    def ran(self) -> bool:
        """Whether anything could be run at all."""
        return any(line.state != SKIPPED for line in self.lines)

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines if line.state == FAILED]

    def add(self, check: str, state: str, detail: str = "", reproduce: str = "") -> None:
        self.lines.append(Line(check, state, detail, reproduce))

    def head(self) -> str:
        return f"{self.op}  {self.device}  {self.inputs} {'input' if self.inputs == 1 else 'inputs'}"

    def text(self, paint: Callable[[str, str], str] | None = None) -> list[str]:
        """Aligned lines; `paint(word, "good" | "bad" | "dim" | "head")` may colour the words that carry the verdict."""
        width = max([18, *(len(line.check) + 2 for line in self.lines)])
        colours = {OK: "good", FAILED: "bad", SKIPPED: "dim"}
        shown = [self.head() if paint is None else paint(self.head(), "head")]
        for line in self.lines:
            word = line.state if paint is None else paint(line.state, colours[line.state])
            padding = " " * (8 - len(line.state))
            detail = line.detail.replace("\n", "\n" + " " * (width + 10))
            shown.append(f"  {line.check:<{width}}{word}{padding}{detail}".rstrip())
            if line.reproduce:
                shown.append(f"  {'':<{width}}{'':<8}reproduce: {line.reproduce}")
        shown.append(summary([self]))
        return shown

    def __str__(self) -> str:
        return "\n".join(self.text())

    def json(self) -> dict[str, Any]:
        return {
            "name": self.op,
            "device": self.device,
            "seed": self.seed,
            "inputs": self.inputs,
            "ok": self.ok,
            "checks": [line.json() for line in self.lines],
        }


def summary(reports: list[Report]) -> str:
    """'1 failed, 4 passed, 1 skipped' over the lines of all reports."""
    counts = {FAILED: 0, OK: 0, SKIPPED: 0}
    for report in reports:
        for line in report.lines:
            counts[line.state] += 1
    words = {FAILED: "failed", OK: "passed", SKIPPED: "skipped"}
    return ", ".join(f"{count} {words[state]}" for state, count in counts.items() if count) or "nothing ran"
