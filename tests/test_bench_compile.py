"""What `opreg bench --framework cold layers warm` compares with computes the same, and shares what it should."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from opreg import bench_compile
from opreg.bench_by_torch_key import by_torch_key


@torch.no_grad()
def test_the_split_by_torch_s_key_computes_the_same_and_compiles_like_pieces_once() -> None:
    torch._dynamo.reset()
    bench_compile.define_attention()
    model, x = bench_compile.Model(4), torch.randn(16, bench_compile.WIDTH)
    backend = by_torch_key(bench_compile.NAME)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    # Of five pieces, three are like one another; the keys of torch 2.8 tell them apart.
    assert len(backend.artifacts) == (5 if torch.__version__.startswith("2.8.") else 3)


def test_further_layers_are_timed_with_every_piece_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[int]] = {"opreg": [], bench_compile.TORCH_KEY: []}

    def backend(way: str) -> Callable[..., Any]:
        def run(gm: Any, inputs: Any, options: Any = None) -> None:
            calls[way].append(len(gm.graph.nodes))
            sum(range(1000 * len(gm.graph.nodes)))  # an amount of work that grows with the layers

        return run

    monkeypatch.setattr(bench_compile, "opreg_backend", backend("opreg"))
    monkeypatch.setattr(bench_compile, "by_torch_key", lambda name: backend(bench_compile.TORCH_KEY))
    found = list(bench_compile.further_layers(rounds=2, few=1, many=2))
    assert [row.what for row in found] == list(calls)
    assert [len(made) for made in calls.values()] == [6, 6]
    assert all(len(set(made[:3])) == 1 and made[0] < made[3] for made in calls.values())


def test_cold_compiles_are_the_least_of_their_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"whole graph": [8.0, 12.0], bench_compile.TORCH_KEY: [6.0, 4.0], "opreg": [3.0, 2.0]}
    monkeypatch.setattr(bench_compile, "fresh", lambda way: seconds.setdefault(way, [1.0, 1.0]).pop())
    rows = [(row.what, row.baseline, row.seconds, row.ratio) for row in bench_compile.cold_compiles(rounds=2)]
    assert rows[0] == ("whole graph", "whole graph", 8.0, 1.0)
    assert rows[2] == ("opreg", "whole graph", 2.0, 0.25)
    assert rows[-1] == ("opreg", bench_compile.TORCH_KEY, 2.0, 0.5)
