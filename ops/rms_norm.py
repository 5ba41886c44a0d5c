"""opreg::rms_norm: the smallest complete op, and the one the tutorial walks through."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import register_op


@register_op("opreg::rms_norm")
def rms_norm(
    x: Annotated[Tensor, "*n d"], weight: Annotated[Tensor, "d"], eps: float = 1e-6
) -> Annotated[Tensor, "*n d"]:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019, eq. 4).

    y = x / sqrt(mean(x^2, last dim) + eps) * weight, computed in fp32 and rounded once to the dtype of x.

    Raises ContractError where weight has not the size of x's last dimension.
    """
    rows = x.float()
    return (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


rms_norm.register_kernel("cpu", "opreg.kernels.cpu.rms_norm:rms_norm", why_not="opreg.kernels.cpu.rms_norm:why_not")

rms_norm.register_kernel(
    ("cuda", "xpu"),
    "opreg.kernels.triton.rms_norm:rms_norm",
    requires="triton",
    why_not="opreg.kernels.triton.rms_norm:why_not",
)

# With an addition before and a gate after it, as in a transformer's block, the fused loop wins on a CPU from one row of
# 2048 on, since x is read once instead of three times. Nothing is measured on other devices.
rms_norm.register_kernel("cpu", "inductor", priority=1)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """With r = 1/sqrt(mean(x^2) + eps): dx = r (g w - x r^2 mean(g w x)), dw = sum over rows of g x r."""
    x, weight = ctx.saved_tensors
    # At least fp32, and fp64 where the caller has it: gradcheck works in fp64.
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, g = x.to(wide), grad.to(wide)
    r = torch.rsqrt(rows.square().mean(-1, keepdim=True) + ctx.eps)
    gw = g * weight.to(wide)
    dx = r * (gw - rows * r.square() * (gw * rows).mean(-1, keepdim=True))
    dw = (g * rows * r).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dw.to(weight.dtype), None


rms_norm.register_autograd(_backward, setup_context=_setup_context)


@rms_norm.register_vmap
def _batched(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, int]:
    batched_x, batched_weight = in_dims[0], in_dims[1]
    if batched_weight is None:
        return rms_norm(x.movedim(batched_x or 0, 0), weight, eps), 0
    # A weight per sample: norm without weight, then scale, since the contract has one weight for all rows.
    rows = x.movedim(batched_x, 0) if batched_x is not None else x.expand(info.batch_size, *x.shape)
    scale = weight.movedim(batched_weight, 0).float()
    ones = torch.ones(rows.shape[-1], dtype=torch.float32, device=x.device)
    normed = rms_norm(rows.float(), ones, eps)
    return (normed * scale.reshape(-1, *(1,) * (rows.dim() - 2), rows.shape[-1])).to(x.dtype), 0


@rms_norm.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    for shape in [(1, 1), (0, 8), (7, 64), (2, 3, 128), (5, 4096)]:
        x = torch.randn(shape, generator=generator).to(device, dtype)
        yield {"x": x, "weight": torch.randn(shape[-1:], generator=generator).to(device, dtype)}
    wide = torch.randn(6, 32, generator=generator).to(device, dtype)
    weight = torch.randn(16, generator=generator).to(device, dtype)
    yield {"x": wide[:, ::2], "weight": weight, "eps": 1e-3}


rms_norm.tolerance(torch.float32, 1e-6, "two roundings of 2^-24 and a sum of squares of at most 4096 terms")
rms_norm.tolerance(torch.bfloat16, 4e-3, "the result is rounded to 8 significant bits: 2^-9 relative, uniformly spread")
rms_norm.tolerance(torch.float16, 5e-4, "the result is rounded to 11 significant bits")
