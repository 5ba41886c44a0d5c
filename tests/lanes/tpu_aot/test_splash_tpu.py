"""opreg::splash_attention's JAX kernels under the real TPU compiler, in a process of their own (it may abort)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import importlib, sys, jax
from jax.experimental import topologies

module = importlib.import_module("opreg.kernels.pallas.splash_attention")
device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:1x1").devices[0]

def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

d = int(sys.argv[1])
q, k = array(1, 8, 512, d), array(1, 2, 512, d)
ids, lse = array(1, 512, dtype="int32"), array(1, 8, 512, dtype="float32")
options = {"causal": True, "window": 300, "soft_cap": 30.0}
calls = {
    "forward": (lambda q, k, v, i: module.splash_attention(q, k, v, i, i, **options), (q, k, k, ids)),
    "backward": (
        lambda *a: module.splash_attention_backward(*a[:-1], a[-1], a[-1], **options),
        (q, lse, q, k, k, q, lse, ids),
    ),
}
for name, (fn, args) in calls.items():
    print(name, jax.jit(fn).lower(*args).compile().as_text().count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.parametrize("head_dim", [64, 128])
def test_forward_and_backward_compile_for_v6e(head_dim):
    settings = {**os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(head_dim)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=settings, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["forward", "1", "backward", "1"]
