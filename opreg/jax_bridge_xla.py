"""The XLA executor: a JAX function lowered for the platform of torch_xla and recorded as one call in its lazy graph.

Nothing runs here: the HLO of the function becomes a node of the graph, compiled with everything around it at the next
sync. So whatever cannot work is refused at the call; found at the sync, it would spoil the whole graph.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch

from .errors import KernelError
from .jax_bridge_arrays import JaxArgumentError, runtime
from .jax_bridge_programs import Program
from .jax_bridge_shapes import x64

_PLATFORMS = {"CPU": "cpu", "TPU": "tpu", "CUDA": "cuda", "GPU": "cuda"}
# Handlers that jaxlib registers in its own CPU client; torch_xla's client has none of them.
_JAX_ONLY = re.compile(r'custom_call_target="((?:lapack|xla_ffi|xla_python|blas|hipsolver|cusolver|cu_)[^"]*)"')
_SHARD_GROUP = re.compile(r"shard_as \d+|shard_like \d+|sharding_group_id")


class Embedded(NamedTuple):
    """A program for tensors of certain shapes: what `record` (torch_xla's function) needs to add it to a graph."""

    name: str
    computation: Any
    tree: Any
    record: Any
    grouped: bool


def on_xla(
    program: Program, tensors: Sequence[torch.Tensor], written: tuple[int, ...] = ()
) -> tuple[list[torch.Tensor], Any]:
    """Record the program in the lazy graph of torch_xla."""
    key: Any = (*[(tensor.shape, tensor.dtype) for tensor in tensors], _configuration())
    known = program.embedded.get(key)
    if known is None:
        known = program.embedded[key] = _embed(program, tensors)
    if known.grouped:
        known = _with_its_own_group(program, key, tensors)
    program.calls += 1
    results: list[torch.Tensor] = known.record(known.name, list(tensors), known.computation)
    return results, known.tree


def _with_its_own_group(program: Program, key: Any, tensors: Sequence[torch.Tensor]) -> Embedded:
    """The program with a shard group that no other call in this graph has.

    The group's number is part of the HLO, and equal numbers in one graph are one group: recorded twice, one
    computation would have all its tensors sharded alike. The n-th call after a sync always gets the n-th computation,
    so that the next step's graph is the same.
    """
    metrics = importlib.import_module("torch_xla.debug.metrics")
    step = metrics.counter_value("MarkStep")
    known_step, turns = program.embedded.get("turns", (None, {}))
    if known_step != step:
        turns = {}
        program.embedded["turns"] = step, turns
    turn = turns[key] = turns.get(key, -1) + 1
    place = (key, turn) if turn else key
    found: Embedded | None = program.embedded.get(place)
    if found is None:
        # A function of its own: jax keeps what it lowered, group numbers included, by function.
        found = program.embedded[place] = _embed(program, tensors, lambda *arrays: program.body(*arrays))
    return found


def record_plain(
    program: Program, tensors: Sequence[Any], types: Container[type]
) -> tuple[list[torch.Tensor], Any] | None:
    """on_xla for ordinary XLA tensors without gradients whose shapes were seen before; None for anything else."""
    key: list[Any] = []
    for tensor in tensors:
        if type(tensor) not in types or not tensor.is_xla or tensor.requires_grad:
            return None
        key.append((tensor.shape, tensor.dtype))
    known = program.embedded.get((*key, _configuration()))
    if known is None or known.grouped:
        return None
    program.calls += 1
    return known.record(known.name, tensors, known.computation), known.tree


def _configuration() -> tuple[Any, ...]:
    """The settings of jax on which a lowered function depends."""
    config = runtime().jax.config
    return config.jax_enable_x64, config.jax_default_matmul_precision, config.jax_numpy_dtype_promotion


def _embed(program: Program, tensors: Sequence[torch.Tensor], fn: Callable[..., Any] | None = None) -> Embedded:
    """The program, or `fn` in its place, lowered for tensors of these shapes."""
    native = importlib.import_module("torch_xla")._XLAC
    device = importlib.import_module("torch_xla.runtime").device_type()
    platform = _PLATFORMS.get(device)
    label = program.function.label
    if platform is None:
        raise KernelError(f"call_jax({label}): torch_xla runs on '{device}'; known are {', '.join(_PLATFORMS)}")
    run = runtime()
    arguments = [run.jax.ShapeDtypeStruct(tuple(t.shape), run.to_numpy_dtype[t.dtype]) for t in tensors]
    with x64([tensor.dtype for tensor in tensors]):
        # An argument that the function ignores stays a parameter: the graph hands over all of them.
        jitted = run.jax.jit(fn or program.counted, keep_unused=True)
        if platform == "tpu":
            # torch_xla's libtpu may be older than jax (2.9 asks for 0.0.21, which knows no Pallas kernel that jax 0.7.1
            # lowers for its own libtpu); only an exported function keeps to what was known a few weeks earlier.
            exported = run.export.export(jitted, platforms=(platform,))(*arguments)
            jitted = run.jax.jit(exported.call, keep_unused=True)
        lowered = jitted.trace(*arguments).lower(lowering_platforms=(platform,))
        hlo = lowered.compiler_ir("hlo")
    leaves, tree = run.flatten(lowered.out_info)
    text = hlo.as_hlo_text()
    foreign = sorted(set(_JAX_ONLY.findall(text)))
    if foreign:
        raise KernelError(
            f"call_jax({label}): it needs {', '.join(foreign)}, which only JAX's own runtime has and torch_xla's lacks "
            "(linear algebra and callbacks on the host do); move the tensors to the CPU for this call"
        )
    computation = native._xla_op_computation_from_module_proto(label, hlo.as_serialized_hlo_module_proto())
    name = "jax::" + re.sub(r"\W", "_", label)
    trial = native._xla_user_computation(name, list(tensors), computation)
    for index, (leaf, tensor) in enumerate(zip(leaves, trial, strict=True)):
        expected = run.to_torch_dtype.get(leaf.dtype)
        if tensor.dtype != expected:
            raise JaxArgumentError(
                f"call_jax({label}): result {index} has dtype {leaf.dtype}, which torch_xla would hand over as "
                f"{tensor.dtype}; convert it in the function"
            )
    return Embedded(name, computation, tree, native._xla_user_computation, bool(_SHARD_GROUP.search(text)))
