"""How a JAX program runs on each device type. Every executor returns only when the arguments may be overwritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from .errors import KernelError
from .jax_bridge_arrays import COPY_LIMIT, WIDE, cpu_tensor, numpy_view, runtime, torch_dtype
from .jax_bridge_programs import Program


def execute(program: Program, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
    """Run a program on tensors of one device: the results' tensors, and their pytree."""
    kind = tensors[0].device.type if tensors else "cpu"
    executor = EXECUTORS.get(kind)
    if executor is None:
        raise KernelError(
            f"call_jax({program.function.label}): no executor for tensors on '{kind}'; JAX functions run on "
            f"{', '.join(EXECUTORS)}; move the tensors to one of these"
        )
    program.calls += 1
    return executor(program, tensors)


def on_cpu(program: Program, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
    """Arguments as numpy views, results awaited; no result shares memory with an argument or another result."""
    run = runtime()
    with ExitStack() as scope:
        if any(tensor.dtype in WIDE for tensor in tensors):
            scope.enter_context(run.enable_x64(True))
        if not run.cpu_default:
            scope.enter_context(run.jax.default_device(run.cpu))
        arrays = [numpy_view(tensor) for tensor in tensors]
        leaves, tree = run.flatten(program.compiled()(*arrays))
        if not leaves:
            run.jax.effects_barrier()
        return own(program, leaves, arrays), tree


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


EXECUTORS: dict[str, Callable[[Program, Sequence[torch.Tensor]], tuple[list[torch.Tensor], Any]]] = {"cpu": on_cpu}
