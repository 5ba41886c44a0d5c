"""The builder of C++ kernels: it builds once, and says why when it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from opreg.kernels.cpu import build

from opreg.cli import main


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty csrc/ and cache, and a builder that has built nothing yet."""
    monkeypatch.setattr(build, "CSRC", tmp_path)
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setenv("OPREG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("OPREG_NO_BUILD", raising=False)
    return tmp_path


def test_builds_once_and_again_when_a_header_changes(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workshop / "answer.h").write_text("#define ANSWER 42\n")
    (workshop / "a.cpp").write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    assert build.load("a", {"a.cpp": []}).answer() == 42
    assert "building the C++ kernels 'a'" in capsys.readouterr().err
    build._loaded.clear()
    assert build.load("a", {"a.cpp": []}).answer() == 42
    assert capsys.readouterr().err == ""
    build._loaded.clear()
    (workshop / "answer.h").write_text("#define ANSWER 43\n")
    assert build.load("a", {"a.cpp": []}).answer() == 43


def test_compiler_errors_are_shown_and_kept(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workshop / "b.cpp").write_text("this is not C++\n")
    with pytest.raises(build.BuildError, match=r"(?s)'b'.*b\.cpp.*not"):
        build.load("b", {"b.cpp": []})
    capsys.readouterr()
    with pytest.raises(build.BuildError, match="'b'"):
        build.load("b", {"b.cpp": []})
    assert capsys.readouterr().err == ""


def test_no_compiler_gives_a_reason_and_a_cure(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    build._compiler.cache_clear()
    try:
        assert "no-such-compiler" in (build.why_not() or "")
        with pytest.raises(build.BuildError, match=r"install g\+\+ or set CXX"):
            build.load("c", {})
    finally:
        build._compiler.cache_clear()


def test_building_can_be_switched_off(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPREG_NO_BUILD", "1")
    with pytest.raises(build.BuildError, match="OPREG_NO_BUILD is set"):
        build.load("d", {})


def test_the_list_names_what_runs_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPREG_NO_BUILD", raising=False)
    monkeypatch.setattr(subprocess, "Popen", None)  # listing runs and builds nothing
    for compiler, kernel in ((sys.executable, "cpu/gdn_attention"), ("no-such-compiler", "cpu/gdn_attention_torch")):
        monkeypatch.setenv("CXX", compiler)
        assert main(["list", "--json", "--device", "cpu"]) == 0
        ops = {op["name"]: op for op in json.loads(capsys.readouterr().out)["ops"]}
        assert ops["opreg::gdn_attention"]["selected"] == kernel
    (native,) = [k for k in ops["opreg::gdn_attention"]["kernels"] if k["name"] == "cpu/gdn_attention"]
    assert native["state"] == "missing"
    assert "looked for no-such-compiler, from CXX); install g++ or set CXX" in native["why"]
