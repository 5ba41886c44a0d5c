"""Plain aligned text: tables, and a picture of which request got what in which step."""

from __future__ import annotations

from collections.abc import Sequence

from .engine import Run


def table(head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Rows under a head; the first `left` columns are aligned to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join("  " + line.rstrip() for line in lines)


def timeline(run: Run, columns: int) -> str:
    """One line per request, one character per step: '#' a chunk of the prompt, '-' one new token, ' ' not running."""
    steps = run.steps[:columns]
    lines = []
    for request in run.requests:
        left = len(request.prompt)
        marks = ""
        for step in steps:
            count = step.get(request.name, 0)
            marks += " " if not count else "#" if left > 0 else "-"
            left -= count
        lines.append(f"  {request.name:4}{marks}".rstrip())
    if len(run.steps) > columns:
        lines.append(f"  ... and {len(run.steps) - columns} more steps")
    return "\n".join(lines)
