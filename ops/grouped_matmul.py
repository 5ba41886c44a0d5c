"""opreg::grouped_matmul: consecutive groups of rows, each times its own matrix (the experts of a mixture)."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import from_jax, register_op


@register_op("opreg::grouped_matmul")
def grouped_matmul(
    lhs: Annotated[Tensor, "m k"], rhs: Annotated[Tensor, "g k n"], group_sizes: Annotated[Tensor, "g"]
) -> Annotated[Tensor, "m n"]:
    """Products of consecutive groups of rows with one matrix each (MegaBlocks, Gale et al. 2022).

    The first group_sizes[0] rows of lhs are multiplied by rhs[0], the next group_sizes[1] by rhs[1], and so on.
    Computed in fp32 and rounded once. Rows past the last group are zero.
    group_sizes: integers, not negative, with a sum of at most m.

    Raises ContractError where shapes disagree.
    """
    out = torch.zeros(lhs.shape[0], rhs.shape[2], dtype=torch.float32, device=lhs.device)
    start = 0
    for group, size in enumerate(group_sizes.tolist()):
        for row in range(start, start + size):
            out[row] = lhs[row].float() @ rhs[group].float()
        start += size
    return out.to(lhs.dtype)


def why_not_megablox(lhs: Tensor, rhs: Tensor, group_sizes: Tensor) -> str | None:
    """megablox works on tiles of 128 by 128 of float32 or bfloat16, and indexes the first group."""
    if lhs.dtype not in (torch.float32, torch.bfloat16):
        return f"wants float32 or bfloat16, but lhs is {lhs.dtype}"
    if not rhs.shape[0]:
        return "there are no groups"
    sizes = {"m": lhs.shape[0], "k": lhs.shape[1], "n": rhs.shape[2]}
    odd = [f"{name} is {size}" for name, size in sizes.items() if size % 128 or not size]
    return f"wants multiples of 128, but {', '.join(odd)}" if odd else None


grouped_matmul.register_kernel("cpu", "opreg.kernels.cpu.grouped_matmul:grouped_matmul")
grouped_matmul.register_kernel(
    ("cpu", "xla"), from_jax("opreg.kernels.pallas.grouped_matmul:ragged_dot"), requires="jax", priority=-10
)
grouped_matmul.register_kernel(
    "cpu",
    from_jax("opreg.kernels.pallas.grouped_matmul:megablox"),
    requires="jax",
    why_not=why_not_megablox,
    priority=-5,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """dlhs is the grouped product with the transposed matrices; drhs[g] = lhs[rows of g]^T grad[rows of g]."""
    lhs, rhs, group_sizes = ctx.saved_tensors
    dlhs = grouped_matmul(grad.contiguous(), rhs.transpose(1, 2).contiguous(), group_sizes)
    ends = group_sizes.cumsum(0)
    rows = torch.arange(lhs.shape[0], device=lhs.device)[None, :]
    member = ((rows >= (ends - group_sizes)[:, None]) & (rows < ends[:, None])).to(lhs.dtype)
    drhs = torch.einsum("gm,mk,mn->gkn", member, lhs, grad)
    return dlhs, drhs, None


grouped_matmul.register_autograd(_backward, setup_context=_setup_context)
for _dtype, _rms in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
    grouped_matmul.tolerance(_dtype, _rms, "the order of the sum over k is free; one rounding to the dtype")


@grouped_matmul.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    for m, k, n, sizes in ((9, 8, 6, (4, 0, 3)), (128, 128, 128, (100, 28))):
        yield {
            "lhs": (torch.randn(m, k, generator=generator) * k**-0.5).to(device, dtype),
            "rhs": torch.randn(len(sizes), k, n, generator=generator).to(device, dtype),
            "group_sizes": torch.tensor(sizes, dtype=torch.int32, device=device),
        }
