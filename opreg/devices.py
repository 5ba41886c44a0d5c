"""Device types: their names and which of them are present. Only `prepare` and `waiter` import a vendor's package."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

from .errors import KernelError, UnknownOpError, nearest

KNOWN = ("cpu", "cuda", "xpu", "tpu", "xla", "mps", "hpu", "mtia", "privateuseone")
"""Names accepted by register_kernel: torch's device types, and "tpu" for torch_tpu (torch_xla is "xla" on TPU too)."""


def check(device_type: str, who: str) -> str:
    """`device_type` itself, or UnknownOpError naming the nearest one."""
    if device_type not in KNOWN and device_type != torch._C._get_privateuse1_backend_name():
        raise UnknownOpError(
            f"{who}: unknown device type '{device_type}'; known are {', '.join(KNOWN)}.{nearest(device_type, KNOWN)}"
        )
    return device_type


def present() -> list[str]:
    """Device types that a process can use here; the first is what a user most likely means.

    "xla" wherever torch_xla is installed, which is looked up and not imported: before "cpu" where PJRT_DEVICE names
    another device than the CPU, after it otherwise. "tpu" where torch_tpu, which loads itself with torch, finds one.
    """
    found = []
    if torch.cuda.is_available():
        found.append("cuda")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found.append("xpu")
    if hasattr(torch, "tpu") and torch.tpu.is_available():
        found.append("tpu")
    if not _has_torch_xla():
        return [*found, "cpu"]
    accelerated = os.environ.get("PJRT_DEVICE", "CPU") != "CPU"
    return [*found, "xla", "cpu"] if accelerated else [*found, "cpu", "xla"]


@functools.cache
def _has_torch_xla() -> bool:
    return importlib.util.find_spec("torch_xla") is not None


def prepare(device_type: str, who: str) -> None:
    """Import what makes tensors of this device possible; KernelError where it is not installed."""
    if device_type == "xla":
        if not _has_torch_xla():
            raise KernelError(f"{who}: device 'xla' needs torch_xla, which is not installed")
        importlib.import_module("torch_xla")


def waiter(device_type: str) -> Callable[[], None]:
    """What waits until the device has done all it was told, and compiled and run what it has put off."""
    if device_type != "xla":
        wait: Callable[[], None] = torch.get_device_module(device_type).synchronize
        return wait
    sync = importlib.import_module("torch_xla").sync
    wait_device_ops = importlib.import_module("torch_xla.core.xla_model").wait_device_ops

    def finish() -> None:
        sync()
        wait_device_ops()

    return finish
