"""Build the C++ sources in csrc/ once, keep the result, and say why when that is impossible.

The sources export a plain C interface (raw pointers and sizes) and are loaded with ctypes. That is deliberate: torch's
own extension builder needs ninja and the Python headers, takes half a minute for the includes alone, and ties the
result to one torch version; this needs a C++ compiler and nothing else, and one build serves every torch.
OpenMP: torch brings a libgomp that is also called `libgomp.so.1`, so a library linked with -fopenmp shares its threads;
pass torch.get_num_threads() to the C function and use it in `num_threads(...)`.
Instruction sets: one file per set, each with its own flags in `sources`; the file without flags asks
`__builtin_cpu_supports` at run time. ctypes releases the interpreter lock during a call.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).parent / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# -ffp-contract=fast lets a * b + c become one fused instruction. No -ffast-math: it breaks NaN and inf.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_LINKS = ("-fopenmp",)

_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL | BuildError] = {}


class BuildError(RuntimeError):
    """The C++ kernels cannot be built here; the text says why and what to do."""


@cache
def _compiler() -> tuple[tuple[str, ...], str] | str:
    """Return (command, version line) of the C++ compiler, or the reason there is none."""
    wanted = os.environ.get("CXX")
    if wanted:
        command = tuple(shlex.split(wanted))
    else:
        found = next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
        if found is None:
            return "no C++ compiler (looked for g++, c++ and clang++); install g++ or set CXX"
        command = (found,)
    try:
        out = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as e:
        return f"the C++ compiler {shlex.join(command)!r} does not run ({e}); install g++ or set CXX"
    return command, out.splitlines()[0] if out else ""


def why_not() -> str | None:
    """Say why nothing can be compiled here, or None. Cheap after the first call."""
    if os.environ.get("OPREG_NO_BUILD", "") not in ("", "0"):
        return "OPREG_NO_BUILD is set; unset it to build the C++ kernels"
    found = _compiler()
    return found if isinstance(found, str) else None


def cache_dir() -> Path:
    """Where built libraries are kept: $OPREG_CACHE_DIR, else $XDG_CACHE_HOME/opreg, else ~/.cache/opreg."""
    own = os.environ.get("OPREG_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opreg"


def _with_includes(name: str, seen: dict[str, str]) -> dict[str, str]:
    """Read a source and every header in csrc/ that it includes, so that the digest covers all of them."""
    if name not in seen:
        seen[name] = (CSRC / name).read_text(encoding="utf-8")
        for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', seen[name], re.M):
            _with_includes(header, seen)
    return seen


def load(name: str, sources: Mapping[str, Sequence[str]]) -> ctypes.CDLL:
    """Return the library `name` built from `sources` (file name in csrc/ -> its extra flags), building it at most once.

    Raises BuildError with the reason (no compiler, compiler output); the same reason again at every later call.
    """
    with _lock:
        have = _loaded.get(name)
        if have is None:
            try:
                have = _open(name, _build(name, sources, _FLAGS, _LINKS))
            except BuildError as e:
                have = e
            _loaded[name] = have
    if isinstance(have, BuildError):
        raise have
    return have


def _open(name: str, target: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(target))
    except OSError as e:
        raise BuildError(f"the built C++ kernels {name!r} do not load ({e}); delete {target} to build again") from e


def load_module(name: str, source: str) -> ModuleType:
    """Return the Python module `name` built from `source`, which includes headers of Python and of torch.

    Such a build is for one torch and one Python. Raises BuildError with the reason.
    """
    import torch

    headers, home = sysconfig.get_paths()["include"], Path(torch.__file__).parent
    if not (Path(headers) / "Python.h").exists():
        raise BuildError(
            f"cannot build {name!r}: there is no Python.h in {headers}; install the headers of this Python"
        )
    # Headers of torch 2.10 and later are written for C++20; earlier ones compile as such, too.
    flags = ("-std=c++20", "-O2", "-fPIC", f"-I{home / 'include'}", f"-I{headers}")
    links = (f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python")
    linked = (home / "lib" / "libtorch_python.so").stat()  # tells every build of torch from every other
    facts = (linked.st_size, linked.st_mtime_ns, sys.implementation.cache_tag)
    with _lock:
        target = _build(name, {source: ()}, flags, links, facts)
    loader = importlib.machinery.ExtensionFileLoader(name, str(target))
    try:
        spec = importlib.util.spec_from_loader(name, loader)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        loader.exec_module(module)
    except ImportError as e:
        raise BuildError(f"the built module {name!r} does not load ({e}); delete {target} to build again") from e
    return module


def _build(
    name: str,
    sources: Mapping[str, Sequence[str]],
    flags: Sequence[str],
    links: Sequence[str],
    facts: tuple[object, ...] = (),
) -> Path:
    """The library `name`, built unless it is in the cache; facts: what makes another build of the same sources."""
    reason = why_not()
    if reason is not None:
        raise BuildError(f"cannot build the C++ kernels {name!r}: {reason}")
    found = _compiler()
    command, version = found if isinstance(found, tuple) else ((), "")
    text: dict[str, str] = {}
    for source in sources:
        _with_includes(source, text)
    own = sorted((source, list(more)) for source, more in sources.items())
    key = repr((sorted(text.items()), own, flags, links, facts, command, version))
    digest = hashlib.sha256(f"{key}{platform.machine()}".encode()).hexdigest()[:16]
    target = cache_dir() / f"{name}-{digest}.so"
    if not target.exists():
        units = {source: [*command, *flags, *more, "-c", str(CSRC / source)] for source, more in sources.items()}
        _compile(name, units, [*command, "-shared"], links, target)
    return target


def _compile(name: str, units: Mapping[str, list[str]], link: list[str], links: Sequence[str], target: Path) -> None:
    """units: the compiler's command per source; link: the linker's, before the objects, and `links` after them."""
    start = time.monotonic()
    where = f"(once, kept in {target.parent})"
    print(f"opreg: building the C++ kernels {name!r} {where} ...", end=" ", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{name}-") as tmp:
            jobs: list[tuple[list[str], subprocess.Popen[str]]] = []
            objects = []
            for source, unit in units.items():
                objects.append(str(Path(tmp) / f"{source}.o"))
                line = [*unit, "-o", objects[-1]]
                jobs.append((line, subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)))
            results = [(line, job.communicate()[0], job.returncode) for line, job in jobs]
            if all(code == 0 for _, _, code in results):
                line = [*link, *objects, "-o", str(Path(tmp) / target.name), *links]
                done = subprocess.run(line, capture_output=True, text=True, check=False)
                results.append((line, done.stdout + done.stderr, done.returncode))
            for line, output, code in results:
                if code != 0:
                    tail = "\n".join(output.splitlines()[-20:])
                    raise BuildError(f"cannot build the C++ kernels {name!r}: {shlex.join(line)} failed:\n{tail}")
            # A rename within one file system is atomic: a second process building the same thing at once does no harm.
            os.replace(Path(tmp) / target.name, target)
    except BuildError:
        print("failed", file=sys.stderr, flush=True)
        raise
    except OSError as e:
        print("failed", file=sys.stderr, flush=True)
        raise BuildError(
            f"cannot build the C++ kernels {name!r}: {e}; set OPREG_CACHE_DIR to a writable directory"
        ) from e
    print(f"done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
