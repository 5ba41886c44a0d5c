"""Build csrc/guard.cpp for this torch, and find what was built.

It links against torch's libraries, so there is one build per torch, Python and source, made once per machine: by
`opreg build`, which waits for it, or by `in_background` in a process that calls its ops often, which does not.
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
from .errors import KernelError, NotBuilt

SOURCE = Path(__file__).parent / "csrc" / "guard.cpp"
_FLAGS = ("-O2", "-fPIC", "-shared", "-Wl,-z,now")


_SCRIPT = """\
made=$1 target=$2 failed=$3
shift 3
if nice -n 10 "$@" >"$made.log" 2>&1; then mv -f "$made" "$target"; rm -f "$made.log"
else rm -f "$made"; mv -f "$made.log" "$failed"; fi
"""

_started: dict[int, subprocess.Popen[bytes]] = {}  # by process: a forked one inherits the others' entries


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
        reason = why_not_unasked()
        raise NotBuilt(f"the native guard is not built; run `opreg build`{reason and f' ({reason})'}", not reason)
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


def why_not_unasked() -> str:
    """Why the guard is not built without being asked for; "" where it is, see `in_background`."""
    if os.environ.get("OPREG_NO_BUILD", "") not in ("", "0"):
        return "it is not built by itself: OPREG_NO_BUILD is set"
    if not sys.platform.startswith("linux"):
        return "it is built on Linux only"
    if compiler() is None:
        return "it is not built by itself: there is no C++ compiler"
    said = _failed(target())
    if said.exists():
        return f"it is not built by itself: that failed once, {said} says why"
    return ""


def _failed(path: Path) -> Path:
    return path.with_suffix(".failed")


def _line(made: Path) -> list[str]:
    """The compiler's command line."""
    torch_dir = Path(torch.__file__).parent
    command = shlex.split(os.environ.get("CXX", "")) or [str(compiler())]
    include = [f"-I{torch_dir / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
    libraries = [f"-L{torch_dir / 'lib'}", "-lc10", "-ltorch_cpu"]
    return [*command, "-std=c++20", *_FLAGS, *include, str(SOURCE), "-o", str(made), *libraries]


def in_background() -> bool:
    """Whether the build is there; where it is not, one is started, by one process of those that ask, with a line on
    stderr. To be asked again later; NotBuilt says that there is no more to wait for.

    The compiler runs niced and on its own: it ends what it began even if this process ends. Its words are kept in a
    file where it fails.
    """
    path, started = target(), _started.get(os.getpid())
    if started is not None and started.poll() is None:
        return False
    if path.exists():
        return True
    reason = why_not_unasked()
    if not reason and started is not None:
        reason = "the compiler was ended before it was done"
    if reason:
        raise NotBuilt(f"the native guard is not built; run `opreg build` ({reason})")
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False  # another process is building it
            made = path.with_suffix(f".{os.getpid()}.tmp")
            line = ["sh", "-c", _SCRIPT, "sh", str(made), str(path), str(_failed(path)), *_line(made)]
            # The compiler inherits the lock and so keeps it until it is done.
            nothing, held = subprocess.DEVNULL, [lock.fileno()]
            started = subprocess.Popen(
                line, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True, pass_fds=held
            )
    except OSError as error:
        raise NotBuilt(f"the native guard cannot be built: {error}; set OPREG_CACHE_DIR to a writable folder") from None
    _started[os.getpid()] = started
    print(
        f"opreg: building the native guard in the background (once, kept in {path.parent}; OPREG_GUARD=python or "
        "OPREG_NO_BUILD=1 prevents it)",
        file=sys.stderr,
        flush=True,
    )
    return False


def build() -> Path:
    """Compile the guard, unless that was done. KernelError says why it cannot be."""
    path = target()
    if path.exists():
        return path
    if not sys.platform.startswith("linux"):
        raise KernelError(f"the native guard is built on Linux only, not on {sys.platform}")
    if compiler() is None:
        raise KernelError("the native guard needs a C++ compiler: install g++, or set CXX to one")
    print(f"opreg: building the native guard (kept in {path.parent}) ...", end=" ", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="guard-") as folder:
            made = Path(folder) / path.name
            line = _line(made)
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                tail = "\n".join(done.stderr.splitlines()[-20:])
                raise KernelError(f"cannot build the native guard: {shlex.join(line)} failed:\n{tail}")
            os.replace(made, path)  # atomic: a second process that builds the same does no harm
            _failed(path).unlink(missing_ok=True)
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
