"""The native guard without asking for it: built in the background by a process that makes many calls, and taken up."""

import fcntl
import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opreg import guard, guard_build, register_op

X = torch.arange(3.0)
_serial = itertools.count()


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a process that has made no calls yet."""
    monkeypatch.setenv("OPREG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(guard, "_loaded", [])
    monkeypatch.setattr(guard, "_waiting", [])
    monkeypatch.setattr(guard, "OFTEN", 16)
    monkeypatch.setattr(guard_build, "_started", {})
    return tmp_path


def adding() -> Any:
    @register_op(f"t_guard_build::adds_{next(_serial)}", mutates_args=("x",))
    def adds(x: Tensor, y: Tensor) -> None:
        x.add_(y)

    return adds


def counts(op: Any) -> bool:
    """Whether the op's function counts its calls."""
    return "_next_call" in op.__code__.co_names


def native(op: Any) -> bool:
    op(torch.zeros(3), X)
    return "_outside" in op.__code__.co_names


def call_until(op: Any, done: Any) -> None:
    """Call the op until `done()`: the compiler takes 2 s alone and more on a busy machine."""
    end = time.monotonic() + 300
    while not done():
        assert time.monotonic() < end
        for _ in range(40):
            op(torch.zeros(3), X)
        time.sleep(0.02)


def test_many_calls_build_it_and_ops_in_use_take_it_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used, other = adding(), adding()
    for op in (used, other):
        op(torch.zeros(3), X)
        assert counts(op)
    assert not list(folder.iterdir())
    assert "calls builds it in the background" in guard.in_use()
    call_until(used, lambda: guard_build._started)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"building the native guard in the background (once, kept in {folder}" in said
    call_until(used, lambda: guard.native() is not None)
    assert guard.in_use() == "native"
    for op in (used, other, adding()):
        assert native(op)
        assert not counts(op)
        out = torch.zeros(3)
        version = out._version
        op(out, X)
        assert torch.equal(out, X)
        assert out._version > version
    assert capsys.readouterr().err == ""
    assert {path.suffix for path in folder.iterdir()} == {".so", ".lock"}


def test_a_build_of_another_process_is_waited_for_and_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    op = adding()
    with open(guard_build.target().with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(100):
            op(torch.zeros(3), X)
        assert not guard_build._started
        assert counts(op)
        guard_build.build()
        call_until(op, lambda: guard.native() is not None)
    assert native(op)
    assert not guard_build._started


def test_a_failure_is_kept_and_not_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    op = adding()
    call_until(op, lambda: not counts(op) and guard_build._started)
    failed = guard_build.target().with_suffix(".failed")
    assert f"not built by itself: that failed once, {failed} says why" in guard.in_use()
    assert failed.exists()
    monkeypatch.setattr(guard, "_loaded", [])
    monkeypatch.setattr(guard_build, "_started", {})
    again = adding()
    again(torch.zeros(3), X)
    assert not counts(again)
    monkeypatch.delenv("CXX")
    guard_build.build()
    assert not failed.exists()


REFUSED = {
    "OPREG_NO_BUILD": ("1", "OPREG_NO_BUILD is set"),
    "OPREG_GUARD": ("python", "OPREG_GUARD=python"),
    "CXX": ("no-such-compiler", "there is no C++ compiler"),
}


@pytest.mark.parametrize("variable", REFUSED)
def test_whoever_does_not_want_it_gets_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    value, reason = REFUSED[variable]
    monkeypatch.setenv(variable, value)
    op = adding()
    for _ in range(100):
        op(torch.zeros(3), X)
    assert not counts(op)
    assert reason in guard.in_use()
    assert not list(folder.iterdir())
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("OPREG_CACHE_DIR", str(folder / "file" / "below"))
    op = adding()
    op(torch.zeros(3), X)
    call_until(op, lambda: not counts(op))
    assert "set OPREG_CACHE_DIR to a writable folder" in guard.in_use()


def test_a_forked_process_does_not_take_the_build_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    op = adding()
    call_until(op, lambda: guard_build._started)
    started = guard_build._started[os.getpid()]
    monkeypatch.setattr(guard_build, "_started", {os.getpid() + 1: started})
    assert not guard_build.in_background()
    assert list(guard_build._started.values()) == [started]  # it holds the lock
    call_until(op, lambda: guard.native() is not None)
    started.wait()
