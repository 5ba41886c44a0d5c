"""The example of the JAX bridge runs and prints what it promises."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "06_call_jax.py"


def test_the_example(capsys):
    torch._dynamo.reset()
    assert jax
    runpy.run_path(str(EXAMPLE), run_name="example")["main"]()
    printed = capsys.readouterr().out
    assert "eager: y is a (4, 3) tensor" in printed
    assert "the bias got a gradient: True" in printed
    assert "equal to cummax: True" in printed
    assert "a new function object of the same code" in printed
