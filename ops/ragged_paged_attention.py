"""opreg::ragged_paged_attention, also with log-sum-exp: attention over a paged KV cache, any mix of lengths."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import from_jax, register_op

from .paged_attention_inputs import make_batch, split_pages


@register_op("opreg::ragged_paged_attention")
def ragged_paged_attention(
    q: Annotated[Tensor, "t hq d"],
    kv_pages: Annotated[Tensor, "_ _ _ d"],
    kv_lens: Annotated[Tensor, "s", torch.int32],
    page_indices: Annotated[Tensor, "s _", torch.int32],
    cu_q_lens: Annotated[Tensor, "s+1", torch.int32],
    num_seqs: Annotated[Tensor, "1", torch.int32],
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Annotated[Tensor, "hq"] | None = None,
) -> Annotated[Tensor, "t hq d"]:
    """Attention of prefill and decode sequences in one batch over a paged KV cache (Kwon et al. 2023, section 4.3).

    For sequence i, query rows cu_q_lens[i] to cu_q_lens[i+1] are its last tokens: row r stands at position
    p = kv_lens[i] - q_len + r and sees the positions c <= p, and c > p - sliding_window with a window:

        s[c] = cap(sm_scale * k_scale * <q, K[c]>),   cap(x) = soft_cap * tanh(x / soft_cap) if soft_cap is given
        out  = v_scale * sum_c exp(s[c]) V[c] / (sum_c exp(s[c]) + exp(sinks[h]) if sinks are given)

    q: float32, bfloat16 or float16; query head h reads kv head h // (hq // kv heads). Rows past cu_q_lens[num_seqs]
        are padding.
    kv_pages: the cache, K of head h at 2h and V at 2h+1 of the combined axis, holding the step's own tokens already
        (opreg::kv_cache_update); "NHD" [pages, page_size, 2*kv heads, d] or "HND" [pages, 2*kv heads, page_size, d];
        float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8, whatever q is.
    kv_lens: tokens per sequence, the step's own included. page_indices: the pages of each sequence in order.
        cu_q_lens: sums of query lengths, from 0. num_seqs: how many sequences are real. Entries past num_seqs, table
        entries past a sequence's length and pages wholly before its window may hold anything.
    mask_value: for callers of the TPU operator; at most -1e4, and without effect: masked positions get no weight.
    k_scale, v_scale: what one unit of a quantised cache is worth; None means 1.
    sinks: one logit per query head that takes weight and adds no value.

    Returns q's dtype, sums in float32 or better; rows past cu_q_lens[num_seqs] are zero.
    Raises ValueError for sizes, dtypes, options, lengths or page indices that cannot be, wherever values can be read.
    """
    ...


@register_op("opreg::ragged_paged_attention_lse")
def ragged_paged_attention_lse(
    q: Annotated[Tensor, "t hq d"],
    kv_pages: Annotated[Tensor, "_ _ _ d"],
    kv_lens: Annotated[Tensor, "s", torch.int32],
    page_indices: Annotated[Tensor, "s _", torch.int32],
    cu_q_lens: Annotated[Tensor, "s+1", torch.int32],
    num_seqs: Annotated[Tensor, "1", torch.int32],
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    kv_layout: str = "NHD",
    sinks: Annotated[Tensor, "hq"] | None = None,
) -> tuple[Annotated[Tensor, "t hq d"], Annotated[Tensor, "t hq", torch.float32]]:
    """opreg::ragged_paged_attention with the log-sum-exp of every row, for merging attention over parts of a sequence.

    Returns (out, lse): lse is float32 [t, hq], the natural logarithm of the denominator above (sinks included), and
    -inf in rows past cu_q_lens[num_seqs], which therefore drop out of a merge. Arguments and errors are the same.
    """
    ...


_CPP = "opreg.kernels.cpu.rpa_cpp"
_XLA, _WHY_NOT = "opreg.kernels.pallas.rpa_xla", "opreg.kernels.pallas.rpa_why_not:why_not"
_TRITON = "opreg.kernels.triton.rpa"
for _op, _suffix in ((ragged_paged_attention, ""), (ragged_paged_attention_lse, "_lse")):
    _op.register_kernel(None, f"opreg.kernels.reference.paged_attention:ragged_paged_attention{_suffix}", priority=-100)
    _op.register_kernel(None, f"opreg.kernels.cpu.rpa_torch:rpa_torch{_suffix}", priority=-50)
    _op.register_kernel("cpu", f"{_CPP}:rpa_cpp{_suffix}", requires="c++", why_not=f"{_CPP}:why_not")
    _op.register_kernel(("xla", "tpu"), from_jax(f"{_XLA}:rpa{_suffix}"), requires="jax", why_not=_WHY_NOT)
    _op.register_kernel(("xla", "tpu"), from_jax(f"{_XLA}:rpa_plain{_suffix}"), requires="jax", priority=-10)
    _op.register_kernel(
        ("cuda", "xpu"),
        f"{_TRITON}:ragged_paged_attention{_suffix}",
        requires="triton",
        why_not=f"{_TRITON}:why_not",
        priority=5,
    )
    _op.register_sharding("hq", others=split_pages)
    _op.tolerance(torch.float32, 1e-5, "sums of a few thousand float32 terms in another order")
    _op.tolerance(torch.bfloat16, 2e-2, "inputs and output are rounded to 8 bits, weights may be too")
    _op.tolerance(torch.float16, 2e-3, "inputs and output are rounded to 11 bits, weights may be too")

# Below the C++ kernel, which is faster and takes everything; it serves where there is no compiler.
ragged_paged_attention.register_kernel(
    "cpu",
    "opreg.kernels.cpu.rpa_ipex:rpa_ipex",
    requires="intel_extension_for_pytorch",
    why_not="opreg.kernels.cpu.rpa_ipex:why_not",
    priority=-10,
)


_LENGTHS = [(5, 18), (1, 29), (0, 9), (20, 40), (1, 16), (3, 3)]


def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    def batch(**sizes: Any) -> dict[str, Any]:
        made = make_batch(_LENGTHS, dtype=dtype, device=device, generator=generator, **sizes)
        return {**made._asdict(), "sm_scale": made.q.shape[2] ** -0.5}

    yield batch()
    yield {**batch(kv_layout="HND", window=7), "kv_layout": "HND", "sliding_window": 7, "soft_cap": 5.0}
    yield {**batch(heads=(6, 2), head_dim=24), "sinks": torch.linspace(-1.0, 2.0, 6, device=device)}
    # 8-bit floats are left to the kernels' own tests: torch.library.opcheck cannot compare them (torch 2.13).
    yield {**batch(kv_dtype=torch.int8, page_size=8), "k_scale": 0.03, "v_scale": 0.05, "mask_value": -1e30}


def _and_one_for_ipex(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    yield from _inputs(device, dtype, generator)
    made = make_batch(_LENGTHS, dtype=dtype, device=device, generator=generator, kv_layout="HND")
    yield {**made._asdict(), "sm_scale": made.q.shape[2] ** -0.5, "kv_layout": "HND", "soft_cap": 5.0}


ragged_paged_attention.register_inputs(_and_one_for_ipex)
ragged_paged_attention_lse.register_inputs(_inputs)
