"""How a JAX program runs on each device type. Every executor returns only when the arguments may be overwritten.

An executor is told which operands the caller will overwrite with results (`written`): it may reuse their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import KernelError
from .jax_bridge_cpu import on_cpu
from .jax_bridge_cuda import on_cuda
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


Executor = Callable[[Program, Sequence[torch.Tensor], tuple[int, ...]], tuple[list[torch.Tensor], Any]]
EXECUTORS: dict[str, Executor] = {"cpu": on_cpu, "cuda": on_cuda, "xla": on_xla, "tpu": on_tpu}
