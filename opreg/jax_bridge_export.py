"""Graphs that leave the process: opreg::jax_exported carries a JAX program, compiled to StableHLO by jax.export.

`program` is "name@digest", the digest being that of the artifact; `artifact` is the serialized jax.export.Exported
in base 85. It runs where the Python function does not exist; `import opreg.jax_bridge` defines the operator there.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from . import library
from .errors import KernelError
from .jax_bridge_arrays import runtime
from .jax_bridge_cache import state
from .jax_bridge_executors import execute
from .jax_bridge_op import OP, gradients
from .jax_bridge_programs import Program, find_function
from .jax_bridge_shapes import evaluate, infer, symbolic_inputs, x64

NAME = "opreg::jax_exported"
PLATFORMS = {"cpu": "cpu", "cuda": "cuda", "xla": "tpu", "tpu": "tpu"}


def carry(program: Program, tensors: Sequence[torch.Tensor]) -> tuple[str, str]:
    """(program, artifact) for a call with these tensors, sizes symbolic where theirs are."""
    run = runtime()
    inputs = symbolic_inputs(program, tensors)
    with x64([tensor.dtype for tensor in tensors]):
        arguments = [run.jax.ShapeDtypeStruct(shape, run.to_numpy_dtype[dtype]) for shape, dtype in inputs]
        platform = PLATFORMS.get(tensors[0].device.type if tensors else "cpu", "cpu")
        jitted = run.jax.jit(lambda *arrays: program.leaves(*arrays))
        exported = run.export.export(jitted, platforms=[platform])(*arguments)
        # One order of gradients travels along: a loaded program can be fine-tuned.
        differentiable = any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors)
        try:
            data = bytes(exported.serialize(vjp_order=1 if differentiable else 0))
        except ImportError as missing:
            raise _no_serializer(missing) from missing
    return f"{program.function.label}@{_digest(data)}", base64.b85encode(data).decode()


def _no_serializer(missing: ImportError) -> KernelError:
    return KernelError(
        f"torch.export of a JAX function: {missing}. Install what it needs with: pip install 'opreg[jax]'"
    )


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def loaded(name: str, artifact: str) -> Program:
    """The program of an artifact, deserialized at first sight."""
    known = state.programs.get(name)
    if known is not None:
        return known
    label, _, digest = name.rpartition("@")
    try:
        data = base64.b85decode(artifact)
    except ValueError as error:
        raise KernelError(f"opreg::jax_exported: the artifact of '{name}' is not base 85: {error}") from error
    if _digest(data) != digest:
        raise KernelError(f"opreg::jax_exported: the artifact of '{name}' is damaged: its digest is {_digest(data)}")
    try:
        exported = runtime().export.deserialize(bytearray(data))
    except ImportError as missing:
        raise _no_serializer(missing) from missing

    def body(*arrays: Any) -> list[Any]:
        results: list[Any] = list(exported.call(*arrays[: len(exported.in_avals)]))
        return results

    body.__qualname__ = body.__name__ = label
    function = find_function(body)
    function.pin()
    return Program(name, function, body)


def _run(tensors: Sequence[torch.Tensor], program: str, artifact: str) -> list[torch.Tensor]:
    return execute(loaded(program, artifact), tensors)[0]


def _fake(tensors: Sequence[torch.Tensor], program: str, artifact: str) -> list[torch.Tensor]:
    found, values = infer(loaded(program, artifact), tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    return [
        torch.empty([evaluate(size, values) for size in sizes], dtype=dtype, device=device)
        for sizes, dtype in found.leaves
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[torch.Tensor]) -> None:
    tensors, name, artifact = inputs
    ctx.save_for_backward(*tensors)
    ctx.program = loaded(name, artifact)


def _backward(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], None, None]:
    return gradients(ctx, ctx.needs_input_grad[0], grads, lambda tensors, name: OP(tensors, name)), None, None


EXPORTED = library.define(
    NAME,
    "(Tensor[] tensors, str program, str artifact) -> Tensor[]",
    (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
library.implement(NAME, _run)
library.fake(NAME, _fake)
library.autograd(NAME, _backward, _setup)
