"""opreg doctor: each foot-gun of the environment is provoked, named with its cure, and fails the command if broken."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor

from opreg import _compat, register_op
from opreg.cli import footguns, main


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `opreg doctor` in this process, expects an exit code, returns what it printed."""

    def run(*argv: str, code: int) -> str:
        capsys.readouterr()
        assert main(["doctor", *argv]) == code
        return capsys.readouterr().out

    return run


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes empty packages, and with a version their metadata, that find_spec and importlib.metadata see."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, version: str | None = None) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('doctor imports nothing to find out')")
        if version is not None:
            info = tmp_path / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    return install


def test_functionalisation_v1_by_variable(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_AUTO_FUNCTIONALIZED_V2", "0")
    text = doctor(code=1)
    assert "auto_functionalized v1 is forced" in text
    assert "unset TORCHDYNAMO_AUTO_FUNCTIONALIZED_V2" in text


def test_functionalisation_v1_by_config(doctor: Any) -> None:
    import torch._inductor.config as config

    with config.patch(enable_auto_functionalized_v2=False):
        assert "leave torch._inductor.config.enable_auto_functionalized_v2 at True" in doctor(code=1)
    assert "auto_functionalized" not in doctor(code=0)


def test_no_compiler(doctor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    text = doctor(code=1)
    assert "CXX is 'no-such-compiler -O2', which is no program here" in text
    assert "unset CXX" in text
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    text = doctor(code=1)
    assert "there is no C++ compiler: torch.compile on the CPU fails" in text
    assert "install g++" in text


def test_flax_that_torch_xla_swallows(doctor: Any, installed: Any) -> None:
    if footguns.find_spec("torch_xla") is not None:
        pytest.skip("this environment has the real torch_xla")
    installed("torch_xla")
    installed("torchax")
    text = doctor(code=1)
    assert "imports flax, which is not installed, and torch_xla swallows that error" in text
    assert "pip install --no-deps 'torchax>=0.0.7'" in text
    installed("flax")
    assert "swallows" not in doctor(code=0)


def test_a_torchax_of_its_own_needs_no_flax(doctor: Any, installed: Any) -> None:
    if footguns.find_spec("torch_xla") is not None:
        pytest.skip("this environment has the real torch_xla")
    installed("torch_xla")
    installed("torchax", "0.0.7")
    assert "flax" not in doctor(code=0)


def test_two_packages_for_one_device(doctor: Any, installed: Any) -> None:
    installed("torch_npu")
    if footguns.find_spec("torchax") is None:
        assert "PrivateUse1" not in doctor(code=0)
        installed("torchax", "0.0.7")
    text = doctor(code=1)
    assert "torch_npu and torchax are installed, and each takes torch's one PrivateUse1 device (npu, jax)" in text
    assert "keep one of them" in text


def test_a_device_that_is_taken(doctor: Any, installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if footguns.find_spec("torchax") is not None:
        pytest.skip("torchax is a second candidate here")
    installed("torch_npu")
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "mine")
    assert "taken by 'mine', so importing torch_npu fails" in doctor(code=1)
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "npu")
    assert "PrivateUse1" not in doctor(code=0)


def test_a_list_to_split_on_that_names_nothing(doctor: Any) -> None:
    text = doctor("--split-on", "opreg::gdn_attention_core,opreg::gdn_atention_core", code=1)
    assert "1 problem:" in text
    assert "there is no operator 'opreg::gdn_atention_core' to split at. Did you mean" in text
    assert "no problems" in doctor("--split-on", "opreg::gdn_attention_core", "--split-on", "aten::mm", code=0)


@pytest.mark.parametrize(
    ("window", "code", "words"),
    [
        (((2, 99), (3, 5)), 1, "is older than 2.99, the oldest that opreg is tested with: pip install 'torch==3.5.*'"),
        (((1, 9), (2, 0)), 0, "is newer than any that opreg is tested with (1.9 to 2.0)"),
    ],
)
def test_versions_outside_the_window(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, window: Any, code: int, words: str
) -> None:
    monkeypatch.setattr(_compat, "TESTED", window)
    text = doctor(code=code)
    assert words in text
    assert "untested" in text


def test_an_old_jax_and_a_torch_xla_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"jax": "0.4.30", "torch_xla": "1.12.0"}
    monkeypatch.setattr(footguns, "version", lambda package: versions[package])
    found = " ".join([*footguns._old_versions(), *footguns._mismatched_xla()])
    assert "jax 0.4 is older than 0.7" in found
    assert "torch_xla 1.12 works with torch 1.12 only" in found


def test_jax_without_x64_where_an_op_takes_int64(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @register_op("t_doctor::wide")
    def wide(x: Annotated[Tensor, "t", torch.int64]) -> Annotated[Tensor, "t"]:
        return x + 1

    @wide.register_kernel("cpu", requires="jax")
    def by_jax(x: Tensor) -> Tensor:
        return x + 1

    monkeypatch.setattr(footguns, "find_spec", lambda name: object() if name == "jax" else None)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    text = doctor(code=0)
    assert "remark: jax's x64 mode is off, and t_doctor::wide" in text
    assert "set JAX_ENABLE_X64=1" in text
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    assert "x64 mode is off" not in doctor(code=0)


def test_json_tells_the_same(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "PyTorch version: x")
    monkeypatch.setenv("TORCHDYNAMO_AUTO_FUNCTIONALIZED_V2", "0")
    monkeypatch.setattr(_compat, "TESTED", ((1, 9), (2, 0)))
    facts = json.loads(doctor("--json", code=1))
    assert [problem.split(":")[0] for problem in facts["problems"]] == ["auto_functionalized v1 is forced"]
    assert any("is newer than any" in remark for remark in facts["remarks"])
    assert facts["collect_env"] == "PyTorch version: x"
