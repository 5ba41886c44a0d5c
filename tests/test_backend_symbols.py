"""Dynamic sizes are known to Inductor's cache by their order: other names of variables compile nothing again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters


def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.t() @ y, y.new_ones(x.shape[1], 1)], 1).sin() * x.shape[0]


def renamed(prompts: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return step(prompts, states)


def in_a_list(both: list[torch.Tensor]) -> torch.Tensor:
    return step(*both)


def other_size(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same sizes, of which the result takes another."""
    return torch.cat([x.t() @ y, y.new_ones(x.shape[1], 1)], 1).sin() * y.shape[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    yield
    torch._dynamo.reset()


def hits_and_misses(fn: Any, *inputs: Any, grad: bool = False) -> tuple[int, int]:
    """Compile with nothing but the files of the cache, and compare at two sizes of each dimension."""
    from torch._inductor.codecache import PyCodeCache

    torch._dynamo.reset()
    PyCodeCache.cache_clear()
    counters.clear()
    made = torch.compile(fn, backend="opreg", fullgraph=True, dynamic=True)
    for rows, columns, others in ((3, 4, 5), (7, 9, 6)):
        results = []
        for run in (made, fn):
            torch.manual_seed(0)
            # The memory layout is that of a transposed tensor: strides are sizes, too.
            x, y = (torch.randn(n, rows).t().requires_grad_(grad) for n in (columns, others))
            out = run([x, y]) if fn is in_a_list else run(x, y)
            if grad:
                out.square().sum().backward()
            results.append([out, x.grad, y.grad])
            assert out.shape == (columns, others + 1)
        torch.testing.assert_close(results[0], results[1])
    found = counters["inductor"]
    return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]


def test_other_names_are_the_same_graph_and_another_graph_is_not() -> None:
    assert hits_and_misses(step) == (0, 1)
    for fn in (renamed, in_a_list):
        assert hits_and_misses(fn) == (1, 0), fn.__name__
    assert hits_and_misses(other_size) == (0, 1)


def test_gradients_too() -> None:
    assert hits_and_misses(step, grad=True) == (0, 2)
    assert hits_and_misses(in_a_list, grad=True) == (2, 0)


def test_strides_are_kept_by_order_and_given_back_by_name() -> None:
    from opreg.backend_symbols import _renamed

    kept = {"s52": "size0", "s5": "size1"}
    assert _renamed([None, ("s52*s5", "s5 + 1", "1")], kept) == [None, ("size0*size1", "size1 + 1", "1")]
    assert _renamed(None, kept) is None
