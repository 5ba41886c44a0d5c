"""The function that C++ calls for an op on the CPU in a compiled graph: it runs the kernel's own code where it can.

A call more takes 20 to 50 ns in Python, and an operator defined with torch.library alone has none. A registered
function cannot be replaced while other threads may call it, but its code can."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from .runner import arguments, parameters
from .spec import OpSpec


class CpuCall:
    """`function` has the op's signature and runs what `use` was given last."""

    def __init__(
        self, spec: OpSpec, defaults: tuple[Any, ...], keywords: dict[str, Any], run: Callable[..., Any]
    ) -> None:
        self._keywords = keywords
        self._names = [arg.name for arg in spec.args if arg.keyword_only]
        given = [parameters(spec)] if spec.args else []
        given += ["_run"] if self._names else ["*", "_run"]
        source = f"def call({', '.join(given)}):\n    return _run({arguments(spec)})\n"
        module = compile(source, f"<opreg {spec.name}>", "exec")
        self._through = next(constant for constant in module.co_consts if isinstance(constant, CodeType))
        self._count = len(spec.args) - len(self._names)
        names = run.__globals__ if isinstance(run, FunctionType) else {}
        self.function = FunctionType(self._through, names, spec.name.partition("::")[2], defaults)
        self.use(run)

    def use(self, run: Callable[..., Any]) -> None:
        """Run `run`, which has the op's signature, from now on."""
        self.function.__kwdefaults__ = {**self._keywords, "_run": run}
        self.function.__code__ = run.__code__ if self._fits(run) else self._through

    def _fits(self, run: Callable[..., Any]) -> bool:
        """Whether the code of `run` means the same in `function`."""
        if type(run) is not FunctionType or run.__closure__ or run.__globals__ is not self.function.__globals__:
            return False
        code, count = run.__code__, self._count
        return (
            not code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
            and code.co_argcount == count
            and list(code.co_varnames[count : count + code.co_kwonlyargcount]) == self._names
        )
