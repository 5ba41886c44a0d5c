"""Linking a kernel without reading torch's symbols, which takes the linker 0.3 s where compiling the kernel takes 0.5.

A kernel needs a few symbols of libtorch_cpu at most, and this process has loaded that library. The linker only has to
write down its name: it is given an empty library of that name in its place.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("opreg")
_NAME = "libtorch_cpu.so"


def linked_by_name(job: Callable[[], None]) -> Callable[[], None]:
    """Inductor's job of building one library, its builders told to link against the empty library, where one can be
    made. What Inductor's keys are made of is the usual command line, so they stay what they are."""
    for builder in job.args[1]:  # type: ignore[attr-defined]
        if sys.platform == "linux" and "-ltorch_cpu " in builder._libraries_args:
            folder = _empty_library()
            if folder is not None:
                builder._libraries_dirs_args = f"-L{folder} {builder._libraries_dirs_args}"
                # Some compilers drop by default what no symbol is taken from.
                builder._ldflags_args += "-Wl,--no-as-needed "
    return job


def _empty_library() -> Path | None:
    """The folder that holds it, or None where it cannot be made: linking then reads the real one."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()) / "opreg" / "link"
    if (folder / _NAME).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        path = os.path.join(made, _NAME)
        named = [f"-Wl,-soname,{_NAME}", "-o", path]
        command = [get_cpp_compiler(), "-shared", "-nostdlib", *named, "-x", "c", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            log.info("kernels are linked with all of torch's symbols read: %s", done.stderr.strip())
            return None
        os.replace(path, folder / _NAME)
    return folder
