"""Every difference between the supported torch versions (2.8 to 2.13) and the private names of torch opreg leans on."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

TESTED = ((2, 8), (2, 13))
"""First and last torch minor version that the test-suite runs on."""


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def trace_instead(fn: F, body: Callable[..., Any]) -> F:
    """Make Dynamo trace `body` wherever it meets `fn`: called in a traced function, or given to torch.compile itself.

    These attributes are private but unchanged from torch 2.1 to 2.13. torch._dynamo.substitute_in_graph would say the
    same, but importing torch._dynamo costs 1.5 s at registration.
    """
    fn._torchdynamo_inline = body  # type: ignore[attr-defined]
    fn._torchdynamo_orig_callable = body  # type: ignore[attr-defined]
    # 2.12 and later follow the line above only where this one names the function itself.
    fn._torchdynamo_wrapper_id = id(fn)  # type: ignore[attr-defined]
    return fn


def constant_under_dynamo(fn: F) -> F:
    """torch.compiler.assume_constant_result without its import of torch._dynamo (1.5 s)."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def dtensor_needs_a_result() -> bool:
    """Whether DTensor fails at operators that return nothing ("list index out of range"). Delete with torch 2.9."""
    return torch_version() <= (2, 9)


def compiles_pieces_of_dtensors() -> bool:
    """Whether AOTAutograd takes the fake of a DTensor as it is, and fails no assertion. Delete with torch 2.9."""
    return torch_version() > (2, 9)


@functools.cache
def checked_tags() -> frozenset[torch.Tag]:
    """The tags for which Library.define looks at the schema: "out" and "inplace", which torch 2.8 and 2.9 lack."""
    return frozenset(tag for tag in (getattr(torch.Tag, name, None) for name in ("out", "inplace")) if tag is not None)


def forget_dispatch(op: torch._ops.OpOverload) -> None:
    """Let compilers see what was registered since they first met `op`.

    Under torch's Python dispatcher an operator keeps what it once found for a key, and registering forgets nothing: a
    formula that comes after a first trace was ignored. Private and unchanged from torch 2.8 to 2.13.
    """
    op._dispatch_cache.clear()


def build_key() -> str:
    """What a library that links against torch's own must be built anew for."""
    return f"{torch.__version__} {torch.version.git_version} {torch._C._GLIBCXX_USE_CXX11_ABI}"


class _Entry(torch._library.simple_registry.SimpleOperatorEntry):
    """What torch keeps per operator beside the dispatcher, all but the fake made at first need (20 us in 2.13, which
    reads the schema to see whether the operator has effects)."""

    def __init__(self, qualname: str) -> None:
        self.qualname = qualname
        self.fake_impl = torch._library.fake_impl.FakeImplHolder(qualname)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        whole = torch._library.simple_registry.SimpleOperatorEntry(self.qualname)
        for known, value in vars(whole).items():
            self.__dict__.setdefault(known, value)
        if name not in self.__dict__:
            raise AttributeError(name)
        return self.__dict__[name]


def enter_fake(qualname: str, fn: Callable[..., Any], source: str) -> Callable[..., Any]:
    """Enter `fn` where FakeTensorMode looks for fakes; returns what torch would register under Meta. Private, unchanged
    from torch 2.8 to 2.13."""
    entries = torch._library.simple_registry.singleton._data
    entry = entries.get(qualname)
    if entry is None:
        entry = entries[qualname] = _Entry(qualname)
    entry.fake_impl.kernels.append(torch._library.utils.Kernel(fn, source))
    return functools.partial(_on_meta, qualname, entry.fake_impl)


def _on_meta(qualname: str, fakes: Any, *args: Any, **kwargs: Any) -> Any:
    return torch._library.fake_impl.construct_meta_kernel(qualname, fakes)(*args, **kwargs)


def unbatched(tensor: torch.Tensor) -> torch.Tensor:
    """What torch.func.vmap has wrapped, or the tensor itself. Private, unchanged from torch 2.8 to 2.13."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def not_in_jit_trace() -> Any:
    """Inside it torch.jit.trace records nothing. The key has no name in torch._C.DispatchKey; 2.8 to 2.13 parse it.

    For what the tracer is not to see, and must not refuse: it crashes, with a segmentation fault, where the error of a
    traced operator is caught.
    """
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C._dispatch_key_parse("Tracer")))


def tensor_guard(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A test whether tensors are like these, in all that Dynamo's guards look at; the same from torch 2.8 to 2.13.

    Type, dispatch keys (as the transforms of the calling thread make them), dtype, device, requires_grad, sizes,
    strides. Where no tensor is among `tensors` twice, none may be among the tested twice.
    """
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        each = [tensor_guard([tensor]) for tensor in tensors]
        return lambda *tested: (
            len(tested) == len(each) and all(check(tensor) for check, tensor in zip(each, tested, strict=True))
        )
    guard: Any = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    check: Callable[..., bool] = guard.check
    return check


empty_cpu: Callable[..., torch.Tensor] = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
"""(sizes, strides, dtype) -> an uninitialised CPU tensor in 0.4 us, where torch.empty takes 1.2; Inductor's own way."""


def identity_under_dynamo(ctx: Any, name: str) -> Any:
    """The object behind a local of the frame that Dynamo traces, and a guard that it stays this very object.

    `ctx` is what torch._dynamo.comptime.comptime hands to its function. Without the guard Dynamo takes two functions of
    the same code for one, whatever their closures hold; `id(fn)` guards from torch 2.11 on only.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    variable = ctx.get_local(name)._ComptimeVar__variable.realize()
    if variable.source is not None:
        install_guard(variable.source.make_guard(GuardBuilder.ID_MATCH))
    if hasattr(variable, "value"):
        return variable.value
    if hasattr(variable, "get_function"):
        return variable.get_function()  # torch 2.8 and 2.9 do not call a function made in the frame a constant
    return variable.as_python_constant()


def decompose_by_table(op: torch._ops.OpOverload) -> None:
    """Let a decomposition table apply to an op that writes its arguments.

    torch looks into the table after functionalization has wrapped such an op up. Before that it asks for a composite
    implementation, here the table's entry; NotImplemented where it has none goes on as if there were no such
    implementation. Private; the table was a global of torch until it became the tracing mode's own, as in 2.13.
    """

    def by_table(*args: Any, **kwargs: Any) -> Any:
        from torch.fx.experimental import proxy_tensor

        mode = proxy_tensor.get_proxy_mode()
        table = getattr(proxy_tensor, "CURRENT_DECOMPOSITION_TABLE", None) or getattr(mode, "decomposition_table", {})
        entry = table.get(op)
        return NotImplemented if entry is None else entry(*args, **kwargs)

    if torch._C.DispatchKey.CompositeImplicitAutograd not in op.py_kernels:
        op.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(by_table)


def apply_at_this_level(function: Any, *args: Any) -> Any:
    """Run an autograd.Function at the level of the torch.func transform that is at work, as torch does with those it
    makes of a user's. Private and the same from torch 2.8 to 2.13."""
    from torch._functorch import autograd_function

    levels: Any = autograd_function
    with levels.enable_single_level_autograd_function():
        return function.apply(*args)


def forget_guards(module: str) -> None:
    """Let the graph that Dynamo is making not look at the globals of `module`, whose functions it traced, at each call.

    For a module of ours whose globals nobody replaces. Guards on its functions, and on torch and the classes that they
    name, took 0.9 us of the entry into a graph. Private and the same from torch 2.8 to 2.13.
    """
    from torch._dynamo.source import GlobalSource

    guards = torch._guards.TracingContext.get().guards_context.dynamo_guards
    guards.remove_guards_with_source(GlobalSource(f"__import_{module.replace('.', '_dot_')}"))


@contextmanager
def around_opcheck() -> Iterator[None]:
    """What torch.library.opcheck must run inside of: no cyclic garbage collection. Delete with torch 2.9.

    A collection in the middle of AOTAutograd of 2.9 clears the attributes of a FakeTensor that only C++ still holds:
    "'FakeTensor' object has no attribute 'fake_mode'", for operators with a backward formula, about every second time.
    """
    if torch_version() > (2, 9) or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
