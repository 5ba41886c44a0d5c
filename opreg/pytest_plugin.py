"""`pytest --opreg`: conformance tests of the installed operators, one per op and check and one per kernel.

`pytest --opreg` adds them to the tests that pytest collects; `--opreg-op NAME` (repeatable) chooses ops. A third party
gets them by installing opreg: its ops are found through the entry-point group `opreg.ops`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .op import Op
    from .testing import Line, Report


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("opreg", "operators registered with opreg")
    group.addoption("--opreg", action="store_true", help="also check every installed op")
    group.addoption("--opreg-op", action="append", default=[], metavar="NAME", help="check this op (repeatable)")
    group.addoption("--opreg-device", default=None, metavar="TYPE", help="device type (default: the one found here)")
    group.addoption("--opreg-seed", type=int, default=0, metavar="N", help="seed of the inputs (default 0)")


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--opreg-op")
    if not (config.getoption("--opreg") or wanted):
        return
    collector = Operators.from_parent(session, name="opreg", path=Path(str(config.rootpath)))
    items.extend(collector.collect_from(wanted))


class Operators(pytest.Collector):
    """All operators; each gives its checks."""

    def collect(self) -> Iterator[pytest.Item]:
        return self.collect_from([])

    def collect_from(self, wanted: list[str]) -> Iterator[pytest.Item]:
        from . import registry

        for name, error in registry.load_packages().items():
            if error is not None:
                yield PackageItem.from_parent(self, name=f"package {name}", error=error)
        for op in [registry.get(name) for name in wanted] or registry.all_ops():
            yield OpItem.from_parent(self, name=f"{op.name}[checks]", op=op, kernel=None)
            for kernel in op.kernels:
                yield OpItem.from_parent(self, name=f"{op.name}[kernel {kernel.name}]", op=op, kernel=kernel.name)


class CheckFailed(Exception):
    """Lines of a report that failed."""


class PackageItem(pytest.Item):
    """An op package that could not be imported."""

    def __init__(self, *, error: BaseException, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.error = error

    def runtest(self) -> None:
        raise CheckFailed(f"the package cannot be imported: {type(self.error).__name__}: {self.error}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name


class OpItem(pytest.Item):
    """The checks of one op, or of one of its kernels; both are read from one report per op."""

    def __init__(self, *, op: Op[Any, Any], kernel: str | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.op, self.kernel = op, kernel

    def runtest(self) -> None:
        report = _report(self.config, self.op)
        mine = [line for line in report.lines if self._is_mine(line)]
        failed = [line for line in mine if line.state == "FAILED"]
        if failed:
            raise CheckFailed("\n".join(_sentence(line) for line in failed))
        if not any(line.state == "ok" for line in mine):
            why = mine[0].detail if mine else "nothing could be run"
            pytest.skip(why)

    def _is_mine(self, line: Line) -> bool:
        return line.check == f"kernel {self.kernel}" if self.kernel else not line.check.startswith("kernel ")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, CheckFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        file, _, line = self.op.spec.source.rpartition(":")
        return Path(file), int(line) - 1 if line.isdigit() else None, self.name


def _sentence(line: Line) -> str:
    again = f"\n    reproduce: {line.reproduce}" if line.reproduce else ""
    return f"{line.check}: {line.detail}{again}"


_REPORTS: pytest.StashKey[dict[str, Report]] = pytest.StashKey()


def _report(config: pytest.Config, op: Op[Any, Any]) -> Report:
    from . import devices
    from .testing import check_op

    reports = config.stash.setdefault(_REPORTS, {})
    if op.name not in reports:
        device = config.getoption("--opreg-device")
        device = devices.present()[0] if device is None else devices.check(device, "--opreg-device")
        reports[op.name] = check_op(op, device=device, seed=config.getoption("--opreg-seed"))
    return reports[op.name]
