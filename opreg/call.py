"""The functions through which an op is called, written out per op with its exact arity.

A generic `*args` wrapper costs 80 ns per call and a callable object 170 ns; a function generated for the signature
costs 20 ns. For each op there are five: what users hold (a direct call in plain eager, else the OpOverload), what
Dynamo traces in its place, what the dispatcher calls, what Inductor's graphs call, and the per-device runner that
checks the contract and the layer before the kernel.
"""

from __future__ import annotations

import builtins
import functools
import textwrap
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from . import context, devices, guard, no_formula
from .call_cpu import CpuCall
from .runner import arguments, make_runner, parameters
from .spec import REQUIRED, OpSpec

if TYPE_CHECKING:
    from .op import Op


_ANY_DEVICE = """\
def {name}({parameters}):
{picked}    _run = {run}
    if _run is None:
        _run = {make}({device})
{gradless}    return _run({arguments})
"""

_PICKED_INSIDE = """\
    _run = _inside({tensors})
    if _run is not None:
        return _run({arguments})
"""

_TANGENTS = """\
    if _forward_ad._current_level >= 0:
        _no_tangents(({tensors}))
"""

# With a formula, torch calls what it registered first, and this one in a place where no gradient is recorded.
_GRADLESS = """\
    if {wanted}:
        return _without_formula(_run, ({everything}))
"""
# What an op writes can carry no gradient at all.
_GRADLESS_WRITES = """\
    if {wanted}:
        _lost_gradient()
"""

_NAMED = """\
def {name}({parameters}):
    {layer} = _handle_of_string({layer}, {silent!r})
    return _overload({arguments})
"""

_PUBLIC = """\
def {name}({parameters}):
{direct}{handle}    return {named}{operator}({arguments}){end}
"""

_DIRECT = """\
    if {guard}:
        _run = _cpu if {first}.is_cpu else _runners.get({first}.device.type)
{on_xla}        if _run is not None:
{count}            return {named}_run({arguments}){end}
"""

_PICKED = """\
    _run = _outside({tensors})
    if _run is not None:
        return {named}_run({arguments}){end}
"""

_LOOK = """\
    if len(_implementations) != _seen:
        _look()
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
    **guard.NAMES,
    "_cpu": None,  # the runner for CPU tensors: a global costs 15 ns less than the look-up in _runners
    "_cpu_unchecked": None,
    "_handle_of_string": context.handle_of_string,
    "_layer_handle": context.layer_handle,
}


class Calls:
    """The generated functions of one op and the runners they share; `reset` after kernels or forces changed.

    public is what users call, traced what Dynamo traces in its place, entry what the dispatcher calls.
    """

    def __init__(self, op: Op) -> None:
        self.op = op
        self.runners: dict[str, Callable[..., Any]] = {}
        self.unchecked: dict[str, Callable[..., Any]] = {}
        self.on_meta: Callable[..., Any]  # the fake; given when the operator has been defined
        self._picks: tuple[Any, ...] = ()
        self._slow: Callable[..., Any] | None = None
        given = [arg for arg in op.spec.args if arg.default is not REQUIRED]
        self._name = op.name.partition("::")[2]
        self._defaults = tuple([arg.default for arg in given if not arg.keyword_only])
        self._keyword_defaults = {arg.name: arg.default for arg in given if arg.keyword_only}
        # What the stand-ins name; the rest comes with the code that is written at the first call.
        self._names: dict[str, Any] = {"__builtins__": builtins, "_overload": op.overload, "_write": self._write}
        self.public = self._function(_public_at_first.__code__)
        self.entry = self._function(_entry_at_first.__code__)
        # Code of its own: by that Dynamo tells the functions in a program's closures and arguments apart.
        self.traced = FunctionType(_traced.__code__.replace(), self._names, self._name)
        if op.spec.layer_arg is not None or op.spec.named is not None:
            self._complete()
            self.traced = self._function(self._code(_PUBLIC.replace("{direct}", ""), operator="_overload"))

    def _function(self, code: CodeType) -> FunctionType:
        """A function of the op's globals and defaults; stand-ins take everything and never look at defaults."""
        made = FunctionType(code, self._names, self._name, self._defaults)
        if self._keyword_defaults:
            made.__kwdefaults__ = dict(self._keyword_defaults)
        return made

    def _code(self, source: str, **parts: str | None) -> CodeType:
        spec, layer = self.op.spec, self.op.spec.layer_arg
        parts.update(name=self._name, parameters=parameters(spec), arguments=arguments(spec))
        parts.setdefault("operator", "_operator")
        parts["named"], parts["end"] = ("_Named(*", ")") if spec.named is not None else ("", "")
        parts["handle"] = f"    {layer.name} = _layer_handle({layer.name})\n" if layer else ""
        module = compile(source.format(device=_device_source(spec), **parts), f"<opreg {spec.name}>", "exec")
        return next(constant for constant in module.co_consts if isinstance(constant, CodeType))

    def _complete(self) -> None:
        """Add to the globals what written code names."""
        if "_runners" in self._names:
            return
        self._names.update(
            _SHARED,
            _Named=self.op.spec.named,
            _default_device=_default_device,
            _look=self._look,
            _lost_gradient=functools.partial(no_formula.written, self.op),
            _no_tangents=functools.partial(no_formula.tangents, self.op),
            _runner=self.runner,
            _runners=self.runners,
            _unchecked=self.unchecked,
            _unchecked_runner=self.unchecked_runner,
            _without_formula=functools.partial(no_formula.call, self.op),
        )

    def _write(self) -> Calls:
        """Give public and entry their code."""
        with guard.LOCK:
            return self._write_with_guard()

    def _rewrite(self) -> None:
        """Give them new code at the next call, with another guard; runners count writes with the guard's help."""
        self.public.__code__, self.entry.__code__ = _public_at_first.__code__.replace(), _entry_at_first.__code__
        self.reset()

    def _write_with_guard(self) -> Calls:
        spec, first = self.op.spec, self.op.spec.first_tensor
        outside, inside = (guard.pick(spec, where, self._look) for where in (True, False))
        self._picks = tuple(pick for pick in (outside, inside) if pick is not None)
        self._complete()
        # _op is what OpOverload.__call__ calls: 0.2 us less. Dynamo must see the OpOverload itself.
        self._names.update(_outside=outside, _inside=inside, _operator=self._slow or self.op.overload._op)
        for device_type, run in self.runners.items():
            self._set(device_type, run)
        tensors = "".join(f"{arg.name}, " for arg in guard.tensors(spec))
        wanted, gradless = guard.gradient_wanted(spec), ""
        if wanted and guard.loses_gradients(spec):
            everything = "".join(f"{arg.name}, " for arg in spec.args)
            gradless = (_GRADLESS_WRITES if spec.mutates else _GRADLESS).format(wanted=wanted, everything=everything)
        if tensors:
            gradless = _TANGENTS.format(tensors=tensors) + gradless
        picked = _PICKED_INSIDE if inside is not None else ""
        self.entry.__code__ = self._any_device(
            "_runner", self._cached_run("_runners"), gradless=gradless, picked=picked, tensors=tensors
        )
        if first is None or guard.setting() == "off":
            self.public.__code__ = self._code(_PUBLIC.replace("{direct}", ""))
            return self
        on_xla, count = _ON_XLA if spec.mutates else "", guard.count(self._rewrite)
        direct = _DIRECT.replace("{on_xla}", on_xla).replace("{guard}", guard.condition(spec, first))
        direct = direct.replace("{count}", f"            {count}\n" if count else "")
        if outside is not None:
            # The native guard leaves tensors of torch_xla, wrappers of functionalization, to the dispatcher.
            plain = f"type({first.name}) is _Tensor and not _function_mode({first.name})"
            on_xla = f"    if {plain} and {first.name}.is_xla:\n{textwrap.indent(direct, '    ')}"
            direct = _PICKED + (on_xla if spec.mutates else "")
        self.public.__code__ = self._code(
            _PUBLIC.replace("{direct}", direct + _LOOK + _TANGENTS), tensors=tensors, first=first.name
        )
        return self

    def _look(self) -> None:
        """See whether somebody else has registered an implementation of this op, which a direct call would pass by."""
        seen = guard.free_of_others(self.op.name)
        if seen < 0:
            self.public.__code__ = self._code(_PUBLIC.replace("{direct}", ""))
        self._names["_seen"] = seen
        for pick in self._picks:
            pick.seen = seen

    def _cached_run(self, runners: str) -> str:
        """The expression for a runner that has been made."""
        first = self.op.spec.first_tensor
        if first is None:
            return f"{runners}.get({_device_source(self.op.spec)})"
        cpu = {"_runners": "_cpu", "_unchecked": "_cpu_unchecked"}[runners]
        return f"{cpu} if {first.name}.is_cpu else {runners}.get({first.name}.device.type)"

    def _any_device(self, make: str, run: str, **parts: str) -> CodeType:
        source = _ANY_DEVICE.replace("{picked}", parts.pop("picked", ""))
        return self._code(source, make=make, run=run, **{"gradless": "", **parts})

    def named(self, layer: str) -> FunctionType:
        """What torch.ops calls with the name of a layer, `layer` being the parameter that takes it."""
        spec = self.op.spec
        self._complete()
        silent = None if spec.mutates or spec.returns else spec.name
        return self._function(self._code(_NAMED, layer=layer, silent=silent))

    @functools.cached_property
    def compiled(self) -> FunctionType:
        """What compiled graphs call: no contract check, no dispatcher."""
        self._complete()
        return self._function(self._any_device("_unchecked_runner", self._cached_run("_unchecked")))

    @functools.cached_property
    def compiled_on_cpu(self) -> CpuCall:
        """The same where all tensors are known to be on the CPU."""
        return CpuCall(self.op.spec, self._defaults, self._keyword_defaults, self.unchecked_runner("cpu"))

    def _cpu_at_first(self, *args: Any, **kwargs: Any) -> Any:
        return self.unchecked_runner("cpu")(*args, **kwargs)

    def runner(self, device_type: str) -> Callable[..., Any]:
        """The runner of a device, made at its first call."""
        run = self.on_meta if device_type == "meta" else make_runner(self.op, device_type)
        run = self.runners.setdefault(device_type, run)
        self._set(device_type, run)
        return run

    def _set(self, device_type: str, run: Callable[..., Any]) -> None:
        """Let the functions find a runner without a look-up."""
        if device_type == "cpu":
            self._names["_cpu"] = run
        for pick in self._picks:
            pick.set(device_type, run)

    def unchecked_runner(self, device_type: str) -> Callable[..., Any]:
        """The runner for compiled graphs, whose sizes were checked when they were traced."""
        run = self.unchecked.setdefault(device_type, make_runner(self.op, device_type, checked=False))
        if device_type == "cpu":
            self._names["_cpu_unchecked"] = run
            self._use_on_cpu(run)
        return run

    def _use_on_cpu(self, run: Callable[..., Any]) -> None:
        if "compiled_on_cpu" in self.__dict__:
            self.compiled_on_cpu.use(run)

    def otherwise(self, fn: Callable[..., Any]) -> None:
        """Make `fn` what users' calls come to where the kernel cannot be called directly, instead of the overload."""
        self._slow = self._names["_operator"] = fn

    def use(self, device_type: str, run: Callable[..., Any]) -> None:
        """Let `run` compute the op on a device until the next reset: for tests that want to see the calls."""
        self.runners[device_type] = run
        self._set(device_type, run)

    def reset(self) -> None:
        """Forget the runners: the next call chooses anew."""
        self.runners.clear()
        self.unchecked.clear()
        self._names["_cpu"] = self._names["_cpu_unchecked"] = None
        self._use_on_cpu(self._cpu_at_first)
        for pick in self._picks:
            pick.clear()


def _default_device() -> str:
    return devices.present()[0]


def _device_source(spec: OpSpec) -> str:
    first = spec.first_tensor
    if first is not None:
        return f"'cpu' if {first.name}.is_cpu else {first.name}.device.type"
    for arg in spec.args:
        if arg.type == "Tensor?" and not arg.layer:
            return f"{arg.name}.device.type if {arg.name} is not None else _default_device()"
        if arg.is_list and arg.type.startswith("Tensor"):
            return f"{arg.name}[0].device.type if {arg.name} else _default_device()"
        if arg.type in ("Device", "Device?"):
            return f"{arg.name}.type if {arg.name} is not None else _default_device()"
    return "_default_device()"
