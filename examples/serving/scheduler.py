"""Continuous batching in plain Python: which sequence gets how many tokens in the next step, and where its memory is.

It knows no torch and no model. Every running sequence owns one state slot (a GDN layer keeps one fixed-size state per
sequence) and as many pages as its tokens fill (an attention layer keeps one row per token). Both are returned when the
sequence leaves and handed, dirty, to the next one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Room:
    """How much fits: sequences at a time, pages in the cache, tokens in a page and in a step."""

    slots: int
    pages: int
    page_size: int = 16
    token_budget: int = 64

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)


@dataclass
class Request:
    """One prompt and what became of it."""

    name: str
    prompt: list[int]
    max_new_tokens: int
    generated: list[int] = field(default_factory=list)
    cached: int = 0  # tokens already in the caches
    slot: int = -1
    pages: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated

    @property
    def finished(self) -> bool:
        return len(self.generated) == self.max_new_tokens

    @property
    def longest(self) -> int:
        # The last token is produced but never fed back, so it needs no room.
        return len(self.prompt) + self.max_new_tokens - 1


@dataclass(frozen=True)
class Chunk:
    """The share of one request in one step: tokens[start : start + count]."""

    request: Request
    start: int
    count: int

    @property
    def samples(self) -> bool:
        return self.start + self.count == len(self.request.tokens)


class Scheduler:
    """First come, first served; running sequences decode first, prompts share what is left of the token budget."""

    def __init__(self, room: Room) -> None:
        if room.token_budget < room.slots:
            raise ValueError(f"token_budget {room.token_budget} < {room.slots} slots: some decodes would never run")
        self.room = room
        self.free_slots = list(range(room.slots))
        self.free_pages = list(range(room.pages))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.peak_pages = 0

    def add(self, request: Request) -> None:
        """Queue a request; one that could never run is refused here, not after an hour of waiting."""
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError(f"request {request.name!r} needs a prompt and at least one new token")
        if (needed := self.room.pages_for(request.longest)) > self.room.pages:
            raise ValueError(f"request {request.name!r} needs {needed} pages, the cache has {self.room.pages}")
        self.waiting.append(request)

    def plan(self) -> list[Chunk]:
        """Admit what fits, then share out the token budget; an empty list means that all requests are finished."""
        self._admit()
        budget = self.room.token_budget
        chunks = []
        # A decode (one token left to feed) goes first: it must never wait behind a long prompt.
        for request in sorted(self.running, key=lambda r: len(r.tokens) - r.cached > 1):
            count = min(len(request.tokens) - request.cached, budget)
            if count:
                budget -= count
                self._grow(request, request.cached + count)
                chunks.append(Chunk(request, request.cached, count))
        self.peak_pages = max(self.peak_pages, self.room.pages - len(self.free_pages))
        return chunks

    def commit(self, chunks: list[Chunk], sampled: list[int]) -> None:
        """Book the result of a step: one token for every chunk that samples, in the order of the chunks."""
        for chunk in chunks:
            chunk.request.cached += chunk.count
        for chunk, token in zip([c for c in chunks if c.samples], sampled, strict=True):
            chunk.request.generated.append(token)
            if chunk.request.finished:
                self._release(chunk.request)

    def _admit(self) -> None:
        while self.waiting and self.free_slots:
            # Pages are taken as a sequence grows, but promised here: a sequence that starts can always end.
            promised = sum(self.room.pages_for(r.longest) - len(r.pages) for r in self.running)
            if self.room.pages_for(self.waiting[0].longest) > len(self.free_pages) - promised:
                return
            request = self.waiting.popleft()
            request.slot = self.free_slots.pop(0)
            self.running.append(request)

    def _grow(self, request: Request, tokens: int) -> None:
        while len(request.pages) < self.room.pages_for(tokens):
            request.pages.append(self.free_pages.pop(0))

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.free_slots.append(request.slot)
        self.free_pages.extend(request.pages)
        request.slot, request.pages = -1, []
