"""Where a graph is split, which pieces are the same, and what backend="opreg" compiles.

python examples/04_split.py
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import opreg.backend
from opreg import LayerName, current_layer, forward_context, register_op, split_graph, splitting_ops


@register_op("tutorial::mix", mutates_args=("out",), kind="attention")
def mix(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], layer_name: LayerName) -> None:
    """Mean of all rows so far: the smallest thing that looks at more than one token."""
    layer, _ = current_layer(layer_name)
    counts = torch.arange(1, x.shape[0] + 1).unsqueeze(1)
    torch.div(x.cumsum(0), counts * layer.temperature, out=out)


class Block(nn.Module):
    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        self.temperature = 1.5
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.empty_like(x)
        mix(x, mixed, self.name)
        return x + self.down(torch.relu(self.up(mixed)))


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    names = [f"blocks.{i}" for i in range(6)]
    model = nn.Sequential(*(Block(name, 16) for name in names))
    layers = dict(zip(names, model, strict=True))
    x = torch.randn(5, 16)

    print(f"Graphs are split at every op of kind attention; in this process those are\n  {', '.join(splitting_ops())}")

    # Compiled: six blocks, but the pieces between the splits are copies of one.
    compiled = torch.compile(model, backend="opreg", options={"inner": "aot_eager"}, dynamic=True, fullgraph=True)
    with forward_context(layers=layers, metadata="one object for all layers"):
        difference = (compiled(x) - model(x)).abs().max()
    print(f"\n{opreg.backend.last_report()}")
    print(f"largest difference from eager: {difference:.0e}")

    # The same tool by hand, on any graph and at any operator.
    feed_forward = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
    graph = make_fx(feed_forward)(x)
    print(f"\n{split_graph(graph, on=['aten::relu']).report()}")


if __name__ == "__main__":
    main()
