"""Published wheels of vllm-xpu-kernels: the operator's schema and checks, read out of a binary that is never loaded.

The library needs an Intel build of torch. What it can be asked without running it are its strings, among them the
schemas it registers and the messages of its checks.
"""

import hashlib
import importlib.util
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from opreg.kernels.cpu.build import cache_dir
from opreg.kernels.xpu import gdn_vendor

# version: (digest of the wheel, schema)
WHEELS = {
    "0.1.3.1": ("ddbc1b5597fd68127d043692a204c2ba62991fbd5cc812c2f2170a581801fdba", "A"),
    "0.1.12.3": ("a231e614efe99cd320529452150a52bf789058d5344ae7a046de9acbc91d45e2", "C"),
    "0.1.16.2": ("86bfa26abbb605fab485236a386e6de07f76320177c456fa96e55c27502af17a", "C"),
}
CACHE = cache_dir() / "wheels"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wheel(version: str) -> Path:
    """The wheel, from the cache or the index; pip refuses one with another digest."""
    path = CACHE / f"vllm_xpu_kernels-{version}-cp38-abi3-manylinux_2_28_x86_64.whl"
    expected, _ = WHEELS[version]
    if path.exists() and digest(path) == expected:
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    wanted = CACHE / f"{version}.txt"
    wanted.write_text(f"vllm-xpu-kernels=={version} --hash=sha256:{expected}\n")
    tags = "--platform manylinux_2_28_x86_64 --python-version 3.12 --abi abi3 --only-binary :all:".split()
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", *tags]
    done = subprocess.run([*pip, "-d", str(CACHE), "-r", str(wanted)], capture_output=True, text=True, check=False)
    wanted.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    return path


@cache
def binary(version: str) -> bytes:
    with zipfile.ZipFile(wheel(version)) as package:
        return package.read("vllm_xpu_kernels/_xpu_C.abi3.so")


def schemas(version: str, op: str) -> set[str]:
    """What the binary registers under a name, in torch's own spelling."""
    found = re.findall(rb"\b%s\([ -~]*?\) -> [ -~]*" % op.encode(), binary(version))
    return {str(torch._C.parse_schema(f"_xpu_C::{text.decode()}")) for text in found}


def stand_in() -> ModuleType:
    path = Path(__file__).parents[2] / "kernels" / "gdn_vendor_stand_in.py"
    spec = importlib.util.spec_from_file_location("gdn_vendor_stand_in", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", WHEELS)
def test_schema_in_the_binary_is_the_one_that_is_handled(version: str) -> None:
    _, letter = WHEELS[version]
    expected = torch._C.parse_schema(f"_xpu_C::{stand_in().SCHEMAS[letter]}")
    assert schemas(version, "gdn_attention") == {str(expected)}
    assert gdn_vendor.schema_of(tuple(argument.name for argument in expected.arguments)) == letter


def has(version: str, text: str) -> bool:
    return text.encode() in binary(version)


# Text of a check: the first and the last of the wheels above in which it stands.
CHECKS = {
    "core_attn_out.size(0) == num_actual_tokens": ("0.1.3.1", "0.1.3.1"),
    "conv_state of each batch must be contiguous": ("0.1.3.1", "0.1.16.2"),
    "ssm_state of each batch must be contiguous": ("0.1.3.1", "0.1.16.2"),
    "projected_states_qkvz must be contiguous": ("0.1.3.1", "0.1.16.2"),
    "dt_bias must be contiguous": ("0.1.3.1", "0.1.16.2"),
    "num_v_heads % num_k_heads == 0": ("0.1.3.1", "0.1.16.2"),
    "head_k_dim % sub_group_size == 0": ("0.1.3.1", "0.1.16.2"),
    "A_log dtype must be float32": ("0.1.12.3", "0.1.16.2"),
    "dt_bias dtype must match core_attn_out dtype": ("0.1.12.3", "0.1.16.2"),
    "must be >= num_actual_tokens": ("0.1.12.3", "0.1.16.2"),
    "has_initial_state must be of bool dtype": ("0.1.12.3", "0.1.16.2"),
    "has_initial_state must have size [num_prefills + num_decodes]": ("0.1.12.3", "0.1.16.2"),
    "non_spec_query_start_loc must be of int32 dtype": ("0.1.12.3", "0.1.16.2"),
    "non_spec_query_start_loc must have size [num_prefills + num_decodes + 1]": ("0.1.12.3", "0.1.16.2"),
    "non_spec_state_indices_tensor must be of int32 dtype": ("0.1.12.3", "0.1.16.2"),
    "spec_query_start_loc must have size [num_spec_decodes + 1]": ("0.1.12.3", "0.1.16.2"),
    "num_accepted_tokens size must be num_spec_decodes": ("0.1.12.3", "0.1.16.2"),
    "non_spec_token + spec_token must equal num_actual_tokens": ("0.1.12.3", "0.1.12.3"),
    # Why speculative rows want a later package, and go in calls of their own.
    "does not support spec-decode and non-spec (prefill + decode) tokens in the same": ("0.1.12.3", "0.1.12.3"),
    "spec_token == num_spec_decodes * (num_speculative_tokens + 1)": ("0.1.12.3", "0.1.12.3"),
    # The rolling buffer: a convolution row for each draft.
    " rows for speculative decoding, but got ": ("0.1.16.2", "0.1.16.2"),
}


@pytest.mark.parametrize("text", CHECKS)
def test_checks_of_the_stand_in_are_in_the_binary(text: str) -> None:
    versions = list(WHEELS)
    first, last = (versions.index(version) for version in CHECKS[text])
    assert [has(version, text) for version in versions] == [first <= i <= last for i in range(len(versions))]
