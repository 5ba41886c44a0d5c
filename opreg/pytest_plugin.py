"""`pytest --opreg`: conformance tests of the installed operators: one per op, and one per op, kernel and input.

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
            yield OpItem.from_parent(self, name=f"{op.name}[checks]", op=op)
            inputs = _count_inputs(self.config, op)
            for kernel in op.kernels:
                for number in range(inputs) or [None]:
                    name = f"kernel {kernel.name}" if number is None else f"kernel {kernel.name}-input {number}"
                    yield OpItem.from_parent(self, name=f"{op.name}[{name}]", op=op, kernel=kernel.name, number=number)


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
    """The checks of one op, or one of its kernels on one input; all are read from one report per op."""

    def __init__(
        self, *, op: Op[Any, Any], kernel: str | None = None, number: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.op, self.kernel, self.number = op, kernel, number

    def runtest(self) -> None:
        report = _report(self.config, self.op)
        mine = [line for line in report.lines if self._is_mine(line)]
        if self.number is not None and any(line.state != "skipped" for line in mine):
            self._of_input(report, mine)
            return
        failed = [line for line in mine if line.state == "FAILED"]
        if failed:
            raise CheckFailed("\n".join(_sentence(line) for line in failed))
        if not any(line.state == "ok" for line in mine):
            why = mine[0].detail if mine else "nothing could be run"
            pytest.skip(why)

    def _of_input(self, report: Report, mine: list[Line]) -> None:
        unplaced = [line for line in mine if line.state == "FAILED" and not line.detail.startswith("input ")]
        if unplaced:  # the kernel cannot even be loaded
            raise CheckFailed("\n".join(_sentence(line) for line in unplaced))
        found = report.by_input.get((f"kernel {self.kernel}", self.number or 0))
        if found:
            from .testing.verdict import reproduce

            check = f"kernel {self.kernel}"
            command = reproduce(self.op, report.device, report.seed, check, f"input {self.number}")
            raise CheckFailed("\n".join([*(f"{check}: {text}" for text in found), f"    reproduce: {command}"]))
        if found is None:
            pytest.skip(f"kernel {self.kernel} refuses this input")

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


def _count_inputs(config: pytest.Config, op: Op[Any, Any]) -> int:
    """How many inputs the op's report will have; 0 where none can be made, which the report then says."""
    import torch

    from .testing.samples import registered_calls
    from .testing.variants import from_contract

    device, seed = _device(config), config.getoption("--opreg-seed")
    dtype = torch.float32 if torch.float32 in op.tolerances or not op.tolerances else next(iter(op.tolerances))
    make = from_contract if op.inputs is None else registered_calls
    try:
        return sum(1 for _ in make(op, device, dtype, seed))
    except Exception:  # register_inputs is the author's code; the report words what it raises
        return 0


def _device(config: pytest.Config) -> str:
    from . import devices

    wanted = config.getoption("--opreg-device")
    return devices.present()[0] if wanted is None else devices.check(wanted, "--opreg-device")


_REPORTS: pytest.StashKey[dict[str, Report]] = pytest.StashKey()


def _report(config: pytest.Config, op: Op[Any, Any]) -> Report:
    from .testing import check_op

    reports = config.stash.setdefault(_REPORTS, {})
    if op.name not in reports:
        reports[op.name] = check_op(op, device=_device(config), seed=config.getoption("--opreg-seed"))
    return reports[op.name]
