"""The CUDA executor: tensors become JAX arrays and back through DLPack, ordered by streams, with no copy and no wait.

Both conversions are DLPack's own: jax hands torch its stream, which then waits for torch's current one, and torch hands
jax its current stream, which then waits for the results. So the host waits for nothing, and whatever torch does next on
its current stream, to arguments too, comes after the function. jax takes 75% of a GPU's memory at its first use; a
process that shares the GPU with torch sets XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from .errors import KernelError
from .jax_bridge_arrays import STORED, runtime, torch_dtype
from .jax_bridge_programs import Program
from .jax_bridge_shapes import x64


def on_cuda(
    program: Program, tensors: Sequence[torch.Tensor], written: tuple[int, ...] = ()
) -> tuple[list[torch.Tensor], Any]:
    """Run the program on the GPU of its tensors, in order with torch's current stream there."""
    run, label, device = runtime(), program.function.label, tensors[0].device
    _check_device(label, device)
    # torch exports tensors of the current device only, and synchronises that one's current stream.
    with torch.cuda.device(device), x64([tensor.dtype for tensor in tensors]):
        arrays = [_array(tensor) for tensor in tensors]
        program.calls += 1
        leaves, tree = run.flatten(program.compiled()(*arrays))
        return _own([_tensor(leaf, label) for leaf in leaves], tensors), tree


def _check_device(label: str, device: torch.device) -> None:
    """KernelError unless jax has this GPU."""
    try:
        found = runtime().jax.devices("gpu")
    except RuntimeError as absent:
        raise KernelError(
            f"call_jax({label}): its tensors are on {device}, and this jax was built without CUDA ({absent}). Install "
            "pip install 'jax[cuda12]' (or cuda13, as torch has it), or move the tensors to the CPU"
        ) from absent
    numbers = [gpu.local_hardware_id for gpu in found]
    if device.index not in numbers:
        raise KernelError(
            f"call_jax({label}): its tensors are on {device}, but jax sees the GPUs {numbers} only; see "
            "jax_cuda_visible_devices (JAX_CUDA_VISIBLE_DEVICES)"
        )


def _array(tensor: torch.Tensor) -> Any:
    """The tensor's memory as a JAX array; a copy of it where the layout is not the plain one."""
    run = runtime()
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    stored = STORED.get(tensor.dtype)
    if stored is None or run.to_numpy_dtype[tensor.dtype] in run.dlpack_dtypes:
        return run.jax.dlpack.from_dlpack(plain)
    return run.jax.dlpack.from_dlpack(plain.view(stored[0])).view(run.to_numpy_dtype[tensor.dtype])


def _tensor(array: Any, label: str) -> torch.Tensor:
    run = runtime()
    dtype = torch_dtype(array.dtype, label)
    if array.dtype in run.dlpack_dtypes:
        taken: torch.Tensor = from_dlpack(array)
        return taken
    as_stored: torch.Tensor = from_dlpack(array.view(run.to_numpy_dtype[STORED[dtype][0]]))
    return as_stored.view(dtype)


def _own(results: list[torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Results with memory of their own: jax returns an argument that is a result, and one result twice, as it is."""
    taken = {tensor.data_ptr() for tensor in tensors if tensor.numel()}
    owned = []
    for result in results:
        shared = result.numel() > 0 and result.data_ptr() in taken
        taken.add(result.data_ptr())
        owned.append(result.clone() if shared else result)
    return owned
