"""Choose block sizes with the TPU compiler instead of a TPU, and write the table that ships (rpa_table.py).

python -m opreg.kernels.pallas.tpu_tune [--chips v6e,7x] [--shapes 32/8x128,...] [--write FILE]
Each candidate is compiled and its cost worked out from the bundles of its tiles and the bytes of its copies: a prompt
of 2,048 tokens, and decode steps at several lengths. Entries that are not tuned again stay in the table as they are.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from .rpa_blocks import MIB, VMEM_BYTES, Blocks
from .rpa_table import TABLE
from .tpu_bundles import DumpError
from .tpu_compile import Problem, TpuCompileError
from .tpu_figures import Figures, measure

# (tokens_per_block, tokens_per_tile, kv_per_block, kv_per_chunk)
Sizes = tuple[int, int, int, int]
Key = tuple[str, int, int, int, str, str, str]

CANDIDATES: list[Sizes] = [
    (256, 32, 512, 512),
    (256, 32, 512, 256),
    (128, 32, 512, 512),
    (256, 32, 1024, 512),
    (128, 32, 256, 256),
]

PROMPT = 2048
DECODE = (100, 500, 2000, 8000)

HEADER = '''"""Block sizes that the tuner chose; written by tpu_tune, not by hand.

(chip, query heads, kv heads, head_dim, q dtype, cache dtype, layout):
(tokens_per_block, tokens_per_tile, kv_per_block, kv_per_chunk)
"""

TABLE: dict[tuple[str, int, int, int, str, str, str], tuple[int, int, int, int]] = '''


@dataclass(frozen=True)
class Cost:
    """Cycles of the prompt, and of one decode step per length."""

    prefill: float
    decode: tuple[float, ...]

    def against(self, best: "Cost") -> float:
        """Mean of the ratios to the best candidate of each, the prompt as heavy as all decode lengths together."""
        steps = [mine / other for mine, other in zip(self.decode, best.decode, strict=True)]
        return (self.prefill / best.prefill + sum(steps) / len(steps)) / 2


def cost(figures: Figures, sizes: Sizes) -> Cost:
    """Cycles after the schedule: what is larger of issuing a tile and its bound, tile by tile."""
    tokens, _, kv, chunk = sizes
    prefill = 0.0
    for start in range(0, PROMPT, tokens):
        inside = start // kv
        edge = -(-(start + tokens) // kv) - inside
        prefill += inside * max(figures.inside, figures.matrix_bound) + edge * max(figures.masked, figures.matrix_bound)
    fixed = figures.decode_sequence - kv // chunk * figures.decode_product
    decode = tuple(
        max(-(-length // kv) * fixed + -(-length // chunk) * figures.decode_product, length / kv * figures.copy_floor)
        for length in DECODE
    )
    return Cost(prefill, decode)


def choose(chip: str, problem: Problem) -> Sizes:
    """The best candidate that compiles.

    Raises TpuCompileError where none does.
    """
    costs: dict[Sizes, Cost] = {}
    for sizes in CANDIDATES:
        try:
            found = measure(chip, problem, Blocks(*sizes, VMEM_BYTES[chip]))
        except (TpuCompileError, DumpError) as error:
            note(f"{chip} {sizes}: no ({str(error).strip().splitlines()[-1][:100]})")
            continue
        costs[sizes] = cost(found, sizes)
        note(f"{chip} {sizes}: prompt {costs[sizes].prefill:,.0f}, decode {[round(x) for x in costs[sizes].decode]}")
    if not costs:
        raise TpuCompileError(f"{chip}: no candidate compiles for {problem}")
    columns = zip(*(entry.decode for entry in costs.values()), strict=True)
    best = Cost(min(entry.prefill for entry in costs.values()), tuple(min(column) for column in columns))
    return min(costs, key=lambda sizes: costs[sizes].against(best))


def render(table: dict[Key, Sizes]) -> str:
    """The table as a module."""
    quoted = (str(key).replace("'", '"') + f": {sizes}" for key, sizes in sorted(table.items()))
    return HEADER + "{\n" + "".join(f"    {entry},\n" for entry in quoted) + "}\n"


def note(text: str) -> None:
    """Progress, on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def parse_shape(text: str) -> Problem:
    """'32/8x128', '32/8x128:NHD' or '32/8x128:NHD:int8' as a problem."""
    sizes, *rest = text.split(":")
    heads, head_dim = sizes.split("x")
    query_heads, kv_heads = heads.split("/")
    return Problem(
        query_heads=int(query_heads),
        kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        layout=rest[0] if rest else "HND",
        kv_dtype=rest[1] if len(rest) > 1 else "bfloat16",
    )


def main() -> None:
    """Tune what is asked for and write the table after every entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--chips", default=",".join(VMEM_BYTES))
    parser.add_argument("--shapes", default="32/8x128:HND,32/8x128:NHD,8/1x128:HND,16/2x256:HND")
    parser.add_argument("--write", type=Path, default=Path(__file__).with_name("rpa_table.py"))
    options = parser.parse_args()
    table: dict[Key, Sizes] = dict(TABLE)
    for shape in options.shapes.split(","):
        problem = parse_shape(shape)
        for chip in options.chips.split(","):
            p = problem
            key = (chip, p.query_heads, p.kv_heads, p.head_dim, p.q_dtype, p.kv_dtype, p.layout)
            table[key] = choose(chip, problem)
            note(f"{key}: {table[key]} ({VMEM_BYTES[chip] // MIB} MiB)")
            options.write.write_text(render(table))


if __name__ == "__main__":
    main()
