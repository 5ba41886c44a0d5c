"""Host tensors to a device without needless copies."""

from __future__ import annotations

import importlib
import sys

import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from .errors import KernelError


def to_device(tensor: torch.Tensor, device: torch.device | str, *, share: bool = False) -> torch.Tensor:
    """A tensor's values on `device`, with as few copies as the runtime allows.

    cuda, xpu: pinned memory goes over asynchronously (`non_blocking`), other memory as with .to(). xla: the data goes
    straight to the runtime; .to("xla") copies the tensor on the host first.
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
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    if "torch_xla" not in sys.modules:
        raise KernelError("opreg.transfer.to_device: device 'xla' needs torch_xla; import torch_xla first")
    runtime = importlib.import_module("torch_xla.runtime")
    source = tensor.detach()
    if share:
        if runtime.device_type() != "CPU" or not source.is_contiguous():
            raise KernelError(
                "opreg.transfer.to_device: memory can be shared for contiguous tensors with XLA's CPU device; this is "
                f"{'a strided tensor' if not source.is_contiguous() else 'XLA on ' + str(runtime.device_type())}"
            )
        dlpack = importlib.import_module("torch_xla.utils.dlpack")
        shared: torch.Tensor = dlpack.from_dlpack(to_dlpack(source))
        return shared
    # `xla` without a number is the current device; the runtime wants it spelled out.
    model = importlib.import_module("torch_xla.core.xla_model")
    place = str(target) if target.index is not None else str(importlib.import_module("torch_xla").device())
    sent: torch.Tensor = model.send_cpu_data_to_device([source], torch.device(place))[0]
    return sent
