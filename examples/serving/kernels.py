"""Which kernel ran each op: opreg says so in its log, once per op and choice, with the reason of every refusal."""

from __future__ import annotations

import logging
from types import TracebackType

from opreg.ops import (
    gdn_attention,
    gdn_attention_core,
    kv_cache_update,
    paged_attention_core,
    ragged_paged_attention,
)

REFERENCE = "reference"
LOG = logging.getLogger("opreg")
OPS = (gdn_attention_core, gdn_attention, paged_attention_core, kv_cache_update, ragged_paged_attention)


class KernelLog(logging.Handler):
    """Collects what the logger "opreg" says inside the `with` block."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def kernels(self) -> list[tuple[str, str]]:
        """(op, kernel) for each shipped op of the model. What was chosen before the log was read, explain() tells."""
        rows = []
        for op in OPS:
            said = f"{op.name} on cpu runs "
            ran = [line.removeprefix(said) for line in self.lines if line.startswith(said)]
            selected = op.explain().selected
            names = ran or [selected.name if selected else "none"]
            # The body of a layer op only looks up its layer and calls the next op of this table.
            rows.append((op.name, ", ".join("reference (its body)" if name == REFERENCE else name for name in names)))
        return rows

    def refusals(self) -> list[str]:
        """Why a kernel did not take some call, if any did not."""
        return [line for line in self.lines if " refused: " in line]

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
