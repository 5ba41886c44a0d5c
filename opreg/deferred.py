"""Ops that are recorded and not yet registered: for packages of many ops, of which a process uses a few.

Inside `with registry.deferred():`, and so in packages loaded with `registry.load_packages(deferred=True)`, register_op
returns its function after 6 to 11 us. The op is registered at its first use: a call, a look at `torch.ops.ns.op` or at
the function's `spec` or `overload`, a graph that is split, `opreg list`. What registration would refuse is refused
then, and again at every later use; `opreg check` and the package's own tests, which import it as usual, find it before.
C++ that looks an operator up by name, such as a loaded AOTInductor package, finds only what Python has used.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from . import _compat, library
from .errors import OpregError
from .later import LOCK, later
from .signature import source_of
from .spec import OpSpec


def _at_first(*args: Any, **kwargs: Any) -> Any:
    _define(_name)  # type: ignore[name-defined]  # noqa: F821 - globals of the function
    return _op.calls.public(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


_CODE = _at_first.__code__

# Run for real while Dynamo traces.
_define = _compat.constant_under_dynamo(library.define_recorded)


class Recorded:
    """One recorded op: what its registration was told, and what is to be registered for it after that.

    Few objects on purpose: each that stays costs the garbage collector 0.2 us in the long run.
    """

    __slots__ = ("calls", "failed", "make", "op", "overload", "public", "told")

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]
    failed: BaseException

    def __init__(self, cls: type, name: str, fn: Callable[..., Any], make: Callable[..., Any], told: Any) -> None:
        """make(op, public, *told) registers; the name comes first in `told`."""
        self.make = make
        self.told = told
        self.op = op = later(cls, self)
        self.overload = later(torch._ops.OpOverload, self)
        # No __name__: Dynamo would look for these in the module of that name.
        names = {"__builtins__": builtins, "_op": op, "_name": name, "_define": _define}
        self.public = public = FunctionType(_CODE, names, fn.__name__)
        public.__module__ = fn.__module__
        public.__qualname__, public.__doc__, public.__annotations__ = fn.__qualname__, fn.__doc__, fn.__annotations__
        public.__dict__ = {
            "__wrapped__": fn,
            "op": op,
            "name": name,
            "spec": later(OpSpec, self),
            "overload": self.overload,
            "register_kernel": self.register_kernel,
            "register_fake": self.register_fake,
            "register_autograd": self.register_autograd,
            "register_vmap": self.register_vmap,
            "register_sharding": self.register_sharding,
            "register_inputs": self.register_inputs,
            "tolerance": self.tolerance,
            "samples": self.samples,
            "explain": self.explain,
            "check": self.check,
        }

    def __call__(self, asked: Any) -> Any:
        """What somebody looks at, the op, its spec or its OpOverload: register it, and then what was recorded."""
        if asked is self.overload:
            return library.overload(self.public.name)  # type: ignore[attr-defined]
        if asked is not self.op:
            return self.op.spec
        if hasattr(self, "failed"):
            raise self.failed
        try:
            self.make(self.op, self.public, *self.told)
        except OpregError as error:
            place = source_of(self.public.__wrapped__)  # type: ignore[attr-defined]
            error.args = (f"{error} (recorded at {place}, registered now)",)
            raise
        name, self.told = self.told[0], None
        try:
            for method, args, kwargs in getattr(self, "calls", ()):
                getattr(self.op, method)(*args, **kwargs)
        except BaseException as error:
            # torch has the operator now, and cannot forget it; what was wrong is said to all who come after.
            self.failed = error
            self.public.__code__ = _CODE
            self.op.__dict__.clear()
            library.record(name, self)
            raise
        if hasattr(self, "calls"):
            del self.calls
        return self.op

    def _record(self, result: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        with LOCK:
            if self.told is not None:
                self.calls = [*getattr(self, "calls", ()), (method, args, kwargs)]
                return result
        return getattr(self.op, method)(*args, **kwargs)

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
