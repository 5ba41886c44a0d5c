"""Write the figures with which the lane compares: python tests/lanes/tpu_aot/write_figures.py FILE [--chips v6e,...].

`opreg bench ragged_paged_attention --tpu` shows them. Needs jax and libtpu, no TPU; a chip takes about half a minute.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import libtpu
from opreg.kernels.pallas.tpu_compile import TOPOLOGIES, Problem
from opreg.kernels.pallas.tpu_figures import measure, tile_blocks


def main() -> None:
    """Parse, compile, write after each chip, since one can take minutes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--chips", default=",".join(TOPOLOGIES))
    parser.add_argument("--layouts", default="HND")
    options = parser.parse_args()
    compiler = {"jax": jax.__version__, "libtpu": libtpu.__version__}
    found = {}
    if options.file.exists():
        kept = json.loads(options.file.read_text())
        found = kept.pop("figures")
        if kept != compiler:
            raise SystemExit(f"{options.file} holds figures of {kept}, and this is {compiler}; delete it first")
    for layout in options.layouts.split(","):
        for chip in options.chips.split(","):
            result = measure(chip, Problem(layout=layout), tile_blocks(chip))
            found[f"{chip} {layout}"] = dataclasses.asdict(result)
            options.file.write_text(json.dumps({**compiler, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
