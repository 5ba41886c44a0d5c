"""Whether a call is plain eager, so that the kernel may be called without the dispatcher.

Two guards answer with the same results. The Python one is generated into each op's function and asks torch's own
queries, 30 ns each. The native one (csrc/guard.cpp) answers for all arguments in one C call; it is used where it has
been built for this torch: by `opreg build`, or in the background after 16,384 calls, since most processes make few
and some make millions. Ops take it up while they are in use. OPREG_GUARD=python keeps to the first and builds nothing;
OPREG_GUARD=off sends every call through the dispatcher.

A direct call passes by implementations that others registered for the op with torch.library, such as an autocast rule.
So both guards compare the number of all registrations with that of the last look; where it has changed the op looks
again, and an op with such an implementation is never called directly.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active, _has_torch_function_unary, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad, profiler
from torch.utils._python_dispatch import _disable_current_modes

from . import library
from .errors import NotBuilt, RegistrationError
from .spec import ArgSpec, OpSpec

SETTINGS = ("native", "python", "off")

# What opreg itself registers for an op, or lets its user register.
_OWN = ("CompositeExplicitAutograd", "Meta", "Autograd", "AutogradXLA", "XLA", "FuncTorchBatched")
_OTHERS = tuple(sorted(set(torch._C.DispatchKey.__members__) - set(_OWN)))

_loaded: list[Any] = []  # the native guard's module, or the reason why it is not used

LOCK = threading.RLock()
"""Held while an op takes up a guard."""

OFTEN = 1 << 14
"""After so many calls with Python's guard a process asks for the native one, and after as many again."""

_waiting: list[Callable[[], None]] = []  # ops that count calls


def setting() -> str:
    """What OPREG_GUARD says."""
    wanted = os.environ.get("OPREG_GUARD") or "native"
    if wanted not in SETTINGS:
        raise RegistrationError(f"OPREG_GUARD={wanted!r} is unknown; it may be {', '.join(SETTINGS)}")
    return wanted


def native() -> Any:
    """The native guard's module where it is built and wanted, else None. Loaded once per process, in 1 ms."""
    if not _loaded:
        _loaded.append(_load())
    return None if isinstance(_loaded[0], (str, NotBuilt)) else _loaded[0]


@contextmanager
def python() -> Iterator[None]:
    """Ops that are called for the first time inside the `with` block get Python's guard: for tests and benchmarks."""
    before = list(_loaded)
    _loaded[:] = ["the caller's choice"]
    try:
        yield
    finally:
        _loaded[:] = before


def in_use() -> str:
    """Which guard this process uses, and why no better one: for `opreg doctor`."""
    if setting() == "off":
        return "none: every call goes through the dispatcher (OPREG_GUARD=off)"
    if native() is not None:
        return "native"
    wait = f"; a process that makes {OFTEN:,} calls builds it in the background" if _awaited() else ""
    return f"Python ({_loaded[0]}{wait})"


def _awaited() -> bool:
    return isinstance(_loaded[0], NotBuilt) and _loaded[0].buildable


def count(rewrite: Callable[[], None]) -> str:
    """The statement with which an op counts its calls, as long as the native guard may be built; else "".

    rewrite: called with LOCK held when there is one to take up, or nothing to wait for any more.
    """
    if native() is not None or not _awaited():
        return ""
    _waiting.append(rewrite)
    return f"if not _next_call() & {OFTEN - 1}: _often()"


def _often() -> None:
    from . import guard_build

    if not LOCK.acquire(blocking=False):
        return  # another thread is at it; there will be a next time
    try:
        if not _awaited():
            return
        try:
            if not guard_build.in_background():
                return
            _loaded[:] = [_load()]
        except NotBuilt as reason:
            _loaded[:] = [reason]
        told = list(_waiting)
        _waiting.clear()
        for rewrite in told:
            rewrite()
    finally:
        LOCK.release()


def _load() -> Any:
    from . import guard_build  # 1 ms of `import opreg`, for processes that call no op

    if setting() != "native":
        return f"OPREG_GUARD={setting()}"
    try:
        module = guard_build.load()
        with _disable_current_modes():  # the first call may be one that is being traced, and these are no part of it
            plain, parameter = torch.empty(2), torch.nn.Parameter(torch.empty(2))
            samples = [(tensor, tensor._cdata) for tensor in (plain, parameter, plain[1:])]
        module.bind(torch.Tensor, torch.nn.Parameter, library.implementations(), vars(forward_ad), samples)
    except NotBuilt as reason:
        return reason
    return module


def free_of_others(qualname: str) -> int:
    """How many implementations torch.library knows in all, or -1 if somebody else registered one for this op."""
    known = library.implementations()
    count, prefix = len(known), qualname.replace("::", "/")
    foreign = any(f"{prefix}/{key}" in known for key in _OTHERS)
    return -1 if foreign else count


def tensors(spec: OpSpec) -> list[ArgSpec]:
    """The arguments that a guard looks at."""
    return [arg for arg in spec.args if arg.type.startswith("Tensor") and not arg.layer]


def pick(spec: OpSpec, outside: bool, look: Callable[[], None]) -> Any:
    """The native guard of one op, called with its `tensors`; None where there is none.

    It returns what takes the call, or None if the general path must be gone. outside: asked in place of the dispatcher,
    not by it. Inside only the device is asked for, and a gradient that an op without formula would lose. look: called
    when somebody has registered something.
    """
    module, asked, first = native(), tensors(spec), spec.first_tensor
    if module is None or first is None or len(asked) > 64:
        return None
    kinds = "".join("tolm"[2 * arg.is_list + arg.optional] for arg in asked)
    return module.Pick(kinds, asked.index(first), outside, outside or loses_gradients(spec), look)


def loses_gradients(spec: OpSpec) -> bool:
    """Whether a call of this op, without a formula, must say that no gradient passes where one is wanted."""
    return bool(spec.returns or spec.mutates)


def condition(spec: OpSpec, first: ArgSpec) -> str:
    """Python's guard: the condition under which a direct call is the same as one through the dispatcher.

    Cheapest first (quiet ns): exact types 8 each, the profiler flag 3, two other globals 12 each, function modes 16,
    the mode queries 30 each, grad mode 31. Whether some tensor wants a gradient is asked in grad mode only. It does not
    see conjugate and negative views, which the native guard does: kernels that read memory resolve them. Nor does it
    see strided nested tensors and bare wrappers of functionalization, whose type is Tensor: the kernel gets them, where
    the operator refuses the call.
    """
    types = []
    for arg in tensors(spec):
        name = arg.name
        absent = f"{name} is None or " if arg.optional else ""
        plain = f"_plain_list({name})" if arg.is_list else f"type({name}) is _Tensor or type({name}) is _Parameter"
        types.append(f"({absent}{plain})")
    modes = [
        "not _profiler._is_profiler_enabled",
        "len(_implementations) == _seen",
        "_forward_ad._current_level < 0",
        # Of a plain tensor it asks for modes alone.
        f"not _function_mode({first.name})",
        "not _functorch()",
        "not _tracing()",
        "not _dispatch_modes()",
    ]
    return " and ".join([*types, *modes, f"not ({gradient_wanted(spec, plain=True)})"])


def gradient_wanted(spec: OpSpec, plain: bool = False) -> str:
    """The condition that grad mode is on and some tensor requires a gradient; "" for an op without tensors.

    plain: the tensors are of no subclass, of which an attribute takes 0.2 us.
    """
    asked = tensors(spec)
    if len(asked) == 1 and asked[0].type == "Tensor":
        return f"{asked[0].name}.requires_grad and _grad_enabled()"
    if not plain:
        names = ", ".join(arg.name for arg in asked)
        return f"_grad_enabled() and _any_requires_grad({names})" if asked else ""
    # One attribute costs 41 ns, torch's own _any_requires_grad 87 of one tensor and 254 of five.
    wants = []
    for arg in asked:
        present = f"{arg.name} is not None and " if arg.optional else ""
        wants.append(f"_any_requires_grad({arg.name})" if arg.is_list else f"{present}{arg.name}.requires_grad")
    return f"_grad_enabled() and ({' or '.join(wants)})" if asked else ""


def _plain_list(values: Any) -> bool:
    plain = (torch.Tensor, torch.nn.Parameter, type(None))
    return isinstance(values, (list, tuple)) and all(type(value) in plain for value in values)


NAMES: dict[str, Any] = {
    "_Parameter": torch.nn.Parameter,
    "_Tensor": torch.Tensor,
    "_any_requires_grad": torch._C._any_requires_grad,
    "_dispatch_modes": _len_torch_dispatch_stack,
    "_function_mode": _has_torch_function_unary,
    "_forward_ad": forward_ad,
    "_functorch": _are_functorch_transforms_active,
    "_grad_enabled": torch.is_grad_enabled,
    "_implementations": library.implementations(),
    "_next_call": itertools.count(1).__next__,
    "_often": _often,
    "_plain_list": _plain_list,
    "_profiler": profiler,
    "_seen": -1,  # how many registrations there were at the last look; set in an op's own globals
    "_tracing": _is_tracing,
}
"""What the conditions above name."""
