"""The serving loop: a plan becomes tensors and metadata, the step runs in the forward context, tokens are booked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import opreg

from .scheduler import Chunk, Request, Room, Scheduler


@dataclass(frozen=True)
class GdnMetadata:
    """What opreg::gdn_attention_core reads beside its layer: the batch as the GDN layers see it."""

    num_prefills: int
    num_decodes: int
    num_actual_tokens: int
    has_initial_state: Tensor
    non_spec_query_start_loc: Tensor
    non_spec_state_indices_tensor: Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """What opreg::paged_attention_core reads beside its layer: the batch as the layers of full attention see it."""

    kv_lens: Tensor
    page_indices: Tensor
    cu_q_lens: Tensor
    num_seqs: Tensor
    slot_mapping: Tensor
    num_actual_tokens: int


@dataclass
class Run:
    """What happened while a list of requests was served."""

    requests: list[Request]
    steps: list[dict[str, int]] = field(default_factory=list)  # per step: tokens of each request by name
    peak_pages: int = 0

    @property
    def generated(self) -> int:
        return sum(len(r.generated) for r in self.requests)


class Engine:
    """Serves requests with a step function; `layers` are the objects that the ops look up by name."""

    def __init__(
        self, step: Callable[[Tensor, Tensor, Tensor], Tensor], layers: Mapping[str, object], room: Room
    ) -> None:
        self.step, self.layers, self.room = step, layers, room

    def warm_up(self) -> float:
        """Compile the step on a batch of zeros and give the seconds; with metadata None no cache is touched."""
        start = time.perf_counter()
        tokens = torch.zeros(self.room.token_budget, dtype=torch.int64)
        self._step(tokens, tokens.clone(), torch.zeros(self.room.slots, dtype=torch.int64), None)
        return time.perf_counter() - start

    def serve(self, requests: list[Request]) -> Run:
        """Run every request to its end; all are queued at once, and join as slots, pages and tokens allow."""
        scheduler = Scheduler(self.room)
        for request in requests:
            scheduler.add(request)
        run = Run(requests)
        while chunks := scheduler.plan():
            run.steps.append({chunk.request.name: chunk.count for chunk in chunks})
            scheduler.commit(chunks, self._run(chunks))
        run.peak_pages = scheduler.peak_pages
        return run

    def _run(self, chunks: list[Chunk]) -> list[int]:
        tokens = [t for c in chunks for t in c.request.tokens[c.start : c.start + c.count]]
        positions = [p for c in chunks for p in range(c.start, c.start + c.count)]
        ends = torch.tensor([c.count for c in chunks]).cumsum(0)
        rows = [int(end) - 1 for c, end in zip(chunks, ends, strict=True) if c.samples]
        # torch.compile makes a graph of its own for a size of 1, so a lone token gets a padding row beside it. It
        # belongs to no sequence: the ops leave zeros there, and no row of it is sampled.
        padding = [0] * (len(tokens) == 1)
        # The sampled rows are padded to the number of slots, which keeps that size fixed.
        padded_rows = rows + [0] * (self.room.slots - len(rows))
        sampled = self._step(
            torch.tensor(tokens + padding),
            torch.tensor(positions + padding),
            torch.tensor(padded_rows),
            self._metadata(chunks, ends),
        )
        return sampled[: len(rows)].tolist()

    def _step(self, tokens: Tensor, positions: Tensor, rows: Tensor, metadata: dict[str, object] | None) -> Tensor:
        for tensor in (tokens, positions):
            # One graph for every token count. (dynamic=True would also turn each norm's eps into an input.)
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch.inference_mode(), opreg.forward_context(layers=self.layers, metadata=metadata):
            return self.step(tokens, positions, rows)

    def _metadata(self, chunks: list[Chunk], ends: Tensor) -> dict[str, object]:
        starts = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        decodes = sum(c.count == 1 and c.start > 0 for c in chunks)
        gdn = GdnMetadata(
            num_prefills=len(chunks) - decodes,
            num_decodes=decodes,
            num_actual_tokens=int(ends[-1]),
            # A slot still holds what its last owner left; False tells the op to start from zeros.
            has_initial_state=torch.tensor([c.start > 0 for c in chunks]),
            non_spec_query_start_loc=starts,
            non_spec_state_indices_tensor=torch.tensor([c.request.slot for c in chunks], dtype=torch.int32),
        )
        width = max(len(c.request.pages) for c in chunks)
        tables = [c.request.pages + [0] * (width - len(c.request.pages)) for c in chunks]
        slots = [
            c.request.pages[p // self.room.page_size] * self.room.page_size + p % self.room.page_size
            for c in chunks
            for p in range(c.start, c.start + c.count)
        ]
        attention = AttentionMetadata(
            kv_lens=torch.tensor([c.start + c.count for c in chunks], dtype=torch.int32),
            page_indices=torch.tensor(tables, dtype=torch.int32),
            cu_q_lens=starts,
            num_seqs=torch.tensor([len(chunks)], dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            num_actual_tokens=len(slots),
        )
        return {name: gdn if name.endswith("linear_attn") else attention for name in self.layers}
