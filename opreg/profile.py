"""Marked regions and traces of a run: torch.profiler on cpu, cuda and xpu, torch_xla's profiler on XLA.

with opreg.profile.trace("traces"):
    with opreg.profile.region("decode"):
        step()
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import KernelError


class region(contextlib.ContextDecorator):
    """A named stretch of a run, as a context manager or decorator; regions nest.

    It appears in torch.profiler's traces, in those of torch_xla and of JAX where these are loaded. torch_xla.sync()
    may be called inside: the region is an event on the time line, not a scope of the lazy graph. Inside torch.compile
    it has no effect; put it around the compiled call.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._open: list[contextlib.ExitStack] = []

    def __enter__(self) -> region:
        if torch.compiler.is_compiling():
            return self
        stack = contextlib.ExitStack()
        stack.enter_context(torch.profiler.record_function(self.name))
        if "torch_xla" in sys.modules:
            # Not torch_xla's Trace, which also opens a scope of the graph and then refuses sync().
            stack.enter_context(sys.modules["torch_xla"]._XLAC.profiler.TraceMe(self.name))
        if "jax" in sys.modules:
            stack.enter_context(sys.modules["jax"].profiler.TraceAnnotation(self.name))
        self._open.append(stack)
        return self

    def __exit__(self, *exc: Any) -> None:
        if not torch.compiler.is_compiling():
            self._open.pop().__exit__(*exc)


def start_server(port: int) -> Any:
    """Start torch_xla's profiler server; TensorBoard or xprof then sample the running process. Keep what it returns."""
    return _xla_profiler("start_server").start_server(port)


@contextlib.contextmanager
def trace(directory: str | Path) -> Iterator[torch.profiler.profile]:
    """Trace a block into `directory`: torch.json for chrome://tracing or Perfetto, and XLA's plugins/profile if loaded.

    Yields the torch.profiler.profile object, whose key_averages() is the table of what took how long.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    xla = _xla_profiler("trace") if "torch_xla" in sys.modules else None
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
        if xla is not None:
            xla.start_trace(str(folder))
        try:
            yield profiler
        finally:
            if xla is not None:
                importlib.import_module("torch_xla").sync(wait=True)
                xla.stop_trace()
    profiler.export_chrome_trace(str(folder / "torch.json"))


def _xla_profiler(what: str) -> Any:
    if "torch_xla" not in sys.modules:
        raise KernelError(
            f"opreg.profile.{what}: only XLA has a profiler server, and torch_xla is not imported; import it first, or "
            "use opreg.profile.trace on this device"
        )
    return importlib.import_module("torch_xla.debug.profiler")
