"""The attention and cache kernels compiled for an H100 (and one for an A100) where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def figures():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_rpa.py")
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return {entry["name"]: entry for entry in json.loads(run.stdout)}


def test_nothing_is_spilled(figures):
    assert len(figures) == 17
    assert {name: f["spilled"] for name, f in figures.items()} == dict.fromkeys(figures, 0)
    for name, f in figures.items():
        print(f"{name}: {f['registers']} registers, {f['shared']} bytes of shared memory")


def test_programs_fit(figures):
    assert all(f["shared"] <= f["limit"] for f in figures.values())
    assert figures["decode"]["splits"] > figures["decode, no splits"]["splits"] == 1
    # Three programs of 128 threads at once, as the number of splits supposes: 65,536 registers, 227 KiB.
    decode = figures["decode"]
    assert decode["registers"] * 128 * 3 <= 65536
    assert decode["shared"] * 3 <= decode["limit"]


def test_half_precision_uses_tensor_cores_and_asynchronous_loads(figures):
    for name, f in figures.items():
        if name.startswith(("prefill", "decode")):
            assert (f["tensor_cores"] > 0) == ("float32" not in name), name
            assert f["async_copies"] > 0, name


def test_quantising_divides_exactly(figures):
    assert figures["kv_cache_update, fp8"]["exact_division"]
