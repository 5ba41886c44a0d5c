"""The JAX kernels of grouped matmul and segment sum under the real TPU compiler, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import importlib, jax
from jax.experimental import topologies

grouped = importlib.import_module("opreg.kernels.pallas.grouped_matmul")
segments = importlib.import_module("opreg.kernels.pallas.segment_sum")
device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:1x1").devices[0]

def array(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

for dtype in ("bfloat16", "float32"):
    args = array(256, 128, dtype=dtype), array(2, 128, 256, dtype=dtype), array(2, dtype="int32")
    for fn in (grouped.megablox, grouped.ragged_dot):
        lowered = jax.jit(fn).lower(*args)
        lowered.compile()
        print(fn.__name__, lowered.as_text().count("tpu_custom_call"))
    rows = array(256, 128, dtype=dtype), array(256, dtype="int32")
    jax.jit(lambda x, ids: segments.segment_sum(x, ids, 8)).lower(*rows).compile()
print("all")
"""


def test_they_compile_for_v6e_and_megablox_is_a_pallas_kernel():
    settings = {**os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=settings, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["megablox", "1", "ragged_dot", "0"] * 2 + ["all"]
