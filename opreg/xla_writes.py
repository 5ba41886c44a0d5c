"""Ops on torch_xla, where functionalisation stands between the operator and the device.

Every tensor of torch_xla is a functional wrapper: PyTorch's functionalisation sits between the operator and the device,
and it refuses any operator of others that writes an argument. So the operator is caught one level above it, in the
autograd key of XLA (such an op has no gradient formula). There the kernel gets the user's own tensors, and what it
writes with copy_ or index_put_ is functionalised like every other torch operation: views see it, and the lazy graph
updates the buffer in place. In inference mode tensors have no autograd key, so there it is the direct call of the
kernel (opreg.call) that comes before functionalisation, and `torch.ops.ns.op(...)` is refused by torch.

An op that writes nothing is called below functionalisation, with bare tensors. There a kernel that fills a tensor of
its own (`out = torch.zeros(...); out[i] = ...`) would lose what it writes without a word, since torch_xla makes new
tensors wrapped; so its arguments are wrapped again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import library
from .errors import KernelError

if TYPE_CHECKING:
    from .op import Op

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_LAYER_IN_GRAPH = (
    "{0}: a graph of backend='openxla' would keep the layer and the metadata of its first run, so the op cannot be in "
    "one; compile with backend='opreg', options={{'inner': 'openxla'}}, which gives openxla what comes before and "
    "after such ops, and calls them between"
)


def catch(op: Op) -> None:
    """Make an op work on tensors of torch_xla, eager and in compiled graphs."""
    if not op.spec.mutates:
        if _installed():
            _implement(op, lambda args: _wrapped(op, args), "XLA")
        return

    def on_xla(args: tuple[Any, ...]) -> Any:
        tensors = [value for arg, value in zip(op.spec.args, args, strict=True) if arg.is_tensor]
        with torch._C._AutoDispatchBelowAutograd():
            if all(value is None or type(value) in _PLAIN for value in tensors):
                if _below_functionalisation():
                    if op.spec.layer_arg is not None:
                        raise KernelError(_LAYER_IN_GRAPH.format(op.name))
                    return _writing(op, args)
                return op.call_with(op.calls.entry, args)
            _let_graphs_through()
            return _in_graph(op, args)

    _implement(op, on_xla, "AutogradXLA")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("torch_xla") is not None


def _implement(op: Op, run: Callable[[tuple[Any, ...]], Any], key: str) -> None:
    @functools.cache
    def gathered() -> Callable[..., Any]:
        return op.gather(run)  # made at the first call: most processes never have a tensor of torch_xla

    library.implement(op.name, lambda *args, **kwargs: gathered()(*args, **kwargs), key)


def _below_functionalisation() -> bool:
    """Only a graph calls a writing op there; inference mode comes without the autograd key."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Functionalize)


def _wrapped(op: Op, args: tuple[Any, ...]) -> Any:
    """The op as it runs above functionalisation, for bare tensors."""
    with torch._C._PreserveDispatchKeyGuard():
        torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.Functionalize, False)
        return _bare(op.call_with(op.calls.entry, tuple(_wrap(value) for value in args)))


def _writing(op: Op, args: tuple[Any, ...]) -> Any:
    """The same for an op that writes arguments, views of them included, which bare tensors would not see."""
    given = tuple(_wrap(value) for value in args)
    with torch._C._PreserveDispatchKeyGuard():
        torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.Functionalize, False)
        result = _bare(op.call_with(op.calls.entry, given))
        made = [_bare(new) for new in given]
    for arg, value, new in zip(op.spec.args, args, made, strict=True):
        if arg.mutated and not arg.layer and value is not None:
            pairs = zip(value, new, strict=True) if isinstance(value, (list, tuple)) else [(value, new)]
            for old, written in pairs:
                old.copy_(written)
    return result


def _wrap(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_wrap(item) for item in value]
    if isinstance(value, torch.Tensor) and value.device.type == "xla" and not torch._is_functional_tensor(value):
        return torch._to_functional_tensor(value)
    return value


def _bare(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_bare(item) for item in value)
    if isinstance(value, torch.Tensor) and torch._is_functional_tensor(value):
        torch._sync(value)  # type: ignore[attr-defined, no-untyped-call]
        return torch._from_functional_tensor(value)
    return value


def _in_graph(op: Op, args: tuple[Any, ...]) -> Any:
    """The op on copies of what it writes, copied back.

    torch's wrapper of a writing op rebuilds a view from a copy of its base, below functionalisation, where tensors of
    torch_xla share no memory: what the op writes into the view would be lost. XLA takes the copies out again.
    """
    copies: list[Any] = []
    written: list[tuple[torch.Tensor, torch.Tensor]] = []
    for arg, value in zip(op.spec.args, args, strict=True):
        copy = value
        if arg.mutated and not arg.layer and value is not None:
            copy = [x.clone() for x in value] if isinstance(value, (list, tuple)) else value.clone()
            written += zip(value, copy, strict=True) if isinstance(copy, list) else [(value, copy)]
        copies.append(copy)
    # The graph is run three times before it is compiled. Where a kernel looks at a value, what leads there is executed
    # at once, and would take memory that the next run starts from: nothing is given away before the kernel has run.
    _give_away(written, False)
    result = op.call_with(op.overload, tuple(copies))
    _give_away(written, True)  # before the new values are there: afterwards these names no longer mean the inputs
    for old, new in written:
        old.copy_(new)
    return result


def _give_away(written: list[tuple[torch.Tensor, torch.Tensor]], allowed: bool) -> None:
    """Whether the memory of a graph's input that is overwritten may hold the new value; of others it says nothing."""
    for old, _ in written:
        torch.ops.xla.dynamo_set_buffer_donor_(old, allowed)


@functools.cache
def _let_graphs_through() -> None:
    """A graph that is being traced will hold torch's wrapper of writing ops, which has no entry for XLA's autograd key
    as it has for that of CPU and CUDA."""
    wrappers = importlib.import_module("torch._higher_order_ops.auto_functionalize")
    for wrapper in (wrappers.auto_functionalized, wrappers.auto_functionalized_v2):
        wrapper.fallthrough(torch._C.DispatchKey.AutogradXLA)
