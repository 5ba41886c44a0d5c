"""`python -m tests.corpus.table`: what opreg and torch.library.opcheck find in the corpus, as a Markdown table."""

import warnings

from .case import Case, findings, opcheck_finds
from .formulas import CASES as FORMULAS
from .kernels import CASES as KERNELS
from .memory import CASES as MEMORY
from .process import CASES as PROCESS
from .results import CASES as RESULTS
from .shapes import CASES as SHAPES
from .values import CASES as VALUES
from .writes import CASES as WRITES

CASES: tuple[Case, ...] = tuple(
    sorted((*WRITES, *MEMORY, *PROCESS, *SHAPES, *FORMULAS, *KERNELS, *VALUES, *RESULTS), key=lambda case: case.hazard)
)


def table(namespace: str) -> list[str]:
    lines = ["| hazard | operator | mistake | opreg | torch.library.opcheck |", "|---|---|---|---|---|"]
    seen = 0
    for index, case in enumerate(CASES):
        found = findings(case.broken, f"{namespace}_a{index}", compilers=False)
        # The check that is to find it: which others see it too may depend on what memory happens to hold.
        word = "refused" if "registration" in found else case.by if case.by in found else "nothing"
        other = opcheck_finds(case.broken, f"{namespace}_b{index}")
        seen += other not in ("nothing", "-")
        lines.append(f"| {case.hazard} | {case.name} | {case.story} | {word} | {other} |")
    lines.append("")
    lines.append(
        f"opreg finds all {len(CASES)}, torch.library.opcheck {seen}; `-`: opreg refuses to make the operator."
    )
    return lines


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print("\n".join(table("corpus")))
