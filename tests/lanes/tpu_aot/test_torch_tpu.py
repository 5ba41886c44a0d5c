"""The bridge under the real torch_tpu: its jax_op takes the bridge's operator and exports our kernels for a TPU.

There is no device "tpu" here, so nothing runs; tests/test_jax_tpu.py runs the bridge with a stand-in.
"""

import os
import subprocess
import sys
from pathlib import Path

BESIDE = Path(sys.prefix) / "torch_tpu"

# torch_tpu changes torch for the whole process.
SCRIPT = """
import jax
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from opreg import jax_bridge_tpu
from opreg.ops import kv_cache_update, ragged_paged_attention_lse, ragged_paged_attention_update

exported = []
export = jax.export.export

def remember(*args, **kwargs):
    made = export(*args, **kwargs)

    def call(*args, **kwargs):
        exported.append(made(*args, **kwargs))
        return exported[-1]

    return call

jax.export.export = remember

def run(op, *args, written=(), **kwargs):
    (kernel,) = (k.target for k in op.op.kernels if "tpu" in (k.device_types or ()) and k.priority == 0)
    program, tensors, _ = kernel.program(args, kwargs)
    results, _ = jax_bridge_tpu.on_tpu(program, tensors, written)
    graph = exported[-1].mlir_module()
    print(op.name, *(f"{x.dtype}{list(x.shape)}" for x in results), exported[-1].platforms, end=" ")
    print(graph.count("@tpu_custom_call"), "tf.aliasing_output" in graph or "jax.buffer_donor" in graph)

with FakeTensorMode():
    bf16 = torch.bfloat16
    q, k, pages = (torch.empty(s, dtype=bf16) for s in ((64, 8, 128), (64, 2, 128), (16, 32, 4, 128)))
    index = [torch.empty(s, dtype=torch.int32) for s in ((4,), (4, 4), (5,), (1,))]
    run(ragged_paged_attention_lse, q, pages, *index, sinks=torch.empty(8), soft_cap=30.0, sliding_window=7)
    run(ragged_paged_attention_update, q, k, k.clone(), pages, *index, k_scale=0.5, written=(3,))
    run(kv_cache_update, k, k.clone(), pages, torch.empty(64, dtype=torch.int64), written=(2,))
"""

EXPECTED = """\
opreg::ragged_paged_attention_lse torch.bfloat16[64, 8, 128] torch.float32[64, 8] ('tpu',) 1 False
opreg::ragged_paged_attention_update torch.bfloat16[16, 32, 4, 128] torch.bfloat16[64, 8, 128] ('tpu',) 2 True
opreg::kv_cache_update torch.bfloat16[16, 32, 4, 128] ('tpu',) 0 True
"""


def test_the_kernels_are_exported_for_a_tpu_and_the_cache_is_donated(tmp_path: Path):
    assert BESIDE.is_dir(), f"no {BESIDE}: `make lane-tpu_aot` puts torch_tpu there, beside the environment"
    environment = {
        **os.environ,
        "PYTHONPATH": str(BESIDE),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == EXPECTED
