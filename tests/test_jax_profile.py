"""Marked regions, traces, counts of graphs, no_recompiles, transfer: without torch_xla (its lane has the rest)."""

from __future__ import annotations

import json
import sys

import jax.numpy as jnp
import pytest
import torch

import opreg
from opreg import profile, recompiles, transfer
from opreg.recompiles import RecompileError, compiled_graphs, no_recompiles


@pytest.fixture(autouse=True)
def without_torch_xla(monkeypatch):
    """As in a process that has not imported it; in its lane, another file's tests may have."""
    for name in ("torch_xla", "torch_xla.runtime"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def plus_one(a):
    return jnp.add(a, 1)


def test_regions_appear_in_traces(tmp_path):
    @profile.region("decorated")
    def step(x):
        return opreg.call_jax(plus_one, (x,))

    with profile.trace(tmp_path / "run") as profiler, profile.region("outer"), profile.region("inner"):
        step(torch.ones(2))
        step(torch.ones(2))
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert (counts["outer"], counts["inner"], counts["decorated"]) == (1, 1, 2)
    events = json.loads((tmp_path / "run" / "torch.json").read_text())["traceEvents"]
    assert {"outer", "inner", "decorated"} <= {event.get("name") for event in events}


def test_a_region_does_not_break_a_graph():
    def step(x):
        with profile.region("inside"):
            return x + 1

    torch._dynamo.reset()
    assert torch.compile(step, fullgraph=True, backend="eager")(torch.ones(1)).item() == 2
    with profile.region("around"):
        assert torch.compile(step, fullgraph=True, backend="eager")(torch.ones(1)).item() == 2


def test_the_server_is_xlas():
    with pytest.raises(opreg.KernelError, match="torch_xla is not imported"):
        profile.start_server(9012)


def test_graphs_are_counted_with_reasons():
    torch._dynamo.reset()
    before = compiled_graphs()
    compiled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    for n in (2, 3):
        compiled(torch.ones(n))
    opreg.call_jax(lambda a: a - 1, (torch.ones(2),))
    after = compiled_graphs()
    assert (after.torch - before.torch, after.jax - before.jax, after.xla) == (2, 1, None)
    assert any("torch.compile" in reason and "size" in reason for reason in after.reasons)
    assert "jax: " in after.reasons[-1]


def test_no_recompiles_raises_with_the_reason():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x * 3, backend="eager", dynamic=False)
    compiled(torch.ones(2))
    opreg.call_jax(plus_one, (torch.ones(5),))
    with no_recompiles():
        compiled(torch.ones(2))
        opreg.call_jax(plus_one, (torch.ones(5),))
    with pytest.raises(RecompileError, match=r"torch\.compile met a call that needs a new graph"), no_recompiles():
        compiled(torch.ones(4))
    with pytest.raises(RecompileError, match=r"would be traced and compiled: plus_one.*new shapes"), no_recompiles():
        opreg.call_jax(plus_one, (torch.ones(6),))
    with pytest.raises(RuntimeError, match="mine"), no_recompiles():
        raise RuntimeError("mine")
    opreg.call_jax(plus_one, (torch.ones(6),))
    compiled(torch.ones(4))
    assert recompiles.RecompileError is RecompileError


def test_transfer_says_what_cannot_be():
    x = torch.ones(2)
    assert transfer.to_device(x, "cpu") is x
    assert transfer.to_device(x, "meta").is_meta
    with pytest.raises(opreg.KernelError, match="cannot be shared with 'meta'"):
        transfer.to_device(x, "meta", share=True)
    with pytest.raises(opreg.KernelError, match="needs torch_xla"):
        transfer.to_device(x, "xla")
