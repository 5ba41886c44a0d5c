"""Exported programs carry their JAX functions: saved here, run in a process where the functions do not exist."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp
import pytest
import torch

import opreg
from opreg import jax_bridge, library

assert jax_bridge  # defines the operator
EXPORTED = library.overload("opreg::jax_exported")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4) / 10)

    def forward(self, x, index):
        def layer(x, w):
            return {"y": jnp.tanh(x @ w), "rows": x.sum(1)}

        out = opreg.call_jax(layer, (x, self.weight))
        picked = opreg.call_jax(lambda rows, i: (rows[i], i * 2**33), (out["rows"], index))
        return out["y"].relu(), *picked


def export(**options):
    rows = torch.export.Dim("rows", min=3, max=1000)
    args = (torch.randn(5, 3), torch.tensor([1, 0]))
    return torch.export.export(Model(), args, dynamic_shapes={"x": {0: rows}, "index": None}, strict=False, **options)


def test_an_exported_program_carries_its_functions(tmp_path):
    program = export()
    nodes = [node for node in program.graph.nodes if node.target is EXPORTED]
    assert len(nodes) == 2
    x, index = torch.randn(7, 3), torch.tensor([6, 2])
    expected = Model()(x, index)
    for got, want in zip(program.module()(x, index), expected, strict=True):
        torch.testing.assert_close(got, want)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((x, index, expected), tmp_path / "data.pt")
    code = f"""
import sys, torch, opreg.jax_bridge
program = torch.export.load({str(tmp_path / "program.pt2")!r})
x, index, expected = torch.load({str(tmp_path / "data.pt")!r})
module = program.module()
for got, want in zip(module(x, index), expected, strict=True):
    torch.testing.assert_close(got, want)
module(x, index)[0].sum().backward()
assert next(module.parameters()).grad.abs().sum() > 0
compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
for n in (7, 9):
    torch.testing.assert_close(compiled(torch.ones(n, 3), index)[0], module(torch.ones(n, 3), index)[0])
assert "test_jax_export" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_damaged_artifact_is_refused():
    node = next(node for node in export().graph.nodes if node.target is EXPORTED)
    _, name, artifact = node.args
    with pytest.raises(opreg.KernelError, match=r"damaged: its digest is"):
        EXPORTED([torch.ones(3)], name.replace("layer", "other"), artifact[:-5])
    with pytest.raises(opreg.KernelError, match="is not base 85"):
        EXPORTED([torch.ones(3)], "other@00", '"')


def test_exported_operators_are_opcheck_clean():
    program = export()
    node = next(node for node in program.graph.nodes if node.target is EXPORTED)
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    result = library.opcheck(EXPORTED, ([x, w], *node.args[1:]), {})
    assert set(result.values()) == {"SUCCESS"}


def test_without_flatbuffers_the_error_says_what_to_install():
    code = """
import sys; sys.modules["flatbuffers"] = None
import torch, opreg
class Model(torch.nn.Module):
    def forward(self, x):
        return opreg.call_jax(lambda a: a + 1, (x,))
try:
    torch.export.export(Model(), (torch.ones(2),), strict=False)
except opreg.KernelError as error:
    assert "pip install 'opreg[jax]'" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
