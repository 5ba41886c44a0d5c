"""An operator with state: it finds its layer and the batch's metadata by name, and the graph holds neither.

python examples/03_layers.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from opreg import ContextError, LayerName, current_layer, forward_context, register_op


# kind="attention": graphs are split here. mutates_args: the output is the caller's tensor, written in place.
@register_op("tutorial::running_sum", mutates_args=("out",), kind="attention")
def running_sum(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], layer_name: LayerName) -> None:
    """Add each row to the sum of all rows that its sequence has seen, across calls."""
    layer, metadata = current_layer(layer_name)
    for row, slot in enumerate(metadata.slots):
        layer.sums[slot] += x[row]
        out[row] = layer.sums[slot]


class RunningSum(nn.Module):
    """A layer with one state per sequence."""

    def __init__(self, name: str, slots: int, width: int) -> None:
        super().__init__()
        self.name = name
        self.sums = torch.zeros(slots, width)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        running_sum(x, out, self.name)
        return torch.tanh(out)


@dataclass
class Batch:
    """This step's metadata: which sequence each row belongs to."""

    slots: list[int]


@torch.inference_mode()
def main() -> None:
    names = [f"layers.{i}" for i in range(3)]
    model = nn.Sequential(*(RunningSum(name, slots=4, width=8) for name in names))
    layers = dict(zip(names, model, strict=True))
    graphs = []

    def keep_graph(graph: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=keep_graph, fullgraph=True)
    rows = torch.tensor([[1.0], [10.0]]).expand(2, 8)

    print("Metadata None is a profiling run: outputs are zeros, and no state is touched.")
    with forward_context(layers=layers, metadata=None):
        print(f"  outputs {compiled(rows)[:, 0].tolist()}, states {model[0].sums[:, 0].tolist()}")

    print("\nWith metadata, rows belong to sequences. A row of 1 and a row of 10, then the two swapped:")
    for slots in ([2, 0], [0, 2]):
        with forward_context(layers=layers, metadata=Batch(slots)):
            compiled(rows)
        print(f"  rows of sequences {slots}: states {model[0].sums[:, 0].tolist()}")

    print(f"\n{len(graphs)} graph for all of it. It holds no name; each layer's arrives as an input:")
    for node in graphs[0].graph.nodes:
        if "running_sum" in str(node.target):
            print(f"  {node.target}({', '.join(str(arg) for arg in node.args)})")

    print("\nA name that is not there:")
    with forward_context(layers={"layers.O": model[0]}, metadata=Batch([0, 1])):
        try:
            model[0](rows)
        except ContextError as error:
            print(f"  {error}")


if __name__ == "__main__":
    main()
