"""The small examples run, and print what they promise. Each is imported by path and its main() called."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ("01_rms_norm", "02_kernels", "03_layers", "04_split")


def load(name: str) -> ModuleType:
    """An example as a module; a second load re-registers its ops, which must change nothing."""
    spec = importlib.util.spec_from_file_location(f"opreg_example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # typing.get_type_hints looks the module up
    spec.loader.exec_module(module)
    return module


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    torch._dynamo.reset()
    load(name).main()
    text = capsys.readouterr()
    assert text.err == ""
    return text.out


def test_every_example_is_tested() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    examples = sorted(path.stem for path in EXAMPLES.glob("[0-9]*.py"))
    assert {*SMALL, "05_serve_qwen3_next"} <= set(examples)
    assert [name for name in examples if name not in tests] == []


def test_rms_norm(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("01_rms_norm", capsys)
    assert "tutorial::rms_norm(Tensor x, Tensor weight, float eps=1e-06) -> Tensor" in out
    assert out.count("1 graph so far") == 3
    assert "dim 'd' is 64 in weight but 32 in x" in out
    assert any(line.startswith("tutorial::rms_norm ") for line in out.splitlines())


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("02_kernels", capsys)
    assert "blocked: used" in out
    assert "blocked: refused (rows of 63 values; needs a multiple of 16)" in out
    assert "which cannot run here: rows of 63 values" in out


def test_layers(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("03_layers", capsys)
    assert "outputs [0.0, 0.0], states [0.0, 0.0, 0.0, 0.0]" in out
    assert "states [10.0, 0.0, 1.0, 0.0]" in out
    assert "states [11.0, 0.0, 11.0, 0.0]" in out
    assert "\n1 graph for all of it" in out
    assert "Did you mean 'layers.O'?" in out
    assert not any("layers." in line for line in out.splitlines() if "running_sum" in line)


def test_split(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("04_split", capsys)
    assert "12 pieces: 6 at tutorial::mix, 6 compiled as 2 distinct" in out
    assert "largest difference from eager: 0e+00" in out
    assert "6 pieces: 3 at aten::relu, 3 compiled as 1 distinct" in out


@pytest.mark.parametrize("name", SMALL)
def test_a_second_import_changes_nothing(name: str) -> None:
    first, second = load(name), load(name)
    assert first.main is not second.main
