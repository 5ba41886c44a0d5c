"""Graphs of Gated DeltaNet layers on device xpu: traced with fake tensors, since no such device is here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opreg.ops.gdn_attention_core import gdn_attention_core
from opreg.ops.gdn_attention_core_xpu import gdn_attention_core_xpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import opreg

Core = Callable[..., None]


def by_torch_ops(*args: Any) -> None:
    """As vLLM's callers on XPU call it (PR #39466)."""
    torch.ops.opreg.gdn_attention_core_xpu(*args)


CORES = {"function": gdn_attention_core, "alias": gdn_attention_core_xpu, "torch.ops": by_torch_ops}


class Layer(torch.nn.Module):
    """Projections, core, gate and residual of a layer with 2 key heads and 4 value heads of 64."""

    def __init__(self, name: str, core: Core) -> None:
        super().__init__()
        self.name, self.core = name, core
        self.qkvz = torch.nn.Linear(64, 768, bias=False)
        self.ba = torch.nn.Linear(64, 8, bias=False)
        self.out = torch.nn.Linear(256, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        core = torch.zeros(x.shape[0], 4, 64, dtype=x.dtype, device=x.device)
        z = torch.empty_like(core)
        self.core(core, z, self.qkvz(x), self.ba(x), self.name)
        return x + self.out((core * torch.sigmoid(z)).flatten(1))


def fake_model(core: Core, layers: int, mode: FakeTensorMode) -> torch.nn.Module:
    with torch.device("meta"):
        model = torch.nn.Sequential(*(Layer(f"layers.{i}", core) for i in range(layers)))
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            with mode:
                made = torch.empty(weight.shape, dtype=torch.bfloat16, device="xpu")
            module.register_parameter(name, torch.nn.Parameter(made, requires_grad=False))
    return model


def traced(core: Core, layers: int, how: str) -> GraphModule:
    """The graph of a model on fake tensors of device xpu, by Dynamo or by torch.export."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    model = fake_model(core, layers, mode)
    with mode:
        x = torch.empty(8, 64, dtype=torch.bfloat16, device="xpu")
        if how == "export":
            return torch.export.export(model, (x,), strict=False).graph_module
        graphs: list[GraphModule] = []

        def keep(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            graphs.append(gm)
            (result,) = gm.graph.output_node().args[0]
            return lambda *_: (value(result),)  # traced, not run: a real handle does not mix with fake tensors

        out = torch.compile(model, backend=keep, fullgraph=True)(x)
    assert out.device.type == "xpu"
    assert len(graphs) == 1
    return graphs[0]


def value(node: torch.fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize("core", list(CORES))
def test_graph_on_xpu_is_whole_and_splits_at_the_attention(core: str, how: str) -> None:
    layers = 4
    graph = traced(CORES[core], layers, how)
    calls = [node for node in graph.graph.nodes if "gdn_attention_core" in str(node.target)]
    assert len(calls) == layers
    tensors = [value(node) for node in graph.graph.nodes if isinstance(value(node), torch.Tensor)]
    handles = [t for t in tensors if t.dtype == torch.int64]
    assert {t.device.type for t in tensors if t.dtype != torch.int64} == {"xpu"}
    assert all(t.device.type == "cpu" and t.dim() == 0 for t in handles)
    split = opreg.split_graph(graph)
    assert [piece.split for piece in split.pieces] == [bool(i % 2) for i in range(2 * layers + 1)]
    # First and last piece are their own; what lies between two layers is the same piece each time.
    between = split.same[2:-1:2]
    assert len(set(between)) == 1
    assert len(set(split.same[::2])) == 3
