"""What was split where: pieces, their operations and shapes, which are the same, and why others are not."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

from opreg.graph_key import ATTR, HOLE, METHOD, MODULE, Mark
from opreg.graph_ops import name_of


@dataclass(frozen=True)
class PieceReport:
    """One piece of a split graph."""

    index: int
    splitting: bool
    ops: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    digest: str
    same_as: int | None = None
    why_distinct: str = ""

    @property
    def compiled(self) -> bool:
        """Whether this piece is itself handed to the compiler: neither a splitting piece nor a repetition."""
        return not self.splitting and self.same_as is None


@dataclass
class Report:
    """All pieces of one split graph, in the order they run."""

    pieces: tuple[PieceReport, ...]
    split_at: tuple[str, ...]
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lifted: tuple[str, ...] = ()
    inner: str = ""
    variants: tuple[str, ...] = ()
    recorded: tuple[str, ...] = ()
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def distinct(self) -> tuple[int, ...]:
        """Indices of the pieces that are compiled; every other compiled-looking piece is one of these again."""
        return tuple(p.index for p in self.pieces if p.compiled)

    @property
    def splits(self) -> tuple[str, ...]:
        """The operations at which the graph was split, in order."""
        return tuple(op for p in self.pieces if p.splitting for op in p.ops if op in self.split_at)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "pieces": [
                {
                    "index": p.index,
                    "splitting": p.splitting,
                    "ops": list(p.ops),
                    "inputs": list(p.inputs),
                    "outputs": list(p.outputs),
                    "digest": p.digest,
                    "same_as": p.same_as,
                    "why_distinct": p.why_distinct,
                    "seconds": self.seconds.get(p.index),
                }
                for p in self.pieces
            ],
            "distinct": list(self.distinct),
            "splits": list(self.splits),
            "unmatched": list(self.unmatched),
            "notes": list(self.notes),
            "lifted": list(self.lifted),
            "inner": self.inner,
            "variants": list(self.variants),
            "recorded": list(self.recorded),
        }

    def summary(self) -> str:
        """One line: '65 pieces: 32 at opreg::attn, 33 compiled as 3 distinct'."""
        splitting = sum(p.splitting for p in self.pieces)
        where = ", ".join(sorted(set(self.splits))) or "nothing"
        return (
            f"{len(self.pieces)} pieces: {splitting} at {where}, {len(self.pieces) - splitting} compiled as "
            f"{len(self.distinct)} distinct"
        )

    def __str__(self) -> str:
        lines = [self.summary()]
        for p in self.pieces:
            what = "split " if p.splitting else "same  " if p.same_as is not None else "piece "
            ops = p.ops if len(p.ops) <= 6 else (*p.ops[:3], f"... {len(p.ops) - 5} more ...", *p.ops[-2:])
            tail = f"as piece {p.same_as}" if p.same_as is not None else p.why_distinct
            if p.index in self.seconds:
                tail = f"{tail}  {self.seconds[p.index]:.2f} s".strip()
            line = f"{p.index:4d} {what} {len(p.ops):3d} ops  {' '.join(ops)}"
            lines.append(f"{line}  ({tail})" if tail else line)
        lines += [f"also compiled for {v}" for v in self.variants]
        lines += [f"cudagraphs: {r}" for r in self.recorded]
        lines += [f"made an input: {n}" for n in self.lifted]
        lines += [f"note: {n}" for n in self.notes]
        lines += [f"note: nothing to split at '{n}' in this graph" for n in self.unmatched]
        return "\n".join(lines)


def why(mine: Any, other: Any, index: int) -> str:
    """Why the piece with key `mine` is not the same as piece `index` with key `other`."""
    (body, ends, holes), (body2, ends2, holes2) = mine, other
    tokens, metas, tokens2, metas2 = body.tokens, body.metas, body2.tokens, body2.metas
    prefix = f"differs from {index}"
    if len(tokens) != len(tokens2):
        return f"{prefix}: {_calls(tokens)} ops, not {_calls(tokens2)}"
    for a, b in zip(tokens, tokens2, strict=True):
        if a != b:
            if isinstance(a, Mark) or isinstance(b, Mark):
                return f"{prefix}: other arguments or another order"
            if callable(a) or callable(b):
                return f"{prefix}: {name_of(a)}, not {name_of(b)}"
            return f"{prefix}: constant {_shown(a)}, not {_shown(b)}"
    for a, b in zip(holes, holes2, strict=True):
        if a != b:
            return f"{prefix}: constant {_shown(a)}, not {_shown(b)}"
    if len(metas) != len(metas2):
        return f"{prefix}: {len(metas)} inputs, not {len(metas2)}"
    for i, (a, b) in enumerate(zip(metas, metas2, strict=True)):
        if a != b:
            return f"{prefix}: input {i} is {_meta(a)}, not {_meta(b)}"
    return f"{prefix}: {len(ends)} outputs, not {len(ends2)}" if len(ends) != len(ends2) else f"{prefix}: other outputs"


def distance(mine: Any, other: Any) -> int:
    """How unlike two keys are, roughly; used to choose which earlier piece to explain a piece by."""
    (body, *rest), (body2, *rest2) = mine, other
    if len(body.tokens) != len(body2.tokens):
        return 1000 + abs(len(body.tokens) - len(body2.tokens))
    parts = zip((body.tokens, body.metas, *rest), (body2.tokens, body2.metas, *rest2), strict=True)
    return sum(a != b for part, part2 in parts for a, b in zip(part, part2, strict=False))


def _calls(tokens: Any) -> int:
    return sum(t in (METHOD, MODULE, ATTR) or callable(t) for t in tokens)


def _shown(token: Any) -> str:
    if isinstance(token, tuple) and len(token) == 2 and isinstance(token[0], type):
        return repr(token[1]) if token[0] is str else str(token[1])
    return repr(token) if token is not HOLE else "?"


def _meta(meta: Any) -> str:
    if isinstance(meta, tuple) and len(meta) == 7:
        kind, dtype, device, shape, stride, _, grad = meta
        sizes = ", ".join(str(s) for s in shape)
        text = f"{str(dtype).removeprefix('torch.')}[{sizes}] strides {stride} on {device}"
        if isinstance(kind, tuple):
            text = f"{kind[0].__name__} {textwrap.shorten(str(kind[1]), 60)} of {text}"
        return f"{text} with gradient" if grad else text
    return str(meta)
