"""What every kernel of opreg::gated_delta_rule refuses with the same words."""

from __future__ import annotations

import torch
from torch import Tensor

OP = "opreg::gated_delta_rule"


def check_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, erase: Tensor, write: Tensor, initial_state: Tensor | None
) -> None:
    """ValueError for float64, heads that do not divide, gates of other shapes, and tensors on several devices."""
    if v.dtype == torch.float64:
        raise ValueError(f"{OP}: v is torch.float64, but all sums are float32; pass v.float()")
    if k.shape[2] == 0 or v.shape[2] % k.shape[2]:
        raise ValueError(f"{OP}: v has {v.shape[2]} heads, which is no multiple of the {k.shape[2]} heads of k")
    for name, gate, last in (("decay", decay, k), ("erase", erase, k), ("write", write, v)):
        wanted = (v.shape[:3], (*v.shape[:3], last.shape[3]))
        if tuple(gate.shape) not in wanted:
            channels = "v" if last is v else "k"
            raise ValueError(
                f"{OP}: {name} has shape {tuple(gate.shape)}, expected {tuple(wanted[0])} or {wanted[1]}: one number "
                f"a head, or one for each channel of {channels}"
            )
    for name, x in (
        ("q", q),
        ("k", k),
        ("decay", decay),
        ("erase", erase),
        ("write", write),
        ("initial_state", initial_state),
    ):
        if x is not None and x.device != v.device:
            raise ValueError(f"{OP}: {name} is on {x.device}, but v on {v.device}; move it there")
