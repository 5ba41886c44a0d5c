"""The adapter under the real torch_tpu: its jax_op takes the functions, and its fakes export them for a TPU.

There is no device "tpu" here, so nothing runs; tests/kernels/test_rpa_torch_tpu.py runs the adapter with a stand-in.
"""

import os
import subprocess
import sys
from pathlib import Path

BESIDE = Path(sys.prefix) / "torch_tpu"

# torch_tpu changes torch for the whole process.
SCRIPT = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from opreg.kernels.pallas import rpa_torch_tpu as adapter

def show(value):
    values = value if isinstance(value, tuple) else (value,)
    print(*(f"{x.dtype}{list(x.shape)}" for x in values))

with FakeTensorMode():
    bf16 = torch.bfloat16
    q, k, pages = (torch.empty(s, dtype=bf16) for s in ((64, 8, 128), (64, 2, 128), (16, 32, 4, 128)))
    index = [torch.empty(s, dtype=torch.int32) for s in ((4,), (4, 4), (5,), (1,))]
    show(adapter.torch_tpu_rpa(q, pages, *index, sm_scale=0.1, sliding_window=7))
    show(adapter.torch_tpu_rpa_lse(q, pages, *index, sinks=torch.empty(8), soft_cap=30.0))
    show(adapter.torch_tpu_rpa_update(q, k, k, pages, *index, k_scale=0.5))
    print(adapter.torch_tpu_kv_cache_update(k, k, pages, torch.empty(64, dtype=torch.int64)))
print(torch.ops.opreg_torch_tpu.rpa_update.default._schema)
"""

EXPECTED = """\
torch.bfloat16[64, 8, 128]
torch.bfloat16[64, 8, 128] torch.float32[64, 8]
torch.bfloat16[64, 8, 128]
None
opreg_torch_tpu::rpa_update(Tensor q, Tensor k, Tensor v, Tensor kv_pages, Tensor kv_lens, Tensor page_indices, \
Tensor cu_q_lens, Tensor num_seqs, float sm_scale=1., SymInt? sliding_window=None, float? soft_cap=None, \
float? mask_value=None, float? k_scale=None, float? v_scale=None, str kv_layout="NHD", Tensor? sinks=None) \
-> (Tensor, Tensor)
"""


def test_jax_op_takes_the_functions_and_exports_them_for_a_tpu(tmp_path: Path):
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
    assert done.stdout.replace("libtpu not found.\n", "") == EXPECTED
