"""opreg::shard_alike: two tensors that a partitioner is to split alike."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import from_jax, like, register_op


@register_op("opreg::shard_alike")
def shard_alike(
    x: Annotated[Tensor, "*n"], y: Annotated[Tensor, "*n"]
) -> tuple[Annotated[Tensor, "*n", like("x")], Annotated[Tensor, "*n", like("y")]]:
    """Copies of x and y that are sharded alike, without saying how (jax.experimental.shard_alike).

    Under SPMD on XLA a sharding of any of the four tensors spreads to the others, as long as one result is used;
    each call binds its own tensors only. Elsewhere nothing is sharded and the results are plain copies.

    Raises ContractError where the shapes differ.
    """
    return x.clone(memory_format=torch.contiguous_format), y.clone(memory_format=torch.contiguous_format)


shard_alike.register_kernel("xla", from_jax("opreg.kernels.pallas.shard_alike:shard_alike"), requires="jax")


def _backward(ctx: Any, grad_x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients are sharded alike, too."""
    return shard_alike(grad_x, grad_y)


shard_alike.register_autograd(_backward)


@shard_alike.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, y: Tensor) -> tuple[Any, tuple[int, int]]:
    def in_front(value: Tensor, dim: int | None) -> Tensor:
        return value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)

    return shard_alike(in_front(x, in_dims[0]), in_front(y, in_dims[1])), (0, 0)


@shard_alike.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    for shape in ((4, 6), (3,), (0, 2)):
        x = torch.randn(shape, generator=generator).to(device, dtype)
        yield {"x": x, "y": torch.randint(9, shape, generator=generator).to(device)}
