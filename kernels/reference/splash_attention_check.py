"""Checks of the arguments of opreg::splash_attention, shared by its kernels; reads shapes and numbers only."""

from typing import Any

OP = "opreg::splash_attention"


def check(q: Any, k: Any, segments: tuple[Any, Any], window: int | None, soft_cap: float | None) -> None:
    """Raise ValueError for sizes and options that cannot be."""
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{OP}: q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k")
    if (segments[0] is None) != (segments[1] is None):
        missing = "q_segments" if segments[0] is None else "kv_segments"
        raise ValueError(f"{OP}: {missing} is missing; q_segments and kv_segments go together")
    if window is not None and window < 1:
        raise ValueError(f"{OP}: window is {window}; it must be at least 1 (a row sees itself), or None for no window")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{OP}: soft_cap is {soft_cap}; it must be positive, or None for no cap")


def scale_of(q: Any, scale: float | None) -> float:
    """The factor of the scores: 1/sqrt(d) unless given."""
    return float(q.shape[-1] ** -0.5) if scale is None else scale
