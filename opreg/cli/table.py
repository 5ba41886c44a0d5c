"""Aligned plain text, and colour where a person looks at it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

_CODES = {"good": "32", "bad": "31", "dim": "2", "head": "1"}


def coloured() -> bool:
    """Whether stdout is a terminal and NO_COLOR (https://no-color.org) is unset or empty."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, how: str) -> str:
    """`text` in the colour of "good", "bad", "dim" or "head"; unchanged where stdout is no terminal."""
    return f"\x1b[{_CODES[how]}m{text}\x1b[0m" if text and coloured() else text


def columns(rows: Sequence[Sequence[str]], gap: int = 3) -> list[list[str]]:
    """Cells padded so that each column starts at one place; the last cell of a row is not padded, nor does it pad."""
    columns = max(map(len, rows), default=0)
    widths = [max((len(row[i]) for row in rows if i < len(row) - 1), default=0) for i in range(columns)]
    return [[cell if i == len(row) - 1 else cell.ljust(widths[i] + gap) for i, cell in enumerate(row)] for row in rows]


def lines(header: Sequence[str], rows: Iterable[Sequence[str]], states: dict[str, str] | None = None) -> list[str]:
    """A table's lines, header first. states: cell text -> colour, for the words that say how something is."""
    padded = columns([header, *rows])
    head = paint("".join(padded[0]).rstrip(), "head")
    how = states or {}
    body = [
        "".join(paint(cell, how[cell.rstrip()]) if cell.rstrip() in how else cell for cell in row).rstrip()
        for row in padded[1:]
    ]
    return [head, *body]
