"""Benchmark cases of an operator: the workloads its speed is quoted for, each beside named baselines and its floor.

An op in module `pkg.ops.NAME` has them if there is a module `pkg.ops.NAME_bench` with a generator function named like
the op: `fn(device, generator, dtype=torch.bfloat16)` yields one dict per case, see `Case`. Found by its name, so that
declaring or listing ops imports no inputs and no baselines, which are of no use outside a benchmark.

Such a module may also say TPU = "module:function", for an op whose TPU kernel the TPU compiler can judge without a TPU:
the function takes the names of chips (none: its own choice) and gives rows, flat dicts with the same keys, or the
reason (str) why it cannot.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .errors import KernelError, RegistrationError, UnknownOpError, nearest

if TYPE_CHECKING:
    from .op import Op

Call = Callable[[], Any]

_COPY_BYTES = 1 << 26  # larger than any cache
_PEAK_SIZE = 1024


@dataclass(frozen=True)
class Case:
    """One workload.

    name: what `--case` selects. inputs: keyword arguments of the op.
    baselines: {name: "module:function"}; the function takes the inputs, does what can be done once, and returns a call
        without arguments that does the op's work another way, or the reason (str) why there is none here.
    bytes, flops: what the work must read and write, and compute, at least; the floors follow from them.
    """

    name: str
    inputs: Mapping[str, Any]
    baselines: Mapping[str, str]
    bytes: int
    flops: int


def module_of(op: Op[..., Any]) -> str:
    """Name of the module that has the op's cases, whether or not there is one."""
    return f"{op.body.__module__}_bench"


def has_cases(op: Op[..., Any]) -> bool:
    """Whether there is a module of cases, with some for this op."""
    name = module_of(op)
    return importlib.util.find_spec(name) is not None and hasattr(importlib.import_module(name), op.body.__name__)


def cases(op: Op[..., Any], device: torch.device, dtype: torch.dtype | None, seed: int) -> Iterator[Case]:
    """The op's cases, inputs made one case at a time. dtype None: the one that the cases were published for.

    Raises RegistrationError for a case that is not what `Case` says.
    """
    generate = getattr(importlib.import_module(module_of(op)), op.body.__name__)
    chosen = {} if dtype is None else {"dtype": dtype}
    for made in generate(device, torch.Generator().manual_seed(seed), **chosen):
        wanted = [f.name for f in fields(Case)]
        if not isinstance(made, Mapping) or set(made) != set(wanted):
            found = sorted(made) if isinstance(made, Mapping) else type(made).__name__
            raise RegistrationError(
                f"{module_of(op)}.{op.body.__name__}: a case is a dict with {', '.join(wanted)}; this one is {found}"
            )
        yield Case(**made)


def baseline(op: Op[..., Any], case: Case, name: str) -> Call | str:
    """What a case names as baseline: a call, or the reason why there is none here."""
    found: Call | str = _function(op, f"baseline '{name}' of case '{case.name}'", case.baselines[name])(case.inputs)
    return found


def compiled_for_tpu(op: Op[..., Any], chips: Sequence[str]) -> list[dict[str, Any]] | str:
    """Figures of the op's TPU kernel from the TPU compiler, or the reason why there are none here.

    Raises UnknownOpError for an op without such figures or a chip that is not known, KernelError for what the compiler
    refuses.
    """
    where = module_of(op)
    target = getattr(importlib.import_module(where), "TPU", None) if importlib.util.find_spec(where) else None
    if target is None:
        raise UnknownOpError(f"--tpu: {op.name} has no figures from the TPU compiler ({where} would name them as TPU)")
    try:
        found: Iterable[dict[str, Any]] | str = _function(op, "TPU", target)(chips)
        return found if isinstance(found, str) else list(found)
    except ValueError as error:
        raise UnknownOpError(f"--tpu: {error}") from error
    except RuntimeError as error:
        raise KernelError(f"{op.name}: {error}") from error


def _function(op: Op[..., Any], what: str, target: str) -> Callable[..., Any]:
    where, _, attribute = target.partition(":")
    module = importlib.import_module(where)
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if found is None:
        raise RegistrationError(
            f"{op.name}: {what}: module '{where}' has no '{attribute}'."
            f"{nearest(attribute, [n for n in vars(module) if not n.startswith('_')])}"
        )
    return found


def floors(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Call, int]]:
    """{what: (call, its bytes or operations)}: what this machine can do, to be timed in the same rounds as the rest.

    A copy counts the bytes that it reads and those that it writes. torch_xla would answer it with the source itself,
    so there every bit is turned over, which reads and writes as many bytes.
    """
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    a = torch.ones(_PEAK_SIZE, _PEAK_SIZE, dtype=dtype, device=device)
    copy = partial(torch.bitwise_not, source) if device.type == "xla" else partial(target.copy_, source)
    return {
        "copy": (copy, 2 * _COPY_BYTES),
        "matrix product": (partial(torch.mm, a, a), 2 * _PEAK_SIZE**3),
    }
