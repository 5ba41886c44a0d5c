"""JAX functions as torch operators. call_jax is here; register_jax_op and from_jax are in jax_bridge_ops."""

from __future__ import annotations

import functools
import operator
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad as _forward_ad
from torch.autograd import profiler as _profiler

from ._compat import constant_under_dynamo, forget_guards, identity_under_dynamo, trace_instead
from .jax_bridge_arrays import JaxArgumentError, check_tensor, runtime
from .jax_bridge_cache import (
    JaxCacheInfo,
    JaxTraceLimitError,
    jax_cache_clear,
    jax_cache_info,
    jax_cache_limits,
    state,
)
from .jax_bridge_cpu import run_quick
from .jax_bridge_executors import execute
from .jax_bridge_export import call_carried, jax_decompositions
from .jax_bridge_keys import argument_names
from .jax_bridge_op import OP
from .jax_bridge_ops import from_jax, register_jax_op
from .jax_bridge_programs import TENSORS, by_name, find_function, find_program
from .jax_bridge_shapes import infer
from .jax_bridge_xla import record_plain

__all__ = [
    "JaxArgumentError",
    "JaxCacheInfo",
    "JaxTraceLimitError",
    "call_jax",
    "from_jax",
    "jax_cache_clear",
    "jax_cache_info",
    "jax_cache_limits",
    "jax_decompositions",
    "register_jax_op",
]

_Tensor = torch.Tensor
_functions = state.functions
_grad_enabled = torch.is_grad_enabled


def call_jax(fn: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
    """Call a JAX function on torch tensors, as one torch operator: eager, compiled, exported, differentiable.

    fn: a function of JAX arrays, traced by jax.jit once per structure, static values, shapes and dtypes. Define it
        once: a new function object (a lambda in a loop) is traced anew, and forgotten when it dies.
        What it reads from globals and closures it reads when it is traced, as under jax.jit.
    args, kwargs: any pytrees. Tensors (all on one device), numpy arrays, JAX arrays and JAX random keys are operands.
        Every other leaf (None, bool, int, float, str, enum, dtype, frozen dataclass, …) is static: part of the cache
        key, type included.

    Returns the function's pytree with tensors for arrays, contiguous, none sharing memory with an argument. Gradients
    flow to tensors that require them. A 64-bit tensor among the arguments turns JAX's x64 mode on inside the
    function, so that nothing is truncated; JAX's own defaults are then 64 bits wide too.

    Raises JaxArgumentError (an argument that cannot cross), KernelError (jax missing, no executor), JaxTraceLimitError
    (see jax_cache_limits); errors of the function itself pass through.

        opreg.call_jax(jax.nn.softmax, (torch.randn(4, 8),), {"axis": -1})
    """
    if type(args) is tuple and not kwargs:
        record = _functions.get(id(fn))
        if record is not None and record.fn_ref() is fn:
            program = record.flat.get(len(args))
            if program is not None and _eager():
                if program.recipe is not None:
                    out = run_quick(program, args)
                    if out is not None:
                        return out if type(out) is _Tensor else out[1].unflatten(out[0])
                if program.embedded:
                    recorded = record_plain(program, args, TENSORS)
                    if recorded is not None:
                        return recorded[1].unflatten(recorded[0])
    return _call(fn, args, kwargs)


def _eager() -> bool:
    """Whether nothing looks on that would want to see the operator: modes, transforms, a profiler, forward-mode AD."""
    return not (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or _profiler._is_profiler_enabled
        or _forward_ad._current_level >= 0
    )


def _call(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    _check_arguments(fn, args)
    fn, args, kwargs = _unwrap_partial(fn, args, kwargs)
    run = runtime()
    leaves, treedef = run.flatten((tuple(args), dict(kwargs)))
    function = find_function(fn)
    program, tensors = find_program(function, treedef, leaves)
    if program.recipe is not None and _eager():
        out = run_quick(program, tensors)
        if out is not None:
            return out if type(out) is _Tensor else out[1].unflatten(out[0])
    needs_grad, plain = False, True
    for tensor in tensors:
        plain = plain and type(tensor) in TENSORS
        needs_grad = needs_grad or tensor.requires_grad
        if tensor.device != tensors[0].device or tensor.layout is not torch.strided or tensor.is_nested:
            raise _bad_tensors(function.label, treedef, leaves)
        if tensor.dtype not in run.to_numpy_dtype:
            raise _bad_tensors(function.label, treedef, leaves)
    if plain and _eager() and not (tensors and tensors[0].is_meta) and not (needs_grad and _grad_enabled()):
        results, tree = execute(program, tensors)
        return tree.unflatten(results)
    if not _eager():
        function.pin()  # a graph that is being made names the program and may run at any time
    tensors = tensors or [torch.empty(0)]  # an operator without a tensor has no device
    if torch.compiler.is_exporting():
        return call_carried(program, tensors)
    tree = infer(program, tensors)[0].tree
    return tree.unflatten(OP(tensors, program.name))


def _check_arguments(fn: Any, args: Any) -> None:
    """JaxArgumentError for one tensor in place of the sequence of arguments: its rows would be taken for arguments."""
    if not isinstance(args, (tuple, list)):
        name = getattr(fn, "__name__", type(fn).__name__)
        raise JaxArgumentError(
            f"call_jax({name}): args is a {type(args).__module__}.{type(args).__qualname__}; it must be a tuple or "
            "list of the function's arguments: write (x,) for one"
        )


def _unwrap_partial(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]]:
    """A partial is its function with more arguments: two equal partials are one program."""
    kwargs = kwargs or {}
    while isinstance(fn, functools.partial):
        args = (*fn.args, *args)
        kwargs = {**fn.keywords, **kwargs}
        fn = fn.func
    return fn, args, kwargs


def _bad_tensors(label: str, treedef: Any, leaves: list[Any]) -> JaxArgumentError:
    named = [
        (name, leaf)
        for name, leaf in zip(argument_names(treedef), leaves, strict=True)
        if isinstance(leaf, torch.Tensor)
    ]
    for name, leaf in named:
        check_tensor(leaf, name, label)
    where = ", ".join(f"{name} on {leaf.device}" for name, leaf in named)
    return JaxArgumentError(
        f"call_jax({label}): its tensors are on different devices: {where}; move them to one "
        "(numpy and JAX arrays count as cpu)"
    )


# What Dynamo traces instead of call_jax. A function and static values are constants of the graph; what the program is
# called and in which order it takes its operands is worked out once, by ordinary Python, and becomes a constant too.

_CLASSES: dict[str, type] = {}
"""Classes that results are rebuilt with inside a graph; Dynamo takes classes from globals, not from constants."""
_CLASS_NAMES: dict[type, str] = {}


def _class_name(kind: type) -> str:
    """The key of a class in _CLASSES. Not its qualified name alone, which two calls of one function can both define."""
    name = _CLASS_NAMES.setdefault(kind, f"{kind.__module__}.{kind.__qualname__}#{len(_CLASS_NAMES)}")
    _CLASSES[name] = kind
    return name


class _Operand:
    """Stands for operand number `index` while a graph is made."""

    def __init__(self, index: int) -> None:
        self.index = index


_traced_now = threading.local()
"""The function of the call that Dynamo is tracing: an object, for which constants have no room."""


def _note_function(ctx: Any) -> None:
    _traced_now.fn = identity_under_dynamo(ctx, "fn")


def _note_method(ctx: Any) -> None:
    _traced_now.fn = types.MethodType(identity_under_dynamo(ctx, "fn"), identity_under_dynamo(ctx, "owner"))


def _note_value(ctx: Any) -> None:
    identity_under_dynamo(ctx, "value")


def _forget_guards(ctx: Any) -> None:
    forget_guards(__name__)


@constant_under_dynamo
def _plan(described: tuple[Any, ...]) -> tuple[str, tuple[int, ...]]:
    """The program's name and, for each of its operands, which tensor in the order of `_take_apart` it is."""
    function = find_function(_traced_now.fn)
    function.pin()
    leaves, treedef = runtime().flatten(_put_together(described))
    order = tuple(leaf.index for leaf in leaves if isinstance(leaf, _Operand))
    stand_in = torch.empty(0, device="meta")
    filled = [stand_in if isinstance(leaf, _Operand) else leaf for leaf in leaves]
    return find_program(function, treedef, filled)[0].name, order


def _put_together(described: tuple[Any, ...]) -> Any:
    """The arguments as `_take_apart` found them, with _Operand for tensors."""
    kind, value = described[0], described[1]
    if kind == "operand":
        return _Operand(value)
    if kind == "static":
        return value
    items = [_put_together(item) for item in described[2]]
    if kind == "dict":
        return dict(zip(value, items, strict=True))
    return value(*items) if kind == "class" else value(items)


def _take_apart(value: Any, tensors: list[torch.Tensor]) -> tuple[Any, ...]:
    """The structure of arguments in constants; tensors are appended to `tensors`. Traced by Dynamo."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ("operand", len(tensors) - 1)
    kind = type(value)
    if kind is tuple or kind is list:
        return ("sequence", kind, tuple([_take_apart(item, tensors) for item in value]))
    if kind is dict:
        return ("dict", tuple(value.keys()), tuple([_take_apart(item, tensors) for item in value.values()]))
    if isinstance(value, tuple):
        return ("class", kind, tuple([_take_apart(item, tensors) for item in value]))
    if isinstance(value, types.FunctionType):  # before the look at __module__, which Dynamo 2.9 cannot take of its type
        torch._dynamo.comptime.comptime(_note_value)
        return ("static", value)
    if kind.__module__ == "numpy":
        tensors.append(torch.as_tensor(value))
        return ("operand", len(tensors) - 1)
    if kind is int:
        return ("static", operator.index(value))  # a symbolic integer becomes its number, with a guard
    return ("static", value)


@constant_under_dynamo
def _result(name: str) -> tuple[Any, ...]:
    """How to rebuild the pytree of the call that was just traced, in constants only."""
    tree = by_name(name).latest_tree
    return _describe(tree.unflatten(list(range(tree.num_leaves))), name)


def _describe(value: Any, name: str) -> tuple[Any, ...]:
    if value is None:
        return ("none",)
    kind = type(value)
    if kind is int:
        return ("leaf", value)
    if kind is dict:
        return ("dict", tuple(value), tuple(_describe(item, name) for item in value.values()))
    if kind in (tuple, list):
        return (kind.__name__, tuple(_describe(item, name) for item in value))
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return ("class", _class_name(kind), tuple(_describe(item, name) for item in value))
    raise JaxArgumentError(
        f"call_jax({name.partition('#')[0]}): the result holds a {kind.__module__}.{kind.__qualname__}, which "
        "torch.compile cannot rebuild inside a graph; return tuples, lists, dicts or NamedTuples there"
    )


def _rebuild(plan: tuple[Any, ...], tensors: list[torch.Tensor]) -> Any:
    kind = plan[0]
    if kind == "leaf":
        return tensors[plan[1]]
    if kind == "none":
        return None
    if kind == "dict":
        return {key: _rebuild(item, tensors) for key, item in zip(plan[1], plan[2])}  # noqa: B905
    if kind == "class":
        return _CLASSES[plan[1]](*[_rebuild(item, tensors) for item in plan[2]])
    items = [_rebuild(item, tensors) for item in plan[1]]
    return items if kind == "list" else tuple(items)


def _traced(fn: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
    if not isinstance(args, (tuple, list)):
        _check_arguments(fn, args)
    kwargs = {} if kwargs is None else kwargs
    while isinstance(fn, functools.partial):
        args = (*fn.args, *args)
        kwargs = {**fn.keywords, **kwargs}
        fn = fn.func
    if type(kwargs) is not dict:
        kwargs = dict(kwargs)  # Dynamo guards on what it imports for this
    if isinstance(fn, types.MethodType):
        owner, fn = fn.__self__, fn.__func__  # noqa: F841 - _note_method reads it
        torch._dynamo.comptime.comptime(_note_method)
    else:
        torch._dynamo.comptime.comptime(_note_function)
    found: list[torch.Tensor] = []
    name, order = _plan(_take_apart((tuple(args), kwargs), found))
    tensors = [found[index] for index in order] if order else [torch.empty(0)]
    results = OP(tensors, name)  # its fake finds the pytree that _result describes
    rebuilt = _rebuild(_result(name), results)
    torch._dynamo.comptime.comptime(_forget_guards)
    return rebuilt


trace_instead(call_jax, _traced)
