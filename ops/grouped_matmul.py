"""opreg::grouped_matmul: consecutive groups of rows, each times its own matrix (the experts of a mixture)."""

import sys
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
    if odd:
        return f"wants multiples of 128, but {', '.join(odd)}"
    runtime = sys.modules.get("torch_xla.runtime") if lhs.device.type == "xla" else None
    if runtime is not None and runtime.device_type() != "TPU":
        return f"wants a TPU, but torch_xla runs on {runtime.device_type()}"
    return None


grouped_matmul.register_kernel("cpu", "opreg.kernels.cpu.grouped_matmul:grouped_matmul")
grouped_matmul.register_kernel(
    ("cuda", "xpu"),
    "opreg.kernels.triton.grouped_matmul:grouped_matmul",
    requires="triton",
    why_not="opreg.kernels.triton.grouped_matmul:why_not",
)
grouped_matmul.register_kernel(
    ("cpu", "xla", "tpu"), from_jax("opreg.kernels.pallas.grouped_matmul:ragged_dot"), requires="jax", priority=-10
)
grouped_matmul.register_kernel(
    ("cpu", "xla", "tpu"),
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


@grouped_matmul.register_vmap
def _vmap(
    info: Any, in_dims: tuple[int | None, ...], lhs: Tensor, rhs: Tensor, group_sizes: Tensor
) -> tuple[Tensor, int]:
    """One call: the samples' groups one after the other, rows past a sample's last group as a group with zeros."""
    lhs, rhs, group_sizes = (
        value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
        for value, dim in zip((lhs, rhs, group_sizes), in_dims, strict=True)
    )
    rest = lhs.shape[1] - group_sizes.sum(1, keepdim=True)
    sizes = torch.cat([group_sizes, rest.to(group_sizes.dtype)], 1)
    matrices = torch.cat([rhs, rhs.new_zeros(rhs.shape[0], 1, *rhs.shape[2:])], 1)
    out = grouped_matmul(lhs.flatten(0, 1), matrices.flatten(0, 1), sizes.flatten())
    return out.unflatten(0, lhs.shape[:2]), 0


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
