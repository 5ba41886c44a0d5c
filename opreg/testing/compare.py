"""Whether two results are the same: exactly, or within a relative root-mean-square error."""

from __future__ import annotations

from collections.abc import Sequence

import torch

DEFAULT_RMS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
"""Allowed against the reference where the op gives no tolerance of its own: about four roundings of the dtype."""

_WORST = 12
"""No value may be further off than this many times the allowed RMS: one wrong row in a thousand hides in an RMS."""


def difference(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor], rms: float) -> str | None:
    """None, or what differs: 'result 0: 12 of 8192 values differ, worst |Δ| 3.1e-2 at [0, 63], ...'."""
    if len(expected) != len(actual):
        return f"{len(actual)} tensors instead of {len(expected)}"
    for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
        found = _tensors_differ(one.detach().cpu(), other.detach().cpu(), rms)
        if found is not None:
            return found if len(expected) == 1 else f"result {index}: {found}"
    return None


def _tensors_differ(one: torch.Tensor, other: torch.Tensor, rms: float) -> str | None:
    if one.shape != other.shape:
        return f"shape {list(other.shape)} instead of {list(one.shape)}"
    if one.dtype != other.dtype:
        return f"{other.dtype} instead of {one.dtype}"
    if one.numel() == 0:
        return None
    if one.is_complex():
        return _tensors_differ(torch.view_as_real(one), torch.view_as_real(other), rms)
    if not one.is_floating_point():
        return _describe(one != other, one, other, "", rms)
    # A dtype wider than what is compared, so that the comparison itself rounds nothing.
    a, b = one.to(torch.float64), other.to(torch.float64)
    finite = torch.isfinite(a) & torch.isfinite(b)
    special = ~finite & ~((a == b) | (torch.isnan(a) & torch.isnan(b)))
    if special.any():
        kind = "NaN" if torch.isnan(b[special]).any() and not torch.isnan(a[special]).all() else "not finite alike"
        return _describe(special, one, other, f" ({kind})", rms)
    delta = torch.where(finite, a - b, 0.0).abs()
    scale = torch.where(finite, a, 0.0).square().mean().sqrt()
    error = delta.square().mean().sqrt()
    allowed = rms * scale
    # Where all expected values are tiny or zero there is no scale; then rounding of the dtype itself is allowed.
    floor = torch.finfo(one.dtype).tiny
    far = delta > _WORST * rms * (torch.where(finite, a, 0.0).abs() + scale) + floor
    if error <= allowed + floor and not far.any():
        return None
    wrong = far if far.any() else delta > rms * (torch.where(finite, a, 0.0).abs() + scale) + floor
    if not wrong.any():
        wrong = delta > 0
    relative = float(error / scale) if scale > 0 else float("inf")
    return _describe(wrong, one, other, f"; relative RMS error {relative:.1e}", rms)


def _describe(wrong: torch.Tensor, one: torch.Tensor, other: torch.Tensor, more: str, rms: float) -> str | None:
    count = int(wrong.sum())
    if count == 0:
        return None
    delta = (other.to(torch.float64) - one.to(torch.float64)).abs()
    delta = torch.where(wrong, delta.nan_to_num(nan=float("inf")), -1.0)
    at = int(delta.reshape(-1).argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), one.shape)] if one.dim() else []
    values = f"{other.reshape(-1)[at].item():.6g} instead of {one.reshape(-1)[at].item():.6g}"
    allowed = "exactly equal" if rms == 0 or not one.is_floating_point() else f"{rms:g}"
    return (
        f"{count} of {one.numel()} values differ, worst at {place}: {values}{more} "
        f"(allowed {allowed}, {str(one.dtype).removeprefix('torch.')})"
    )
