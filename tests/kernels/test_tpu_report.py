"""Rows of the TPU compiler's figures beside published ones."""

import importlib.util

import pytest
from opreg.kernels.pallas import tpu_figures, tpu_report
from opreg.kernels.pallas.tpu_figures import Figures

FOUND = {
    "inside": 9000,
    "masked": 10000,
    "small_inside": None,
    "small_masked": None,
    "decode_product": 700,
    "decode_sequence": 1000,
    "matrix_use": 0.9,
    "matrix_bound": 8000,
    "copy_floor": 2000.4,
}


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(tpu_report, "version", lambda name: f"of {name}")
    asked = []

    def measure(chip, problem, blocks):
        asked.append(chip)
        return Figures(chip=chip, tile=f"{blocks.tokens_per_block} x {blocks.kv_per_block}", kv=512, **FOUND)

    monkeypatch.setattr(tpu_figures, "measure", measure)
    return asked


def test_rows(installed):
    inside, masked, decode, products = tpu_report.report(["v6e"])
    assert inside == {
        "chip": "v6e",
        "work": "prefill tile of 256 x 512, inside",
        "bundles": 9000,
        "bound": 8000,
        "bound_of": "matrix passes",
        "ratio": 1.125,
        "published": "RPA v3 14,817 (1.65x), RPA v2 21,104 (2.34x)",
        "compiler": "jax of jax, libtpu of libtpu",
    }
    assert (masked["work"], masked["ratio"]) == ("prefill tile of 256 x 512, with masks", 1.25)
    # Copies take longer than the bundles: they are what a sequence takes.
    assert (decode["work"], decode["bound"], decode["ratio"]) == ("decode sequence of 512", 2000, 1.0)
    assert decode["published"] == "RPA v3 7,252 (3.63x)"
    assert (products["work"], products["bundles"], products["published"]) == ("decode products of 512", 700, "")


def test_which_chips(installed):
    assert [row["chip"] for row in tpu_report.report(["v4"])] == ["v4"] * 4
    assert installed == ["v4"]
    assert {row["chip"] for row in tpu_report.report([])} == {"v6e", "7x", "v5e"}
    with pytest.raises(ValueError, match="there is no chip 'v8'; there are v4, v5e, v5p, v6e, 7x"):
        tpu_report.report(["v8"])


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else name)
    assert str(tpu_report.report([])).startswith("libtpu not installed; the TPU compiler is in libtpu")
