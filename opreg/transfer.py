"""Host tensors to a device without needless copies."""

from __future__ import annotations

import importlib
import sys

import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from .errors import KernelError


def to_device(tensor: torch.Tensor, device: torch.device | str, *, share: bool = False) -> torch.Tensor:
    """A tensor's values on `device`, with as few copies as the runtime allows.

    cuda, xpu: pinned memory goes over asynchronously (`non_blocking`), other memory as with .to(). xla: one copy, as
    with .to("xla"), whose time and memory the runtime's own ways do not better (`opreg bench --framework jax`).
    share: on XLA's CPU device, use the tensor's own memory and copy nothing. The caller must not write to the tensor as
        long as the result lives. KernelError where memory cannot be shared.
    """
    target = torch.device(device)
    if tensor.device == target:
        return tensor
    if target.type != "xla":
        if share:
            raise KernelError(
                f"opreg.transfer.to_device: host memory cannot be shared with '{target.type}', only with xla"
            )
        pinned = tensor.device.type == "cpu" and target.type in ("cuda", "xpu") and tensor.is_pinned()
        return tensor.to(target, non_blocking=pinned)
    if "torch_xla" not in sys.modules:
        raise KernelError("opreg.transfer.to_device: device 'xla' needs torch_xla; import torch_xla first")
    if not share:
        return tensor.to(target)
    kind = importlib.import_module("torch_xla.runtime").device_type()
    if kind != "CPU" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        what = (
            "a strided tensor" if not tensor.is_contiguous() else f"a tensor on '{tensor.device.type}', XLA on {kind}"
        )
        raise KernelError(
            "opreg.transfer.to_device: memory can be shared for contiguous tensors of the CPU with XLA's CPU device; "
            f"this is {what}"
        )
    dlpack = importlib.import_module("torch_xla.utils.dlpack")
    shared: torch.Tensor = dlpack.from_dlpack(to_dlpack(tensor.detach()))
    return shared
