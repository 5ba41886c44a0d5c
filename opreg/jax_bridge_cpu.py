"""The CPU executor. The first call of a program for certain shapes and dtypes finds out how later ones are made.

Small arguments are copied into buffers that jax knows (jax_bridge_buffers), others become numpy views, whose memory jax
uses without a copy where it is aligned and contiguous. Results are awaited, so that the arguments may be overwritten,
and share no memory with an argument or another result.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ._compat import empty_cpu, tensor_guard
from .jax_bridge_arrays import COPY_LIMIT, cpu_tensor, numpy_view, runtime, torch_dtype
from .jax_bridge_buffers import Buffers, copy, suit
from .jax_bridge_programs import TENSORS, Program
from .jax_bridge_shapes import x64

_VARIANTS = 4
"""Recipes for tensors of the same shapes and dtypes, which differ in strides, in requires_grad, in torch's modes."""
_grad_enabled = torch.is_grad_enabled


class Recipe:
    """How a program is called for tensors like those of one call: through buffers, or as numpy views.

    fits: whether tensors are like those: one C++ call (0.2 us) that looks at type, dtype, sizes, strides, requires_grad
    and the dispatch keys, hence at device, layout, a pending negation and the transforms torch is in.
    """

    __slots__ = ("array_type", "dtype", "fits", "grads", "idle", "jitted", "new", "size", "sizes", "specs")

    def __init__(self, jitted: Any, tensors: Sequence[torch.Tensor], out: Any) -> None:
        run = runtime()
        self.jitted = jitted
        self.fits = tensor_guard(tensors)
        self.grads = any(tensor.requires_grad for tensor in tensors)
        self.specs = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self.sizes = [ctypes.c_size_t(tensor.nbytes) for tensor in tensors]
        self.idle: list[Buffers] | None = None
        if suit(tensors):
            buffers = Buffers(self.specs)
            self.idle = [buffers] if buffers.shared() else None
        # A result that is one small array is copied without being looked over: its dtype, and what is like it.
        self.array_type, self.dtype = run.array_type, None
        one: bool = type(out) is run.array_type
        if one and 0 < out.nbytes <= COPY_LIMIT and run.numpy.asarray(out).flags.c_contiguous:
            self.dtype, self.size = out.dtype, ctypes.c_size_t(out.nbytes)
            strides = torch.empty(out.shape, device="meta").stride()
            self.new = functools.partial(empty_cpu, out.shape, strides, run.to_torch_dtype[out.dtype])


def run_quick(program: Program, tensors: Sequence[Any]) -> Any:
    """Run for arguments whose recipe is known: a tensor, or (tensors, pytree); None if the long way must do it."""
    recipe = program.recipe
    if recipe is None or not recipe.fits(*tensors):
        recipe = _recipe(program, tensors)
        if recipe is None:
            return None
    idle = recipe.idle
    if idle is None:
        return _run_views(program, recipe, tensors)
    try:
        buffers = idle.pop()  # one step of the interpreter: no two threads get the same
    except IndexError:
        buffers = Buffers(recipe.specs)
    for address, tensor, size in zip(buffers.addresses, tensors, recipe.sizes):  # noqa: B905 - strict costs 30 ns
        copy(address, tensor.data_ptr(), size)
    program.calls += 1
    out = recipe.jitted(*buffers.arrays)
    # Its dtype is another where jax's x64 mode was switched since.
    if type(out) is recipe.array_type and out.dtype is recipe.dtype:
        out.block_until_ready()
        found = recipe.new()
        copy(found.data_ptr(), out.unsafe_buffer_pointer(), recipe.size)
    else:
        found = _finish(program, out, buffers.hosts)
    idle.append(buffers)
    return found


def _run_views(program: Program, recipe: Recipe, tensors: Sequence[torch.Tensor]) -> Any:
    if recipe.grads and _grad_enabled():
        return None
    with x64([dtype for _, dtype in recipe.specs]):
        views = [numpy_view(tensor) for tensor in tensors]
        program.calls += 1
        return _finish(program, recipe.jitted(*views), views)


def _recipe(program: Program, tensors: Sequence[Any]) -> Recipe | None:
    """A recipe other than the one used last."""
    if any(type(tensor) not in TENSORS for tensor in tensors):
        return None
    key = tuple([(tensor.shape, tensor.dtype) for tensor in tensors])
    for recipe in program.recipes.get(key, ()):
        if recipe.fits(*tensors):
            program.recipe = recipe
            found: Recipe = recipe
            return found
    return None


def _finish(program: Program, out: Any, arrays: Sequence[Any]) -> tuple[list[torch.Tensor], Any]:
    """The results as the caller's own, and their pytree."""
    leaves, tree = runtime().flatten(out)
    if not leaves:
        runtime().jax.effects_barrier()  # results are awaited where they become tensors, a call without any is here
    return own(program, leaves, arrays), tree


def on_cpu(
    program: Program, tensors: Sequence[torch.Tensor], written: tuple[int, ...] = ()
) -> tuple[list[torch.Tensor], Any]:
    """Arguments as buffers or views, results awaited; no result shares memory with an argument or another result."""
    run = runtime()
    found = run_quick(program, tensors) if tensors else None
    if found is not None:
        return ([found], run.leaf) if type(found) is torch.Tensor else found
    with ExitStack() as scope:
        scope.enter_context(x64([tensor.dtype for tensor in tensors]))
        if not run.cpu_default:
            scope.enter_context(run.jax.default_device(run.cpu))
        arrays = [numpy_view(tensor) for tensor in tensors]
        program.calls += 1
        jitted = program.compiled()
        out = jitted(*arrays)
        found = _finish(program, out, arrays)
    if program.jitted is jitted:  # a trace may have evicted this very program
        _note_recipe(program, jitted, tensors, out)
    return found


def _note_recipe(program: Program, jitted: Any, tensors: Sequence[torch.Tensor], out: Any) -> None:
    """Remember how this call goes, if nothing about it is special."""
    if not tensors or not runtime().cpu_default or any(type(t) not in TENSORS or not t.numel() for t in tensors):
        return
    variants = program.recipes.setdefault(tuple([(tensor.shape, tensor.dtype) for tensor in tensors]), [])
    if len(variants) < _VARIANTS:
        program.recipe = Recipe(jitted, tensors, out)
        variants.append(program.recipe)


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
