"""opreg::shard_alike under SPMD with four CPU devices: what a sharding spreads to. In a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch_xla
from opreg.ops import shard_alike

PROGRAM = """
import json, numpy, torch, torch_xla, torch_xla.distributed.spmd as xs, torch_xla.runtime as xr
xr.use_spmd()
import opreg
from opreg.ops import shard_alike

device, mesh = torch_xla.device(), xs.Mesh(numpy.arange(4), (4,), ("a",))
sharding = torch_xla._XLAC._get_xla_sharding_spec

def pair(spec):
    x, y = torch.randn(8, 8).to(device), torch.randn(8, 8).to(device)
    xs.mark_sharding(x, mesh, spec)
    return x, y

rows, columns = pair(("a", None)), pair((None, "a"))
torch_xla.sync()
found, graphs = [], []
for step in range(3):
    results = [shard_alike(x, y * 2) for x, y in (rows, columns)]
    torch_xla.sync()
    found.append([sharding(tensor) for result in results for tensor in result])
    graphs.append(xr.get_num_cached_compilation_graph())
many = [shard_alike(*rows)] + [shard_alike(*columns) for _ in range(257)]
torch_xla.sync()
many = [[sharding(tensor) for tensor in result] for result in (many[0], *many[-2:])]
alone = columns[1] * 2
torch_xla.sync()
exact = all(torch.equal(b.cpu(), y.cpu() * 2) for (_, b), (_, y) in zip(results, (rows, columns)))
print(json.dumps({"found": found, "graphs": graphs, "alone": sharding(alone), "exact": exact, "many": many}))
"""


@pytest.fixture(scope="module")
def seen():
    settings = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300, env=settings
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_sharding_spreads_within_a_call_and_no_further(seen):
    by_rows, by_columns = "{devices=[4,1]0,1,2,3}", "{devices=[1,4]0,1,2,3}"
    assert seen["found"] == [[by_rows, by_rows, by_columns, by_columns]] * 3
    assert seen["alone"] not in (by_rows, by_columns)  # it is shard_alike that spreads it
    assert seen["exact"]


def test_hundreds_of_calls_in_a_graph_are_kept_apart(seen):
    by_rows, by_columns = "{devices=[4,1]0,1,2,3}", "{devices=[1,4]0,1,2,3}"
    assert seen["many"] == [[by_rows] * 2, [by_columns] * 2, [by_columns] * 2]


def test_the_next_step_is_the_same_graph(seen):
    assert len(set(seen["graphs"])) == 1


def test_without_spmd_it_copies():
    x, y = torch.randn(2, 3).to("xla"), torch.arange(6).view(2, 3).to("xla")
    before = x.cpu()
    a, b = shard_alike(x, y)
    a.zero_()
    torch_xla.sync()
    assert torch.equal(x.cpu(), before)
    assert a.cpu().eq(0).all()
    assert torch.equal(b.cpu(), y.cpu())
