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


NAMED = """
import gc, sys
import torch
if torch.__version__ < "2.10":
    gc.disable()  # while 2.9 decomposes, a collection clears FakeTensors in use: opreg._compat.around_opcheck
import jax, jax.numpy as jnp
import opreg

@opreg.register_jax_op("opregjaxaway::scale")
def scale(x: jax.Array, w: jax.Array, factor: float = 2.0, *, shift: float = 0.0) -> jax.Array:
    return jnp.tanh(x @ w) * factor + shift

@opreg.register_jax_op("opregjaxaway::split")
def split(parts: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return sum(parts), parts[0].argmax(0)

@opreg.register_jax_op("opregjaxaway::push", mutates_args="cache")
def push(cache: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.roll(cache, 1, 0).at[0].set(new), new.sum()

@opreg.register_op("opregjaxaway::cube")
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3

cube.register_fake(lambda x: torch.empty_like(x))
cube.register_kernel("cpu", opreg.from_jax(lambda x: x * x * x), requires="jax", priority=1)

@opreg.register_op("opregjaxaway::double", mutates_args="x")
def double(x: torch.Tensor) -> None:
    x.mul_(2)

double.register_kernel("cpu", opreg.from_jax(lambda x: x * 2, mutates_args="x"), requires="jax", priority=1)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4) / 10)
        self.register_buffer("cache", torch.zeros(2, 4))

    def forward(self, x):
        by_name, store = (torch.ops.opregjaxaway.scale, torch.ops.opregjaxaway.push) if WAY == "ops" else (scale, push)
        y = by_name(x, self.weight, 3.0, shift=1.0)
        total, where = split([y, y + 1])
        size = store(self.cache, y[0])
        double(self.cache)
        return cube(total), where, size, self.cache + y[0]

FOLDER, WAY = sys.argv[1:]
x = torch.randn(5, 3)
rows = torch.export.Dim("rows", min=2, max=1000)
program = torch.export.export(Model(), (x,), dynamic_shapes={"x": {0: rows}}, strict=WAY == "strict")
if WAY != "plain":
    program = program.run_decompositions(opreg.jax_decompositions(*((cube, double) if WAY == "ops" else ())))
names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
names |= {str(node.args[0]) for node in program.graph.nodes if "auto_functionalized" in str(node.target)}
assert "opreg.jax_exported.default" in names, names
left = {name for name in names if "opregjaxaway" in name or "jax_call" in name}
assert left == (set() if WAY == "ops" else {"opregjaxaway.cube.default", "opregjaxaway.double.default"}), left
torch.export.save(program, f"{FOLDER}/program.pt2")
x = torch.randn(7, 3)
model = Model()
torch.save((x, model(x), model.cache), f"{FOLDER}/data.pt")
"""

AWAY = """
import sys
import torch
import opreg.jax_bridge

FOLDER, WAY = sys.argv[1:]
if WAY != "ops":  # an operator of register_op needs its registration, as any operator does
    @opreg.register_op("opregjaxaway::cube")
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x**3
    cube.register_fake(lambda x: torch.empty_like(x))
    @opreg.register_op("opregjaxaway::double", mutates_args="x")
    def double(x: torch.Tensor) -> None:
        x.mul_(2)
module = torch.export.load(f"{FOLDER}/program.pt2").module()
x, expected, cache = torch.load(f"{FOLDER}/data.pt")
for got, want in zip(module(x), expected, strict=True):
    torch.testing.assert_close(got, want)
assert not hasattr(torch.ops.opregjaxaway, "scale")
torch.testing.assert_close(module.cache, cache)  # written by the JAX functions
"""


@pytest.mark.parametrize("way", ["plain", *(pytest.param(way, marks=pytest.mark.slow) for way in ("strict", "ops"))])
def test_named_ops_run_where_their_functions_do_not_exist(tmp_path, way):
    for code in (NAMED, AWAY):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), way], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
