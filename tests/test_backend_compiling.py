"""How pieces are compiled, beside what is compiled: how often garbage is collected, and what kernels link against."""

import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opreg import backend_link, graph
from opreg.backend import BackendError
from opreg.backend_link import linked_by_name


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def thresholds(inner: Any) -> list[tuple[int, int, int]]:
    """What the collector is told while a piece is compiled by `inner`."""
    seen: list[tuple[int, int, int]] = []

    def watched(gm: Any, inputs: Any) -> Any:
        seen.append(gc.get_threshold())
        return inner(gm)

    torch._dynamo.reset()
    torch.compile(double, backend="opreg", options={"inner": watched})(torch.ones(3))
    return seen


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def test_garbage_is_collected_rarely_while_pieces_compile(usual: tuple[int, int, int]) -> None:
    assert thresholds(lambda gm: gm.forward) == [(100_000, *usual[1:])]
    assert gc.get_threshold() == usual


def test_the_collector_is_as_before_after_an_error(usual: tuple[int, int, int]) -> None:
    with pytest.raises(Exception, match="by zero"):
        thresholds(lambda gm: 1 / 0)
    assert gc.get_threshold() == usual


@pytest.mark.parametrize("chosen", [(0, 10, 10), (500_000, 5, 5)])
def test_a_user_who_collects_as_rarely_is_left_alone(chosen: tuple[int, int, int]) -> None:
    gc.set_threshold(*chosen)
    assert thresholds(lambda gm: gm.forward) == [chosen]
    assert gc.get_threshold() == chosen


def job(libraries: str) -> Any:
    """A job as Inductor hands it over, with the builder of one library."""
    builder = SimpleNamespace(_libraries_args=libraries, _libraries_dirs_args="-L/real ", _ldflags_args="")
    return SimpleNamespace(args=("lock", (builder,)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_kernels_link_against_an_empty_library_of_torch_s_name(cache: Path) -> None:
    made = linked_by_name(job("-ltorch -ltorch_cpu -lgomp "))
    (builder,) = made.args[1]  # type: ignore[attr-defined]
    folder = cache / "opreg" / "link"
    assert builder._libraries_dirs_args == f"-L{folder} -L/real "
    assert (folder / "libtorch_cpu.so").stat().st_size < 100_000
    kernel = cache / "kernel.so"
    source = cache / "kernel.cpp"
    source.write_text('extern "C" float Sleef_cosf1_u10(float); extern "C" float call(float x) { return x; }')
    flags = f"{builder._ldflags_args} -ltorch_cpu {builder._libraries_dirs_args}".split()
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(kernel), *flags], check=True)
    assert b"libtorch_cpu.so" in kernel.read_bytes(), "the loader finds what is missing in the library of this name"


def test_a_library_that_needs_no_torch_is_left_as_it_is(cache: Path) -> None:
    (builder,) = linked_by_name(job("-lgomp ")).args[1]  # type: ignore[attr-defined]
    assert (builder._libraries_dirs_args, builder._ldflags_args) == ("-L/real ", "")


def test_without_an_empty_library_the_real_one_is_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no linker")
    monkeypatch.setattr(backend_link.subprocess, "run", lambda *args, **kwargs: failed)
    with caplog.at_level("INFO", "opreg"):
        (builder,) = linked_by_name(job("-ltorch_cpu ")).args[1]  # type: ignore[attr-defined]
    assert (builder._libraries_dirs_args, builder._ldflags_args) == ("-L/real ", "")
    assert "all of torch's symbols read: no linker" in caplog.text


def test_a_cache_folder_that_cannot_be_written_is_named_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    made = torch.compile(lambda x: torch.sin(x) * 2, backend="opreg")
    # Not before: torch.compile itself makes the folder. A folder that is there but read-only is first met by Inductor.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as found:
        made(torch.ones(3))
    assert isinstance(found.value.inner_exception, BackendError)
    said = str(found.value.inner_exception)
    assert f"cannot be written to: {tmp_path}/file/cache (NotADirectoryError" in said
    assert "Set the environment variable TORCHINDUCTOR_CACHE_DIR" in said


def test_an_error_with_a_writable_cache_is_left_as_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError("not the cache's fault")

    monkeypatch.setattr("opreg.backend.compile_piece", broken)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as found:
        torch.compile(lambda x: torch.sin(x) * 2, backend="opreg")(torch.ones(3))
    assert isinstance(found.value.inner_exception, ArithmeticError)


def test_garbage_is_collected_rarely_while_a_graph_is_split(
    usual: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []
    plan = graph.make_plan

    def watched(*args: Any) -> Any:
        seen.append(gc.get_threshold())
        return plan(*args)

    monkeypatch.setattr(graph, "make_plan", watched)
    graph.split_graph(torch.fx.symbolic_trace(double), on=[])
    assert seen == [(100_000, *usual[1:])]
    assert gc.get_threshold() == usual
