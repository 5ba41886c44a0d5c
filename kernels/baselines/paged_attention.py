"""opreg::ragged_paged_attention as people write it without such an operator, and by two vendors' paths for CPUs."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Call = Callable[[], Tensor]


def sdpa_loop(call: Mapping[str, Any]) -> Call | str:
    """One scaled_dot_product_attention per sequence over its gathered pages."""
    reason = _refused(call)
    if reason:
        return reason
    q, kv_pages, table, scale = call["q"], _token_major(call), call["page_indices"], call["sm_scale"]
    size, spans = kv_pages.shape[1], _spans(call)

    def run() -> Tensor:
        out = torch.zeros_like(q)
        for i, (start, q_len, kv_len) in enumerate(spans):
            kv = kv_pages[table[i, : -(-kv_len // size)].long()].flatten(0, 1)[:kv_len]
            k, v = kv[:, 0::2].transpose(0, 1)[None], kv[:, 1::2].transpose(0, 1)[None]
            query = q[start : start + q_len].transpose(0, 1)[None]
            mask = None if q_len == 1 else torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
            got = scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
            out[start : start + q_len] = got[0].transpose(0, 1)
        return out

    return run


def padded_dense(call: Mapping[str, Any]) -> Call | str:
    """All sequences padded to the longest, one masked scaled_dot_product_attention."""
    reason = _refused(call)
    if reason:
        return reason
    q, kv_pages, scale, spans = call["q"], _token_major(call), call["sm_scale"], _spans(call)
    n, size, pool = len(spans), kv_pages.shape[1], kv_pages.shape[0]
    most_q, most_kv = max(s[1] for s in spans), -(-max(s[2] for s in spans) // size) * size

    def run() -> Tensor:
        query = q.new_zeros(n, most_q, *q.shape[1:])
        table = call["page_indices"][:n, : most_kv // size].clamp(0, pool - 1).long()
        kv = kv_pages[table].view(n, most_kv, *kv_pages.shape[2:])
        mask = torch.zeros(n, 1, most_q, most_kv, dtype=torch.bool)
        mask[..., 0] = True  # padding rows see something, so that nothing is NaN
        for i, (start, q_len, kv_len) in enumerate(spans):
            query[i, :q_len] = q[start : start + q_len]
            mask[i, 0, :q_len, :kv_len] = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        k, v = kv[:, :, 0::2].transpose(1, 2), kv[:, :, 1::2].transpose(1, 2)
        got = scaled_dot_product_attention(
            query.transpose(1, 2), k, v, attn_mask=mask, scale=scale, enable_gqa=True
        ).transpose(1, 2)
        out = torch.zeros_like(q)
        for i, (start, q_len, _) in enumerate(spans):
            out[start : start + q_len] = got[i, :q_len]
        return out

    return run


def ipex_varlen(call: Mapping[str, Any]) -> Call | str:
    """torch.ops.torch_ipex.flash_attn_varlen_func, on a head-major cache with K and V apart, made once."""
    reason = _missing("intel_extension_for_pytorch") or _refused(call)
    if reason:
        return reason
    importlib.import_module("intel_extension_for_pytorch")  # defines torch.ops.torch_ipex
    q, kv_pages, spans = call["q"], _token_major(call), _spans(call)
    k, v = (kv_pages[:, :, i::2].transpose(1, 2).contiguous() for i in (0, 1))
    ends = torch.tensor([[0, 0], *([s[1], s[2]] for s in spans)]).cumsum(0).to(torch.int32)
    out = torch.zeros_like(q)
    attend = partial(
        torch.ops.torch_ipex.flash_attn_varlen_func,
        out,
        q,
        k,
        v,
        ends[:, 0].contiguous(),
        ends[:, 1].contiguous(),
        max(s[1] for s in spans),
        max(s[2] for s in spans),
        call["sm_scale"],
        True,  # causal
        call["page_indices"][: len(spans)].contiguous(),
        None,  # no ALiBi
        -1,  # no window
        -1,
        "auto",
        1.0,  # scales of the cache
        1.0,
        -1.0,  # no soft cap
    )

    def run() -> Tensor:
        attend()
        return out

    return run


def xla_nonkernel(call: Mapping[str, Any]) -> Call | str:
    """The path that torch_xla's operator takes without its TPU kernel, on its device (PJRT_DEVICE=CPU), awaited."""
    reason = _missing("torch_xla") or _refused(call)
    if reason:
        return reason
    torch_xla = importlib.import_module("torch_xla")
    wait = importlib.import_module("torch_xla.core.xla_model").wait_device_ops
    attend = _nonkernel(call, torch_xla.device())
    torch_xla.sync()
    wait()

    def run() -> Tensor:
        out = attend()
        torch_xla.sync()
        wait()
        return out

    return run


def xla_nonkernel_on_cpu(call: Mapping[str, Any]) -> Call | str:
    """The same function on torch's own CPU tensors."""
    return _missing("torch_xla") or _refused(call) or _nonkernel(call, torch.device("cpu"))


def _nonkernel(call: Mapping[str, Any], device: torch.device) -> Call:
    attend = importlib.import_module("torch_xla.experimental.custom_kernel").ragged_paged_attention
    pool = call["kv_pages"].shape[0]
    tensors = (
        call["q"],
        _token_major(call),
        call["kv_lens"].clamp_min(0),
        call["page_indices"].clamp(0, pool - 1),  # it reads whole rows of the table
        call["cu_q_lens"].clamp_min(0),
        call["num_seqs"],
    )
    return partial(attend, *(t.to(device) for t in tensors), sm_scale=call["sm_scale"], use_kernel=False)


def _spans(call: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(first query row, query rows, cached tokens) per sequence."""
    n = int(call["num_seqs"])
    starts, lens = call["cu_q_lens"][: n + 1].tolist(), call["kv_lens"][:n].tolist()
    return [(starts[i], starts[i + 1] - starts[i], lens[i]) for i in range(n)]


def _token_major(call: Mapping[str, Any]) -> Tensor:
    """The cache as [pages, page_size, 2 * kv heads, head_dim], copied once where it is head-major."""
    pages: Tensor = call["kv_pages"]
    return pages if call.get("kv_layout", "NHD") == "NHD" else pages.transpose(1, 2).contiguous()


def _missing(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def _refused(call: Mapping[str, Any]) -> str | None:
    """Options that these baselines were not written for, where a case has any."""
    plain = {"q", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs", "sm_scale", "kv_layout"}
    more = sorted(name for name, value in call.items() if name not in plain and value is not None)
    return f"it is written here without {', '.join(more)}" if more else None
