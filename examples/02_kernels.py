"""Give an operator kernels: per device, with requirements and reasons for refusing a call; see and force the choice.

python examples/02_kernels.py
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from opreg import KernelError, register_op, use_kernel


@register_op("tutorial::silu_mul")
def silu_mul(gate: Annotated[Tensor, "t d"], up: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
    """SwiGLU's middle: silu(gate) * up (Shazeer 2020)."""
    return gate * torch.sigmoid(gate) * up


def needs_whole_blocks(gate: Tensor, up: Tensor) -> str | None:
    """A reason for not taking the call, or None. The reason is what logs, errors and `opreg list` show."""
    if gate.shape[1] % 16:
        return f"rows of {gate.shape[1]} values; needs a multiple of 16"
    return None


# The larger priority is asked first. A function with the operator's own parameters is a kernel.
@silu_mul.register_kernel("cpu", why_not=needs_whole_blocks, priority=10)
def blocked(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate).mul_(up)


# A kernel can be named by a string. Nothing is imported until it is needed, and never where a requirement is missing:
# this line costs nothing on a machine that has never heard of the vendor.
silu_mul.register_kernel("xpu", "vendor_kernels.fused:silu_mul", requires="vendor_kernels")


def main() -> None:
    wide, odd = torch.randn(4, 64), torch.randn(4, 63)

    choice = silu_mul.explain(wide, wide)
    print(f"What runs for rows of 64 values, and why:\n{choice}")
    print(f"\nand for rows of 63:\n{silu_mul.explain(odd, odd)}")

    with use_kernel("tutorial::silu_mul", "reference"):
        forced = silu_mul(wide, wide)
    print(f"\nBoth kernels agree: largest difference {(forced - silu_mul(wide, wide)).abs().max():.0e}")

    print("\nA kernel that is demanded and cannot run is an error, never a silent replacement:")
    with use_kernel("tutorial::silu_mul", choice.selected.name):
        try:
            silu_mul(odd, odd)
        except KernelError as error:
            print(f"  {error}")


if __name__ == "__main__":
    main()
