"""The torch operator behind every JAX function: opreg::jax_call(Tensor[] tensors, str program) -> Tensor[].

`program` names an entry of jax_bridge_programs. Its gradient is the same operator with the program's vjp, so that
gradients of any order exist; its batching rule is the same operator with the program's jax.vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import library, lowering
from .jax_bridge_arrays import runtime
from .jax_bridge_cpu import run_quick
from .jax_bridge_executors import execute
from .jax_bridge_programs import Program, by_name
from .jax_bridge_shapes import evaluate, infer

NAME = "opreg::jax_call"


def run(tensors: Sequence[torch.Tensor], program: str) -> list[torch.Tensor]:
    """What the dispatcher and compiled graphs call."""
    entry = by_name(program)
    if entry.recipe is not None:
        found = run_quick(entry, tensors)
        if found is not None:
            return [found] if type(found) is torch.Tensor else found[0]
    return execute(entry, tensors)[0]


def _fake(tensors: Sequence[torch.Tensor], program: str) -> list[torch.Tensor]:
    # A graph that holds this op runs its fake first, and may be lowered by Inductor then.
    lowering.install(OP, "_opreg_jax_call", ("from opreg.jax_bridge_op import run as _opreg_jax_call",))
    entry = by_name(program)
    found, values = infer(entry, tensors)
    entry.latest_tree = found.tree
    device = tensors[0].device if tensors else torch.device("cpu")
    return [
        torch.empty([evaluate(size, values) for size in sizes], dtype=dtype, device=device)
        for sizes, dtype in found.leaves
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[torch.Tensor]) -> None:
    tensors, name = inputs
    ctx.save_for_backward(*tensors)
    ctx.program = by_name(name)
    ctx.alive = ctx.program.function.get()  # the graph needs the function for as long as it may run backward


def _backward(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], None]:
    return gradients(ctx, ctx.needs_input_grad[0], grads, lambda tensors, name: OP(tensors, name)), None


def gradients(
    ctx: Any,
    needed: Sequence[bool],
    grads: Sequence[torch.Tensor | None],
    call: Callable[[list[torch.Tensor], str], Sequence[torch.Tensor]],
) -> list[torch.Tensor | None]:
    """Gradients of the saved tensors of a call of ctx.program, None for those that need none."""
    tensors = ctx.saved_tensors
    wanted = tuple(
        i for i, tensor in enumerate(tensors) if needed[i] and (tensor.is_floating_point() or tensor.is_complex())
    )
    given = tuple(i for i, grad in enumerate(grads) if grad is not None)
    result: list[torch.Tensor | None] = [None] * len(tensors)
    if wanted and given:
        program = vjp(ctx.program, len(tensors), wanted, given)
        found = call([*tensors, *(grad for grad in grads if grad is not None)], program.name)
        for index, grad in zip(wanted, found, strict=True):
            result[index] = grad
    return result


def tangents(
    ctx: Any, tensors: Sequence[torch.Tensor], given: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """Tangents of the results of a call of ctx.program on `tensors`, of theirs: None for whole numbers."""
    program = jvp(ctx.program, len(tensors), tuple(i for i, tangent in enumerate(given) if tangent is not None))
    found = iter(OP([*tensors, *(t for t in given if t is not None)], program.name))
    results = infer(ctx.program, tensors)[0].leaves
    return tuple(next(found) if dtype.is_floating_point or dtype.is_complex else None for _, dtype in results)


def vjp(program: Program, arity: int, wanted: tuple[int, ...], given: tuple[int, ...]) -> Program:
    """The program (primals, cotangents of the results `given`) -> gradients of the primals `wanted`."""

    def body(*arrays: Any) -> list[Any]:
        run = runtime()
        jnp, dtypes = run.jax.numpy, run.jax.dtypes
        primals, cotangents = list(arrays[:arity]), arrays[arity:]

        def restricted(*chosen: Any) -> list[Any]:
            full = list(primals)
            for index, value in zip(wanted, chosen, strict=True):
                full[index] = value
            return program.leaves(*full)

        results, pull = run.jax.vjp(restricted, *(primals[i] for i in wanted))
        seeds: list[Any] = []
        by_index = dict(zip(given, cotangents, strict=True))
        for index, value in enumerate(results):
            if not dtypes.issubdtype(value.dtype, jnp.inexact):
                seeds.append(run.numpy.zeros(value.shape, dtypes.float0))
            elif index in by_index:
                # jax transposes, torch takes the adjoint: they differ by complex conjugation on both sides.
                seeds.append(jnp.conj(by_index[index]).astype(value.dtype))
            else:
                seeds.append(jnp.zeros(value.shape, value.dtype))
        return [jnp.conj(grad) for grad in pull(seeds)]

    return program.derive(("vjp", arity, wanted, given), body)


def jvp(program: Program, arity: int, given: tuple[int, ...]) -> Program:
    """The program (primals, tangents of the primals `given`) -> tangents of the results that have any."""

    def body(*arrays: Any) -> list[Any]:
        run = runtime()
        primals = list(arrays[:arity])

        def restricted(*chosen: Any) -> list[Any]:
            full = list(primals)
            for index, value in zip(given, chosen, strict=True):
                full[index] = value
            return program.leaves(*full)

        results, tangents = run.jax.jvp(restricted, [primals[i] for i in given], list(arrays[arity:]))
        inexact = run.jax.numpy.inexact
        return [t for r, t in zip(results, tangents, strict=True) if run.jax.dtypes.issubdtype(r.dtype, inexact)]

    return program.derive(("jvp", arity, given), body)


def _vmap(
    info: Any, in_dims: Any, tensors: Sequence[torch.Tensor], program: str
) -> tuple[list[torch.Tensor], list[int]]:
    outputs = OP(list(tensors), vmap(by_name(program), batched_dims(in_dims[0], tensors)).name)
    return outputs, [0] * len(outputs)


def batched_dims(dims: Any, tensors: Sequence[torch.Tensor]) -> tuple[int | None, ...]:
    """The mapped dimension of each tensor, of what torch says of the list."""
    return tuple(dims) if isinstance(dims, (list, tuple)) else (dims,) * len(tensors)


def vmap(program: Program, dims: tuple[int | None, ...]) -> Program:
    """The program mapped over one dimension of each operand with an entry in `dims`; results carry it in front."""

    def body(*arrays: Any) -> list[Any]:
        mapped: list[Any] = runtime().jax.vmap(program.leaves, in_axes=dims, out_axes=0)(*arrays)
        return mapped

    return program.derive(("vmap", *dims), body)


# Any layout of the arguments will do (a numpy view has strides), so compiled graphs need not copy for this op.
OP = library.define(
    NAME, "(Tensor[] tensors, str program) -> Tensor[]", (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
)
library.implement(NAME, run)
library.fake(NAME, _fake)
library.autograd(NAME, _backward, _setup, tangents)
library.vmap(NAME, _vmap)
