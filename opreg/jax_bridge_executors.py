"""How a JAX program runs on each device type. Every executor returns only when the arguments may be overwritten.

An executor is told which operands the caller will overwrite with results (`written`): it may reuse their memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from .errors import KernelError
from .jax_bridge_arrays import COPY_LIMIT, PLAIN, WIDE, cpu_tensor, numpy_view, runtime, torch_dtype
from .jax_bridge_programs import Program
from .jax_bridge_tpu import on_tpu
from .jax_bridge_xla import on_xla


def execute(
    program: Program, tensors: Sequence[torch.Tensor], written: tuple[int, ...] = ()
) -> tuple[list[torch.Tensor], Any]:
    """Run a program on tensors of one device: the results' tensors, and their pytree."""
    kind = tensors[0].device.type if tensors else "cpu"
    executor = EXECUTORS.get(kind)
    if executor is None:
        raise KernelError(
            f"call_jax({program.function.label}): no executor for tensors on '{kind}'; JAX functions run on "
            f"{', '.join(EXECUTORS)}; move the tensors to one of these"
        )
    return executor(program, tensors, written)


def on_cpu(
    program: Program, tensors: Sequence[torch.Tensor], written: tuple[int, ...] = ()
) -> tuple[list[torch.Tensor], Any]:
    """Arguments as numpy views, results awaited; no result shares memory with an argument or another result."""
    if program.jitted is not None:
        views = plain_views(tensors)
        if views is not None:
            out = run_plain(program, views)
            return ([out], _LEAF.tree) if isinstance(out, torch.Tensor) else out
    run = runtime()
    with ExitStack() as scope:
        if any(tensor.dtype in WIDE for tensor in tensors):
            scope.enter_context(run.enable_x64(True))
        if not run.cpu_default:
            scope.enter_context(run.jax.default_device(run.cpu))
        arrays = [numpy_view(tensor) for tensor in tensors]
        program.calls += 1
        leaves, tree = run.flatten(program.compiled()(*arrays))
        _wait(leaves)
        return own(program, leaves, arrays), tree


class _Leaf:
    @functools.cached_property
    def tree(self) -> Any:
        """The pytree of a function that returns one array."""
        return runtime().flatten(0)[1]


_LEAF = _Leaf()


def plain_views(tensors: Sequence[Any], types: Container[type] | None = None) -> list[Any] | None:
    """numpy views of CPU tensors of the common types that have nothing special about them, or None."""
    views = []
    try:
        for tensor in tensors:
            if (types is not None and type(tensor) not in types) or tensor.dtype not in PLAIN or tensor.requires_grad:
                return None
            views.append(tensor.numpy())
    except (RuntimeError, TypeError):
        return None  # a negation bit or another device: torch says so here, and the general way deals with it
    return views if runtime().cpu_default else None


def run_plain(program: Program, views: list[Any]) -> Any:
    """Run on plain views. One small result comes back as a tensor, anything else as (tensors, pytree)."""
    run = runtime()
    program.calls += 1
    out = program.jitted(*views)
    if type(out) is run.array_type:
        host = run.numpy.asarray(out)
        if host.nbytes <= COPY_LIMIT and host.dtype in run.plain_dtypes:
            return torch.from_numpy(host.copy())
    leaves, tree = run.flatten(out)
    _wait(leaves)
    return own(program, leaves, views), tree


def _wait(leaves: list[Any]) -> None:
    """Results are awaited where they become tensors; a function without results is awaited here."""
    if not leaves:
        runtime().jax.effects_barrier()


def own(program: Program, leaves: list[Any], arrays: Sequence[Any]) -> list[torch.Tensor]:
    """Tensors of jax results. A large result's memory is taken over unless an argument or another result has it too."""
    label = program.function.label
    taken: set[int] = set()
    tensors = []
    for leaf in leaves:
        shared = False
        torch_dtype(leaf.dtype, label)  # refuses what has no memory, such as a random key
        if leaf.nbytes > COPY_LIMIT:
            taken = taken or {array.ctypes.data for array in arrays}
            address = leaf.unsafe_buffer_pointer()
            shared = address in taken
            taken.add(address)
        tensors.append(cpu_tensor(leaf, label, keep=shared))
    return tensors


Executor = Callable[[Program, Sequence[torch.Tensor], tuple[int, ...]], tuple[list[torch.Tensor], Any]]
EXECUTORS: dict[str, Executor] = {"cpu": on_cpu, "xla": on_xla, "tpu": on_tpu}
