"""Ops that are recorded and not yet registered: for packages of many ops, of which a process uses a few.

Inside `with registry.deferred():`, and so in packages loaded with `registry.load_packages(deferred=True)`, register_op
returns a `Deferred` after 1.5 us. The op is registered at its first use: a call, a look at `torch.ops.ns.op` or at the
`spec`, `overload` or `op` of what was returned, a graph that is split, `opreg list`. From then on it calls the op's
function, 40 ns later than that itself, and has its attributes. What registration would refuse is refused then, and
again at every later use; `opreg check` and the package's own tests, which import it as usual, find it before. C++ that
looks an operator up by name, such as a loaded AOTInductor package, finds only what Python has used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import registry
from .errors import OpregError
from .later import LOCK
from .signature import source_of

_func = functools.partial.func.__get__


def _first(*args: Any, **kwargs: Any) -> Any:
    name = args[0]
    registry.define(name)
    return registry.get(name).calls.public(*args[_TOLD:], **kwargs)


_TOLD = 4
"""How many of them are what the registration was told."""


def _of_function(name: str) -> Any:
    return property(lambda op: getattr(op.__wrapped__, name))


_DOC = _of_function("__doc__")


# What register_op returns for an op that it has only recorded: `partial(_first, name, function, make, how)`, and once
# `make(name, function, *how)` has made the op, `partial(its function)`: no object can be called for less.
class Deferred(functools.partial[Any]):
    # In place of what the class has, without a __dict__ for each op.
    __doc__ = _DOC
    __annotations__ = _of_function("__annotations__")

    @property
    def func(self) -> Any:
        """The op's function. Dynamo, which follows a partial, asks for it before it looks at the arguments."""
        self.define()
        return _func(self)

    def define(self) -> None:
        """Register the op, if nobody has yet, and then what was recorded for it."""
        if not self.args:
            return
        with LOCK:
            if not self.args or "_making" in self.__dict__:
                return  # done, or this thread is at it
            self.__dict__["_making"] = True
            try:
                op = self._make(*self.args)
            finally:
                del self.__dict__["_making"]
            op.function = self
            public = op.calls.public
            self.__setstate__((public, (), {}, dict(public.__dict__)))
            registry.recorded.pop(op.name)  # last, so that until then other threads come here and wait

    def _make(self, name: str, fn: Callable[..., Any], make: Callable[..., Any], how: Any) -> Any:
        if "_failed" in self.__dict__:
            raise self.__dict__["_failed"]
        try:
            op = make(name, fn, *how)
        except OpregError as error:
            error.args = (f"{error} (recorded at {source_of(fn)}, registered now)",)
            raise
        try:
            for method, args, kwargs in self.__dict__.get("_calls", ()):
                getattr(op, method)(*args, **kwargs)
        except BaseException as error:
            # torch has the operator now, and cannot forget it; what was wrong is said to all who come after.
            self.__dict__["_failed"] = error
            registry.discard(op)
            raise
        return op

    def __getattr__(self, name: str) -> Any:
        if not self.args:
            return getattr(_func(self), name)
        known, fn = self.args[:2]
        if name == "__wrapped__":
            return fn
        if name in ("__name__", "__qualname__"):
            return getattr(fn, name)
        if name == "name":
            return known
        if name in ("op", "spec", "overload"):
            self.define()
            if name in self.__dict__:
                return self.__dict__[name]
        if name in ("__code__", "__defaults__", "__kwdefaults__", "__globals__", "__closure__"):
            return getattr(self.func, name)  # for what takes functions only, register_op among them
        raise AttributeError(f"{known}, which is recorded and not registered yet, has no attribute '{name}'")

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __reduce__(self) -> Any:
        """Pickled and copied by name, as functions are."""
        return self.__qualname__

    def _record(self, result: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        with LOCK:
            if self.args:
                self.__dict__.setdefault("_calls", []).append((method, args, kwargs))
                return result
        return getattr(self.op, method)(*args, **kwargs)

    # The methods of an op, until its own are in __dict__.

    def register_kernel(self, device_types: Any, target: Any = None, **how: Any) -> Any:
        if target is not None:
            return self._record(target, "register_kernel", device_types, target, **how)
        return lambda fn: self._record(fn, "register_kernel", device_types, fn, **how)

    def register_fake(self, fn: Any) -> Any:
        return self._record(fn, "register_fake", fn)

    def register_autograd(self, backward: Any, /, *, setup_context: Any = None) -> None:
        self._record(None, "register_autograd", backward, setup_context=setup_context)

    def register_vmap(self, fn: Any) -> Any:
        return self._record(fn, "register_vmap", fn)

    def register_sharding(self, *dims: str, others: Any = None) -> None:
        self._record(None, "register_sharding", *dims, others=others)

    def register_inputs(self, fn: Any) -> Any:
        return self._record(fn, "register_inputs", fn)

    def tolerance(self, dtype: torch.dtype, rms: float, why: str) -> None:
        self._record(None, "tolerance", dtype, rms, why)

    def samples(self, *args: Any, **kwargs: Any) -> Any:
        return self.op.samples(*args, **kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> Any:
        return self.op.explain(*args, **kwargs)

    def check(self) -> Any:
        return self.op.check()


def deferred(name: str, fn: Callable[..., Any], make: Callable[..., Any], how: tuple[Any, ...]) -> Deferred | None:
    """Record an op; None if there is one of this name."""
    made = (_CLASSES.get(fn.__module__) or _class_in(fn.__module__))(_first, name, fn, make, how)
    return made if registry.record(name, made) else None


_CLASSES: dict[str, type[Deferred]] = {}


def _class_in(module: str) -> type[Deferred]:
    """The class for the ops of a module, which is the module that its objects say they are from."""
    return _CLASSES.setdefault(module, type("Deferred", (Deferred,), {"__module__": module, "__doc__": _DOC}))
