"""Paged attention on torch_xla (PJRT_DEVICE=CPU): values, the cache in place, openxla graphs, a graph for a TPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_xla
import torch_xla.core.xla_model as xla_model
import torch_xla.debug.metrics as metrics
from opreg.ops import (
    kv_cache_update,
    ragged_paged_attention,
    ragged_paged_attention_lse,
    ragged_paged_attention_update,
)
from opreg.ops.paged_attention_inputs import make_batch
from torch import Tensor

import opreg
from opreg import jax_bridge_xla
from opreg.recompiles import no_recompiles

device = torch_xla.device()


def on_cpu(call):
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in call.items()}


def same_bits(a, b):
    return torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


def compare(op, call):
    """The op on XLA against the kernel in torch; the cache, if it is written, bit for bit."""
    reference = on_cpu(call)
    with opreg.use_kernel(op.name, next(k.name for k in op.op.kernels if k.name.startswith("cpu/rpa_torch"))):
        want = op(**reference)
    got = op(**call)
    assert same_bits(call["kv_pages"], reference["kv_pages"])
    for left, right in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        assert left.device.type == "xla"
        assert left.dtype is right.dtype
        limit = 1e-2 if left.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(left.cpu(), right, rtol=limit, atol=limit)


SAMPLES = [
    *((ragged_paged_attention, index, torch.float32) for index in range(4)),
    (ragged_paged_attention, 2, torch.bfloat16),
    (ragged_paged_attention_lse, 2, torch.float32),
    *((ragged_paged_attention_update, index, torch.float32) for index in range(3)),
]


@pytest.mark.parametrize(("op", "index", "dtype"), SAMPLES)
def test_values(op, index, dtype):
    compare(op, list(op.samples("xla", dtype))[index])


def test_an_8_bit_float_cache():
    batch = make_batch([(5, 18), (1, 29), (0, 9)], kv_dtype=torch.float8_e4m3fn, kv_layout="HND", device=device)
    k, v = torch.randn(2, batch.q.shape[0], 2, 16) * 100  # some of it is more than the type can hold
    call = {**batch._asdict(), "k": k.to(device), "v": v.to(device), "kv_layout": "HND", "k_scale": 0.1, "v_scale": 2.0}
    compare(ragged_paged_attention_update, call)


@pytest.mark.parametrize("index", range(4))
def test_cache_update(index):
    call = list(kv_cache_update.samples("xla"))[index]
    reference = on_cpu(call)
    with opreg.use_kernel(kv_cache_update.name, "reference"):
        kv_cache_update(**reference)
    tail = call["kv_pages"][1:]  # made before: it must see the update
    kv_cache_update(**call)
    assert same_bits(call["kv_pages"], reference["kv_pages"])
    assert same_bits(tail, reference["kv_pages"][1:])


def test_nothing_runs_and_nothing_is_read_before_the_sync():
    call = next(iter(ragged_paged_attention.samples("xla")))
    torch_xla.sync()
    metrics.clear_all()
    out = ragged_paged_attention(**call)
    assert metrics.metric_data("ExecuteTime") is None
    assert metrics.metric_data("TransferFromDeviceTime") is None
    assert out.cpu().isfinite().all()


def test_the_kernel_that_runs_and_why():
    first, hnd, *_ = ragged_paged_attention.samples("xla")
    assert "pallas/rpa: used" in str(ragged_paged_attention.explain(**first))
    told = str(ragged_paged_attention.explain(**hnd))
    assert "pallas/rpa: refused (page_size 4 with HND pages of float32: a page must fill register tiles" in told
    assert "pallas/rpa_plain: used" in told


def test_a_mistake_is_an_error_at_the_call_and_spoils_nothing():
    call = next(iter(ragged_paged_attention.samples("xla")))
    y = call["q"] + 1
    with pytest.raises(ValueError, match=r"soft_cap is -2\.0; it must be finite and positive"):
        ragged_paged_attention(**{**call, "soft_cap": -2.0})
    torch_xla.sync()
    assert y.shape == call["q"].shape


class Layer(torch.nn.Module):
    """An attention layer around the fused op."""

    heads, kv_heads, head_dim, width, pages, page_size = 4, 2, 128, 64, 6, 16

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(self.width, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.o = torch.nn.Linear(self.heads * self.head_dim, self.width, bias=False)

    def forward(self, x, kv_pages, *lengths):
        rows = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = rows.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        out = ragged_paged_attention_update(q, k, v, kv_pages, *lengths, sm_scale=self.head_dim**-0.5, kv_layout="HND")
        return x + self.o(out.flatten(1))

    def cache(self):
        return torch.zeros(self.pages, 2 * self.kv_heads, self.page_size, self.head_dim)


TABLE = torch.tensor([[4, 1], [0, 3]], dtype=torch.int32)


def step(rows, lengths):
    """x and the index tensors of one step of two sequences; the padded sizes are the same for every step."""
    starts = [0, rows[0], sum(rows)]
    x = torch.randn(8, Layer.width, generator=torch.Generator().manual_seed(sum(lengths)))
    return x, [torch.tensor(lengths, dtype=torch.int32), TABLE, torch.tensor(starts, dtype=torch.int32)]


STEPS = [((5, 2), (5, 2)), ((1, 1), (6, 3)), ((1, 7), (7, 10)), ((0, 8), (7, 18))]


def test_a_model_serves_in_one_openxla_graph():
    torch.manual_seed(0)
    model = Layer()
    twin = Layer().to(device)
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(twin, backend="openxla", fullgraph=True)
    count = torch.tensor([2], dtype=torch.int32)
    cache, eager, graph = model.cache(), model.cache().to(device), model.cache().to(device)
    with torch.no_grad():
        for number, (rows, lengths) in enumerate(STEPS):
            x, index = step(rows, lengths)
            x, index = x, [*index, count]
            want = model(x, cache, *index)
            moved = [tensor.to(device) for tensor in (x, *index)]
            found = twin(moved[0], eager, *moved[1:])
            if number < 2:  # torch_xla compiles an openxla graph at its first run, and what surrounds it at the second
                result = compiled(moved[0], graph, *moved[1:]).cpu()
            else:
                with no_recompiles():  # lengths are data
                    result = compiled(moved[0], graph, *moved[1:]).cpu()
            used = sum(rows)
            for got in (found.cpu(), result):
                torch.testing.assert_close(got[:used], want[:used], rtol=1e-4, atol=1e-4)
    for pages in (eager, graph):
        torch.testing.assert_close(pages.cpu(), cache, rtol=1e-5, atol=1e-5)


# In a process of its own: libtpu aborts where it cannot go on. jax has no public function that compiles somebody else's
# StableHLO for a topology; this is what its own ahead-of-time compilation calls.
COMPILE = """
import sys
import numpy
from jax._src.compiler import get_compile_options
from jax._src.lib import xla_client
from jax.experimental import topologies

chip = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
options = get_compile_options(
    num_replicas=1, num_partitions=1, device_assignment=numpy.array([[chip.id]]), use_spmd_partitioning=False
)
module = open(sys.argv[1], "rb").read()
executable = chip.client.compile(module, xla_client.DeviceList((chip,)), options)
(compiled,) = executable.hlo_modules()
calls = compiled.to_string().count('custom_call_target="tpu_custom_call"')
print(chip.device_kind, calls, executable.get_compiled_memory_stats().generated_code_size_in_bytes)
"""


@pytest.fixture
def for_tpu(monkeypatch):
    """Graphs are lowered for a TPU while they are traced here; nothing of them may run."""
    opreg.jax_bridge.jax_cache_clear()
    monkeypatch.setitem(jax_bridge_xla._PLATFORMS, "CPU", "tpu")
    yield
    opreg.jax_bridge.jax_cache_clear()


def test_the_whole_graph_compiles_for_v6e(for_tpu, tmp_path: Path):
    libtpu = Path(sys.prefix) / "libtpu"
    assert libtpu.is_dir(), f"no {libtpu}: `make lane-xla` puts libtpu there, beside the environment"
    model = Layer().to(torch.bfloat16).to(device)
    x, index = step((5, 2), (5, 2))
    index.append(torch.tensor([2], dtype=torch.int32))
    kv_pages = model.cache().to(torch.bfloat16).to(device)
    moved = [tensor.to(device) for tensor in (x.to(torch.bfloat16), *index)]
    torch_xla.sync()
    with torch.no_grad():
        out = model(moved[0], kv_pages, *moved[1:])
    text = xla_model.get_stablehlo([out, kv_pages])
    assert text.count("@tpu_custom_call") == 2  # the cache update and the attention
    assert text.count("stablehlo.dot_general") == 2
    module = tmp_path / "graph.mlirbc"
    module.write_bytes(xla_model.get_stablehlo_bytecode([out, kv_pages]))
    environment = {
        **os.environ,
        "PYTHONPATH": str(libtpu),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(module)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *_, answer = done.stdout.strip().split("\n")
    kind, calls, code = answer.rsplit(" ", 2)
    assert (kind, calls) == ("TPU v6 lite", "2")
    assert int(code) > 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_seqs", [3], "num_seqs is 3, but the index tensors hold 2"),
        ("kv_lens", [5, 99], r"kv_lens\[1\] is 99, but a sequence has room"),
        ("page_indices", [[0, 1, 0], [2, 6, 0]], r"page_indices\[1, 1\] is 6, but kv_pages has 6 pages"),
    ],
)
def test_the_kernel_in_torch_checks_values(name, value, message):
    batch = make_batch([(2, 5), (1, 6)], spare_seqs=0)._replace(**{name: torch.tensor(value, dtype=torch.int32)})
    sent = [tensor.to(device) for tensor in batch]
    with opreg.use_kernel("opreg::ragged_paged_attention", "cpu/rpa_torch"):
        for call in (ragged_paged_attention, torch.ops.opreg.ragged_paged_attention):
            with pytest.raises(ValueError, match=message):
                call(*sent)
