"""Every file of the cache damaged in turn: the result is right all the same, and nothing damaged is run."""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

LIB = torch.library.Library("opreg_damage", "DEF")
LIB.define("core(Tensor x) -> Tensor")
LIB.impl("core", lambda x: x + 1, "CompositeExplicitAutograd")
torch.library.register_fake("opreg_damage::core", torch.empty_like, lib=LIB)


def model(x: torch.Tensor) -> torch.Tensor:
    x = torch.ops.opreg_damage.core(torch.sin(x) * 2)
    return torch.ops.opreg_damage.core(torch.softmax(x, -1)) * 3


def flipped(data: bytes, others: list[bytes], choose: random.Random) -> bytes:
    at = choose.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << choose.randrange(8))]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes, list[bytes], random.Random], bytes]] = {
    "empty": lambda data, others, choose: b"",
    "cut": lambda data, others, choose: data[: choose.randrange(len(data))],
    "flipped": flipped,
    # What belongs to something else, as it would be after a version of torch changed what its keys mean.
    "foreign": lambda data, others, choose: choose.choice(others) if others else data[::-1],
}


def compiled() -> None:
    """Compile and run as a new process would, with nothing but the files of the cache."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache, PyCodeCache

    torch._dynamo.reset()
    PyCodeCache.cache_clear()
    CppPythonBindingsCodeCache.cache_clear()
    x = torch.arange(12.0).reshape(3, 4)
    with torch.no_grad():
        made = torch.compile(model, backend="opreg", options={"split_on": ["opreg_damage::core"]}, dynamic=False)
        torch.testing.assert_close(made(x), model(x))


def damage_all(seed: int, share: float, folder: Path, pristine: Path) -> tuple[list[str], int, list[str]]:
    """Damage each file in each way (a share of them at random) and compile again; (files, cases, what went wrong)."""
    choose = random.Random(seed)
    wrong: list[str] = []
    compiled()
    shutil.copytree(folder, pristine)
    files = sorted(p.relative_to(pristine) for p in pristine.rglob("*") if p.is_file() and p.stat().st_size)
    cases = [(path, how) for path in files for how in DAMAGES if choose.random() < share]
    for path, how in cases:
        # New files, too: those of a library that is mapped into this process must not be written.
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
        alike = [p for p in files if (p.suffix, p.parts[0]) == (path.suffix, path.parts[0]) and p != path]
        others = [(pristine / p).read_bytes() for p in alike]
        (folder / path).write_bytes(DAMAGES[how]((pristine / path).read_bytes(), others, choose))
        for time in ("first", "second"):
            try:
                compiled()
            except Exception as error:
                wrong.append(f"{path} {how}, the {time} time: {type(error).__name__}: {str(error)[:300]}")
                break
    return [str(p) for p in files], len(cases), wrong


@pytest.mark.slow
def test_a_damaged_file_of_the_cache_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    _, cases, wrong = damage_all(7, 0.3, tmp_path / "cache", tmp_path / "pristine")
    assert not wrong
    assert cases >= 3
    torch._dynamo.reset()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as parent:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{parent}/cache"
        print(
            *damage_all(int(sys.argv[1]), float(sys.argv[2]), Path(parent) / "cache", Path(parent) / "pristine"),
            sep="\n",
        )
