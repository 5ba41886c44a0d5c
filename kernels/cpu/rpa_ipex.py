"""Ragged paged attention by Intel Extension for PyTorch's paged variable-length attention, where that is installed."""

import importlib

import torch
from torch import Tensor

from ..reference.paged_attention_check import check_attention

OP = "opreg::ragged_paged_attention"


def why_not(
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Tensor | None = None,
) -> str | None:
    """What IPEX 2.8 cannot take, or None.

    Tried with version 2.8.0: other layouts and dtypes give wrong numbers without an error, and NaN before a window
    comes through, so positions that nobody may see are read.
    """
    if kv_layout != "HND":
        return "its cache is head-major: it reads kv_layout='HND' only"
    if sinks is not None:
        return "it knows no sinks"
    if sliding_window is not None:
        return "it reads pages before the sliding window, which may be gone"
    if q.dtype != kv_pages.dtype:
        return f"q is {q.dtype} but the cache is {kv_pages.dtype}; it wants one dtype"
    if kv_pages.dim() == 4 and kv_pages.stride(3) != 1:
        return f"the last dimension of kv_pages is not contiguous (stride {kv_pages.stride(3)})"
    return None


def rpa_ipex(
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every sequence's query rows over its pages; see opreg::ragged_paged_attention."""
    importlib.import_module("intel_extension_for_pytorch")  # defines torch.ops.torch_ipex
    _, sequences = check_attention(
        OP,
        q,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        mask_value=mask_value,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        sinks=sinks,
    )
    out = torch.zeros(q.shape, dtype=q.dtype)
    if not sequences:
        return out
    # Sequences without query rows are left out, so that lengths and tables hold real work only.
    place = torch.tensor([s.place for s in sequences])
    ends = torch.tensor([[0, 0], *([s.q_len, s.kv_len] for s in sequences)]).cumsum(0).to(torch.int32)
    torch.ops.torch_ipex.flash_attn_varlen_func(
        out,
        q.contiguous(),
        kv_pages[:, 0::2],
        kv_pages[:, 1::2],
        ends[:, 0].contiguous(),
        ends[:, 1].contiguous(),
        max(s.q_len for s in sequences),
        max(s.kv_len for s in sequences),
        sm_scale * (1.0 if k_scale is None else k_scale),
        True,
        page_indices[place].contiguous(),
        None,
        -1,
        -1,
        "auto",
        1.0,
        1.0,
        -1.0 if soft_cap is None else soft_cap,
    )
    return out if v_scale is None else out.mul_(v_scale)
