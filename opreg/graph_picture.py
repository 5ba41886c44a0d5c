"""A split graph as a person reads it: repeated layers folded into one, as text and as an SVG picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from opreg.graph_report import PieceReport, Report

# Twelve fills that stay apart for most colour-blind readers, all light enough for dark text.
_FILLS = "#cfe3f5 #fde2c1 #d3ecd0 #f6d0d3 #e2d9f0 #e9ddc9 #f9d9ec #dfe3e6 #eef0b9 #c9ecef #d9e8b8 #e8cfc4".split()
_WIDTH, _ROW, _LEFT = 980, 34, 96
_LINE = 16
_SILENT = ("getitem", "size", "_log_api_usage_once")
# Parts of the names of ops that take time and tell a reader where in the model a piece is.
_HEAVY = ("linear", "matmul", "mm", "conv", "embedding", "einsum", "attention")


@dataclass(frozen=True)
class Run:
    """Pieces that follow one another `times` times."""

    pieces: tuple[PieceReport, ...]
    times: int


def kind_of(piece: PieceReport) -> Any:
    """Equal for pieces that look the same to a reader: like compiled pieces, or splitting pieces of the same ops."""
    if piece.splitting:
        return piece.ops
    return piece.index if piece.same_as is None else piece.same_as


def fold(pieces: Sequence[PieceReport], longest: int = 24) -> list[Run]:
    """Find repetitions of up to `longest` pieces (a layer, or a few unlike layers), the most saving first."""
    kinds = [kind_of(p) for p in pieces]
    runs: list[Run] = []
    start = 0
    while start < len(pieces):
        best, saved = (1, 1), 0
        for period in range(1, min(longest, (len(pieces) - start) // 2) + 1):
            times = 1
            while kinds[start + times * period : start + (times + 1) * period] == kinds[start : start + period]:
                times += 1
            if (times - 1) * period > saved:
                best, saved = (period, times), (times - 1) * period
        period, times = best
        runs.append(Run(tuple(pieces[start : start + period]), times))
        start += period * times
    return _joined(runs)


def _joined(runs: list[Run]) -> list[Run]:
    """Neighbours that do not repeat become one run, for fewer brackets."""
    joined: list[Run] = []
    for run in runs:
        if run.times == 1 and joined and joined[-1].times == 1:
            joined[-1] = Run(joined[-1].pieces + run.pieces, 1)
        else:
            joined.append(run)
    return joined


def number_of(report: Report) -> dict[int, int]:
    """{index of a distinct piece: 1, 2, ...}: what the picture and the text call it."""
    return {index: i for i, index in enumerate(report.distinct, 1)}


def rows(report: Report) -> list[tuple[str, str, str, str]]:
    """(times, piece, ops, remark) per line, folded."""
    numbers = number_of(report)
    found: list[tuple[str, str, str, str]] = []
    for run in fold(report.pieces):
        for i, p in enumerate(run.pieces):
            times = f"{run.times} x" if run.times > 1 and i == 0 else "  |" if run.times > 1 else ""
            if p.splitting:
                found.append((times, f"{p.index}", "-- " + ", ".join(p.ops), "runs as it is"))
                continue
            same = kind_of(p)
            seconds = _seconds(report, same)
            remark = f"distinct {numbers[same]}" + (f", compiled in {seconds:.2f} s" if seconds is not None else "")
            made = shapes(p)
            found.append(
                (times, f"{p.index}", f"{len(p.ops)} ops: {gist(p.ops)}", remark + f", makes {made}" * bool(made))
            )
    return found


def _seconds(report: Report, piece: int) -> float | None:
    """How long a piece was compiled, if it was: with inner="eager" it runs as it is, and there is no time to show."""
    return None if report.inner == "eager" else report.seconds.get(piece)


def gist(ops: Sequence[str], room: int = 60) -> str:
    """What a piece is about: its products, look-ups and ops of packages, most frequent first; else all of its ops."""
    names = [op.rpartition("::")[2] for op in ops if "::" in op or any(word in op for word in _HEAVY)]
    counts = sorted(Counter(names).items(), key=lambda item: -item[1])
    if not counts:
        return short(ops, room)
    parts = [f"{name} x{count}" if count > 1 else name for name, count in counts]
    while len(" ".join(parts)) > room and len(parts) > 1:
        parts.pop()
    rest = len(ops) - sum(count for _, count in counts[: len(parts)])
    return " ".join(parts) + (f" and {rest} more" if rest else "")


def shapes(piece: PieceReport, room: int = 60) -> str:
    """The shapes a piece makes, each once, those that fit."""
    text = ""
    for shape in dict.fromkeys(s for s in piece.outputs if s):
        if len(text) + len(shape) > room:
            return f"{text} ..."
        text = f"{text} {shape}".strip()
    return text


def short(ops: Sequence[str], room: int = 60) -> str:
    """The first ops that fit, and how many more there are; an op that comes several times in a row is named once."""
    names: list[str] = []
    for name in (op.rpartition("::")[2] for op in ops if op not in _SILENT):
        if names and names[-1].split(" x")[0] == name:
            count = int(names[-1].partition(" x")[2] or 1) + 1
            names[-1] = f"{name} x{count}"
        else:
            names.append(name)
    text = ""
    for i, name in enumerate(names):
        if len(text) + len(name) > room:
            return f"{text} and {len(names) - i} more"
        text = f"{text} {name}".strip()
    return text


def svg(report: Report, title: str = "") -> str:
    """The picture: one bar per piece, top to bottom; like pieces have one colour, repeated layers one bracket."""
    numbers = number_of(report)
    parts: list[str] = []
    y = 66
    for run in fold(report.pieces):
        top = y
        for p in run.pieces:
            parts.append(_bar(p, report, numbers, y))
            y += _ROW if p.splitting else _ROW + _LINE
        if run.times > 1:
            parts.append(
                f'<path d="M{_LEFT - 12} {top} h-10 V{y - 8} h10" fill="none" stroke="#555"/>'
                f'<text x="{_LEFT - 30}" y="{(top + y) // 2}" text-anchor="end" font-weight="bold">{run.times} x</text>'
            )
        y += 6
    notes = [*(f"note: {n}" for n in report.notes), *(f"made an input: {n}" for n in report.lifted)]
    for note in notes:
        parts.append(f'<text x="{_LEFT}" y="{y + 8}" fill="#666">{escape(note[:150])}</text>')
        y += 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 16}" viewBox="0 0 {_WIDTH} {y + 16}" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<text x="20" y="28" font-size="17" font-weight="bold">{escape(title or "split graph")}</text>'
        f'<text x="20" y="48" fill="#444">{escape(report.summary())}</text>{"".join(parts)}</svg>\n'
    )


def _bar(p: PieceReport, report: Report, numbers: dict[int, int], y: int) -> str:
    lines = [f"piece {p.index}", *p.ops, "in: " + ", ".join(p.inputs), "out: " + ", ".join(p.outputs), p.why_distinct]
    tip = escape("\n".join(line for line in lines if line))
    width = _WIDTH - _LEFT - 20
    if p.splitting:
        return (
            f"<g><title>{tip}</title>"
            f'<rect x="{_LEFT}" y="{y}" width="{width}" height="{_ROW - 10}" rx="3" fill="#37424d"/>'
            f'<text x="{_LEFT + 10}" y="{y + 16}" fill="white">{p.index} · {escape(short(p.ops, 90))}</text></g>'
        )
    same = kind_of(p)
    number = numbers[same]
    fill = _FILLS[(number - 1) % len(_FILLS)]
    seconds = _seconds(report, same)
    right = f"distinct {number}" + (f" · {seconds:.2f} s" if seconds is not None else "")
    return (
        f'<g><title>{tip}</title><rect x="{_LEFT}" y="{y}" width="{width}" height="{_ROW + _LINE - 8}" rx="5" '
        f'fill="{fill}" stroke="#9aa4ad"/><text x="{_LEFT + 10}" y="{y + 17}">{p.index} · '
        f'{escape(gist(p.ops, 70))}</text><text x="{_LEFT + 10}" y="{y + 34}" fill="#444" font-size="11">'
        f"{len(p.ops)} ops, makes {escape(shapes(p, 100) or 'nothing')}</text>"
        f'<text x="{_WIDTH - 30}" y="{y + 17}" text-anchor="end" fill="#333">{right}</text></g>'
    )
