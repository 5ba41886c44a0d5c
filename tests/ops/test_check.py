"""`opreg check` over the whole shipped op set is green."""

import time
from typing import Any

import opreg.ops  # noqa: F401 - registers the shipped ops
import pytest

from opreg import registry
from opreg.op import Op
from opreg.testing import check_op

OPS = [op for op in registry.all_ops() if op.name.startswith("opreg::")]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@every_op
def test_eager_checks(op: Op[..., Any]) -> None:
    """One input and what is derived from it, without the compilers, which test_opcheck.py tries on every op."""
    report = check_op(op, input=0, compilers=False)
    assert report.ok, str(report)


@pytest.mark.slow
def test_everything_in_two_minutes() -> None:
    started = time.process_time()
    reports = [check_op(op) for op in OPS]
    assert all(report.ok for report in reports), "\n".join(map(str, reports))
    # CPU seconds of one process, which two free cores need not even share.
    assert time.process_time() - started < 120
