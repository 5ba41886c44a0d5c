"""Tell autograd of writes that it cannot see, so that a backward that needs the old values is an error, not wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import guard
from .spec import ArgSpec

# Tensors of inference mode, which no backward can need, have no count and are passed over.
_increment = torch._C._increment_version


def count(written: Sequence[ArgSpec], names: dict[str, Any]) -> str:
    """The statement that counts one write of each of these arguments; what it names is put into `names`.

    Only in grad mode, for without it nothing is saved. Two tensors cost 35 ns with the native guard, else 110.
    """
    given = ", ".join(arg.name for arg in written)
    native = guard.native()
    if native is not None:
        names["_wrote"] = native.wrote
        return f"_wrote({given})"
    names["_grad_enabled"] = torch.is_grad_enabled
    names["_wrote"] = _increment if all(arg.type == "Tensor" for arg in written) else _wrote_any
    return f"if _grad_enabled(): _wrote(({given},))"


def _wrote_any(values: Sequence[Any]) -> None:
    flat = [t for value in values for t in (value if isinstance(value, (list, tuple)) else (value,)) if t is not None]
    _increment(tuple(flat))
