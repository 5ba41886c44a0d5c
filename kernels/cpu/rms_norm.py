"""Root-mean-square norm on the CPU through ATen's fused rms_norm."""

from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """One pass over `x` [*n, d]; ATen accumulates in fp32 and rounds once."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def why_not(x: Tensor, weight: Tensor, eps: float = 1e-6) -> str | None:
    """ATen multiplies in the wider of the two dtypes and returns that; the contract returns x's."""
    if x.dtype != weight.dtype:
        return f"x is {x.dtype} but weight is {weight.dtype}"
    return None
