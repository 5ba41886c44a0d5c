"""The bounded cache of the JAX bridge: what it holds, how often a function was traced and why, and the user's limits.

Programs (jax_bridge_programs) enter themselves here; this module knows them only by the fields it counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import secrets
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import OpregError
from .recompiles import RecompileError

if TYPE_CHECKING:
    from .jax_bridge_programs import Function, Program

log = logging.getLogger("opreg.jax")


class JaxTraceLimitError(OpregError, RuntimeError):
    """A JAX function was traced more often than jax_cache_limits allows."""


@dataclasses.dataclass(frozen=True)
class JaxCacheInfo:
    """Counters of the JAX bridge since the start of the process or the last jax_cache_clear().

    calls: executions. traces: how often a JAX function was traced and compiled; symbolic_traces: traced for output
    sizes only. entries: compiled specialisations held now, at most `limit`. evictions: specialisations dropped to stay
    under it. functions, programs: how many are known now. reasons: why the latest 100 traces happened.
    """

    calls: int
    traces: int
    symbolic_traces: int
    entries: int
    limit: int
    max_traces: int | None
    evictions: int
    functions: int
    programs: int
    reasons: tuple[str, ...]


class _State:
    """The tables and counters of the process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clock = itertools.count(1)
        self.serial = itertools.count()
        # Names travel in graphs, and torch caches compiled graphs on disk: a name of another process must never match.
        self.codes: weakref.WeakSet[types.CodeType] = weakref.WeakSet()
        self.process = secrets.token_hex(4)
        self.functions: dict[Any, Function] = {}
        self.programs: dict[str, Program] = {}
        self.limit = 512
        self.max_traces: int | None = None
        self.forbidden = 0
        self.entries = self.traces = self.symbolic = self.evictions = self.calls = 0
        self.reasons: deque[str] = deque(maxlen=100)


state = _State()
_abstract = threading.local()


def symbolically(fn: Callable[[], Any]) -> Any:
    """Run `fn`, whose traces count as symbolic."""
    _abstract.on = True
    try:
        return fn()
    finally:
        _abstract.on = False


def note_trace(program: Program, arrays: tuple[Any, ...]) -> None:
    """Count one trace of a program, say why, and keep the cache and the user's limit."""
    if getattr(_abstract, "on", False):
        state.symbolic += 1
        return
    function = program.function
    shapes = tuple(f"{array.dtype}[{','.join(map(str, array.shape))}]" for array in arrays)
    reason = f"{program.name}: {_reason(program, shapes)}"
    if state.forbidden:
        raise RecompileError(f"inside no_recompiles(): a JAX function would be traced and compiled: {reason}")
    with state.lock:
        program.seen.append(shapes)
        del program.seen[1:-8]
        function.traces += 1
        state.traces += 1
        state.reasons.append(reason)
        if function.code is not None:
            state.codes.add(function.code)
        program.entries += 1
        state.entries += 1
        if state.max_traces is not None and function.traces > state.max_traces:
            recent = "; ".join(r for r in list(state.reasons)[-3:] if r.startswith(function.label))
            raise JaxTraceLimitError(
                f"call_jax({function.label}): traced {function.traces} times, and jax_cache_limits(max_traces="
                f"{state.max_traces}) allows no more. Latest reasons: {recent}. Pass values that change as tensors, "
                "pad sizes to a few buckets, and define the function once, outside the loop"
            )
        _evict(program)
    log.debug("traced %s", reason)


def _reason(program: Program, shapes: tuple[str, ...]) -> str:
    earlier = program.seen[1:]
    if shapes in earlier:
        return f"traced again for {', '.join(shapes)}: evicted, cleared, or jax's configuration changed"
    if earlier:
        return f"new shapes or dtypes {', '.join(shapes)}; had {', '.join(earlier[-1])}"
    if program.parent is not None:
        return f"first use of this transformation of {program.parent.name}"
    siblings = [p for p in program.function.programs.values() if p is not program and p.seen]
    if siblings:
        return f"new structure or static values {program.seen[0]}; had {siblings[-1].seen[0]}"
    if program.function.code in state.codes:
        return "a new function object of the same code as a cached one; define it once, outside the loop"
    return "first call"


def _evict(current: Program) -> None:
    while state.entries > state.limit:
        others = [p for p in state.programs.values() if p.entries and p is not current]
        if not others:
            # `current` alone is over the limit; its trace goes on with the old jit, the next call starts a new one.
            state.evictions += current.entries - 1
            current.drop()
            current.entries, state.entries = 1, state.entries + 1
            return
        # A call only counts itself; when it matters, whoever was called since the last look is the younger one.
        for program in others:
            if program.calls != program.calls_at_stamp:
                program.stamp, program.calls_at_stamp = next(state.clock), program.calls
        oldest = min(others, key=lambda p: p.stamp)
        state.evictions += oldest.entries
        oldest.drop()


def jax_cache_info() -> JaxCacheInfo:
    """Counters of the cache of traced and compiled JAX functions, and why the latest traces happened."""
    with state.lock:
        return JaxCacheInfo(
            calls=state.calls + sum(p.calls for p in state.programs.values()),
            traces=state.traces,
            symbolic_traces=state.symbolic,
            entries=state.entries,
            limit=state.limit,
            max_traces=state.max_traces,
            evictions=state.evictions,
            functions=len(state.functions),
            programs=len(state.programs),
            reasons=tuple(state.reasons),
        )


def jax_cache_limits(*, entries: int | None = None, max_traces: int | None = None) -> None:
    """Set how many compiled specialisations are kept (None: as it is) and how often one function may be traced.

    entries: at least 1; the least recently used ones go first. max_traces: traces per function after which a further
    one raises JaxTraceLimitError; None for no limit.
    """
    if entries is not None and entries < 1:
        raise ValueError(f"jax_cache_limits: entries is {entries}; it must be at least 1")
    if max_traces is not None and max_traces < 0:
        raise ValueError(f"jax_cache_limits: max_traces is {max_traces}; it must be at least 0, or None for no limit")
    with state.lock:
        state.limit = entries if entries is not None else state.limit
        state.max_traces = max_traces


def jax_cache_clear() -> None:
    """Drop everything compiled and set the counters to zero; programs that graphs name compile again when called."""
    with state.lock:
        for program in state.programs.values():
            program.drop()
            program.calls = 0
        for function in state.functions.values():
            function.traces = 0
        state.entries = state.traces = state.symbolic = state.evictions = state.calls = 0
        state.reasons.clear()
