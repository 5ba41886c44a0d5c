"""The torch_tpu executor: a JAX program handed to torch_tpu's own jax_op, which compiles it for the TPU and runs it.

One operator of torch_tpu's serves every program: the program's name is a static argument of it, so nothing is
registered per function and nothing is left behind when a function dies. Written arguments travel in a list of their
own, which torch_tpu donates; it leaves them invalid, and the caller copies the new values back into them.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import KernelError
from .jax_bridge_arrays import runtime
from .jax_bridge_programs import Program, by_name
from .jax_bridge_shapes import infer, x64

NAME = "opreg_tpu::jax_program"


def on_tpu(
    program: Program, tensors: Sequence[torch.Tensor], written: tuple[int, ...] = ()
) -> tuple[list[torch.Tensor], Any]:
    """Run the program on tensors of torch_tpu; operands in `written` may be invalid afterwards, until copied into."""
    donated = [index for index in sorted(written) if _stands_alone(index, tensors)]
    given = [tensors[index] for index in donated]
    kept = [tensor for index, tensor in enumerate(tensors) if index not in donated]
    tree = infer(program, tensors)[0].tree
    program.calls += 1
    with x64([tensor.dtype for tensor in tensors]):
        return list(_operator()(given, kept, donated, program.name)), tree


def _stands_alone(index: int, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a tensor is all of its memory and no other operand has it, so that giving the memory away harms none."""
    storage = tensors[index].untyped_storage()
    others = (tensor for place, tensor in enumerate(tensors) if place != index)
    return storage.nbytes() == tensors[index].nbytes and all(
        other.untyped_storage()._cdata != storage._cdata for other in others
    )


@functools.cache
def _operator() -> Callable[[list[torch.Tensor], list[torch.Tensor], list[int], str], Sequence[torch.Tensor]]:
    """torch_tpu's operator for all programs, registered at first use."""
    jax_op = _find_jax_op()
    list_of_arrays = types.GenericAlias(list, (runtime().jax.Array,))  # list[jax.Array], known at run time only

    def jax_program(donated: list[Any], kept: list[Any], places: tuple[int, ...], program: str) -> list[Any]:
        arrays = list(kept)
        for place, value in zip(places, donated, strict=True):  # ascending, so each lands where it was
            arrays.insert(place, value)
        return by_name(program).leaves(*arrays)

    # torch_tpu reads the schema and what is static off the annotations; real types, since `Any` says nothing to it.
    jax_program.__annotations__ = {
        "donated": list_of_arrays,
        "kept": list_of_arrays,
        "places": list[int],
        "program": str,
        "return": list_of_arrays,
    }
    made: Callable[..., Sequence[torch.Tensor]] = jax_op(NAME, jax_program, donate_argnums=(0,))
    return made


def _find_jax_op() -> Callable[..., Any]:
    try:
        importlib.import_module("torch_tpu")  # it makes the modules below torch.tpu
        pallas = importlib.import_module("torch.tpu.pallas")
    except ImportError as missing:
        raise KernelError(
            f"JAX functions run on 'tpu' through torch_tpu, and importing it failed: {missing}. Install it with: "
            "pip install 'torch_tpu>=0.2.0'"
        ) from missing
    found: Callable[..., Any] = pallas.jax_op
    return found
