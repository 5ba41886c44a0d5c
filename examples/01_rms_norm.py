"""Register an operator, call it, compile it, list it.

python examples/01_rms_norm.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from opreg import ContractError, register_op
from opreg.cli import main as opreg_command


# The annotations are the contract: x has any leading dimensions and a last one, d; weight has d; the result is like x.
# The body is the reference: it says what the operator means, and it runs wherever no kernel does.
@register_op("tutorial::rms_norm")
def rms_norm(
    x: Annotated[Tensor, "*n d"], weight: Annotated[Tensor, "d"], eps: float = 1e-6
) -> Annotated[Tensor, "*n d"]:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019, eq. 4)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def main() -> None:
    torch.manual_seed(0)
    weight = torch.rand(64)

    print("It is a torch operator:")
    print(f"  {rms_norm.name}{rms_norm.spec.schema}")

    # Nothing but the contract told torch what shape comes out, so one graph serves every size.
    graphs = []

    def keep_graph(graph: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: rms_norm(x, weight) * 2, backend=keep_graph, dynamic=True, fullgraph=True)
    print("\nCompiled, it gives what it gives eagerly:")
    for shape in ((3, 64), (5, 64), (70, 64)):
        x = torch.randn(shape)
        difference = (compiled(x) - rms_norm(x, weight) * 2).abs().max()
        print(f"  {shape!s:9} largest difference {difference:.0e}, {len(graphs)} graph so far")

    print("\nA call that breaks the contract says how:")
    try:
        rms_norm(torch.randn(3, 32), weight)
    except ContractError as error:
        print(f"  {error}")

    print("\n$ opreg list")
    opreg_command(["list"])


if __name__ == "__main__":
    main()
