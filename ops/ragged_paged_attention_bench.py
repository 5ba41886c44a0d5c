"""Workloads of ragged_paged_attention for `opreg bench`: batches that the TPU operator is tested with, at Llama 3 8B's
heads (32 query, 8 KV, head size 128, pages of 16)."""

from collections.abc import Iterator
from typing import Any

import torch

from .paged_attention_inputs import DECODE16, MIXED16, PREFILL16, make_batch

QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
CASES = {
    "decode16": DECODE16,
    "mixed16": MIXED16,
    "prefill16": PREFILL16,
    "three": [(1, 1328), (5, 18), (500, 563)],
    "prefill512": [(512, 512)],
    "long_decode": [(1, 16384)],
}
_AT = "opreg.kernels.baselines.paged_attention"
BASELINES = {
    "loop of sdpa": f"{_AT}:sdpa_loop",
    "padded dense": f"{_AT}:padded_dense",
    "ipex varlen": f"{_AT}:ipex_varlen",
    "torch_xla without kernel": f"{_AT}:xla_nonkernel",
    "the same on CPU tensors": f"{_AT}:xla_nonkernel_on_cpu",
}
TPU = "opreg.kernels.pallas.tpu_report:report"


def ragged_paged_attention(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16
) -> Iterator[dict[str, Any]]:
    """Every case with a token-major cache, the first two head-major as well."""
    for name, lengths, layout in (
        *((name, lengths, "NHD") for name, lengths in CASES.items()),
        *((name, CASES[name], "HND") for name in ("decode16", "mixed16")),
    ):
        batch = make_batch(
            lengths,
            heads=(QUERY_HEADS, KV_HEADS),
            head_dim=HEAD_DIM,
            page_size=PAGE_SIZE,
            dtype=dtype,
            kv_layout=layout,
            poison=False,  # padded attention reads everything
            device=device,
            generator=generator,
        )
        item, tokens = dtype.itemsize, sum(q for q, _ in lengths)
        cache = sum(kv for _, kv in lengths) * 2 * KV_HEADS * HEAD_DIM * item
        pairs = sum(q * kv - q * (q - 1) // 2 for q, kv in lengths)
        yield {
            "name": name if layout == "NHD" else f"{name}.HND",
            "inputs": {**batch._asdict(), "sm_scale": HEAD_DIM**-0.5, "kv_layout": layout},
            "baselines": BASELINES,
            "bytes": cache + 2 * tokens * QUERY_HEADS * HEAD_DIM * item,
            "flops": 4 * QUERY_HEADS * HEAD_DIM * pairs,
        }
