"""How the host learns that a cache was written by kernels of another convention, without waiting for the device."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from ..reference.gdn_checks import fail


class _Device:
    """report [1], which kernels set to 1, and what the host has seen of it."""

    def __init__(self, device: torch.device) -> None:
        self.report = torch.zeros(1, dtype=torch.int32, device=device)
        self.module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self.seen = torch.zeros(1, dtype=torch.int32, pin_memory=self.module is not None)
        self.event: Any = None  # of the copy that is under way

    def poll(self) -> bool:
        """Whether a kernel has reported; starts a copy if none is under way, and waits for none."""
        if self.module is None:
            self.seen.copy_(self.report)
        else:
            capturing = getattr(self.module, "is_current_stream_capturing", None)
            if capturing is not None and capturing():
                return False  # neither events nor the host are any use while a graph is recorded
            if self.event is not None and not self.event.query():
                return False
        found = bool(self.seen)
        if found:
            self.seen.zero_()
            self.report.zero_()
        if self.module is not None:
            self.seen.copy_(self.report, non_blocking=True)
            self.event = self.module.Event()
            self.event.record()
        return found


class Windows:
    """The reports of speculative calls, by device: of the call itself on the CPU, of earlier ones elsewhere."""

    def __init__(self) -> None:
        self._devices: dict[torch.device, _Device] = {}
        self._lock = threading.Lock()

    def _of(self, device: torch.device) -> _Device:
        if device not in self._devices:
            self._devices[device] = _Device(device)
        return self._devices[device]

    def report(self, device: torch.device) -> Tensor:
        """What a kernel stores a 1 in."""
        with self._lock:
            return self._of(device).report

    def check(self, device: torch.device) -> None:
        """ValueError if a call so far, as far as its report has arrived, was given another convention's cache."""
        with self._lock:
            found = self._of(device).poll()
        if found:
            when = "this call" if device.type == "cpu" else "this call or an earlier one"
            fail(
                f"conv_state: {when} was given slots of a row of spec_state_indices_tensor, all accepted, that do not "
                "hold windows one token apart, so another kind of kernel wrote this cache: one that keeps a rolling "
                "buffer in column 0. Outputs of such rows are NaN and their slots were left alone. A cache stays with "
                "the backend that wrote it; start an empty one"
            )


windows = Windows()
