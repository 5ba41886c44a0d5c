"""Broken operators: each is found, none of their healthy twins is accused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .corpus.case import Case, findings
from .corpus.results import UNUSUAL as UNUSUAL_RESULTS
from .corpus.table import CASES, table
from .corpus.unusual import UNUSUAL

every_unusual_op = pytest.mark.parametrize("build", [*UNUSUAL, *UNUSUAL_RESULTS], ids=lambda build: build.__name__)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))


@every_case
def test_the_broken_one_is_found(case: Case) -> None:
    found = findings(case.broken, f"t_broken_{CASES.index(case)}", compilers=False)
    assert case.by in found, found
    assert found[case.by]


@every_case
def test_its_healthy_twin_is_not_accused(case: Case) -> None:
    assert findings(case.healthy, f"t_healthy_{CASES.index(case)}", compilers=False) == {}


@every_unusual_op
def test_an_unusual_one_is_not_accused(build: Callable[[str], Any]) -> None:
    assert findings(build, f"t_unusual_{build.__name__}", compilers=False) == {}


@pytest.mark.slow
@every_unusual_op
def test_an_unusual_one_compiles(build: Callable[[str], Any]) -> None:
    assert findings(build, f"t_unusual_compiled_{build.__name__}", compilers=True) == {}


def test_there_are_thirty_and_two_per_hazard() -> None:
    assert len(CASES) >= 30
    hazards = [case.hazard for case in CASES]
    assert all(hazards.count(hazard) >= 2 for hazard in set(hazards))


@pytest.mark.slow
@every_case
def test_its_healthy_twin_compiles(case: Case) -> None:
    assert findings(case.healthy, f"t_compiled_{CASES.index(case)}", compilers=True) == {}


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_is_found() -> None:
    docs = Path(__file__).parent.parent / "docs" / "corpus.md"
    assert "\n".join(table("t_table")) in docs.read_text()
