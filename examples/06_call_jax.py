"""JAX functions on torch tensors: one call, inside a compiled graph, with gradients, and as a named operator.

python examples/06_call_jax.py
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
import torch

import opreg


def gelu_and_norm(tree: dict[str, jax.Array], power: int) -> dict[str, jax.Array]:
    """Any pytree in, any pytree out. Tensors are operands; `power` is static, part of the cache key with its type."""
    y = jax.nn.gelu(tree["x"]) + tree["bias"]
    return {"y": y, "norm": jnp.sum(jnp.abs(y) ** power)}


@opreg.register_jax_op("tutorial::cumulative_max")
def cumulative_max(x: Annotated[jax.Array, "t d"]) -> Annotated[jax.Array, "t d"]:
    """Running maximum over tokens, by an associative scan."""
    return jax.lax.associative_scan(jnp.maximum, x)


def main() -> None:
    x, bias = torch.randn(4, 3), torch.ones(3, requires_grad=True)

    eager = opreg.call_jax(gelu_and_norm, ({"x": x, "bias": bias}, 2))
    print(f"eager: y is a {tuple(eager['y'].shape)} tensor, norm {eager['norm'].item():.4f}")

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def model(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return opreg.call_jax(gelu_and_norm, ({"x": x * 2, "bias": bias}, 2))["norm"].sqrt()

    for tokens in (4, 6, 9):
        loss = model(torch.randn(tokens, 3), bias)
        loss.backward()
    print(f"compiled: one graph for 4, 6 and 9 tokens; the bias got a gradient: {bias.grad is not None}")

    out = cumulative_max(x)
    print(f"as an operator: torch.ops.tutorial.cumulative_max, equal to cummax: {torch.equal(out, x.cummax(0).values)}")
    print(cumulative_max.explain(x))

    for _ in range(3):
        opreg.call_jax(lambda a: a + 1, (x,))  # a new function each time
    info = opreg.jax_cache_info()
    print(f"{info.calls} calls, {info.traces} traces; the latest, because: {info.reasons[-1].split(': ', 1)[1]}")


if __name__ == "__main__":
    main()
