"""The functions through which an op is called, written out per op with its exact arity.

A generic `*args` wrapper costs 80 ns per call and a callable object 170 ns; a function generated for the signature
costs 20 ns. For each op there are five: what users hold (a direct call in plain eager, else the OpOverload), what
Dynamo traces in its place, what the dispatcher calls, what Inductor's graphs call, and the per-device runner that
checks the contract and the layer before the kernel.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _are_functorch_transforms_active, _has_torch_function_unary, _len_torch_dispatch_stack
from torch.autograd import profiler

from . import context, devices, no_formula
from .errors import KernelError
from .runner import arguments, make_runner, parameters
from .spec import REQUIRED, ArgSpec, OpSpec

if TYPE_CHECKING:
    from .op import Op


def _guard_source(spec: OpSpec, first: ArgSpec) -> str:
    """Condition under which a direct call of the kernel is the same as a call through the dispatcher.

    Cheapest first (quiet ns): exact types 8 each, the profiler flag 6, function modes 17, the two other mode queries 30
    each, grad mode 30. Whether a tensor wants a gradient costs 40 each, so of several it is asked in grad mode only.
    """
    types, grads = [], _grads(spec)
    for arg in spec.args:
        name = arg.name
        if arg.layer or not arg.type.startswith("Tensor"):
            continue
        if arg.type in ("Tensor", "Tensor?"):
            absent = f"{name} is None or " if arg.optional else ""
            types.append(f"({absent}type({name}) is _Tensor or type({name}) is _Parameter)")
        else:
            types.append(f"_plain_list({name})")
    modes = [
        "not _profiler._is_profiler_enabled",
        # Of a plain tensor it asks for modes alone.
        f"not _function_mode({first.name})",
        "not _dispatch_modes()",
        "not _functorch()",
    ]
    asked = ["not _grad_enabled()", f"not ({' or '.join(grads)})"]
    return " and ".join([*types, *modes, f"({' or '.join(asked if len(grads) > 1 else reversed(asked))})"])


def _grads(spec: OpSpec) -> list[str]:
    """Per tensor of a call, the question whether it requires a gradient."""
    asked = []
    for arg in spec.args:
        if arg.type == "Tensor" and not arg.layer:
            asked.append(f"{arg.name}.requires_grad")
        elif arg.type == "Tensor?" and not arg.layer:
            asked.append(f"({arg.name} is not None and {arg.name}.requires_grad)")
        elif arg.type.startswith("Tensor") and not arg.layer:
            asked.append(f"_any_grad({arg.name})")
    return asked


def _plain_list(values: Any) -> bool:
    return all(value is None or type(value) in (torch.Tensor, torch.nn.Parameter) for value in values)


def _any_grad(values: Any) -> bool:
    return any(value is not None and value.requires_grad for value in values)


_ANY_DEVICE = """\
def {name}({parameters}):
    _type = {device}
    _run = {runners}.get(_type)
    if _run is None:
        _run = {make}(_type)
{gradless}    return _run({arguments})
"""

# With a formula, torch calls what it registered first, and this one in a place where no gradient is recorded.
_GRADLESS = """\
    if _grad_enabled() and ({grads}):
        return _without_formula(_run, ({everything}))
"""

_NAMED = """\
def {name}({parameters}):
    {layer} = _handle_of_string({layer}, {silent!r})
    return _overload({arguments})
"""

_PUBLIC = """\
def {name}({parameters}):
{direct}{handle}    return {slow}({arguments})
"""

_DIRECT = """\
    if {guard}:
        _run = _cpu if {first}.is_cpu else _runners.get({first}.device.type)
{on_xla}        if _run is not None:
            return _run({arguments})
"""

# An op that writes must not wait for the dispatcher to make the runner: on XLA it would not come back (xla_writes.py).
_ON_XLA = """\
        if _run is None and {first}.is_xla:
            _run = _runner("xla")
"""

# What stands in for the functions above until the first call: compiling their source costs 0.3 ms, ten times what is
# left of a registration, and most ops of a process are never called.


def _entry_at_first(*args: Any, **kwargs: Any) -> Any:
    return _write().entry(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821 - a global of the op's functions


def _public_at_first(*args: Any, **kwargs: Any) -> Any:
    return _write().public(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821 - a global of the op's functions


def _traced(*args: Any, **kwargs: Any) -> Any:
    return _overload(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821 - a global of the op's functions


_SHARED: dict[str, Any] = {
    "__builtins__": builtins,
    "_Parameter": torch.nn.Parameter,
    "_Tensor": torch.Tensor,
    "_any_grad": _any_grad,
    "_cpu": None,  # the runner for CPU tensors: a global costs 15 ns less than the look-up in _runners
    "_dispatch_modes": _len_torch_dispatch_stack,
    "_function_mode": _has_torch_function_unary,
    "_functorch": _are_functorch_transforms_active,
    "_grad_enabled": torch.is_grad_enabled,
    "_handle_of_string": context.handle_of_string,
    "_layer_handle": context.layer_handle,
    "_plain_list": _plain_list,
    "_profiler": profiler,
}


class Calls:
    """The generated functions of one op and the runners they share; `reset` after kernels or forces changed.

    public is what users call, traced what Dynamo traces in its place, entry what the dispatcher calls.
    """

    def __init__(self, op: Op) -> None:
        self.op = op
        self.runners: dict[str, Callable[..., Any]] = {}
        self.unchecked: dict[str, Callable[..., Any]] = {}
        self._names: dict[str, Any] = {
            **_SHARED,
            "_default_device": _default_device,
            "_overload": op.overload,
            "_runner": self.runner,
            "_slow": op.overload,
            "_runners": self.runners,
            "_unchecked": self.unchecked,
            "_unchecked_runner": self.unchecked_runner,
            "_without_formula": functools.partial(no_formula.call, op),
            "_write": self._write,
        }
        self.public = self._function(_public_at_first.__code__)
        self.entry = self._function(_entry_at_first.__code__)
        self.traced = FunctionType(_traced.__code__, self._names, self._name)
        if op.spec.layer_arg is not None:
            self.traced = self._function(self._code(_PUBLIC, direct="", slow="_overload"))

    @property
    def _name(self) -> str:
        return self.op.name.split("::")[-1]

    def _function(self, code: CodeType) -> FunctionType:
        """A function of the op's globals and defaults; stand-ins take everything and never look at defaults."""
        args = [arg for arg in self.op.spec.args if arg.default is not REQUIRED]
        defaults = tuple(arg.default for arg in args if not arg.keyword_only)
        made = FunctionType(code, self._names, self._name, defaults)
        made.__kwdefaults__ = {arg.name: arg.default for arg in args if arg.keyword_only}
        return made

    def _code(self, source: str, **parts: str | None) -> CodeType:
        spec, layer = self.op.spec, self.op.spec.layer_arg
        parts.update(name=self._name, parameters=parameters(spec), arguments=arguments(spec))
        parts["handle"] = f"    {layer.name} = _layer_handle({layer.name})\n" if layer else ""
        module = compile(source.format(device=_device_source(spec), **parts), f"<opreg {spec.name}>", "exec")
        return next(constant for constant in module.co_consts if isinstance(constant, CodeType))

    def _write(self) -> Calls:
        """Give public and entry their code."""
        spec = self.op.spec
        first, direct = spec.first_tensor, ""
        if first is not None:
            on_xla = _ON_XLA.format(first=first.name) if spec.mutates else ""
            direct = _DIRECT.format(
                guard=_guard_source(spec, first), first=first.name, on_xla=on_xla, arguments=arguments(spec)
            )
        grads, gradless = _grads(spec), ""
        if grads and spec.returns and not spec.mutates:
            everything = "".join(f"{arg.name}, " for arg in spec.args)
            gradless = _GRADLESS.format(grads=" or ".join(grads), everything=everything)
        self.entry.__code__ = self._code(_ANY_DEVICE, runners="_runners", make="_runner", gradless=gradless)
        self.public.__code__ = self._code(_PUBLIC, direct=direct, slow="_slow")
        return self

    def named(self, layer: str) -> FunctionType:
        """What torch.ops calls with the name of a layer, `layer` being the parameter that takes it."""
        spec = self.op.spec
        silent = None if spec.mutates or spec.returns else spec.name
        return self._function(self._code(_NAMED, layer=layer, silent=silent))

    @functools.cached_property
    def compiled(self) -> FunctionType:
        """What compiled graphs call: no contract check, no dispatcher."""
        return self._function(self._code(_ANY_DEVICE, runners="_unchecked", make="_unchecked_runner", gradless=""))

    def runner(self, device_type: str) -> Callable[..., Any]:
        """The runner of a device, made at its first call."""
        if device_type == "meta":
            raise KernelError(f"{self.op.name}: called on meta tensors outside a fake implementation")
        run = self.runners.setdefault(device_type, make_runner(self.op, device_type))
        if device_type == "cpu":
            self._names["_cpu"] = run
        return run

    def unchecked_runner(self, device_type: str) -> Callable[..., Any]:
        """The runner for compiled graphs, whose sizes were checked when they were traced."""
        return self.unchecked.setdefault(device_type, make_runner(self.op, device_type, checked=False))

    def otherwise(self, fn: Callable[..., Any]) -> None:
        """Make `fn` what users' calls come to where the kernel cannot be called directly, instead of the overload."""
        self._names["_slow"] = fn

    def reset(self) -> None:
        """Forget the runners: the next call chooses anew."""
        self.runners.clear()
        self.unchecked.clear()
        self._names["_cpu"] = None


def _default_device() -> str:
    return devices.present()[0]


def _device_source(spec: OpSpec) -> str:
    first = spec.first_tensor
    if first is not None:
        return f"'cpu' if {first.name}.is_cpu else {first.name}.device.type"
    for arg in spec.args:
        if arg.type == "Tensor?" and not arg.layer:
            return f"{arg.name}.device.type if {arg.name} is not None else _default_device()"
        if arg.type == "Tensor[]":
            return f"{arg.name}[0].device.type if {arg.name} else _default_device()"
        if arg.type in ("Device", "Device?"):
            return f"{arg.name}.type if {arg.name} is not None else _default_device()"
    return "_default_device()"
