"""How a mixed batch is put to the vendor's gdn_attention: which calls, with which index tensors.

The vendor checks sizes and dtypes but no values. It writes through slot -1 (memory before the cache), copies
uninitialised memory into the slot of an empty sequence, wants equally many tokens of all speculative rows, and runs
one-token sequences through its chunked kernel, padded to 64 tokens, as soon as one sequence is longer. So it is handed
what is left when all of that is sorted out: live sequences only; one-token, longer and speculative ones in calls of
their own; speculative ones grouped by their number of tokens. Each call sees rows that it writes in full.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference.gdn_args import Sequence


@dataclass(frozen=True, slots=True)
class Speculative:
    """The slots of a call of speculative rows, of which it is given the first as if one token had been accepted.

    source: where the window of each row is. to, row, token: slots that keep what holds after a token of a row.
    staged: the states go through a scratch cache of one slot per token, since some token has no slot, or slots have no
    convolution row for each draft.
    """

    source: Tensor
    to: Tensor
    row: Tensor
    token: Tensor
    staged: bool


@dataclass(frozen=True, slots=True)
class Group:
    """One call. rows: its rows, None where they are the range from `first`. arguments: the call's metadata, by name."""

    first: int
    tokens: int
    rows: Tensor | None
    arguments: dict[str, Any]
    speculative: Speculative | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """moves: states (from, to) that are copied before the calls; owned: rows that some sequence writes."""

    groups: tuple[Group, ...]
    moves: tuple[Tensor, Tensor] | None
    owned: int


_ABSENT = dict.fromkeys(
    "has_initial_state non_spec_query_start_loc non_spec_token_indx non_spec_state_indices_tensor spec_query_start_loc "
    "spec_token_indx spec_state_indices_tensor num_accepted_tokens".split()
)
_NONE = {"num_prefills": 0, "num_decodes": 0, "num_spec_decodes": 0, **_ABSENT}


def make_plan(todo: list[Sequence], spare_rows: int, device: torch.device) -> Plan:
    """Sort checked sequences into calls. spare_rows: convolution rows that a slot has beyond width - 1."""
    moves: list[tuple[int, int]] = []
    plain: dict[bool, list[Sequence]] = {False: [], True: []}
    speculative: dict[tuple[int, bool], list[Sequence]] = {}
    for q in todo:
        if q.final is not None:
            plain[len(q.rows) > 1].append(q)
            if q.source is not None and q.source != q.final:
                moves.append((q.source, q.final))
        else:
            staged = len(q.writes) < len(q.rows) or spare_rows < len(q.rows) - 1
            speculative.setdefault((len(q.rows), staged), []).append(q)
    groups = [_plain(many, long, device) for long, many in plain.items() if many]
    for (tokens, staged), many in sorted(speculative.items(), key=lambda item: item[0]):
        groups.append(_speculative(many, tokens, staged, moves, device))
    pairs = (_long([a for a, _ in moves], device), _long([b for _, b in moves], device)) if moves else None
    return Plan(tuple(groups), pairs, sum(len(q.rows) for q in todo))


def _plain(many: list[Sequence], long: bool, device: torch.device) -> Group:
    many = _in_row_order(many)
    starts = [0]
    for q in many:
        starts.append(starts[-1] + len(q.rows))
    known = [q.source is not None for q in many]
    arguments = {
        "num_prefills" if long else "num_decodes": len(many),
        "has_initial_state": None if all(known) else torch.tensor(known, device=device),
        "non_spec_query_start_loc": _int(starts, device),
        "non_spec_state_indices_tensor": _int([q.final for q in many], device),
    }
    return _group(many, arguments, device)


def _speculative(
    many: list[Sequence], tokens: int, staged: bool, moves: list[tuple[int, int]], device: torch.device
) -> Group:
    """Rows of equally many tokens. Their states are moved to the first column, which the call writes first of all.

    Where windows of the convolution are kept changed in the vendor's 0.1.14: after token t in column t before, all in
    one rolling buffer of width - 1 + drafts rows in column 0 since. With one accepted token both begin with the first
    rows of column 0, and what is left in the cache afterwards is written here, so the cache has the same form whatever
    is installed.
    """
    many = _in_row_order(many)
    kept = [(q.writes[t][-1], i, t) for i, q in enumerate(many) for t in sorted(q.writes)]
    # A slot that stands in several columns of a row keeps the last of them.
    kept = list({slot: (slot, i, t) for slot, i, t in kept}.values())
    columns = [[i * tokens + t if staged else q.writes[t][-1] for t in range(tokens)] for i, q in enumerate(many)]
    if not staged:
        moves += [(q.source, q.writes[0][-1]) for q in many if q.source not in (None, q.writes[0][-1])]
    count = len(many)
    arguments = {
        "num_spec_decodes": count,
        "spec_query_start_loc": _int(range(0, count * tokens + 1, tokens), device),
        "spec_token_indx": _int(range(count * tokens), device),
        "spec_state_indices_tensor": _int([slot for row in columns for slot in row], device).view(count, tokens),
        "num_accepted_tokens": _int([1] * count, device),
    }
    source = _long([q.source if staged else q.writes[0][-1] for q in many], device)
    to, row, token = (_long(list(part), device) for part in zip(*kept, strict=True))
    return _group(many, arguments, device, Speculative(source, to, row, token, staged))


def _group(
    many: list[Sequence], arguments: dict[str, Any], device: torch.device, speculative: Speculative | None = None
) -> Group:
    rows = [row for q in many for row in q.rows]
    together = rows == list(range(rows[0], rows[0] + len(rows)))
    arguments = {**_NONE, **arguments, "num_actual_tokens": len(rows)}
    return Group(rows[0], len(rows), None if together else _long(rows, device), arguments, speculative)


def _in_row_order(many: list[Sequence]) -> list[Sequence]:
    # The vendor needs no order, and neighbours in rows need no gathering.
    return sorted(many, key=lambda q: q.rows[0])


def _int(values: list[int | None] | list[int] | range, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _long(values: list[int | None] | list[int] | range, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


class _Entry:
    """A plan, what it was made from, and the layers that used it."""

    __slots__ = ("counts", "plan", "served", "tensors")

    def __init__(self, counts: tuple[Any, ...], tensors: tuple[Any, ...], plan: Plan) -> None:
        self.counts, self.tensors, self.plan = counts, tensors, plan
        self.served: set[int] = set()

    def is_of(self, counts: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> bool:
        if counts != self.counts:
            return False
        for (known, change), tensor in zip(self.tensors, tensors, strict=True):
            if tensor is None:
                if known is not None:
                    return False
            elif known is None or known() is not tensor or tensor._version != change:
                return False
        return True


class Plans(threading.local):
    """The plans of the last few batches, so that the layers of one step read its metadata from the device once.

    A plan serves the same tensor objects, unchanged since, and each layer once: a layer that comes again is another
    step, whose metadata may have been written by a kernel that torch knows nothing of. Tensors made in inference mode
    count no changes, so nothing is kept for them and every layer reads.
    """

    def __init__(self) -> None:
        self.entries: deque[_Entry] = deque(maxlen=4)

    def find(
        self, layer: int, counts: tuple[Any, ...], tensors: tuple[Tensor | None, ...], make: Callable[[], Plan]
    ) -> Plan:
        """The plan for these counts and index tensors. layer: tells layers apart (the address of its cache does)."""
        if any(tensor is not None and tensor.is_inference() for tensor in tensors):
            return make()
        entry = next((entry for entry in self.entries if entry.is_of(counts, tensors)), None)
        if entry is not None and layer in entry.served:
            self.entries.remove(entry)
            entry = None
        if entry is None:
            # Versions before values: a change in between makes the entry useless, not wrong.
            marks = tuple((None, 0) if t is None else (weakref.ref(t), t._version) for t in tensors)
            entry = _Entry(counts, marks, make())
            self.entries.append(entry)
        entry.served.add(layer)
        return entry.plan
