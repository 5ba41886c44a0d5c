"""One run of the C++ compiler for the CPU kernels of all pieces, instead of one for every kernel.

Starting g++ and loading the precompiled headers costs more than a typical kernel: three kernels took 2.5 s of CPU time
one by one and 1.1 s together. Inductor asks for a kernel while it loads the module it generated for a piece; here it
gets a stand-in, and when all pieces are there, the kernels are built in one file and put in the stand-ins' places."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from opreg.backend_artifacts import Library
from opreg.backend_link import linked_by_name

log = logging.getLogger("opreg")
# Above this many the kernels are spread over the compiler's threads.
_PER_FILE = 8
Kernel = Callable[..., Any]


class Later:
    """A kernel that is not built yet. Called before it is (after an error in another piece), it is built alone."""

    __slots__ = ("alone", "argtypes", "scope", "source")

    def __init__(
        self, argtypes: Sequence[str], source: str, scope: dict[str, Any], alone: Callable[[], Kernel]
    ) -> None:
        self.argtypes = tuple(argtypes)
        self.source = source
        self.scope = scope
        self.alone = alone

    def put(self, kernel: Kernel) -> None:
        """Replace this stand-in in the module that asked for it."""
        for name in [name for name, value in self.scope.items() if value is self]:
            self.scope[name] = kernel

    def __call__(self, *args: Any) -> Any:
        kernel = self.alone()
        self.put(kernel)
        return kernel(*args)


@contextmanager
def kernels_built_together() -> Iterator[None]:
    """Inside, Inductor's C++ kernels are collected; at the end they are built."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    waiting: list[Later] = []
    original = AsyncCompile.cpp_pybinding

    def collect(self: Any, argtypes: list[str], source_code: str) -> Later:
        alone = functools.partial(CppPythonBindingsCodeCache.load_pybinding, argtypes, source_code)
        waiting.append(Later(argtypes, source_code, sys._getframe(1).f_globals, alone))
        return waiting[-1]

    AsyncCompile.cpp_pybinding = collect  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile.cpp_pybinding = original  # type: ignore[method-assign]
    _build(waiting)


def _build(waiting: Sequence[Later]) -> None:
    from torch._inductor.async_compile import get_compile_threads

    distinct = list({(later.argtypes, later.source): later for later in waiting}.values())
    if not distinct:
        return
    files = min(get_compile_threads(), -(-len(distinct) // _PER_FILE))
    made: dict[Any, Kernel] = {}
    started = [(part, _start(part)) for part in (distinct[i::files] for i in range(files))]
    for part, finish in started:
        kernels = finish()
        made.update({(later.argtypes, later.source): k for later, k in zip(part, kernels, strict=True)})
    for later in waiting:
        later.put(made[later.argtypes, later.source])


def _start(kernels: Sequence[Later]) -> Callable[[], list[Kernel]]:
    """Start building one file; what is returned waits for it, and gives its kernels."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.exc import CppCompileError

    class Together(CppPythonBindingsCodeCache):
        cache: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
        entry_function = _entry(0)
        path = ""

        @classmethod
        def _load_library_inner(cls, path: str, key: str) -> Any:
            cls.path = path
            return super()._load_library_inner(path, key)

    source = _source(kernels)
    library = Library(source)
    library.check()
    submit = AsyncCompile().submit
    load = Together.load_async(source, "cpu", submit_fn=lambda job: submit(linked_by_name(job)))

    def finish() -> list[Kernel]:
        try:
            first = load()
        except CppCompileError as error:
            log.warning("kernels could not be built in one file, so each is built alone: %s", error)
            return [later.alone() for later in kernels]
        except ImportError as error:
            # What a process that was stopped while it wrote left behind.
            if error.path is None or not os.path.exists(error.path):
                raise
            os.unlink(error.path)
            log.warning("%s cannot be loaded and is built again: %s", error.path, error)
            Together.cache.clear()
            first = Together.load_async(source, "cpu")()
        library.keep(Together.path)
        found = [getattr(first, _entry(0))]
        for i in range(1, len(kernels)):
            name = f"{first.__name__.rpartition('.')[0]}.{_entry(i)}"
            spec = importlib.util.spec_from_file_location(name, first.__file__)
            if spec is None or spec.loader is None:
                raise ImportError(f"{first.__file__} is no extension module")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found.append(getattr(module, _entry(i)))
        return found

    return finish


def _entry(i: int) -> str:
    return f"kernel{i}"


def _source(kernels: Sequence[Later]) -> str:
    """Every kernel with its bindings in a namespace of its own: one library that holds a module for each."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Bindings

    includes: dict[str, None] = {}
    parts: list[str] = []
    for i, later in enumerate(kernels):
        given = ", ".join(f"parse_arg<{t.replace('const ', '')}>(args, {n})" for n, t in enumerate(later.argtypes))
        bindings = Bindings.suffix_template.format(
            arg_len=len(later.argtypes),
            call_entry_func=Bindings.call_entry_function.format(given),
            entry_func=_entry(i),
            extra_parse_arg=Bindings.extra_parse_arg.format(array_len=-1),
        )
        lines: list[str] = []
        for line in (later.source + bindings).splitlines():
            if line.lstrip().startswith(("#include", "#define PY_SSIZE_T_CLEAN")):
                includes[line.strip()] = None
            else:
                lines.append(line)
        # With C linkage the kernels of all namespaces would be one function.
        body = re.sub(r'\bextern\s+"C"\s', "", "\n".join(lines))
        parts.append(f"namespace part{i} {{\n{body}\n}}")
    return "\n".join([*includes, *parts])
