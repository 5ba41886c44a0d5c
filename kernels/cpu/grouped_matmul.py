"""Matrix products of consecutive groups of rows, one torch.mm per group."""

import torch
from torch import Tensor


def grouped_matmul(lhs: Tensor, rhs: Tensor, group_sizes: Tensor) -> Tensor:
    """lhs [m, k], rhs [g, k, n], group_sizes [g] -> [m, n], each group written in place by one product."""
    out = torch.empty(lhs.shape[0], rhs.shape[2], dtype=lhs.dtype, device=lhs.device)
    start = 0
    for matrix, size in zip(rhs, group_sizes.tolist(), strict=True):
        torch.mm(lhs[start : start + size], matrix, out=out[start : start + size])
        start += size
    out[start:] = 0
    return out
