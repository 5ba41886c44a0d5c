"""register_op, and what it returns: a plain function of the op's arity that carries the methods of its Op."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any, Generic, cast, overload

import torch

from . import (
    _compat,
    call,
    devices,
    digest,
    fake,
    fusion,
    library,
    registry,
    runner,
    select,
    sharding,
    signature,
    xla_writes,
)
from .deferred import deferred
from .errors import DuplicateOpError, RegistrationError, SignatureError
from .op_function import Inputs, OpFunction, P, R
from .spec import REFERENCE, REFERENCE_PRIORITY, Fusion, KernelSpec, OpSpec, same_kernel

_LOCK = threading.RLock()
"""Held while an op's kernels change."""


class Op(Generic[P, R]):
    """One registered operator: its frozen spec and what was added to it since."""

    def __init__(self, spec: OpSpec, body: Callable[P, R]) -> None:
        self.spec = spec
        self.body = body
        self.name = spec.name
        self.kernels: list[KernelSpec] = []
        self.explicit_fake: Callable[..., Any] | None = None
        self.has_autograd = False
        self.jvp: Callable[..., Any] | None = None  # see transforms.differentiable; torch.library has no word for it
        self.formula: tuple[Callable[..., Any] | None, ...] = ()
        self.batching: Callable[..., Any] | None = None
        self.traced = False  # whether a compiler has seen the fake
        self.gradless_logged = False
        self.refuses_gradients = False  # whether torch holds a formula of ours that raises
        self.has_vmap = False
        self.fusion: Fusion | None = None
        self.sharding: sharding.Rule | None = None
        self.inputs: Inputs | None = None
        self.tolerances: dict[torch.dtype, tuple[float, str]] = {}
        self.forced_somewhere = 0
        if spec.has_body:
            self.kernels.append(KernelSpec(REFERENCE, None, body, (), None, REFERENCE_PRIORITY, spec.source))

    def define(self) -> None:
        """Make the torch operator. Called once, by register_op."""
        try:
            self.overload = library.define(self.name, self.spec.schema, self.spec.tags)
        except RuntimeError:
            if not library.is_defined(self.name):
                raise
            raise DuplicateOpError(
                f"{self.name} is already a torch operator, defined outside opreg with schema "
                f"{library.overload(self.name)._schema}; choose another name"
            ) from None
        self.calls = call.Calls(self)
        library.implement(self.name, self.calls.entry)
        self.calls.on_meta = library.enter_fake(self.name, fake.Fake(self), self.spec.source)
        xla_writes.catch(self)
        self.function = cast(OpFunction[P, R], self.calls.public)
        self._dress(self.calls.public)
        if self.spec.layer_arg is not None:
            self._define_named()

    def _define_named(self) -> None:
        """The overload `ns::op.named`, whose layer is a plain string, for code that calls torch.ops with one."""
        layer = self.spec.layer_arg
        if layer is None:
            raise RegistrationError(f"{self.name}: has no layer to name")
        schema = re.sub(rf"Tensor(\(\w+!\))? {layer.name}\b", f"str {layer.name}", self.spec.schema, count=1)
        library.define(f"{self.name}.named", schema, self.spec.tags)
        # Composite: it becomes the default overload with a handle before any compiler sees it.
        library.implement(f"{self.name}.named", self.calls.named(layer.name), "CompositeImplicitAutograd")

    def _dress(self, fn: Any) -> None:
        """Make the generated function look like the decorated one and carry this op's methods."""
        body = self.body
        fn.__module__, fn.__name__, fn.__qualname__ = body.__module__, body.__name__, body.__qualname__
        fn.__doc__, fn.__annotations__ = body.__doc__, body.__annotations__
        attributes = {"__wrapped__": body, "op": self, "name": self.name, "spec": self.spec, "overload": self.overload}
        fn.__dict__.update(attributes, **{method: getattr(self, method) for method in _METHODS})
        self.calls.traced.__name__ = fn.__name__
        _compat.trace_instead(fn, self.calls.traced)

    @property
    def declaration(self) -> tuple[str, str, str]:
        """What must be equal for a second registration under this name to be the same one, met again."""
        return self.spec.digest(), self.body.__module__, digest.of_code(self.body)

    def call_with(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return runner.call_with(self.spec, fn, args)

    def gather(self, many: Callable[[tuple[Any, ...]], Any]) -> Callable[..., Any]:
        return runner.gather(self.spec, many)

    def chooser(self, *told: Any) -> Callable[..., Any]:
        return runner.chooser(self.spec, *told)

    def force(self, change: int) -> None:
        """Count of active use_kernel blocks; runners are rebuilt when it leaves or reaches zero."""
        with _LOCK:
            before = self.forced_somewhere
            self.forced_somewhere += change
            if bool(before) != bool(self.forced_somewhere):
                self.calls.reset()
                if self.fusion is not None:
                    digest.changed_after_trace(self, "a forced kernel, where fusion was possible,")

    # What users call. Words and meanings are torch.library's where it has them.

    def register_kernel(
        self,
        device_types: str | Iterable[str] | None,
        target: str | Callable[..., Any] | None = None,
        *,
        requires: str | Iterable[str] = (),
        why_not: str | Callable[..., str | None] | None = None,
        priority: int = 0,
    ) -> Any:
        """Add a kernel for one or several device types (None: every device). Usable as a decorator without `target`.

        target: a callable, or "module:function", imported at first use, with the op's parameters in the op's order. Or
            "inductor": graphs that Inductor compiles then hold the body itself, fused with what stands around it, where
            no other kernel has this priority or more; eager calls are not changed.
        requires: modules that must be installed, "module" or "module>=1.2"; they are looked up and not imported. "c++"
            is a compiler, for a kernel that is compiled at its first use; it is looked up and not run.
        why_not: takes the op's arguments; returns None to accept the call, or the reason for refusing it. One without
            parameters answers for this machine, and is asked once, before the first call.
        priority: the largest that accepts wins; two kernels with equal priority on one device are an error.

        Raises RegistrationError (tie, duplicate), SignatureError (other parameters), UnknownOpError (device type).
        """
        if target is None:

            def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
                self.register_kernel(device_types, fn, requires=requires, why_not=why_not, priority=priority)
                return fn

            return decorate
        if target == fusion.TARGET:
            self.fusion = fusion.make(self, device_types, requires, why_not, priority)
            digest.changed_after_trace(self, "fusion")
            return target
        kernel = select.make_kernel(self, device_types, target, requires, why_not, priority)
        if callable(target):
            select.check_signature(self, f"kernel {kernel.name}", target)
        if callable(why_not) and not select.asked_once(why_not):
            select.check_signature(self, f"why_not of kernel {kernel.name}", why_not)
        with _LOCK:
            known = next((k for k in self.kernels if k.name == kernel.name), None)
            if known is not None:
                if same_kernel(known, kernel):
                    return target
                raise RegistrationError(
                    f"{self.name}: there is already a kernel '{kernel.name}' for {known.devices} ({known.target}); "
                    "rename the function, or register it once with all its device types"
                )
            select.refuse_tie(self, kernel)
            self.kernels = sorted([*self.kernels, kernel], key=lambda k: -k.priority)
            self.calls.reset()
        if self.fusion is not None:
            digest.changed_after_trace(self, "a kernel that fusion is measured against")
        return target

    def register_fake(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Make `fn` the fake implementation (shapes only), instead of the one derived from the contract."""
        select.check_signature(self, "fake", fn)
        if self.explicit_fake is not None and self.explicit_fake.__code__ is not fn.__code__:
            raise RegistrationError(
                f"{self.name}: a fake is already registered at {signature.source_of(self.explicit_fake)}"
            )
        self.explicit_fake = fn
        self.calls.reset()  # runners of contract-derived fakes also see to the results' strides
        digest.changed_after_trace(self, "a fake")
        return fn

    def register_autograd(
        self, backward: Callable[..., Any], /, *, setup_context: Callable[..., Any] | None = None
    ) -> None:
        """Register the backward formula; both arguments as in torch.library.register_autograd."""
        if self.spec.mutates:
            raise RegistrationError(
                f"{self.name}: mutates {', '.join(self.spec.mutates)}, so it can have no backward formula; write a "
                "functional op for training and let it return what it computes"
            )
        if not self.refuses_gradients:
            library.autograd(self.name, backward, setup_context, self.jvp)
        self.has_autograd, self.formula = True, (backward, setup_context)
        digest.changed_after_trace(self, "a backward formula")

    def register_vmap(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Register the batching rule, `fn(info, in_dims, *args) -> (outputs, out_dims)`."""

        def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
            # The dispatcher leaves out trailing arguments that equal their defaults; the rule gets all of them.
            everything = self.gather(lambda values: values)(*args, **kwargs)
            dims = (*in_dims, *(None for _ in everything[len(in_dims) :]))
            return self.call_with(functools.partial(fn, info, dims), everything)

        library.vmap(self.name, rule)
        self.has_vmap, self.batching = True, fn
        digest.changed_after_trace(self, "a batching rule")
        return fn

    def register_sharding(self, *dims: str, others: sharding.Others = None) -> None:
        """Let DTensors be split along these dims of the contract, all together; the rest is whole on every rank.

        others: {argument: dim} for tensors whose contract does not name the dim, or a function of the op's arguments
            that returns it. Written arguments are never redistributed: wrong placements are an error.

        Raises RegistrationError for a name that no contract or argument has.
        """
        self.sharding = sharding.Rule(self, dims, others)
        digest.changed_after_trace(self, "a sharding rule")

    def register_inputs(self, fn: Inputs) -> Inputs:
        """Register sample calls: `fn(device, dtype, generator)` yields dicts of keyword arguments, one per call.

        A layer op yields inside `with forward_context(...)`. Used by `opreg check`, `opreg bench` and tests.
        """
        self.inputs = fn
        return fn

    def samples(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> Iterator[dict[str, Any]]:
        """The registered sample calls, reproducible from the seed."""
        if self.inputs is None:
            raise RegistrationError(f"{self.name}: no inputs are registered; add some with register_inputs")
        generator = torch.Generator().manual_seed(seed)
        yield from self.inputs(torch.device(device), dtype, generator)

    def tolerance(self, dtype: torch.dtype, rms: float, why: str) -> None:
        """Allow a relative RMS error of `rms` against the fp32 reference for inputs of this dtype, and say why."""
        if not rms >= 0 or not why:
            raise RegistrationError(f"{self.name}: tolerance({dtype}, {rms}, {why!r}) needs rms >= 0 and a reason")
        self.tolerances[dtype] = (rms, why)

    def explain(self, *args: Any, **kwargs: Any) -> select.Explanation:
        """Which kernel runs and why the others do not: for these arguments, or for the default device without any."""
        if not args and not kwargs:
            return select.explain(self, devices.present()[0])
        everything = self.gather(lambda values: values)(*args, **kwargs)
        return select.explain(self, self.device_of(everything), everything)

    def device_of(self, args: tuple[Any, ...]) -> str:
        """Device type that chooses the kernel for a call with all arguments given in order."""
        for arg, value in zip(self.spec.args, args, strict=True):
            if arg.is_tensor and value is not None:
                return cast(str, value.device.type)
        return devices.present()[0]

    def check(self) -> Any:
        """Everything `opreg check` does, for this op; returns its report."""
        from . import testing

        return testing.check_op(self)


_METHODS = (
    "register_kernel",
    "register_fake",
    "register_autograd",
    "register_vmap",
    "register_sharding",
    "register_inputs",
    "samples",
    "tolerance",
    "explain",
    "check",
)


@overload
def register_op(name: Callable[P, R], /) -> OpFunction[P, R]: ...
@overload
def register_op(
    name: str | None = None,
    /,
    *,
    mutates_args: str | Iterable[str] | Mapping[str, str] = (),
    device_types: str | Iterable[str] | None = None,
    schema: str | None = None,
    tags: torch.Tag | Iterable[torch.Tag] = (),
    kind: str | None = None,
) -> Callable[[Callable[P, R]], OpFunction[P, R]]: ...


def register_op(
    name: Any = None,
    /,
    *,
    mutates_args: str | Iterable[str] | Mapping[str, str] = (),
    device_types: str | Iterable[str] | None = None,
    schema: str | None = None,
    tags: torch.Tag | Iterable[torch.Tag] = (),
    kind: str | None = None,
) -> Any:
    """Turn a typed function into a torch operator.

    name: "namespace::name"; left out (bare `@register_op`), the top package and the function's name.
    mutates_args: names of the tensor parameters that are written in place, or {name: how it starts}, which is "written"
        (undefined; the kernel writes all of it), "tail" (the same, but the framework zeroes the rows from
        num_actual_tokens on: of the layer's metadata, or an argument), "zeros" (the framework zeroes it before
        the kernel) or "state" (kept from call to call). The LayerName parameter may be named too: the op writes its
        layer's state. That is implied for kind="attention" and for layer ops that write anything.
    device_types: devices on which the body may run; None: all. The body is the reference: it runs where no kernel does.
    schema: a torch schema string, where the annotations cannot say it; usually inferred.
    tags: torch.Tag values. kind: "attention" marks an op at which graphs are split (see splitting_ops).

    Annotations are the contract: `x: Annotated[Tensor, "*n d"]`. The function returned has the declared parameters and
    carries register_kernel, register_fake, register_autograd, register_vmap, register_sharding, register_inputs,
    tolerance, explain.

    Raises SignatureError, RegistrationError, DuplicateOpError.

        @register_op("mylib::double")
        def double(x: Annotated[Tensor, "*n"]) -> Annotated[Tensor, "*n"]:
            return x * 2
    """
    if callable(name):
        return _register(None, ((), None, None, (), None), name)
    if type(tags) is not tuple:
        tags = (tags,) if isinstance(tags, torch.Tag) else tuple(tags)
    if kind == "attention" and torch.Tag.cudagraph_unsafe not in tags:
        # Attention reads per-step metadata on the host, which a captured CUDA graph would freeze.
        tags = (*tags, torch.Tag.cudagraph_unsafe)
    return functools.partial(_register, name, (mutates_args, device_types, schema, tags, kind))


def _register(name: str | None, how: tuple[Any, ...], fn: Callable[..., Any]) -> Any:
    if type(fn) is not FunctionType and not hasattr(fn, "__code__"):
        raise SignatureError(f"register_op decorates Python functions; got {type(fn).__name__}: {fn!r}")
    qualname = registry.qualify(name, fn)
    recorded = deferred(qualname, fn, _make, how) if registry.is_deferred() else None
    return _make(qualname, fn, *how).function if recorded is None else recorded


def _make(
    name: str,
    fn: Callable[..., Any],
    mutates_args: str | Iterable[str] | Mapping[str, str],
    device_types: str | Iterable[str] | None,
    schema: str | None,
    tags: tuple[torch.Tag, ...],
    kind: str | None,
) -> Op[Any, Any]:
    """Register an op, or return the one that is registered already."""
    spec = signature.read_op(name, fn, mutates_args=mutates_args, kind=kind, tags=tags, schema=schema)
    op: Op[Any, Any] = Op(spec, fn)
    if device_types is not None and op.kernels:
        types = (device_types,) if isinstance(device_types, str) else tuple(device_types)
        checked = tuple(devices.check(t, name) for t in types)
        op.kernels = [KernelSpec(REFERENCE, checked, fn, (), None, REFERENCE_PRIORITY, spec.source)]
    known = registry.add(op)
    if known is op:
        try:
            op.define()
        except BaseException:
            registry.discard(op)
            raise
    return known
