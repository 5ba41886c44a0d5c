"""A second compilation takes every piece from Inductor's cache; a changed one misses, a corrupt one is rebuilt; the
kernels of all pieces are one run of the C++ compiler."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from opreg import backend_cpp
from opreg.backend_cpp import Later

LIB = torch.library.Library("opreg_warm", "DEF")
LIB.define("core(Tensor x, str name) -> Tensor")
LIB.impl("core", lambda x, name: x + 1, "CompositeExplicitAutograd")
torch.library.register_fake("opreg_warm::core", lambda x, name: torch.empty_like(x), lib=LIB)
core = torch.ops.opreg_warm.core
X = torch.arange(12.0).reshape(3, 4)
pytestmark = pytest.mark.slow


def first(x: torch.Tensor) -> torch.Tensor:
    for i in range(4):
        x = core(torch.sin(x) * 2, f"layers.{i}")
    return x


def renamed(hidden: torch.Tensor) -> torch.Tensor:
    number_of_layers = 4
    for layer in range(number_of_layers):
        doubled = torch.sin(hidden) * 2
        hidden = core(doubled, f"model.layers.{layer}.attention")
    return hidden


def changed(x: torch.Tensor) -> torch.Tensor:
    for i in range(4):
        x = core(torch.sin(x) * 3, f"layers.{i}")
    return x


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    yield tmp_path
    torch._dynamo.reset()


def hits_and_misses(fn: Any) -> tuple[int, int]:
    """Compile as a new process would, with nothing but the files of the cache."""
    from torch._inductor.codecache import PyCodeCache

    torch._dynamo.reset()
    PyCodeCache.cache_clear()
    counters.clear()
    with torch.no_grad():
        made = torch.compile(fn, backend="opreg", options={"split_on": ["opreg_warm::core"]}, dynamic=False)
        torch.testing.assert_close(made(X), fn(X))
    found = counters["inductor"]
    return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]


def test_everything_is_reused_and_only_what_changed_is_compiled(cache: Path) -> None:
    assert hits_and_misses(first) == (0, 1), "all four pieces before a split are one"
    assert hits_and_misses(first) == (1, 0)
    assert hits_and_misses(renamed) == (1, 0), "names of variables and of layers are not part of a piece"
    assert hits_and_misses(changed) == (0, 1)


def garbage(path: Path) -> None:
    path.write_bytes(b"\x80garbage" + path.read_bytes()[:20])


def other_code(path: Path) -> None:
    path.write_text("raise SystemError('a damaged module ran')")


def one_flipped_bit(path: Path) -> None:
    """In the middle of the generated code that an entry of the index holds: it is still readable."""
    data = path.read_bytes()
    at = data.index(b"async_compile")
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def flipped_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    # Another file: the old one is mapped into this process.
    path.unlink()
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    """As a build that was stopped leaves it: nothing is known about the file yet."""
    for facts in path.parent.parent.glob("opreg/*"):
        if facts.is_file():  # "link" is the folder of what libraries are linked against
            facts.unlink()
    data = path.read_bytes()[:500]
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("files", "damage", "again"),
    [
        ("fxgraph/**/*", garbage, (0, 1)),
        ("fxgraph/**/*", one_flipped_bit, (0, 1)),
        ("*/*.py", other_code, (0, 1)),
        ("*/*.main.so", flipped_byte, (1, 0)),
        ("opreg/*", garbage, (1, 0)),
    ],
)
def test_a_damaged_artifact_is_made_again_and_never_runs(
    cache: Path, files: str, damage: Any, again: tuple[int, int]
) -> None:
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    CppPythonBindingsCodeCache.cache_clear()
    assert hits_and_misses(first) == (0, 1)
    found = [p for p in cache.glob(files) if p.is_file()]
    assert found
    for path in found:
        damage(path)
    damaged = {path: path.read_bytes() for path in found if path.exists()}
    CppPythonBindingsCodeCache.cache_clear()
    assert hits_and_misses(first) == again
    if damage is not garbage:  # Inductor passes over a damaged entry of its index and leaves it where it is
        assert not any(path.exists() and path.read_bytes() == data for path, data in damaged.items())
    CppPythonBindingsCodeCache.cache_clear()
    assert hits_and_misses(first) == (1, 0)


PROGRAM = """
import torch

def f(x):
    return torch.softmax(x, -1).sin()

with torch.no_grad():
    x = torch.randn(4, 8)
    made = torch.compile(f, backend="opreg", options={"split_on": []})
    torch.testing.assert_close(made(x), f(x))
"""


def test_a_library_that_was_not_written_to_its_end_is_built_again(cache: Path) -> None:
    """In processes of their own: Python loads an extension module of one name and path once."""
    said = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
        (library,) = cache.glob("*/*.main.so")
        size = library.stat().st_size
        cut_short(library)
    assert "cannot be loaded and is built again" not in said[0]
    assert "cannot be loaded and is built again" in said[1]
    assert size > 500


def different(x: torch.Tensor) -> torch.Tensor:
    x = core(torch.sin(x) * 2, "a")
    x = core(torch.softmax(x, -1), "b")
    return torch.cos(x) + torch.sin(x) * 2


@pytest.fixture
def built(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the C++ compiler was run for, headers aside."""
    from torch._inductor.cpp_builder import CppBuilder

    files: list[str] = []
    build = CppBuilder.build

    def counted(self: Any, *args: Any) -> Any:
        name = str(self.get_target_file_path())
        if name.endswith(".main.so"):
            files.append(name)
        return build(self, *args)

    monkeypatch.setattr(CppBuilder, "build", counted)
    return files


def test_kernels_of_all_pieces_are_built_in_one_run(built: list[str]) -> None:
    from torch._inductor.codecache import PyCodeCache

    assert hits_and_misses(different) == (0, 3)
    assert len(built) == 1
    held = [v for module in PyCodeCache.modules for v in vars(module).values()]
    assert not any(isinstance(v, Later) for v in held)
    assert sum(getattr(v, "__name__", "").startswith("kernel") for v in held) == 3
    assert hits_and_misses(different) == (3, 0)
    assert len(built) == 1, "nor is anything built for pieces that are cached"


def test_kernels_that_do_not_go_together_are_built_alone(
    built: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend_cpp, "_source", lambda kernels: "no C++")
    assert hits_and_misses(different) == (0, 3)
    assert len(built) == 1 + 3
    assert "each is built alone" in "".join(r.getMessage() for r in caplog.records if r.name == "opreg")


def test_a_kernel_left_behind_by_an_error_is_built_when_called(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    scope: dict[str, Any] = {}
    source = 'extern "C" void kernel(float* x) { x[0] = 7; }'
    before = AsyncCompile.cpp_pybinding
    scope |= {"compiler": AsyncCompile(), "source": source}
    asked = "kernel = compiler.cpp_pybinding(['float*'], source); 1 / 0"
    with pytest.raises(ZeroDivisionError), backend_cpp.kernels_built_together():
        exec(asked, scope)
    assert AsyncCompile.cpp_pybinding is before
    x = torch.zeros(2)
    scope["kernel"](x)
    assert x.tolist() == [7, 0]
