"""options={"cudagraphs": ...}: compiled pieces are recorded once per size and replayed; splitting pieces run as ever.

A forward at a captured size, or at a smaller one that is padded to it, runs three times in three ways: the first warms
the pieces up, the second records and replays them, all others replay. A replay reads and writes fixed memory:

* weights, buffers and what torch._dynamo.mark_static_address names are read where they are; at every replay their
  addresses are compared, and where one has moved the piece is recorded again;
* what an earlier recorded piece made is read where that piece writes it, without a copy;
* everything else is copied to memory of the piece's own.

What the model returns is copied out of that memory. Not run on a GPU yet (see opreg.cudagraph_device)."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from opreg import registry
from opreg.cudagraph_device import Device
from opreg.errors import OpregError
from opreg.graph import SplitGraph
from opreg.graph_lift import Lifted, overload_of
from opreg.graph_ops import name_of, storages, value_of
from opreg.graph_pieces import Piece
from opreg.graph_rows import why_not_row_wise

log = logging.getLogger("opreg")
Run = Callable[..., Any]
# Calls whose result or course depends on values: the host would have to wait for the device.
_WAITING = frozenset("item tolist nonzero cpu numpy unique masked_select __bool__ __int__ __float__".split())


class CaptureError(OpregError, RuntimeError):
    """A piece that cannot be recorded although nothing in it said so."""


class UnknownSize(Exception):
    """A size that depends on more than the symbols of a point, such as the result of nonzero()."""


@dataclass
class Point:
    """Sizes to record for, {symbol: size}, and what the pieces recorded for them share.

    last: the highest index recorded so far. made: what each recorded piece's outputs are. buffers: copied inputs."""

    sizes: Mapping[Any, int]
    text: str
    last: int = -1
    made: dict[Any, torch.Tensor] = field(default_factory=dict)
    buffers: dict[Any, torch.Tensor] = field(default_factory=dict)

    def number(self, size: Any) -> int:
        """A size or stride at this point. Raises UnknownSize where it has symbols that the point does not fix."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        value = size.node.expr.xreplace({s: sympy.Integer(n) for s, n in self.sizes.items()})
        if not value.is_number:
            raise UnknownSize(str(value))
        return int(value)

    def numbers(self, sizes: Iterable[Any]) -> tuple[int, ...]:
        """All sizes or strides of a tensor."""
        return tuple([self.number(size) for size in sizes])


@dataclass
class Slot:
    """One input of a recorded piece: the tensor it reads, and that tensor's address."""

    tensor: torch.Tensor
    address: int
    weight: bool
    written: bool


class CapturedPiece:
    """One piece at one point. Like pieces are compiled once and recorded once each: their weights differ."""

    def __init__(self, owner: Captures, piece: Piece, point: Point, run: Run, general: Run, padded: bool) -> None:
        self.owner = owner
        self.piece = piece
        self.point = point
        self.run = run
        self.general = general
        self.padded = padded
        self.warm = False
        self.replay: Callable[[], None] | None = None
        self.slots: dict[int, Slot] = {}
        self.outputs: Sequence[torch.Tensor] = ()
        values = {i: value_of(n) for i, n in enumerate(piece.inputs) if not isinstance(n, Lifted)}
        self.numbers = {i: point.number(v) for i, v in values.items() if isinstance(v, torch.SymInt | int)}
        self.shapes = {i: point.numbers(v.shape) for i, v in values.items() if isinstance(v, torch.Tensor)}
        self.dynamic = [i for i in self.shapes if any(isinstance(s, torch.SymInt) for s in _shape(values[i]))]
        self.written = owner.written_inputs(piece)
        # Where a call's own sizes are read: {symbol: (input, its dim, or None for a number)}.
        where: dict[Any, tuple[int, int | None]] = {}
        for i in self.dynamic:
            for j, size in enumerate(_shape(values[i])):
                if isinstance(size, torch.SymInt):
                    where.setdefault(size.node.expr, (i, j))
        where.update({v.node.expr: (i, None) for i, v in values.items() if isinstance(v, torch.SymInt)})
        # Per output the dims that are cut to the size of the call.
        self.cuts: list[list[tuple[int, int, int | None]]] = []
        for node in piece.exports:
            sizes = [(dim, s.node.expr) for dim, s in enumerate(_shape(value_of(node))) if isinstance(s, torch.SymInt)]
            self.cuts.append([(dim, *where[expr]) for dim, expr in sizes] if padded else [])

    def __call__(self, *args: Any) -> Sequence[torch.Tensor]:
        exact = all(args[i].shape == self.shapes[i] for i in self.dynamic) and all(
            args[i] == number for i, number in self.numbers.items()
        )
        if not exact and not self.padded:
            made: Sequence[torch.Tensor] = self.general(*args)
            return made
        if not self.warm:
            outputs = self._warm_up(args)
        else:
            moved = [i for i, slot in self.slots.items() if slot.weight and args[i].data_ptr() != slot.address]
            replay = self._capture(args, moved) if self.replay is None or moved else self.replay
            copied = self._fill(args)
            replay()
            self._write_back(copied)
            outputs = self.outputs
        if exact:
            return outputs
        return [self._cut(t, cuts, args) for t, cuts in zip(outputs, self.cuts, strict=True)]

    def _cut(self, tensor: torch.Tensor, cuts: list[tuple[int, int, int | None]], args: Sequence[Any]) -> torch.Tensor:
        for dim, i, j in cuts:
            tensor = tensor.narrow(dim, 0, args[i] if j is None else args[i].shape[j])
        return tensor

    def _warm_up(self, args: Sequence[Any]) -> Sequence[torch.Tensor]:
        """Run as a replay would; recording executes nothing, so that every call writes what it writes once."""
        # In memory for this call only: what earlier pieces make is not yet where it will be.
        buffers: dict[Any, torch.Tensor] = {}
        self.slots = {i: self._slot(i, args[i], buffers) for i in self.shapes}
        copied = self._fill(args)
        made = self.owner.device.warm_up(self.run, self._given(args))
        self._write_back(copied)
        self.warm = True
        return made

    def _slot(self, i: int, given: torch.Tensor, buffers: dict[Any, torch.Tensor]) -> Slot:
        node, point = self.piece.inputs[i], self.point
        if self.owner.is_weight(node):
            return Slot(given, given.data_ptr(), True, i in self.written)
        tensor = point.made.get(node)
        if tensor is None or tensor.data_ptr() != given.data_ptr():
            value = value_of(node)
            stride = point.numbers(value.stride())
            # Pieces run one after the other, so that inputs alike share one buffer as long as one piece has not two.
            key = (i, self.shapes[i], stride, value.dtype, given.device)
            if key not in buffers:
                buffers[key] = self.owner.device.zeros(given, self.shapes[i], stride)
            tensor = buffers[key]
        return Slot(tensor, tensor.data_ptr(), False, i in self.written)

    def _given(self, args: Sequence[Any]) -> list[Any]:
        return [self.slots[i].tensor if i in self.slots else self.numbers.get(i, a) for i, a in enumerate(args)]

    def _fill(self, args: Sequence[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copy in what does not lie where the piece reads it; (where it came from, the copy) of what is written."""
        back: list[tuple[torch.Tensor, torch.Tensor]] = []
        for i, slot in self.slots.items():
            given = args[i]
            if given.data_ptr() == slot.address:
                continue
            target = slot.tensor
            if given.shape != target.shape:
                for dim, size in enumerate(given.shape):
                    target = target.narrow(dim, 0, size)
            target.copy_(given)
            if slot.written:
                back.append((given, target))
        return back

    @staticmethod
    def _write_back(copied: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for given, target in copied:
            given.copy_(target)

    def _capture(self, args: Sequence[Any], moved: list[int]) -> Callable[[], None]:
        point, device = self.point, self.owner.device
        if moved:
            names = ", ".join(self.piece.inputs[i].name for i in moved)
            log.warning("piece %d is recorded again for %s: %s moved", self.piece.index, point.text, names)
        self.slots = {i: self._slot(i, args[i], point.buffers) for i in self.shapes}
        # Memory that a capture needs only while it runs goes back to the pool, and the next capture's outputs may lie
        # there. That is right while replays come in the order of captures; a late capture needs a pool of its own.
        pool = self.owner.pool if self.piece.index > point.last else device.new_pool()
        point.last = max(point.last, self.piece.index)
        try:
            self.replay, self.outputs = device.capture(self.run, self._given(args), pool)
        except RuntimeError as error:
            ops = ", ".join(dict.fromkeys(name_of(step.target) for step in self.piece.steps))
            raise CaptureError(
                f'torch.compile(backend="opreg"): option "cudagraphs": piece {self.piece.index} ({ops}) cannot be '
                f"recorded: {error}. Register the op that waits for the device, or allocates outside of torch, with "
                "tags=(torch.Tag.cudagraph_unsafe,); pieces that hold it are then left out."
            ) from error
        point.made.update(zip(self.piece.exports, self.outputs, strict=True))
        self.owner.hold(self.outputs)
        return self.replay


class Captures:
    """All recorded pieces of one split graph."""

    def __init__(self, split: SplitGraph, device: Device, device_type: str) -> None:
        self.split = split
        self.device = device
        self.device_type = device_type
        self.pool = device.new_pool()
        self.lines: list[str] = []
        self._held: set[int] = set()
        # Replays use fixed memory: one forward at a time.
        self._lock = threading.Lock()
        self._layer_ops = {op.overload for op in registry.all_ops() if op.spec.layer_arg is not None}
        self._whys = {p.index: self._why_not(p) for p in split.pieces if not p.split}
        reasons = Counter(why for why in self._whys.values() if why)
        self.lines += [f"{count} not recorded: {why}" for why, count in reasons.items()]

    def is_weight(self, node: Any) -> bool:
        """Whether an input stays where it is: a parameter, a buffer, or what mark_static_address named."""
        if node.op != "placeholder":
            return bool(node.op == "get_attr")
        facts = node.meta.get("tensor_dict") or {}
        return isinstance(value_of(node), torch.nn.Parameter) or bool(facts.get("_dynamo_static_input_type"))

    def written_inputs(self, piece: Piece) -> set[int]:
        """Positions of the inputs whose memory a piece writes."""
        written: set[int] = set()
        for node, targets in self.split.plan.mutations:
            if self.split.plan.piece_of.get(node) == piece.index:
                for target in targets:
                    written |= storages(value_of(target))
        return {i for i, node in enumerate(piece.inputs) if storages(value_of(node)) & written}

    def _why_not(self, piece: Piece) -> str | None:
        for step in piece.steps:
            why = self._why_not_call(step)
            if why:
                return why
        owned: set[int] = set()
        for node in piece.inputs:
            value = value_of(node)
            if isinstance(node, Lifted) or isinstance(value, int | torch.SymInt):
                continue  # the same at every replay: recorded as a constant
            if not isinstance(value, torch.Tensor) or value.device.type != self.device_type:
                where = f"on {value.device}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
                return f"its input {node.name} is {where}"
            if not self.is_weight(node):
                owned |= storages(value)
        for node in piece.exports:
            value = value_of(node)
            if not isinstance(value, torch.Tensor) or value.device.type != self.device_type:
                return f"its output {node.name} is no tensor on {self.device_type}"
            if storages(value) & owned:
                return f"its output {node.name} shares memory with an input"
        return None

    def _why_not_call(self, step: Any) -> str | None:
        overload = overload_of(step.target)
        name = name_of(step.target)
        if isinstance(overload, OpOverload) and torch.Tag.cudagraph_unsafe in overload.tags:
            return f"{name} is tagged cudagraph_unsafe"
        if overload in self._layer_ops:
            return f"{name} reads the forward context at every call"
        return f"{name} waits for the device" if name.rpartition("::")[2].partition(".")[0] in _WAITING else None

    def hold(self, outputs: Iterable[torch.Tensor]) -> None:
        """Note memory that later replays write."""
        self._held |= {t.untyped_storage().data_ptr() for t in outputs}

    def function(self, sizes: Mapping[Any, int], text: str, runs: Mapping[int, Run], pad: bool) -> Run:
        """The forward for one point; `runs` are compiled for exactly these sizes, where there are such."""
        point = Point(sizes, text or "its sizes")
        general = self.split.runs()
        every: dict[int, Run] = dict(general)
        recorded, padded, refused = 0, 0, Counter[str]()
        for piece in self.split.pieces:
            if piece.split or self._whys[piece.index]:
                continue
            why = self._why_not_pad(piece, sizes) if pad else "there is nothing to pad"
            if why and pad:
                refused[why] += 1
            run = runs.get(self.split.same[piece.index], general[piece.index])
            try:
                every[piece.index] = CapturedPiece(self, piece, point, run, general[piece.index], why is None)
            except UnknownSize as size:
                self.lines.append(f"piece {piece.index} not recorded: nothing fixes its size {size}")
                continue
            recorded, padded = recorded + 1, padded + (why is None)
        how = f", {padded} padded from smaller sizes" if pad else ""
        self.lines.append(f"{point.text}: {recorded} of {len(general)} pieces recorded{how}")
        self.lines += [f"{count} not padded: {why}" for why, count in refused.items()]
        run_all = self.split.function_of(every)

        def forward(*args: Any) -> Any:
            with self._lock:
                return tree_map(self._copied_out, run_all(*args))

        return forward

    def _why_not_pad(self, piece: Piece, sizes: Mapping[Any, int]) -> str | None:
        for symbol in sizes:
            why = why_not_row_wise(piece.steps, piece.inputs, symbol)
            if why:
                return why
        return None

    def _copied_out(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self._held:
            return value.clone()
        return value


def _shape(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(value.shape)
