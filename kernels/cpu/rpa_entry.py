"""The C entry of the paged-attention kernels: a call's checks, its output and the kernel in one C function.

`attend` and `write` answer None for a call that is wrong or unusual, and rpa_cpp.py and rpa_cpp_update.py, which take
everything and word the errors, go on from there. Where the entry cannot be built, they answer None to everything.
"""

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import torch

from . import build

log = logging.getLogger("opreg")


def load(attention: Any, write_rows: Any) -> None:
    """Build or find the entry and let it call these two functions of a kernel library."""
    global attend, write
    try:
        module = build.load_module("rpa_entry", "rpa_entry.cpp")
    except build.BuildError as reason:
        log.warning(
            "paged attention on the CPU is called through Python, 10 us slower (200 us with cold caches): %s", reason
        )
        return
    plain, parameter = torch.empty(2), torch.nn.Parameter(torch.empty(2))
    module.bind_tensors(torch.Tensor, [(tensor, tensor._cdata) for tensor in (plain, parameter, plain[1:])])
    module.bind(*(ctypes.cast(function, ctypes.c_void_p).value for function in (attention, write_rows)))
    attend, write = module.attend, module.write


def _nothing(*arguments: Any) -> None:
    """Before the kernels are loaded, and where there is no entry."""


attend: Callable[..., Any] = _nothing
"""q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale, sliding_window, soft_cap, mask_value, k_scale,
v_scale, kv_layout, sinks, lse (bool), k, v (or None): the operator's result, or None."""
write: Callable[..., Any] = _nothing
"""k, v, kv_pages, slot_mapping, kv_layout, k_scale, v_scale: True when they are written, or None."""
