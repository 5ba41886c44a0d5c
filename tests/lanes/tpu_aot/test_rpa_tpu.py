"""The Pallas kernel under the real TPU compiler: all chips with default blocks, and figures that may not get worse."""

import json
from pathlib import Path

import pytest
from opreg.kernels.pallas.rpa_blocks import VMEM_BYTES
from opreg.kernels.pallas.tpu_compile import Problem, TpuCompileError, compile_for
from opreg.kernels.pallas.tpu_report import report

# What `opreg bench ragged_paged_attention --tpu --json` printed; written anew where figures get better.
FIGURES = json.loads((Path(__file__).parent / "figures.json").read_text())["tpu"]
KEPT = {(row["chip"], row["work"]): row for row in FIGURES}
CHIPS = sorted(VMEM_BYTES)

# A tile's bundles differ by under 1% between programs that mean the same; 3% is a real change.
WORSE = 1.03

SMALL = {"tokens": 64, "sequences": 8, "pages": 64, "pages_per_sequence": 8}

EVERY_OPTION = {"sliding_window": 200, "soft_cap": 30.0, "sinks": True, "lse": True}

VARIANTS = {
    "every option": Problem(**SMALL, **EVERY_OPTION),
    "token-major": Problem(**SMALL, layout="NHD"),
    "float32": Problem(**SMALL, q_dtype="float32", kv_dtype="float32", query_heads=8, kv_heads=2),
    "float8 pages": Problem(**SMALL, kv_dtype="float8_e4m3fn"),
    "token-major int8": Problem(**SMALL, layout="NHD", kv_dtype="int8"),
    "odd heads, narrow": Problem(**SMALL, **EVERY_OPTION, query_heads=6, kv_heads=2, head_dim=64),
    "wide": Problem(**SMALL, **EVERY_OPTION, query_heads=8, kv_heads=2, head_dim=240),
    "wide, token-major": Problem(**SMALL, **EVERY_OPTION, layout="NHD", query_heads=8, kv_heads=2, head_dim=256),
    "one KV head": Problem(**SMALL, query_heads=8, kv_heads=1),
    "pages of 16": Problem(**SMALL, page_size=16),
    "update": Problem(**SMALL, update=True),
    "update, token-major float8": Problem(**SMALL, update=True, layout="NHD", kv_dtype="float8_e5m2"),
}


@pytest.mark.parametrize("chip", CHIPS)
def test_default_blocks_fit_every_chip(chip):
    """The whole Llama 3 8B call; temporary memory would mean that the cache is copied."""
    compiled = compile_for(chip, Problem())
    assert compiled.temporary_bytes < 2**20


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_compile(chip, name):
    compile_for(chip, VARIANTS[name])


@pytest.mark.parametrize("chip", sorted({chip for chip, _ in KEPT}))
def test_figures_are_not_worse(chip):
    now = {(row["chip"], row["work"]): row for row in report([chip])}
    assert now.keys() == {key for key in KEPT if key[0] == chip}
    for key, row in now.items():
        assert row["compiler"] == KEPT[key]["compiler"], "figures are of another compiler"
        assert row["bundles"] <= KEPT[key]["bundles"] * WORSE, row


def test_the_targets_that_were_set():
    """What issue 5 asks for, of the figures as kept."""
    tile, decode = "prefill tile of 256 x 512", "decode sequence of 512"
    inside, masked = f"{tile}, inside", f"{tile}, with masks"
    assert KEPT["v6e", inside]["bundles"] <= 9_500
    assert KEPT["v6e", masked]["bundles"] <= 10_500
    assert KEPT["7x", inside]["bundles"] <= 9_800
    assert KEPT["v5e", inside]["bundles"] <= KEPT["v5e", inside]["bound"]
    for chip in ("v6e", "7x", "v5e"):
        assert KEPT[chip, decode]["ratio"] <= 1.2


def test_what_the_compiler_says_reaches_the_caller():
    with pytest.raises(TpuCompileError, match=r"(?s)v4: the compiler ended.*at most 128 \(split the heads"):
        compile_for("v4", Problem(**SMALL, query_heads=256))
