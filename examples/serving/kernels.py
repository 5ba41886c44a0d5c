"""Which kernel ran each op: opreg says so in its log, once per op and choice, with the reason of every refusal."""

from __future__ import annotations

import logging
from types import TracebackType

LOG = logging.getLogger("opreg")


class KernelLog(logging.Handler):
    """Collects what the logger "opreg" says inside the `with` block."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    @property
    def choices(self) -> list[tuple[str, str]]:
        """(op, kernel) for every choice that was made, in the order of the first call."""
        said = (line.split(" runs ") for line in self.lines if " runs " in line and line.startswith("opreg::"))
        return [(op.split(" on ")[0], kernel) for op, kernel in said]

    def __enter__(self) -> KernelLog:
        self._level = LOG.level
        LOG.addHandler(self)
        LOG.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        LOG.removeHandler(self)
        LOG.setLevel(self._level)
