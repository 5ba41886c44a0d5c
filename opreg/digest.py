"""The contract digest in torch's compile caches (HAZARDS 2).

torch's disk cache knows an op by its name only: change `mutates_args`, a fake's dtype or a backward formula, and the
old graph is served to the new op. So the digest of all registered ops goes into torch.compiler.config.cache_key_tag,
behind what the user has put there. It is set when a fake runs: every graph that holds an op of ours runs one before its
cache key is computed, and a process that compiles nothing pays nothing.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from . import __version__, alias, fusion, registry

if TYPE_CHECKING:
    from .op import Op

log = logging.getLogger("opreg")

_MARK = "|opreg="
_DEPTH = 6
_VENDORS = ("torch", "jax", "numpy", "opreg.spec")
_known: tuple[int, str] = (-1, "")


def in_cache_key() -> None:
    """Make torch's cache key hold the registry's digest; the user's own tag stays in front. About 5 us."""
    global _known
    config = torch.compiler.config
    if _known[0] != registry.generation():
        _known = (registry.generation(), _MARK + of_registry())
    tag = config.cache_key_tag
    if not tag.endswith(_known[1]):
        config.cache_key_tag = tag.split(_MARK)[0] + _known[1]


def of_registry() -> str:
    """One digest of all ops that graphs may hold, whatever the order in which they were registered."""
    facts = [__version__, str(alias.enabled()), *(of_op(op) for op in registry.defined_ops())]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def of_op(op: Op[..., Any]) -> str:
    """What a compiled graph relies on: schema, contract, kind, tags, and the code of fake, formula and vmap rule."""
    from .fake import fake_source

    source = fake_source(op)
    fake = {"register_fake": op.explicit_fake, "body": op.body}.get(source)
    code = [source, *(of_code(fn) for fn in (fake, *op.formula, op.batching) if fn is not None)]
    if op.fusion is not None:
        code.append(fusion.facts(op))
    if op.sharding is not None:
        code += [op.sharding.facts, *([of_code(op.sharding.others)] if callable(op.sharding.others) else [])]
    return op.spec.digest("\n".join(code))


def of_code(fn: Callable[..., Any]) -> str:
    """Digest of a function, its constants and the functions that it names; the same in every process."""
    found = hashlib.sha256()
    for part in _parts(fn, _DEPTH, set()):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any, depth: int, seen: set[int]) -> Iterator[bytes]:
    """The bytes of a function: code, defaults, closure, and the functions and constants of its module that it names."""
    fn = _function(value)
    if fn is None:
        yield _constant(value)
        return
    if id(fn) in seen or depth == 0:
        return
    seen.add(id(fn))
    yield from _code(fn.__code__)
    for default in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()):
        yield _constant(default)
    cells = [cell.cell_contents for cell in fn.__closure__ or () if _filled(cell)]
    names = _global_names(fn.__code__)
    for inner in (*cells, *(fn.__globals__[name] for name in names if name in fn.__globals__)):
        named = _function(inner)
        if named is not None and not str(named.__module__).startswith(_VENDORS):
            yield from _parts(named, depth - 1, seen)
        else:
            yield _constant(inner)


def _function(value: Any) -> types.FunctionType | None:
    """The Python function that is called in the end: behind jax.jit, functools, a method or a kernel of from_jax."""
    while not isinstance(value, types.FunctionType) or "__wrapped__" in value.__dict__:
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, types.MethodType):
            value = value.__func__
        elif not isinstance(value, type) and "__wrapped__" in getattr(value, "__dict__", ()):
            value = value.__wrapped__
        else:
            return None
    return value


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name of the enclosing function that has no value yet
        return False


def _code(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:
            yield _constant(constant)


def _global_names(code: types.CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _global_names(constant)
    return sorted(set(names))


def _constant(value: Any) -> bytes:
    """What a plain value contributes; of anything else only its type, for its repr may hold an address."""
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)):
        return repr(value).encode()
    if isinstance(value, (tuple, list)):
        return b"(" + b",".join(_constant(item) for item in value) + b")"
    if isinstance(value, frozenset):
        return b"{" + b",".join(sorted(_constant(item) for item in value)) + b"}"
    return type(value).__name__.encode()


def changed_after_trace(op: Op[..., Any], what: str) -> None:
    """Drop compiled functions where a fake, formula or rule arrives after the op was traced without it."""
    registry.touch()
    if op.traced and "torch._dynamo" in sys.modules:
        log.info("%s: %s was registered after the op had been compiled; compiled functions are dropped", op.name, what)
        sys.modules["torch._dynamo"].reset()
        op.traced = False
