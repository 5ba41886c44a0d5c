"""Read the TPU compiler's final schedule of one kernel: its loops, how many bundles each takes, and which units they
use.

A bundle is what a core issues in one cycle. Waits for copies, semaphores and a full matrix unit are not in it, so
figures of the same tile of work by the same compiler compare, and the larger of bundles and matrix passes is a lower
bound of the time.
"""

import re
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*((?:> ?)*)")


class DumpError(RuntimeError):
    """The dump is not there, or does not look as it should."""


@dataclass(frozen=True)
class Region:
    """Bundles in a row at one loop depth."""

    address: int
    depth: int
    loop: bool  # starts at the head of a loop
    bundles: int
    copies: int  # DMA instructions
    slots: dict[str, int]  # instructions per unit

    def use(self, slot: str, capacity: dict[str, int]) -> float:
        """Share of a unit's slots that is filled."""
        return self.slots.get(slot, 0) / (self.bundles * capacity[slot])


@dataclass(frozen=True)
class Schedule:
    """All regions of a kernel in program order, and how many instructions of each unit fit in a bundle."""

    regions: list[Region]
    capacity: dict[str, int]

    @property
    def bundles(self) -> int:
        """Bundles of the whole program, each counted once."""
        return sum(region.bundles for region in self.regions)

    def products(self, least: int = 16) -> list[Region]:
        """Regions of `least` bundles and more that use the matrix unit: straight-line code of the kernel's inner tiles.

        On chips before v6e its last instructions drain into the few bundles of the branches that follow.
        """
        return [region for region in self.regions if region.slots.get("MATMUL", 0) and region.bundles >= least]


def read_schedule(folder: Path, kernel: str) -> Schedule:
    """The schedule of `kernel` from what the compiler left in `folder`.

    Raises DumpError where there is none.
    """
    listings = [
        path
        for path in sorted(folder.glob(f"*{kernel}*final_bundles.txt"))
        if not path.name.endswith("schedule-analysis_final_bundles.txt")
    ]
    tables = sorted(folder.glob(f"*{kernel}*final_hlo-static-per-bundle-utilization.txt"))
    if not listings or not tables:
        raise DumpError(
            f"no schedule of '{kernel}' in the dump; did the compiler get the dump flags, and is that the name?"
        )
    return parse_schedule(listings[0].read_text(), tables[0].read_text())


def parse_schedule(listing: str, table: str) -> Schedule:
    """Regions of a bundle listing, with the counts of the per-bundle table beside it."""
    lines = table.split("\n")
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, (int(x) for x in lines[2].split()), strict=True))
    counts = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
    rows = []
    for line in listing.split("\n"):
        found = LINE.match(line)
        if found:
            rows.append((int(found[1], 16), found[2], found[3].count(">"), "dma." in line))
    if len(rows) != len(counts):
        raise DumpError(
            f"the listing has {len(rows)} bundles and the table {len(counts)}; are they of the same kernel?"
        )
    starts = [
        i for i, (_, mark, depth, _) in enumerate(rows) if i == 0 or mark in ("LB", "PF") or depth != rows[i - 1][2]
    ]
    regions = []
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        address, mark, depth, _ = rows[start]
        totals = [sum(column) for column in zip(*counts[start:end], strict=True)]
        slots = {name: total for name, total in zip(names, totals, strict=True) if total}
        copies = sum(row[3] for row in rows[start:end])
        regions.append(Region(address, depth, mark == "LB", end - start, copies, slots))
    return Schedule(regions, capacity)
