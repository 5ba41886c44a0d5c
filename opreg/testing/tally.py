"""Counts what each check saw, until the report is made."""

from __future__ import annotations

ORDER = (
    "inputs",
    "contract",
    "opcheck",
    "writes",
    "aliasing",
    "outputs",
    "state",
    "layouts",
    "fake",
    "symbolic",
    "repeat",
    "modes",
    "compile",
    "gradients",
    "vmap",
)
"""Checks in the order of the report; the kernels follow."""


class Tally:
    """Passes and findings per check; of several findings the report shows the first."""

    def __init__(self) -> None:
        self.passed: dict[str, int] = {}
        self.found: dict[str, list[tuple[str, str]]] = {}
        self.skipped: dict[str, str] = {}
        self.by_input: dict[tuple[str, int], list[str]] = {}  # (check, number of the input) -> what was found

    def record(self, check: str, where: str, problem: str | None) -> None:
        if problem is None:
            self.passed[check] = self.passed.get(check, 0) + 1
        else:
            self.found.setdefault(check, []).append((where, problem))
        if where.startswith("input "):
            found = self.by_input.setdefault((check, int(where.split()[1].rstrip(","))), [])
            if problem is not None:
                found.append(f"{where}: {problem}")
