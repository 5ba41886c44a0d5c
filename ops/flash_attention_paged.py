"""Paged attention under the names that flash-attention's callers know."""

from torch import Tensor

from .ragged_paged_attention import ragged_paged_attention, ragged_paged_attention_lse

_NAME = "flash_attention_paged"


def flash_attention_paged(
    q: Tensor,
    kv_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    k_descale: float | None = None,
    v_descale: float | None = None,
    s_aux: Tensor | None = None,
    num_seqs: Tensor | None = None,
    kv_layout: str = "NHD",
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """opreg::ragged_paged_attention with the argument names of flash attention's variable-length functions.

    q: [tokens, query heads, d]. kv_cache: K and V interleaved, see kv_pages of the operator; split_cache
        gives the views that other kernels call k_cache and v_cache.
    cu_seqlens_q, seqused_k, block_table: cu_q_lens, kv_lens and page_indices of the operator, int32.
    softmax_scale: None means d ** -0.5. window_size: (left, right) tokens besides the row's own, -1 for no limit; right
        is -1 or 0, since attention is causal. softcap: 0.0 means none. k_descale, v_descale: k_scale and v_scale.
    s_aux: sinks. num_seqs: int32 [1]; None means that every row of block_table is a sequence.

    Returns out, or (out, lse) with lse float32 [query heads, tokens] as flash attention has it (-inf in padding rows).
    Raises ValueError for causal=False or a window to the right, and what the operator raises.
    """
    if not causal:
        raise ValueError(f"{_NAME}: causal=False; rows see their own and earlier positions only, so pass causal=True")
    left, right = window_size
    if right not in (-1, 0):
        raise ValueError(
            f"{_NAME}: window_size is {window_size}; nothing to the right is ever seen, so right is -1 or 0"
        )
    if left < -1:
        raise ValueError(f"{_NAME}: window_size is {window_size}; left is -1 for no limit, or the tokens to see")
    operator = ragged_paged_attention_lse if return_softmax_lse else ragged_paged_attention
    result = operator(
        q,
        kv_cache,
        seqused_k,
        block_table,
        cu_seqlens_q,
        seqused_k.new_full((1,), seqused_k.shape[0]) if num_seqs is None else num_seqs,
        sm_scale=float(q.shape[2] ** -0.5) if softmax_scale is None else softmax_scale,
        sliding_window=None if left == -1 else left + 1,
        soft_cap=None if softcap == 0.0 else softcap,
        k_scale=k_descale,
        v_scale=v_descale,
        kv_layout=kv_layout,
        sinks=s_aux,
    )
    if isinstance(result, Tensor):
        return result
    out, lse = result
    return out, lse.transpose(0, 1)


def split_cache(kv_cache: Tensor, kv_layout: str = "NHD") -> tuple[Tensor, Tensor]:
    """K and V as two views of one cache: [pages, page_size, heads, d] each ("NHD"), or [pages, heads, page_size, d]."""
    if kv_layout == "NHD":
        return kv_cache[:, :, 0::2], kv_cache[:, :, 1::2]
    return kv_cache[:, 0::2], kv_cache[:, 1::2]
