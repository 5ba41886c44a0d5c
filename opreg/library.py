"""The only file that calls torch.library: define an operator, give it implementations, a fake, a formula."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.library import Library

from . import _compat
from .later import become, later

# The process owns every Library: a collected one takes its kernels with it and later calls crash (pytorch #115990).
_LIBRARIES: dict[str, Library] = {}


def _library(namespace: str) -> Library:
    if namespace not in _LIBRARIES:
        _LIBRARIES[namespace] = Library(namespace, "FRAGMENT")
    return _LIBRARIES[namespace]


def split_name(qualname: str) -> tuple[str, str]:
    """'ns::op' or 'ns::op.overload' -> ('ns', 'op' or 'op.overload')."""
    namespace, _, name = qualname.partition("::")
    return namespace, name


def is_defined(qualname: str) -> bool:
    """Whether torch already has an operator of this name, whoever defined it."""
    namespace, name = split_name(qualname)
    name, _, overload = name.partition(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return packet is not None and (overload or "default") in packet.overloads()


class _Namespace(torch._ops._OpNamespace):
    """torch.ops.ns for a namespace with operators of opreg. torch makes the objects behind `torch.ops.ns.op` when the
    name is first looked up, 60 us; this lets the OpOverload be the one that `define` has returned before."""

    __module__ = torch._ops._OpNamespace.__module__  # torch builds the names of its objects from it

    def __getattr__(self, name: str) -> Any:
        qualname = f"{self.name}::{name}"
        recorded = RECORDED.get(qualname)
        if recorded is not None:
            recorded.define()
        packet: Any = super().__getattr__(name)
        awaiting = _AWAITING.pop(qualname, None)
        if awaiting is not None:
            become(awaiting, packet.default)
            packet.default = awaiting
        return packet


_AWAITING: dict[str, torch._ops.OpOverload] = {}
WATCHED: set[str] = set()
"""Namespaces that are of the class above."""
RECORDED: dict[str, Recorded] = {}
"""Ops that have only been recorded; a look at `torch.ops.ns.op` defines one."""
_DEFINED: set[str] = torch.library._defs
_IMPLEMENTED: set[str] = torch.library._impls


def define(qualname: str, schema: str, tags: Sequence[torch.Tag] = ()) -> torch._ops.OpOverload:
    """Define `qualname` with a schema string '(Tensor x) -> Tensor' and return its OpOverload.

    Library.define looks the name up first, and twice more than that; its checks of two tags are kept.
    """
    namespace, name = split_name(qualname)
    library: Any = _library(namespace)
    ops = getattr(torch.ops, namespace)
    packet, _, which = name.partition(".")
    met = packet in ops.__dict__
    if (which and met) or not _compat.checked_tags().isdisjoint(tags):
        library.define(f"{name}{schema}", tags=tuple(tags))
        return overload(qualname)
    library.m.define(f"{name}{schema}", "", tuple(tags))
    library._op_defs.add(qualname)
    _DEFINED.add(qualname)
    if which or met:
        return overload(qualname)
    watch(namespace)
    made = later(torch._ops.OpOverload, functools.partial(_looked_at, qualname))
    _AWAITING[qualname] = made
    return made


def watch(namespace: str) -> None:
    """See looks at `torch.ops.ns.op` of operators that torch has made no objects for."""
    if namespace not in WATCHED:
        ops = getattr(torch.ops, namespace)
        if type(ops) is torch._ops._OpNamespace:
            ops.__class__ = _Namespace
        WATCHED.add(namespace)


def _looked_at(qualname: str, _: Any) -> torch._ops.OpOverload:
    return overload(qualname)


class Recorded(Protocol):
    """An op that is not registered yet."""

    def define(self) -> None: ...


def overload(qualname: str) -> torch._ops.OpOverload:
    """The OpOverload of 'ns::op' (its default overload) or 'ns::op.overload'."""
    namespace, name = split_name(qualname)
    name, _, which = name.partition(".")
    packet = getattr(getattr(torch.ops, namespace), name)
    found: torch._ops.OpOverload = getattr(packet, which or "default")
    return found


def implement(qualname: str, fn: Callable[..., Any], key: str = "CompositeExplicitAutograd") -> None:
    """Make `fn` what the dispatcher calls for `qualname` under `key`: Library.impl without its look-ups, 8 us less."""
    namespace, name = split_name(qualname)
    library: Any = _library(namespace)
    library.m.impl(name, key, fn, False)
    entry = f"{namespace}/{name}/{key}"
    library._op_impls.add(entry)
    _IMPLEMENTED.add(entry)


def fake(qualname: str, fn: Callable[..., Any], source: str = "") -> None:
    """Make `fn`, written for what is at `source`, the fake (meta) implementation of `qualname`.

    torch.library.register_fake does this after looking through the caller's frames for its module and file: 80 of its
    110 us.
    """
    implement(qualname, enter_fake(qualname, fn, source), "Meta")


def enter_fake(qualname: str, fn: Callable[..., Any], source: str = "") -> Callable[..., Any]:
    """`fake` for an operator that is implemented under CompositeExplicitAutograd, which covers meta tensors: returns
    what computes it on them."""
    return _compat.enter_fake(qualname, fn, source or fn.__module__)


def is_implemented(qualname: str, key: str) -> bool:
    """Whether `implement` or torch.library has registered something under `key`."""
    namespace, name = split_name(qualname)
    return f"{namespace}/{name}/{key}" in _IMPLEMENTED


def implementations() -> set[str]:
    """The keys "ns/op/DispatchKey" of all implementations registered through torch.library, in torch's own set."""
    return _IMPLEMENTED


def define_with_public_calls(qualname: str, schema: str, fn: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """The same operator with torch.library's own calls, as serving engines make it: a baseline for benchmarks."""
    namespace, name = split_name(qualname)
    library = _library(namespace)
    library.define(f"{name}{schema}")
    library.impl(name, fn, "CPU")
    library._register_fake(name, fake)


def autograd(
    qualname: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any] | None,
    jvp: Callable[..., Any] | None = None,
) -> None:
    """Register the backward formula, with torch.library's meaning of both arguments, for torch.func as well.

    jvp: the formula for tangents, as in transforms.differentiable.
    """

    from . import transforms  # few ops have a formula

    class Wrapped:
        """The library, in which torch registers its kernel wrapped for transforms."""

        def impl(self, name: str, kernel: Callable[..., Any], key: str, with_keyset: bool) -> None:
            op = overload(f"{namespace}::{name}")
            made = transforms.differentiable(op, kernel, backward, setup_context, jvp)
            _library(namespace).impl(name, made, key, with_keyset=with_keyset)

    namespace, _ = split_name(qualname)
    library: Any = Wrapped()
    torch.library.register_autograd(qualname, backward, setup_context=setup_context, lib=library)
    _compat.forget_dispatch(overload(qualname))


def has_keyword_tensors(op: torch._ops.OpOverload) -> bool:
    """Whether a keyword-only argument is a tensor: torch takes no formula for such an op."""
    return bool(torch._library.utils.has_kwarg_only_tensors(op._schema))


def vmap(qualname: str, fn: Callable[..., Any]) -> None:
    """Register the batching rule, with torch.library's meaning of `fn`."""
    namespace, _ = split_name(qualname)
    torch.library.register_vmap(qualname, fn, lib=_library(namespace))
    _compat.forget_dispatch(overload(qualname))


def infer_schema(signature: inspect.Signature, mutates_args: Sequence[str]) -> str:
    """The schema string of a signature that has been stripped to types torch knows."""

    def prototype() -> None: ...

    prototype.__signature__ = signature  # type: ignore[attr-defined]
    try:
        return torch.library.infer_schema(prototype, mutates_args=tuple(mutates_args))
    except AttributeError as error:  # torch 2.8 and 2.9 look for __origin__ on types that have none
        raise TypeError(str(error)) from None


def custom_op(
    qualname: str, fn: Callable[..., Any], mutates_args: Sequence[str], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """The same function as a torch.library.custom_op with a fake: what `opreg bench --framework` compares with."""
    made: Any = torch.library.custom_op(qualname, fn, mutates_args=tuple(mutates_args))
    made.register_fake(fake)
    run: Callable[..., Any] = made
    return run


def opcheck(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], tests: Sequence[str] | None = None
) -> dict[str, str]:
    """torch.library.opcheck, returning {test: 'SUCCESS' or the failure}. tests: some of its tests; None: all."""
    which = {} if tests is None else {"test_utils": tuple(tests)}
    with _compat.around_opcheck():
        results = torch.library.opcheck(op, args, kwargs, raise_exception=False, **which)
    return {name: result if isinstance(result, str) else str(result) for name, result in results.items()}
