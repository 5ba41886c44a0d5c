"""Device types: their names and which of them are present. Imports no vendor package."""

from __future__ import annotations

import torch

from .errors import UnknownOpError, nearest

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
    """Device types that can be used in this process now, cpu last (the first is what a user most likely means)."""
    found = []
    if torch.cuda.is_available():
        found.append("cuda")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found.append("xpu")
    return [*found, "cpu"]
