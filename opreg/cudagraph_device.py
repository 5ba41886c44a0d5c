"""The few calls that capturing needs of a device. Everything else about captured pieces is in opreg.cudagraphs.

Not run on a GPU yet: no machine of this project had one with a torch that has CUDA. The tests put a stand-in here that
records and replays on the CPU and spoils all memory that a replay may spoil."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Outputs = Sequence[torch.Tensor]
Run = Callable[..., Outputs]


class Device(Protocol):
    """What records the work of a call once and repeats it on the same memory."""

    def available(self) -> bool: ...

    def new_pool(self) -> Any:
        """Memory for captures; captures that share it may use each other's memory between their own replays."""

    def zeros(self, like: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
        """Memory outside of any pool for a captured call's input."""

    def warm_up(self, run: Run, inputs: Sequence[Any]) -> Outputs:
        """Run once as a capture would, so that lazy set-up (autotuning, library handles) is not captured."""

    def capture(self, run: Run, inputs: Sequence[Any], pool: Any) -> tuple[Callable[[], None], Outputs]:
        """Record `run(*inputs)` without executing it: (replay, the outputs, which every replay writes again)."""


class CudaDevice:
    """CUDA graphs through torch.cuda."""

    def available(self) -> bool:
        return torch.cuda.is_available()

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def zeros(self, like: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
        made = torch.empty_strided(tuple(size), tuple(stride), dtype=like.dtype, device=like.device)
        return made.zero_()

    def warm_up(self, run: Run, inputs: Sequence[Any]) -> Outputs:
        # On a stream of its own, as torch.cuda.graph captures: cuBLAS and others set up per stream.
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            made = run(*inputs)
        here.wait_stream(side)
        for tensor in made:
            tensor.record_stream(here)
        return made

    def capture(self, run: Run, inputs: Sequence[Any], pool: Any) -> tuple[Callable[[], None], Outputs]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (a data loader that pins memory) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            made = run(*inputs)
        return graph.replay, made


DEVICES: dict[str, Device] = {"cuda": CudaDevice()}
