"""Figures of the Pallas ragged paged attention kernel from the real TPU compiler; no TPU needed, but jax and libtpu.

python tests/bench/tpu.py [--chips v6e,7x,...] [--layouts HND,NHD] [--json] [--write FILE]
Prints, per chip and layout, the bundles (issue cycles) of one prefill tile and one decode sequence of Llama 3 8B
shapes. Bundles are not time: waits for copies and for a full matrix unit are not in them, so beside each stands its
bound. `--write` keeps the figures in a file that the tpu-aot lane compares with. A chip takes about half a minute.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import libtpu
from opreg.kernels.pallas.tpu_compile import TOPOLOGIES, Problem
from opreg.kernels.pallas.tpu_figures import Figures, measure, tile_blocks

# Bundles per tile of 256 tokens x 512 x 32/8 heads x 128 of the published kernels under this same compiler.
PUBLISHED = {
    "v6e": "RPA v3: 14,817 a tile; v2: 84,416 for the same work (10,552 per 32 x 2048); decode of 512: about 7,300",
    "7x": "RPA v3: 13,512 a tile",
    "v5e": "RPA v3: 20,626 a tile",
}


def describe(layout: str, f: Figures) -> str:
    """The figures of one chip in two lines."""
    use = f"matrix slots {f.matrix_use:.0%} full, bound {f.matrix_bound:,}"
    tile = f"{f.tile:>10} tile: inside {f.inside:>6,}  masked {f.masked:>6,}  ({use})"
    decode = f"decode of {f.kv:,}: {f.decode_sequence:,} bundles a sequence, copies take {f.copy_floor:,.0f} cycles"
    return f"{f.chip:>4} {layout}  {tile}\n          {decode}: {f.decode_ratio:.2f} of the copies' time"


def main() -> None:
    """Parse, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", default=",".join(TOPOLOGIES))
    parser.add_argument("--layouts", default="HND,NHD")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    compiler = {"jax": jax.__version__, "libtpu": libtpu.__version__}
    found = {}
    if options.write and options.write.exists():
        kept = json.loads(options.write.read_text())
        found = kept.pop("figures")
        if kept != compiler:
            raise SystemExit(f"{options.write} holds figures of {kept}, and this is {compiler}; delete it first")
    print(", ".join(f"{name} {version}" for name, version in compiler.items()), file=sys.stderr)
    for layout in options.layouts.split(","):
        for chip in options.chips.split(","):
            result = measure(chip, Problem(layout=layout), tile_blocks(chip))
            found[f"{chip} {layout}"] = dataclasses.asdict(result)
            if not options.json:
                print(describe(layout, result), flush=True)
                if chip in PUBLISHED and layout == "HND":
                    print(f"          published: {PUBLISHED[chip]}", flush=True)
            if options.write:  # after each, since a chip can take minutes
                options.write.write_text(json.dumps({**compiler, "figures": found}, indent=1) + "\n")
    if options.json:
        print(json.dumps({**compiler, "figures": found}, indent=1))


if __name__ == "__main__":
    main()
