"""Root-mean-square norm, one row at a time: the truth that tests compare with."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """y[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i] for each row of `x` [*n, d]; sums in `compute_dtype`."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    scale = weight.to(compute_dtype)
    for row, target in zip(rows, out, strict=True):
        values = row.to(compute_dtype)
        total = torch.zeros((), dtype=compute_dtype)
        for value in values:
            total = total + value * value
        target.copy_(values / torch.sqrt(total / len(values) + eps) * scale)
    return y
