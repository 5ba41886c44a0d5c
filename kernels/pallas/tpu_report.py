"""What `opreg bench ragged_paged_attention --tpu` prints: the TPU compiler's figures beside those of published kernels.

A bundle is what a core issues in one cycle. Waits for copies and for a full matrix unit are not in it, so beside each
figure stands its bound; figures compare for the same work under the same compiler, and are not time.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

# Bundles of the published kernels under jax 0.10.2 with libtpu 0.0.52. RPA v3 masks every block, and computes a whole
# block of 4,096 positions for a decode sequence however short it is; v2's tile of 32 x 2,048 is half of the work.
TILE = {"v6e": {"RPA v3": 14_817, "RPA v2": 2 * 10_552}, "7x": {"RPA v3": 13_512}, "v5e": {"RPA v3": 20_626}}
DECODE = {"v6e": {"RPA v3": 6_552 + 700}, "7x": {"RPA v3": 6_693 + 700}, "v5e": {"RPA v3": 6_754 + 700}}


def report(chips: Sequence[str]) -> Iterable[dict[str, Any]] | str:
    """One row per figure of one layer of Llama 3 8B with head-major pages, or why there are none here.

    chips: "v4", "v5e", "v5p", "v6e", "7x"; none means those for which published figures exist. A chip takes about half
    a minute.

    Raises ValueError for another chip, TpuCompileError where the compiler refuses the kernel.
    """
    absent = [name for name in ("jax", "libtpu") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed; the TPU compiler is in libtpu (0.0.52 with jax 0.10.2)"
    from .tpu_compile import TOPOLOGIES

    unknown = [chip for chip in chips if chip not in TOPOLOGIES]
    if unknown:
        raise ValueError(f"there is no chip '{unknown[0]}'; there are {', '.join(TOPOLOGIES)}")
    return _rows(chips or tuple(TILE))


def _rows(chips: Sequence[str]) -> Iterator[dict[str, Any]]:
    from .tpu_compile import Problem
    from .tpu_figures import measure, tile_blocks

    for chip in chips:
        found = measure(chip, Problem(), tile_blocks(chip))
        # The published tiles are 256 x 512; on a v4, where that does not fit, there is none to compare with.
        for what, bundles in (("inside", found.inside), ("with masks", found.masked)):
            work = f"prefill tile of {found.tile}, {what}"
            yield row(chip, work, bundles, found.matrix_bound, "matrix passes", TILE.get(chip, {}))
        floor, of = round(found.copy_floor), "cycles of its copies"
        yield row(chip, f"decode sequence of {found.kv}", found.decode_sequence, floor, of, DECODE.get(chip, {}))
        yield row(chip, f"decode products of {found.kv}", found.decode_product, floor, of, {})


def row(chip: str, work: str, bundles: int, bound: int, of: str, published: dict[str, int]) -> dict[str, Any]:
    """One figure. What it takes is the larger of bundles and bound; `ratio` is that over the bound, and published
    figures stand beside with how many times that they are."""
    takes = max(bundles, bound)
    beside = ", ".join(f"{name} {theirs:,} ({theirs / takes:.2f}x)" for name, theirs in published.items())
    return {
        "chip": chip,
        "work": work,
        "bundles": bundles,
        "bound": bound,
        "bound_of": of,
        "ratio": takes / bound,
        "published": beside,
        "compiler": f"jax {version('jax')}, libtpu {version('libtpu')}",
    }
