"""One entry of the corpus: a realistic mistake, and the same operator without it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from opreg import library
from opreg.errors import OpregError
from opreg.testing import check_op, process
from opreg.testing.samples import arguments, registered_calls
from opreg.testing.variants import from_contract


@dataclass(frozen=True)
class Case:
    """hazard: row of HAZARDS; by: what must find it, "registration" or a check of the report."""

    hazard: int
    name: str
    by: str
    broken: Callable[[str], Any]
    healthy: Callable[[str], Any]

    @property
    def story(self) -> str:
        return (self.broken.__doc__ or "").strip().splitlines()[0]


def findings(build: Callable[[str], Any], namespace: str, compilers: bool) -> dict[str, str]:
    """{"registration" or check: what was found} for an operator; empty where nothing is wrong."""
    try:
        fn = build(namespace)
    except OpregError as error:
        return {"registration": str(error)}
    report = check_op(fn, compilers=compilers)
    found = {line.check: line.detail for line in report.failed}
    return found if report.ran else {"nothing ran": str(report)}


def opcheck_finds(build: Callable[[str], Any], namespace: str) -> str:
    """What torch.library.opcheck says of the same operator: the failing test, "nothing", or "-" without an operator."""
    try:
        op = build(namespace).op
    except OpregError:
        return "-"
    calls = registered_calls(op) if op.inputs is not None else from_contract(op, "cpu", torch.float32, 0)
    for call in calls:
        named = dict(zip([arg.name for arg in op.spec.args], call.fresh(), strict=True))
        keywords = {arg.name: named.pop(arg.name) for arg in op.spec.args if arg.keyword_only}
        try:
            with process.kept(everything=True):  # some operators change the process they run in
                found = library.opcheck(op.overload, tuple(named.values()), keywords)
        except Exception as error:  # opcheck itself may fail on a broken operator
            return f"error: {type(error).__name__}"
        failed = [name for name, text in found.items() if text != "SUCCESS"]
        if failed:
            return failed[0]
    return "nothing"


__all__ = ["Case", "arguments", "findings", "opcheck_finds"]
