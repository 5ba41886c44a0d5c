"""Build csrc/guard.cpp for this torch, on demand only, and find what was built.

It links against torch's libraries, so there is one build per torch, Python and source. Nothing here looks for a
compiler or waits for one unless `build` is called, which `opreg build` does.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch

from . import _compat
from .errors import KernelError

SOURCE = Path(__file__).parent / "csrc" / "guard.cpp"
_FLAGS = ("-O2", "-fPIC", "-shared", "-Wl,-z,now")


class NotBuilt(Exception):
    """There is no native guard to load; the text says why and what to do."""


def cache_dir() -> Path:
    """Where builds are kept: $OPREG_CACHE_DIR, else $XDG_CACHE_HOME/opreg, else ~/.cache/opreg."""
    own = os.environ.get("OPREG_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opreg"


def target() -> Path:
    """The file of the build for this torch, this Python and this source."""
    facts = (_compat.build_key(), sysconfig.get_config_var("SOABI"), SOURCE.read_text(encoding="utf-8"), _FLAGS)
    return cache_dir() / f"guard-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"


def load() -> ModuleType:
    """The built module; NotBuilt where there is none, or it does not load."""
    path = target()
    if not path.exists():
        raise NotBuilt("the native guard is not built; run `opreg build`")
    loader = importlib.machinery.ExtensionFileLoader("opreg_guard", str(path))
    try:
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader("opreg_guard", loader))  # type: ignore[arg-type]
        loader.exec_module(module)
    except ImportError as error:
        raise NotBuilt(f"the built native guard does not load ({error}); delete {path} and run `opreg build`") from None
    return module


def compiler() -> str | None:
    """The C++ compiler: what CXX says, else the usual names; None where it is no program here."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    return next((path for name in wanted[:1] or ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def build() -> Path:
    """Compile the guard, unless that was done. KernelError says why it cannot be."""
    path = target()
    if path.exists():
        return path
    if not sys.platform.startswith("linux"):
        raise KernelError(f"the native guard is built on Linux only, not on {sys.platform}")
    if compiler() is None:
        raise KernelError("the native guard needs a C++ compiler: install g++, or set CXX to one")
    torch_dir = Path(torch.__file__).parent
    command = shlex.split(os.environ.get("CXX", "")) or [str(compiler())]
    include = [f"-I{torch_dir / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
    print(f"opreg: building the native guard (kept in {path.parent}) ...", end=" ", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="guard-") as folder:
            made = Path(folder) / path.name
            libraries = [f"-L{torch_dir / 'lib'}", "-lc10", "-ltorch_cpu"]
            line = [*command, "-std=c++20", *_FLAGS, *include, str(SOURCE), "-o", str(made)]
            done = subprocess.run([*line, *libraries], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                tail = "\n".join(done.stderr.splitlines()[-20:])
                raise KernelError(f"cannot build the native guard: {shlex.join(line)} failed:\n{tail}")
            os.replace(made, path)  # atomic: a second process that builds the same does no harm
    except OSError as error:
        print("failed", file=sys.stderr, flush=True)
        raise KernelError(
            f"cannot build the native guard: {error}; set OPREG_CACHE_DIR to a writable folder"
        ) from error
    except KernelError:
        print("failed", file=sys.stderr, flush=True)
        raise
    print(f"done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return path
