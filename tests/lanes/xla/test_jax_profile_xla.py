"""Regions, counts of graphs, no_recompiles and transfer on torch_xla (PJRT_DEVICE=CPU)."""

from __future__ import annotations

import pytest
import torch
import torch_xla

from opreg import profile, transfer
from opreg.recompiles import RecompileError, compiled_graphs, no_recompiles

device = torch_xla.device()


def test_sync_works_inside_a_region_and_the_region_is_in_the_trace(tmp_path):
    x = torch.ones(2).to(device)
    with profile.trace(tmp_path), profile.region("my_decode_region"):
        y = x + 1
        torch_xla.sync()
    assert y.cpu().tolist() == [2, 2]
    (found,) = tmp_path.rglob("*.xplane.pb")
    assert b"my_decode_region" in found.read_bytes()


def test_graphs_are_counted_and_a_new_one_is_an_error():
    def step(n):
        y = torch.ones(n, 3).to(device) * 5 - 1
        torch_xla.sync()
        return y.cpu()

    before = compiled_graphs().xla
    step(7)
    held = compiled_graphs().xla
    assert held > before
    with no_recompiles():
        step(7)
    assert compiled_graphs().xla == held
    with pytest.raises(RecompileError, match=r"torch_xla compiled \d+ graph"), no_recompiles():
        step(8)


def test_transfer_copies_or_shares():
    x = torch.arange(1 << 16, dtype=torch.float32)
    copied = transfer.to_device(x, "xla")
    assert copied.device.type == "xla"
    shared = transfer.to_device(x, "xla", share=True)
    assert torch.equal(shared.cpu(), x)
    x[0] = 9
    assert copied[0].item() == 0
    assert shared[0].item() == 9
    with pytest.raises(Exception, match="a strided tensor"):
        transfer.to_device(x[::2], "xla", share=True)
