"""HAZARDS 12 and 15: kernels that are right for the values, sizes and layouts their author tried."""

from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import register_op

from .case import Case


def _soft(ns: str) -> Any:
    @register_op(f"{ns}::soft")
    def soft(x: Annotated[Tensor, "t d"], causal: bool = False) -> Annotated[Tensor, "t d"]:
        if causal:
            hidden = torch.ones(x.shape, dtype=torch.bool, device=x.device).triu(1)
            x = x.masked_fill(hidden, float("-inf"))
        return x.softmax(-1)

    return soft


def good(ns: str) -> Any:
    soft = _soft(ns)

    @soft.register_kernel("cpu")
    def fast(x: Tensor, causal: bool = False) -> Tensor:
        if causal:
            x = x + torch.full(x.shape, float("-inf"), dtype=x.dtype).triu(1)
        e = (x - x.amax(-1, keepdim=True)).float().exp() if x.numel() else x.float()
        return (e / e.sum(-1, keepdim=True)).to(x.dtype)

    return soft


def ignores_a_flag(ns: str) -> Any:
    """Ignores a flag that is off by default."""
    soft = _soft(ns)

    @soft.register_kernel("cpu")
    def fast(x: Tensor, causal: bool = False) -> Tensor:
        return x.softmax(-1)

    return soft


def overflows(ns: str) -> Any:
    """Exponentiates without subtracting the largest value."""
    soft = _soft(ns)

    @soft.register_kernel("cpu", why_not=lambda x, causal=False: "causal" if causal else None)
    def fast(x: Tensor, causal: bool = False) -> Tensor:
        e = x.exp()
        return e / e.sum(-1, keepdim=True)

    return soft


def second_block(ns: str) -> Any:
    """Works in blocks of 32 rows and reads the first one again for every later block."""
    soft = _soft(ns)

    @soft.register_kernel("cpu", why_not=lambda x, causal=False: "causal" if causal else None)
    def fast(x: Tensor, causal: bool = False) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        for i in range(0, x.shape[0], 32):
            n = min(32, x.shape[0] - i)
            y[i : i + n] = x[:n].softmax(-1)
        return y

    return soft


def vector_tail(ns: str) -> Any:
    """Reads whole vectors of four columns and leaves the ragged rest as it is."""
    soft = _soft(ns)

    @soft.register_kernel("cpu", why_not=lambda x, causal=False: "causal" if causal else None)
    def fast(x: Tensor, causal: bool = False) -> Tensor:
        y, whole = x.clone(), x.shape[1] // 4 * 4
        y[:, :whole] = x[:, :whole].softmax(-1)
        return y

    return soft


def wrong_in_bfloat16(ns: str) -> Any:
    """Sums in the input's dtype, which is exact enough for float32 only."""
    soft = _soft(ns)

    @soft.register_kernel("cpu", why_not=lambda x, causal=False: "causal" if causal else None)
    def fast(x: Tensor, causal: bool = False) -> Tensor:
        e = (x - x.amax(-1, keepdim=True)).exp() if x.numel() else x
        total = torch.zeros(x.shape[0], dtype=x.dtype)
        for j in range(x.shape[1] if x.dtype is torch.float32 else x.shape[1] - 1):
            total += e[:, j]
        return e / total[:, None]

    return soft


def no_rows_in_a_kernel(ns: str) -> Any:
    """Takes the largest value of all rows, where the reference needs none."""
    soft = _soft(ns)

    @soft.register_kernel("cpu", why_not=lambda x, causal=False: "causal" if causal else None)
    def fast(x: Tensor, causal: bool = False) -> Tensor:
        e = (x - x.max()).exp()
        return e / e.sum(-1, keepdim=True)

    return soft


def contiguous_kernel(ns: str) -> Any:
    """Reads its input's memory row by row, whatever its strides are."""
    soft = _soft(ns)

    @soft.register_kernel("cpu", why_not=lambda x, causal=False: "causal" if causal else None)
    def fast(x: Tensor, causal: bool = False) -> Tensor:
        flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        n = min(x.numel(), flat.numel())
        return torch.cat([flat[:n], flat.new_zeros(x.numel() - n)]).view(x.shape).softmax(-1)

    return soft


def tuple_of_one(ns: str) -> Any:
    """Returns a tuple of one tensor where the op returns a tensor."""
    soft = _soft(ns)

    @soft.register_kernel("cpu", why_not=lambda x, causal=False: "causal" if causal else None)
    def fast(x: Tensor, causal: bool = False) -> Any:
        return (x.softmax(-1),)

    return soft


def predicate_writes(ns: str) -> Any:
    """The predicate sorts the rows in place to look at them."""
    soft = _soft(ns)

    def why_not(x: Tensor, causal: bool = False) -> str | None:
        return "NaN" if x.copy_(x.sort(-1)[0]).isnan().any() else None

    soft.register_kernel("cpu", good_softmax, why_not=why_not)
    return soft


def good_softmax(x: Tensor, causal: bool = False) -> Tensor:
    if causal:
        x = x.masked_fill(torch.ones(x.shape, dtype=torch.bool).triu(1), float("-inf"))
    return x.softmax(-1)


def predicate_reads(ns: str) -> Any:
    soft = _soft(ns)

    def why_not(x: Tensor, causal: bool = False) -> str | None:
        return "NaN" if x.isnan().any() else None

    soft.register_kernel("cpu", good_softmax, why_not=why_not)
    return soft


def _unit(ns: str) -> Any:
    @register_op(f"{ns}::unit")
    def unit(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
        return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)

    return unit


def no_epsilon(ns: str) -> Any:
    """Divides by the norm of a row, which is zero for a row of padding."""
    unit = _unit(ns)

    @unit.register_kernel("cpu")
    def fast(x: Tensor) -> Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt()

    return unit


def epsilon(ns: str) -> Any:
    unit = _unit(ns)

    @unit.register_kernel("cpu")
    def fast(x: Tensor) -> Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-6)

    return unit


def static_workspace(ns: str) -> Any:
    """Accumulates in a workspace of the module that only the first call clears."""
    soft = _soft(ns)
    kept: dict[tuple[int, ...], Tensor] = {}

    @soft.register_kernel("cpu", why_not=lambda x, causal=False: "causal" if causal else None)
    def fast(x: Tensor, causal: bool = False) -> Tensor:
        total = kept.setdefault(tuple(x.shape), torch.zeros(x.shape[0], 1))
        e = (x - x.amax(-1, keepdim=True)).exp() if x.numel() else x
        total += e.sum(-1, keepdim=True)
        return (e / total).to(x.dtype)

    return soft


CASES = (
    Case(12, "ignores a flag", "kernel values/fast", ignores_a_flag, good),
    Case(12, "overflows", "kernel values/fast", overflows, good),
    Case(12, "wrong from the second block on", "kernel values/fast", second_block, good),
    Case(12, "forgets the ragged columns", "kernel values/fast", vector_tail, good),
    Case(12, "wrong in bfloat16 only", "kernel values/fast", wrong_in_bfloat16, good),
    Case(12, "a row of zeros", "kernel values/fast", no_epsilon, epsilon),
    Case(12, "a kernel without rows", "kernel values/fast", no_rows_in_a_kernel, good),
    Case(12, "workspace never cleared", "kernel values/fast", static_workspace, good),
    Case(12, "a tuple of one", "kernel values/fast", tuple_of_one, good),
    Case(12, "predicate that writes", "kernel values/good_softmax", predicate_writes, predicate_reads),
    Case(15, "kernel assumes contiguous memory", "kernel values/fast", contiguous_kernel, good),
)
