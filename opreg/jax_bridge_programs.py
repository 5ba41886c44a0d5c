"""JAX programs: a function with its argument structure and static values, and the jitted form of it.

A program is found by the identity of the function (weakly held: nothing survives the function, and a reused id is
noticed), the pytree of the arguments, and the static values with their types (jax_bridge_keys). Shapes, dtypes and
jax's own configuration are keys of jax.jit inside a program. Gradients and batched forms are programs derived from a
program, found by name from it.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .errors import KernelError
from .jax_bridge_arrays import JaxArgumentError, from_foreign, runtime
from .jax_bridge_cache import note_trace, state
from .jax_bridge_keys import EXACT, OPERAND, leaf_key

TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
"""Types behind which nothing hides."""
_SYMBOLS = frozenset((torch.SymInt, torch.SymFloat, torch.SymBool))


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
        self.recipe: Any = None
        self.recipes: dict[Any, Any] = {}
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
        self.recipe = None
        self.recipes.clear()
        self.embedded.clear()


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({','.join(map(_text, value))})"
    return str(value)


def find_program(function: Function, treedef: Any, leaves: list[Any]) -> tuple[Program, list[torch.Tensor]]:
    """The program for arguments flattened to `leaves`, and those of them that are operands, as tensors."""
    key: list[Any] = [treedef]
    tensors = []
    for index, leaf in enumerate(leaves):
        kind = type(leaf)
        if kind in TENSORS or isinstance(leaf, torch.Tensor):
            key.append(OPERAND)
            tensors.append(leaf)
            continue
        if kind in _SYMBOLS:
            leaf = leaves[index] = leaf.node.pytype(leaf)  # static values are numbers; torch guards on it
            kind = type(leaf)
        if kind in EXACT or (kind is float and leaf and leaf == leaf):  # zeros have signs, and nan is not itself
            key.append((kind, leaf))
            continue
        part, operand = leaf_key(leaf, function.label, treedef, index)
        key.append(part)
        if operand is not None:
            tensors.append(from_foreign(operand, function.label))
    found = tuple(key)
    program = function.programs.get(found)
    if program is None:
        program = _new_program(function, found, leaves)
    return program, tensors


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
            "carry its programs: torch.export.export(..., strict=False) sees to it, and after strict=True "
            "program.run_decompositions(opreg.jax_decompositions()) does"
        )
    return program
