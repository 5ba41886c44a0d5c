"""JAX programs: a function with its argument structure and static values, the jitted form of it, and the bounded cache.

A program is found by the identity of the function (weakly held: nothing survives the function, and a reused id is
noticed), the pytree of the arguments, and the static values with their types, so that 1, 1.0 and True are three
programs. Shapes, dtypes and jax's own configuration are keys of jax.jit inside a program. Gradients and batched forms
are programs derived from a program, found by name from it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import logging
import secrets
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from .errors import KernelError, OpregError
from .jax_bridge_arrays import JaxArgumentError, runtime
from .recompiles import RecompileError

log = logging.getLogger("opreg.jax")

OPERAND = "<operand>"
"""Stands in a template and in a key for a leaf that is an array at run time."""


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


class Function:
    """A JAX function known to the bridge; holds it weakly unless `pin` was called."""

    def __init__(self, fn: Callable[..., Any], key: Any) -> None:
        self.key = key
        self.label = _label(fn)
        self.code = getattr(_innermost(fn), "__code__", None)
        self.programs: dict[Any, Program] = {}
        self.flat: dict[int, Program] = {}
        self.traces = 0
        self.pinned: Any = None
        self._method = isinstance(fn, types.MethodType)
        parts = (fn.__self__, fn.__func__) if isinstance(fn, types.MethodType) else (fn,)
        self._refs = tuple(self._reference(part) for part in parts)
        self.fn_ref = self._refs[0]

    def _reference(self, part: Any) -> Callable[[], Any]:
        try:
            found = weakref.ref(part)
        except TypeError:
            return lambda: part  # an object without weak references is held for good
        # finalize and not a callback of the reference: it keeps quiet while the interpreter shuts down.
        weakref.finalize(part, self._gone).atexit = False
        return found

    def _gone(self) -> None:
        with state.lock:
            if state.functions.get(self.key) is self:
                del state.functions[self.key]
            for program in list(self.programs.values()):
                program.forget()
            self.programs.clear()
            self.flat.clear()

    def get(self) -> Callable[..., Any] | None:
        """The function, or None if it is gone."""
        parts = [ref() for ref in self._refs]
        if any(part is None for part in parts):
            return None
        fn: Callable[..., Any] = types.MethodType(parts[1], parts[0]) if self._method else parts[0]
        return fn

    def is_for(self, fn: Callable[..., Any]) -> bool:
        if isinstance(fn, types.MethodType):
            return self._method and self._refs[0]() is fn.__self__ and self._refs[1]() is fn.__func__
        return self._refs[0]() is fn

    def pin(self) -> None:
        """Keep the function: its name is in a graph, which may run at any later time."""
        self.pinned = self.pinned or self.get()


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "__wrapped__"):
        fn = fn.__wrapped__
    return fn


def _label(fn: Any) -> str:
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    return str(name).replace("<locals>.", "")


def find_function(fn: Callable[..., Any]) -> Function:
    """The record of a function, made at first sight."""
    if not callable(fn):
        raise JaxArgumentError(f"call_jax: the first argument must be a JAX function; got {type(fn).__name__}: {fn!r}")
    key = (id(fn.__self__), id(fn.__func__)) if isinstance(fn, types.MethodType) else id(fn)
    known = state.functions.get(key)
    if known is not None and known.is_for(fn):
        return known
    record = Function(fn, key)
    with state.lock:
        state.functions[key] = record
    return record


class Program:
    """One function of arrays: called with as many arrays as there are operands, returns the user's pytree."""

    def __init__(self, name: str, function: Function, body: Callable[..., Any], parent: Program | None = None) -> None:
        self.name = name
        self.function = function
        self.body = body
        self.parent = parent
        self.derived: dict[Any, Program] = {}
        self.signatures: dict[Any, Any] = {}
        self.seen: list[tuple[str, ...]] = []
        self.jitted: Any = None
        self.latest_tree: Any = None
        self.embedded: dict[Any, Any] = {}
        self.calls = self.entries = self.stamp = self.calls_at_stamp = 0
        with state.lock:
            state.programs[name] = self

    def compiled(self) -> Any:
        """The jax.jit of this program, made anew after an eviction."""
        jitted = self.jitted
        if jitted is None:
            self.stamp = next(state.clock)
            jitted = self.jitted = runtime().jax.jit(self.counted)
        return jitted

    @functools.cached_property
    def counted(self) -> Callable[..., Any]:
        """The body, which counts its traces; named after the function for whoever reads a profile."""

        def program(*arrays: Any) -> Any:
            note_trace(self, arrays)
            return self.body(*arrays)

        program.__name__ = program.__qualname__ = self.function.label
        return program

    def leaves(self, *arrays: Any) -> list[Any]:
        """The results as a flat list (inside a trace)."""
        found: list[Any] = runtime().flatten(self.body(*arrays))[0]
        return found

    def derive(self, what: tuple[Any, ...], body: Callable[..., Any]) -> Program:
        """The program made from this one by a transformation, by the name of which it is found again."""
        known = self.derived.get(what)
        if known is None:
            with state.lock:
                known = self.derived.get(what) or Program(f"{self.name}/{_text(what)}", self.function, body, self)
                self.derived[what] = known
        return known

    def forget(self) -> None:
        """Leave the tables: the function is gone."""
        for program in list(self.derived.values()):
            program.forget()
        with state.lock:
            state.programs.pop(self.name, None)
            state.calls += self.calls
            self.drop()

    def drop(self) -> None:
        """Let go of everything that was compiled; a later call compiles again."""
        state.entries -= self.entries
        self.entries = 0
        self.jitted = None
        self.__dict__.pop("counted", None)  # jax.jit shares traces between jits of one function
        self.signatures.clear()
        self.embedded.clear()


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({','.join(map(_text, value))})"
    return str(value)


def find_program(function: Function, treedef: Any, leaves: list[Any]) -> tuple[Program, list[Any]]:
    """The program for arguments flattened to `leaves`, and those of them that are operands."""
    key: list[Any] = [treedef]
    operands = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            leaf = leaves[index] = leaf.node.pytype(leaf)  # static values are numbers; torch guards on it
        if isinstance(leaf, torch.Tensor):
            key.append(OPERAND)
            operands.append(leaf)
        elif type(leaf) is int or type(leaf) is str or type(leaf) is bool:
            key.append((type(leaf), leaf))
        else:
            part, operand = _leaf_key(leaf, function, treedef, index)
            key.append(part)
            if operand is not None:
                operands.append(operand)
    found = tuple(key)
    program = function.programs.get(found)
    if program is None:
        program = _new_program(function, found, leaves)
    return program, operands


def _leaf_key(leaf: Any, function: Function, treedef: Any, index: int) -> tuple[Any, Any]:
    run = runtime()
    if isinstance(leaf, run.jax.Array) and run.jax.dtypes.issubdtype(leaf.dtype, run.jax.dtypes.prng_key):
        return (OPERAND, str(run.jax.random.key_impl(leaf))), run.jax.random.key_data(leaf)
    if isinstance(leaf, (run.numpy.ndarray, run.numpy.generic, run.jax.Array)):
        return OPERAND, leaf
    key = static_key(leaf)
    if key is None:
        names = argument_names(treedef)
        kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
        raise JaxArgumentError(
            f"call_jax({function.label}): {names[index]} is a {kind}, neither an array nor a value that can be "
            "part of the cache key (None, bool, int, float, complex, str, bytes, enum, dtype, type, function, slice, "
            "frozen dataclass). Use it inside a function of your own instead of passing it, or register its class as a "
            "JAX pytree"
        )
    return key, None


def static_key(value: Any) -> Any:
    """A hashable key that tells 1 from 1.0 from True, 0.0 from -0.0, and finds nan again; None for what has none."""
    kind = type(value)
    if value is None or kind in (bool, int, str, bytes):
        return (kind, value)
    if kind in (float, complex):
        return (kind, repr(value))
    if isinstance(value, (enum.Enum, torch.dtype, type, types.FunctionType, types.BuiltinFunctionType)):
        return (kind, value)
    if kind in (tuple, list):
        parts = [static_key(item) for item in value]
        return None if any(part is None for part in parts) else (kind, *parts)
    if kind in (slice, range):
        return (kind, *(static_key(part) for part in (value.start, value.stop, value.step)))
    if kind.__module__ == "numpy.dtypes" or kind.__qualname__ == "dtype":
        return (kind, str(value))
    if dataclasses.is_dataclass(value) and kind.__hash__ is not None:
        parts = [static_key(getattr(value, field.name)) for field in dataclasses.fields(value)]
        return None if any(part is None for part in parts) else (kind, *parts)
    return None


def argument_names(treedef: Any) -> list[str]:
    """'args[0]', 'kwargs['scale']', … for each leaf of an (args, kwargs) tree."""
    jax = runtime().jax
    paths = jax.tree_util.tree_flatten_with_path(treedef.unflatten(range(treedef.num_leaves)))[0]
    return [
        ("args", "kwargs")[path[0].idx] + jax.tree_util.keystr(path[1:])
        for path, _ in sorted(paths, key=lambda p: p[1])
    ]


def _new_program(function: Function, key: tuple[Any, ...], leaves: list[Any]) -> Program:
    treedef, parts = key[0], key[1:]
    slots = [i for i, part in enumerate(parts) if part == OPERAND or (type(part) is tuple and part[0] == OPERAND)]
    kinds = {i: parts[i][1] for i in slots if parts[i] != OPERAND}
    template = [None if i in slots else leaf for i, leaf in enumerate(leaves)]

    def body(*arrays: Any) -> Any:
        fn = function.get()
        if fn is None:
            raise KernelError(f"call_jax({function.label}): the function no longer exists; keep a reference to it")
        filled = list(template)
        for slot, array in zip(slots, arrays, strict=False):  # a graph without operands passes one that stands for none
            kind = kinds.get(slot)
            filled[slot] = array if kind is None else runtime().jax.random.wrap_key_data(array, impl=kind)
        args, kwargs = treedef.unflatten(filled)
        return fn(*args, **kwargs)

    with state.lock:
        known = function.programs.get(key)
        if known is None:
            name = f"{function.label}#{state.process}.{next(state.serial)}"
            known = function.programs[key] = Program(name, function, body)
            known.seen.append(tuple(str(p) for p in parts))
            if all(part == OPERAND for part in parts) and treedef == runtime().flatten(((0,) * len(parts), {}))[1]:
                function.flat[len(parts)] = known
    return known


def by_name(name: str) -> Program:
    """The program that a graph names."""
    program = state.programs.get(name)
    if program is None:
        raise KernelError(
            f"opreg::jax_call: there is no JAX program '{name}' in this process. A graph that leaves the process must "
            "carry its programs: save it with torch.export.export(..., strict=False), which does"
        )
    return program


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
