"""Graphs that leave the process: opreg::jax_exported carries a JAX program, compiled to StableHLO by jax.export.

`program` is "name@digest", the digest being that of the artifact; `artifact` is the serialized jax.export.Exported
in base 85. It runs where the Python function does not exist; `import opreg.jax_bridge` defines the operator there.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import _compat, fake, library
from .errors import KernelError
from .jax_bridge_arrays import runtime
from .jax_bridge_cache import state
from .jax_bridge_executors import execute
from .jax_bridge_op import OP, batched_dims, gradients, tangents, vmap
from .jax_bridge_programs import Program, by_name, find_function
from .jax_bridge_shapes import evaluate, infer, symbolic_inputs, x64

if TYPE_CHECKING:
    from .op import Op
    from .op_function import OpFunction

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


def call_carried(program: Program, tensors: Sequence[torch.Tensor]) -> Any:
    """The program's results, by the operator that carries it."""
    tree = infer(program, tensors)[0].tree
    return tree.unflatten(EXPORTED(tensors, *carry(program, tensors)))


_named: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
"""The operators made from JAX functions, and what takes their place in a graph that leaves the process."""


def let_carry(op: Op[..., Any], kernel: Any) -> None:
    """Make calls of an op made from a JAX function carry it where torch.export traces them."""
    carried, overload = functools.partial(_carried, op, kernel), op.overload
    _named[overload] = carried
    if op.spec.mutates:
        _compat.decompose_by_table(overload)
    op.calls.otherwise(lambda *a, **k: (carried if torch.compiler.is_exporting() else overload)(*a, **k))


def _carried(op: Op[..., Any], kernel: Any, *args: Any, **kwargs: Any) -> Any:
    values = op.gather(lambda everything: everything)(*args, **kwargs)
    fake.bind(op.spec, values)  # the contract, which the operator's own fake would have checked
    return op.call_with(kernel.carried, values)


def jax_decompositions(*ops: OpFunction[..., Any]) -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """A table for ExportedProgram.run_decompositions, after which a program carries its JAX functions.

    torch.export with strict=False needs none: functions of call_jax and register_jax_op that the model calls carry
    themselves. With strict=True, or where the model calls torch.ops.ns.name, the program names what exists in this
    process only, until this table replaces it.

    ops: further ops whose kernel by from_jax is to be carried in their place; without it the program needs the package
        that registers them, as it needs any other operator's. Those that write arguments must be named the first time
        that the program is decomposed, which wraps them up.

    Raises KernelError for an op without such a kernel.

        program = torch.export.export(model, args, strict=True).run_decompositions(opreg.jax_decompositions())
    """
    table = {OP: _carried_program, **_named}
    for op in (function.op for function in ops):
        kernel = next((k.target for k in op.kernels if hasattr(k.target, "carried")), None)
        if kernel is None:
            raise KernelError(f"jax_decompositions: {op.name} has no kernel made by from_jax, so nothing to carry")
        table[op.overload] = functools.partial(_carried, op, kernel)
        if op.spec.mutates:
            _compat.decompose_by_table(op.overload)
    return table


def _carried_program(tensors: Sequence[torch.Tensor], program: str) -> list[torch.Tensor]:
    results: list[torch.Tensor] = EXPORTED(tensors, *carry(by_name(program), tensors))
    return results


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


def _vmap(info: Any, in_dims: Any, tensors: Sequence[torch.Tensor], program: str, artifact: str) -> tuple[Any, Any]:
    outputs = OP(list(tensors), vmap(loaded(program, artifact), batched_dims(in_dims[0], tensors)).name)
    return outputs, [0] * len(outputs)


EXPORTED = library.define(
    NAME,
    "(Tensor[] tensors, str program, str artifact) -> Tensor[]",
    (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
library.implement(NAME, _run)
library.fake(NAME, _fake)
library.autograd(NAME, _backward, _setup, tangents)
library.vmap(NAME, _vmap)
