"""What a kernel keeps from one call to the next: its arguments, and Python values that answer for the wrong call."""

from __future__ import annotations

import collections
import copy
import gc
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..op import Op
from .eager import Crashed, Refused, attempt, run
from .outcome import differ
from .samples import Call, copy_arguments, named_tensors, restore_state, tensors_of

_CONTAINERS = (dict, list, set, collections.deque)
_DEPTH = 3


def check_kept(op: Op[Any, Any], fn: Callable[..., Any], call: Call) -> str | None:
    """Which argument is still held by somebody after the call and its result are gone."""
    saved = call.save_state()

    def once() -> dict[str, StorageWeakRef]:
        args = call.fresh()
        held = {name: StorageWeakRef(tensor.untyped_storage()) for name, tensor in named_tensors(op, args)}
        attempt(lambda: op.call_with(fn, args))
        return held

    try:
        held = once()
    except (Refused, Crashed):
        return None  # reported by the other checks
    finally:
        restore_state(saved)
    for wait in (0.0, 0.1):  # frames in reference cycles, and arrays that another runtime lets go a little later
        if not any(not ref.expired() for ref in held.values()):
            return None
        gc.collect()
        time.sleep(wait)
    name = next((name for name, ref in held.items() if not ref.expired()), None)
    if name is None:
        return None
    return (
        f"keeps {name} after the call: the memory is never freed, and in a compiled graph it gets other values; "
        "keep a copy (.clone()), or nothing"
    )


class Memory:
    """The Python values that a function can keep: containers, numbers and tensors in its closure and in the globals it
    names. `self` holds them as they were when it was made."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.places = list(_places(fn, _DEPTH, set()))

    def forget(self) -> Callable[[], None]:
        """Put everything back to what it was; returns the function that undoes that. Modules, functions and flags, such
        as a library that was loaded meanwhile, are left alone."""
        undo: list[Callable[[], None]] = [place.reset() for place in self.places]

        def remember() -> None:
            for one in undo:
                one()

        return remember


class _Container:
    def __init__(self, holder: Any) -> None:
        self.holder, self.before = holder, copy.copy(holder)

    def reset(self) -> Callable[[], None]:
        after = copy.copy(self.holder)
        values = after.values() if isinstance(after, dict) else after
        if all(_plain(value) for value in values):
            self._fill(self.before)
        return lambda: self._fill(after)

    def _fill(self, values: Any) -> None:
        self.holder.clear()
        (self.holder.extend if hasattr(self.holder, "extend") else self.holder.update)(values)


class _Variable:
    """A name that the function rebinds: a cell of its closure, or a global."""

    def __init__(self, get: Callable[[], Any], set_: Callable[[Any], None]) -> None:
        self.get, self.set, self.before = get, set_, get()

    def reset(self) -> Callable[[], None]:
        after = self.get()
        if after is not self.before and _plain(after) and (self.before is None or _plain(self.before)):
            self.set(self.before)
        return lambda: self.set(after)


class _Cache:
    """functools.cache and lru_cache."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn

    def reset(self) -> Callable[[], None]:
        self.fn.cache_clear()
        return lambda: None


def _plain(value: Any) -> bool:
    """A tensor or a number that a call may have computed, or a list, tuple or dict of such."""
    if isinstance(value, (tuple, list)):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_plain(item) for item in value.values())
    return isinstance(value, (torch.Tensor, int, float, complex)) and not isinstance(value, bool)


def _places(fn: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    fn = getattr(fn, "__func__", fn)
    if id(fn) in seen or depth == 0:
        return
    seen.add(id(fn))
    if hasattr(fn, "cache_clear") and hasattr(fn, "__wrapped__"):
        if not isinstance(fn.__wrapped__, types.FunctionType) or not _returns_plain(fn):
            return
        yield _Cache(fn)
    inner = getattr(fn, "__wrapped__", fn)
    if not isinstance(inner, types.FunctionType) or inner.__module__.partition(".")[0] in ("torch", "jax"):
        return
    for cell in inner.__closure__ or ():
        try:
            yield from _of_value(cell.cell_contents, depth, seen)
        except ValueError:  # a name of the enclosing function that has no value yet
            continue
        yield _Variable(partial(getattr, cell, "cell_contents"), partial(setattr, cell, "cell_contents"))
    table = inner.__globals__
    for name in _names(inner.__code__):
        if name in table and not isinstance(table[name], types.ModuleType):
            yield from _of_value(table[name], depth, seen)
            yield _Variable(partial(table.__getitem__, name), partial(table.__setitem__, name))


def _of_value(value: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    if isinstance(value, _CONTAINERS):
        if id(value) not in seen:
            seen.add(id(value))
            yield _Container(value)
    elif isinstance(value, (types.FunctionType, types.MethodType)) or hasattr(value, "cache_clear"):
        yield from _places(value, depth - 1, seen)


def _returns_plain(fn: Any) -> bool:
    """Whether a cached function gives values, not libraries or compiled programs: by its annotation, else yes."""
    answer = getattr(fn.__wrapped__, "__annotations__", {}).get("return", torch.Tensor)
    return "Tensor" in str(answer) or answer in (int, float, "int", "float")


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


def check_caches(op: Op[Any, Any], fn: Callable[..., Any], memory: Memory, call: Call) -> str | None:
    """How a second call, in the same memory with other values, differs from that of a kernel without a past."""
    if torch.Tag.nondeterministic_seeded in op.spec.tags:
        return None
    places = [i for i, arg in enumerate(op.spec.args) if not arg.layer and not arg.mutated]
    args = call.fresh()
    tensors = [t for i in places for t in tensors_of(args[i]) if t.is_floating_point()]
    if not tensors:
        return None
    try:
        run(op, fn, call, args)
        with torch.no_grad():
            for tensor in tensors:
                tensor.mul_(0.5)
        again = copy_arguments(args)
        second = run(op, fn, call, args)
        remember = memory.forget()
        try:
            fresh = run(op, fn, call, again)
        finally:
            remember()
    except (Refused, Crashed):
        return None  # halved values may mean nothing to the op
    found = differ(fresh, second, 0.0)
    return (
        None
        if found is None
        else (
            f"a call is answered from what an earlier one kept, though the values are others: {found}; "
            "a cache may depend on sizes and options, not on the values of tensors"
        )
    )
