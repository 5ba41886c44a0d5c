"""Intel's gdn_attention behind opreg::gdn_attention: the adapter against a stand-in, and when it is chosen."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from opreg.kernels.xpu import gdn, gdn_vendor
from opreg.ops.gdn_attention import gdn_attention
from opreg.ops.gdn_attention_inputs import Heads, make_call
from torch._subclasses.fake_tensor import FakeTensorMode

from opreg.cli import main as command

HERE = Path(__file__).parent


@pytest.mark.parametrize("schema", ["A", "B", "C"])
def test_adapter_against_the_stand_in(schema: str) -> None:
    # A process each: an operator is defined once.
    run = [sys.executable, "-W", "error", str(HERE / "gdn_xpu_cases.py"), schema]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, str] = json.loads(done.stdout)
    assert len(results) >= {"A": 15, "B": 16, "C": 23}[schema]
    assert not {name: trace for name, trace in results.items() if trace}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts a package vllm_xpu_kernels of some version on the path; importing it is an error."""

    def install(version: str) -> None:
        package, facts = tmp_path / "vllm_xpu_kernels", tmp_path / f"vllm_xpu_kernels-{version}.dist-info"
        package.mkdir()
        (package / "__init__.py").write_text("raise AssertionError('imported to find out whether it is there')")
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-xpu-kernels\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        gdn_vendor.why_no_speculation.cache_clear()

    yield install
    gdn_vendor.why_no_speculation.cache_clear()
    gdn_vendor.why_not_layer.cache_clear()


def row(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command([*arguments, "--device", "xpu"]) == 0
    return next(line for line in capsys.readouterr().out.splitlines() if "xpu/gdn_attention" in line)


def test_the_reason_stands_in_list_and_show(installed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "xpu/gdn_attention needs vllm_xpu_kernels>=0.1.12" in row(capsys, "list")
    installed("0.1.3.1")
    reason = "needs vllm_xpu_kernels>=0.1.12 (0.1.3.1 is installed)"
    assert f"xpu/gdn_attention {reason}" in row(capsys, "list")
    assert row(capsys, "show", "gdn_attention").split() == f"xpu/gdn_attention xpu 10 missing {reason}".split()


@pytest.mark.parametrize("version", ["0.1.12.3", "0.1.16.2"])
def test_a_newer_package_is_chosen(version: str, installed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    installed(version)
    line = row(capsys, "show", "gdn_attention")
    assert line.split() == "xpu/gdn_attention xpu 10 used on xpu decides per call".split()


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the vendor was called")

    monkeypatch.setattr(gdn_vendor, "find", lambda: gdn_vendor.Vendor(refuse, "C"))
    gdn_vendor.why_not_layer.cache_clear()


def chosen(heads: Heads, **change: Any) -> tuple[str, str]:
    """The kernel for a call with fake tensors on device xpu, and what the vendor's has to say to it."""
    call = make_call([1, 3], heads, dtype=torch.bfloat16, **change)
    with FakeTensorMode():
        for name, value in call.items():
            if isinstance(value, torch.Tensor):
                call[name] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="xpu")
        explanation = gdn_attention.explain(**call)
    decisions = {d.kernel.name: d for d in explanation.decisions}
    assert explanation.device_type == "xpu"
    assert explanation.selected is not None
    return explanation.selected.name, decisions["xpu/gdn_attention"].why


@pytest.mark.usefixtures("vendor")
def test_calls_on_xpu_choose_by_what_the_vendor_can_take(installed: Any) -> None:
    installed("0.1.16.2")
    assert chosen(Heads(2, 4, 64, 64)) == ("xpu/gdn_attention", "")
    name, why = chosen(Heads(2, 4, 32, 32))
    assert name != "xpu/gdn_attention"
    assert why == "head_k_dim=32 must be 64, 128 or 256 and head_v_dim=32 a multiple of 64"
    name, why = chosen(Heads(2, 6, 64, 64), flat=True)
    assert name != "xpu/gdn_attention"
    assert "no multiple of 4" in why


@pytest.mark.usefixtures("vendor")
@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.1.12.3", "speculative rows need vllm-xpu-kernels 0.1.14 or later (0.1.12.3 is installed)"),
        ("0.1.14", None),
        ("0.1.16.2", None),
    ],
)
def test_speculation_needs_a_newer_package(version: str, reason: str | None, installed: Any) -> None:
    installed(version)
    call = make_call([2], Heads(2, 4, 64, 64), dtype=torch.bfloat16)
    assert gdn.why_not(**call) is None
    assert gdn.why_not(**call, num_spec_decodes=1) == reason


def test_a_package_that_cannot_be_loaded_is_a_reason() -> None:
    assert gdn_vendor.find() == "vllm_xpu_kernels._xpu_C cannot be loaded: No module named 'vllm_xpu_kernels'"
    call = make_call([2], Heads(2, 4, 64, 64), dtype=torch.bfloat16)
    assert gdn.why_not(**call) == gdn_vendor.find()
    with pytest.raises(ValueError, match=r"opreg::gdn_attention: vllm_xpu_kernels._xpu_C cannot be loaded"):
        gdn.gdn_attention(**call)


def test_other_argument_names_are_no_known_schema() -> None:
    for schema, names in gdn_vendor.SCHEMAS.items():
        assert gdn_vendor.schema_of(names) == schema
        assert gdn_vendor.schema_of((*names, "checkpoints")) is None
        assert gdn_vendor.schema_of(names[::-1]) is None
