"""How many graphs are compiled, why, and a guard for production: no_recompiles() makes a new one an error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .errors import OpregError


class RecompileError(OpregError, RuntimeError):
    """A graph was compiled inside no_recompiles()."""


@dataclass(frozen=True)
class CompiledGraphs:
    """Graphs compiled so far in this process, by who compiled them, and why the latest ones were.

    torch: graphs made by torch.compile. xla: graphs that torch_xla holds compiled, None where it is not loaded. jax:
    traces of the JAX bridge. reasons: the latest reasons, oldest first, each starting with who compiled.
    """

    torch: int
    xla: int | None
    jax: int
    reasons: tuple[str, ...]


def compiled_graphs() -> CompiledGraphs:
    """Count the graphs compiled by torch.compile, torch_xla and the JAX bridge, with reasons where these are known."""
    reasons: list[str] = []
    graphs = 0
    utils: Any = sys.modules.get("torch._dynamo.utils")
    if utils is not None:
        graphs = utils.counters["stats"]["unique_graphs"]
        for metrics in utils.get_compilation_metrics():
            why = getattr(metrics, "recompile_reason", None)
            if why:
                reasons.append(f"torch.compile: {metrics.co_name}: {why}")
    bridge: Any = sys.modules.get("opreg.jax_bridge_cache")
    traces = 0
    if bridge is not None:
        info = bridge.jax_cache_info()
        traces = info.traces
        reasons += [f"jax: {reason}" for reason in info.reasons]
    return CompiledGraphs(graphs, _xla_graphs(), traces, tuple(reasons))


def _xla_graphs() -> int | None:
    runtime: Any = sys.modules.get("torch_xla.runtime")
    return None if runtime is None else int(runtime.get_num_cached_compilation_graph())


@contextlib.contextmanager
def no_recompiles() -> Iterator[None]:
    """Raise RecompileError when torch.compile, torch_xla or the JAX bridge compiles a graph inside the block.

    Warm up first; then wrap the serving loop. torch.compile and the JAX bridge are stopped before they compile, with
    the reason; torch_xla, which compiles behind the scenes, is found out at the end of the block. For the whole
    process, not for the thread.
    """
    from . import jax_bridge_cache

    before = _xla_graphs()
    jax_bridge_cache.state.forbidden += 1
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            yield
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        raise RecompileError(
            f"inside no_recompiles(): torch.compile met a call that needs a new graph: {error}"
        ) from error
    finally:
        jax_bridge_cache.state.forbidden -= 1
    after = _xla_graphs()
    if after is not None and before is not None and after > before:
        raise RecompileError(
            f"inside no_recompiles(): torch_xla compiled {after - before} graph(s), now {after}; shapes or the "
            "order of operations differ from the warm-up (XLA_SAVE_TENSORS_FILE shows the graphs)"
        )
