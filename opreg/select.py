"""Which kernel takes a call and why the others do not; forced choices."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from . import devices, registry, signature
from .errors import KernelError, RegistrationError, SignatureError, UnknownOpError, listing, nearest
from .facts import Fact
from .requires import split
from .spec import REFERENCE, REFERENCE_PRIORITY, KernelSpec, kernel_name

if TYPE_CHECKING:
    from .op import Op

log = logging.getLogger("opreg")

_NONE_FORCED: Mapping[str, str] = MappingProxyType({})
_FORCED: ContextVar[Mapping[str, str]] = ContextVar("opreg_forced_kernels", default=_NONE_FORCED)
_LOCK = threading.Lock()
_said: set[tuple[str, str]] = set()


class Decision(Fact):
    """What became of one kernel: state is "used", "ready", "refused", "missing" or "other device"; why says more."""

    kernel: KernelSpec
    state: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.kernel.name}: {self.state}{f' ({self.why})' if self.why else ''}"


class Explanation(Fact):
    """The choice for one op, device and (if given) call. `str()` is what the CLI and errors show."""

    op: str
    device_type: str
    selected: KernelSpec | None
    decisions: tuple[Decision, ...]
    forced: str | None = None
    fusion: str | None = None

    def __str__(self) -> str:
        head = (
            f"{self.op} on {self.device_type}: {self.selected.name if self.selected else 'no kernel takes this call'}"
        )
        if self.forced:
            head += f" (forced by {self.forced})"
        lines = [head, *(f"  {decision}" for decision in self.decisions)]
        return "\n".join([*lines, f"  fusion: {self.fusion}"] if self.fusion else lines)


def load(op: Op, kernel: KernelSpec) -> Callable[..., Any]:
    """The kernel's function, imported at first need and checked against the op's signature."""
    if callable(kernel.target):
        return kernel.target
    fn = _import(op, kernel.name, kernel.target)
    check_signature(op, f"kernel {kernel.name}", fn)
    return fn


def load_predicate(op: Op, kernel: KernelSpec) -> Callable[..., str | None] | None:
    if kernel.why_not is None or callable(kernel.why_not):
        return kernel.why_not
    predicate = _import(op, f"{kernel.name} (why_not)", kernel.why_not)
    if not asked_once(predicate):
        check_signature(op, f"why_not of kernel {kernel.name}", predicate)
    return predicate


def asked_once(predicate: Callable[..., str | None]) -> bool:
    """Whether a predicate takes no argument: its answer is about this machine, and holds for every call."""
    return not inspect.signature(predicate).parameters


def refusal(op: Op, predicate: Callable[..., str | None], args: tuple[Any, ...]) -> str | None:
    """What a kernel's predicate says to a call, of which it may want to see nothing."""
    found: str | None = predicate() if asked_once(predicate) else op.call_with(predicate, args)
    return found


def _import(op: Op, what: str, target: str) -> Callable[..., Any]:
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise KernelError(
            f"{op.name}: kernel {what} could not be loaded: importing '{module_name}' failed: {error}. Fix the import, "
            "or name the missing module in requires=... so that the kernel is left out where it is not installed"
        ) from error
    fn: Callable[..., Any] | None = getattr(module, attribute, None)
    if fn is None:
        names = [n for n in vars(module) if not n.startswith("_")]
        raise KernelError(
            f"{op.name}: kernel {what}: module '{module_name}' has no '{attribute}'.{nearest(attribute, names)}"
        )
    return fn


def check_signature(op: Op, what: str, fn: Callable[..., Any]) -> None:
    """SignatureError unless `fn` takes the op's arguments, by the same names, in the same order."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (ValueError, TypeError):
        return  # a builtin without a signature; the call itself will tell
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise SignatureError(f"{op.name}: {what} takes *args or **kwargs; write the op's parameters out")
    wanted = [(arg.name, arg.keyword_only) for arg in op.spec.args]
    got = [(p.name, p.kind is p.KEYWORD_ONLY) for p in parameters]
    if got != wanted:
        show = _show_parameters
        raise SignatureError(
            f"{op.name}: {what} has parameters ({show(got)}) but the op has ({show(wanted)}); "
            "write the op's parameters, by the same names, in the same order"
        )


def _show_parameters(names: list[tuple[str, bool]]) -> str:
    parts: list[str] = []
    for name, keyword_only in names:
        if keyword_only and "*" not in parts:
            parts.append("*")
        parts.append(name)
    return ", ".join(parts)


def candidates(op: Op, device_type: str) -> list[KernelSpec]:
    """Kernels that are for this device and whose requirements are installed, best first."""
    return [k for k in op.kernels if k.takes(device_type) and k.missing() is None]


def make_kernel(
    op: Op,
    device_types: str | Iterable[str] | None,
    target: str | Callable[..., Any],
    requires: str | Iterable[str],
    why_not: str | Callable[..., str | None] | None,
    priority: int,
) -> KernelSpec:
    """What register_kernel was told, checked."""
    if isinstance(target, str) and (target.count(":") != 1 or not all(target.split(":"))):
        raise RegistrationError(f"{op.name}: kernel target '{target}' is not of the form 'package.module:function'")
    types = (device_types,) if isinstance(device_types, str) else device_types
    name = REFERENCE if priority == REFERENCE_PRIORITY and types is None else kernel_name(target)
    needed = (requires,) if isinstance(requires, str) else tuple(requires)
    for requirement in needed:
        split(requirement, f"kernel {name}")
    return KernelSpec(
        name=name,
        device_types=None if types is None else tuple(devices.check(t, op.name) for t in types),
        target=target,
        requires=needed,
        why_not=why_not,
        priority=priority,
        source=target if isinstance(target, str) else signature.source_of(target),
    )


def refuse_tie(op: Op, kernel: KernelSpec) -> None:
    """RegistrationError for a kernel with the priority of another on a device that both take."""
    for other in op.kernels:
        overlap = kernel.device_types is None or other.device_types is None
        overlap = overlap or bool(set(kernel.device_types or ()) & set(other.device_types or ()))
        if overlap and other.priority == kernel.priority:
            raise RegistrationError(
                f"{op.name}: kernels '{other.name}' ({other.devices}) and '{kernel.name}' ({kernel.devices}) "
                f"both have priority {kernel.priority}; give one a larger priority=, the larger wins"
            )


def environment() -> dict[str, str]:
    """{op: kernel} of OPREG_KERNELS="ns::op=name,ns::other=name", each part checked."""
    text = os.environ.get("OPREG_KERNELS", "")
    forced = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, kernel = part.partition("=")
        if not equals or "::" not in name:
            raise UnknownOpError(f"OPREG_KERNELS: '{part}' is not of the form ns::op=kernel")
        forced[name.strip()] = kernel.strip()
    return forced


def forced_kernel(op: Op) -> tuple[KernelSpec, str] | None:
    """The kernel that use_kernel or OPREG_KERNELS demands for this op, and which of the two said so."""
    name, who = _FORCED.get().get(op.name), "use_kernel"
    if name is None:
        name, who = environment().get(op.name), "OPREG_KERNELS"
    return None if name is None else (kernel_named(op, name), who)


def kernel_named(op: Op, name: str) -> KernelSpec:
    for kernel in op.kernels:
        if kernel.name == name:
            return kernel
    names = [k.name for k in op.kernels]
    raise UnknownOpError(f"{op.name} has no kernel '{name}'; it has {listing(names)}.{nearest(name, names)}")


def why_not_fused(op: Op, device_type: str) -> str | None:
    """Why compiled graphs call a kernel on this device; None where they compile the body in."""
    fusion = op.fusion
    if fusion is None:
        return "it is not registered"
    if fusion.device_types is not None and device_type not in fusion.device_types:
        return f"it is registered for {' '.join(fusion.device_types)}"
    forced = forced_kernel(op)
    if forced is not None:
        return f"{forced[1]} chose {forced[0].name}"
    best = candidates(op, device_type)
    if best and best[0].name != REFERENCE and best[0].priority >= fusion.priority:
        return f"{best[0].name} has priority {best[0].priority}, fusion {fusion.priority}"
    return None


def explain(op: Op, device_type: str, args: tuple[Any, ...] | None = None) -> Explanation:
    """What runs and why, for a device and, where `args` (every argument, in order) are given, for that call."""
    forced = forced_kernel(op)
    selected: KernelSpec | None = None
    decisions = []
    for kernel in op.kernels:
        state, why = "ready", ""
        if not kernel.takes(device_type):
            state, why = "other device", f"for {kernel.devices}"
        elif (absent := kernel.missing()) is not None:
            state, why = "missing", absent
        elif args is not None and (predicate := load_predicate(op, kernel)) is not None:
            answer = refusal(op, predicate, args)
            if answer is not None:
                state, why = "refused", answer
        if forced is not None and kernel.name != forced[0].name and state == "ready":
            why = f"{forced[1]} chose {forced[0].name}"
        elif state == "ready" and selected is None:
            selected, state = kernel, "used"
        decisions.append(Decision(kernel, state, why))
    said = None
    if op.fusion is not None:
        reason = why_not_fused(op, device_type)
        said = f"not in compiled graphs ({reason})" if reason else "compiled graphs compute the body, not a kernel"
    return Explanation(op.name, device_type, selected, tuple(decisions), forced[1] if forced else None, said)


def no_kernel(op: Op, device_type: str, args: tuple[Any, ...]) -> KernelError:
    """The error for a call that nothing takes, with the reason of every kernel."""
    return KernelError(
        f"{explain(op, device_type, args)}\n"
        f"Register a kernel for '{device_type}', write a reference body, or move the tensors to a device listed above"
    )


def runner(op: Op, device_type: str) -> Callable[..., Any]:
    """The function that computes `op` on a device: the kernel itself, or a choice among several made per call."""
    found = candidates(op, device_type)
    forced = forced_kernel(op)
    if forced is not None or op.forced_somewhere:
        return _forced_runner(op, device_type)
    choices = []
    for kernel in found:
        predicate = load_predicate(op, kernel)
        if predicate is not None and asked_once(predicate):
            answer = predicate()
            if answer is not None:
                _say_once(op, f"{op.name} on {device_type}: {kernel.name} refused: {answer}")
                continue
            predicate = None
        choices.append((kernel, predicate, load(op, kernel)))
        if predicate is None:
            break  # it takes every call
    best = choices[0][0] if choices else None
    if best is not None and choices[0][1] is None:
        _say_choice(op, device_type, best)
        return choices[0][2]

    def chosen(index: int) -> bool:
        _say_choice(op, device_type, choices[index][0])
        return not _is_fallback(op, device_type, choices[index][0])

    return op.chooser(
        [(predicate, fn) for _, predicate, fn in choices],
        chosen,
        lambda index, why: _say_once(op, f"{op.name} on {device_type}: {choices[index][0].name} refused: {why}"),
        lambda args: no_kernel(op, device_type, args),
    )


def _forced_runner(op: Op, device_type: str) -> Callable[..., Any]:
    def choose(args: tuple[Any, ...]) -> Any:
        forced = forced_kernel(op)
        if forced is None:
            choice = explain(op, device_type, args).selected
            if choice is None:
                raise no_kernel(op, device_type, args)
            return op.call_with(load(op, choice), args)
        kernel, who = forced
        reason = None if kernel.takes(device_type) else f"it is for {kernel.devices}, not {device_type}"
        reason = reason or kernel.missing()
        if reason is None and (predicate := load_predicate(op, kernel)) is not None:
            reason = refusal(op, predicate, args)
        if reason is not None:
            raise KernelError(f"{op.name}: {who} forces kernel '{kernel.name}', which cannot run here: {reason}")
        return op.call_with(load(op, kernel), args)

    return op.gather(choose)


def _say_once(op: Op, text: str) -> None:
    with _LOCK:
        if (op.name, text) in _said:
            return
        _said.add((op.name, text))
    log.info("%s", text)


def _is_fallback(op: Op, device_type: str, kernel: KernelSpec) -> bool:
    """Whether an accelerator runs the reference for want of a kernel."""
    # An op with nothing but its body is complete as it is: there is no faster kernel to miss.
    return kernel.priority == REFERENCE_PRIORITY and device_type != "cpu" and len(op.kernels) > 1


def _say_choice(op: Op, device_type: str, kernel: KernelSpec) -> None:
    """Log the choice once; a reference on an accelerator is a warning, and an error with OPREG_STRICT=1."""
    if _is_fallback(op, device_type, kernel):
        others = [str(d) for d in explain(op, device_type).decisions if d.state in ("missing", "refused")]
        text = f"{op.name} on {device_type} falls back to its reference, which is slow; {listing(others)}"
        if os.environ.get("OPREG_STRICT", "") not in ("", "0"):
            raise KernelError(f"{text}. OPREG_STRICT is set, so this is an error")
        with _LOCK:
            first = (op.name, text) not in _said
            _said.add((op.name, text))
        if first:
            log.warning("%s", text)
        return
    _say_once(op, f"{op.name} on {device_type} runs {kernel.name}")


@contextmanager
def use_kernel(name: str, kernel: str) -> Iterator[None]:
    """Force a kernel for an op inside the `with` block (this thread and asyncio task only).

    name: the op, "ns::op" or a short name that is unique. kernel: a name that `opreg show` lists, such as "reference".
    A forced kernel that cannot run raises KernelError; an unknown name raises UnknownOpError.
    """
    op = registry.get(name)
    kernel_named(op, kernel)
    token = _FORCED.set({**_FORCED.get(), op.name: kernel})
    op.force(+1)
    try:
        yield
    finally:
        op.force(-1)
        _FORCED.reset(token)


__all__ = ["REFERENCE", "Decision", "Explanation", "explain", "runner", "use_kernel"]
