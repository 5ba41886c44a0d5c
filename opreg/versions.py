"""Tell autograd of writes that it cannot see, so that a backward that needs the old values is an error, not wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

wrote = torch._C._increment_version
"""Count one write of each tensor of a tuple; tensors of inference mode, which no backward can need, have no count.
0.1 us for two."""


def wrote_any(values: Iterable[Any]) -> None:
    """The same for arguments among which there are lists and None."""
    flat = [t for value in values for t in (value if isinstance(value, (list, tuple)) else (value,)) if t is not None]
    wrote(tuple(flat))
