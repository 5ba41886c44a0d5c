"""opreg::ragged_paged_attention_update: write the step's K and V into the cache and attend over it, in one call."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import from_jax, register_op

from .paged_attention_inputs import make_batch, split_pages


@register_op("opreg::ragged_paged_attention_update", mutates_args=("kv_pages",))
def ragged_paged_attention_update(
    q: Annotated[Tensor, "t hq d"],
    k: Annotated[Tensor, "t h d"],
    v: Annotated[Tensor, "t h d"],
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
    """opreg::kv_cache_update with the slots that the step implies, then opreg::ragged_paged_attention.

    Row r of sequence i stands at position kv_lens[i] - q_len + r, so its slot follows from page_indices and no slot
    mapping is needed. Sequences share no page that they write.

    k, v: the step's keys and values, row for row with q; rows past cu_q_lens[num_seqs] are padding and are not written.
    The other arguments are those of opreg::ragged_paged_attention; k_scale and v_scale are also what K and V are
    divided by on the way into the cache.

    Writes the step's slots of kv_pages, and no other. Nothing is written when an argument is refused.
    Raises ValueError as the two operators do.
    """
    ...


_CPP = "opreg.kernels.cpu.rpa_cpp_update"
ragged_paged_attention_update.register_kernel(
    None, "opreg.kernels.reference.paged_attention:ragged_paged_attention_update", priority=-100
)
ragged_paged_attention_update.register_kernel(None, "opreg.kernels.cpu.rpa_torch:rpa_torch_update", priority=-50)
ragged_paged_attention_update.register_kernel(
    "cpu", f"{_CPP}:rpa_cpp_fused", requires="c++", why_not=f"{_CPP}:why_not_fused"
)
_XLA, _WHY_NOT = "opreg.kernels.pallas.rpa_xla", "opreg.kernels.pallas.rpa_why_not:why_not_update"
ragged_paged_attention_update.register_kernel(
    ("xla", "tpu"), from_jax(f"{_XLA}:rpa_update", mutates_args="kv_pages"), requires="jax", why_not=_WHY_NOT
)
ragged_paged_attention_update.register_kernel(
    ("xla", "tpu"), from_jax(f"{_XLA}:rpa_plain_update", mutates_args="kv_pages"), requires="jax", priority=-10
)
ragged_paged_attention_update.register_kernel(
    ("cuda", "xpu"),
    "opreg.kernels.triton.rpa:ragged_paged_attention_update",
    requires="triton",
    why_not="opreg.kernels.triton.rpa:why_not_update",
    priority=5,
)
ragged_paged_attention_update.register_sharding("hq", "h", others=split_pages)
for _dtype, _rms in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
    ragged_paged_attention_update.tolerance(_dtype, _rms, "that of opreg::ragged_paged_attention")


@ragged_paged_attention_update.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    def call(kv_dtype: torch.dtype, **sizes: Any) -> dict[str, Any]:
        lengths = [(5, 18), (1, 29), (0, 9), (20, 40), (3, 3)]
        batch = make_batch(
            lengths, dtype=dtype, kv_dtype=kv_dtype, device=device, generator=generator, poison=False, **sizes
        )
        heads = batch.kv_pages.shape[1 if sizes.get("kv_layout") == "HND" else 2] // 2
        k, v = (
            torch.randn(batch.q.shape[0], heads, 16, generator=generator, device=generator.device).to(batch.q)
            for _ in range(2)
        )
        return {**batch._asdict(), "k": k, "v": v, "sm_scale": 0.25}

    yield call(dtype)
    yield {**call(dtype, kv_layout="HND", window=7), "kv_layout": "HND", "sliding_window": 7, "soft_cap": 5.0}
    yield {**call(torch.int8), "k_scale": 0.03, "v_scale": 0.05, "sinks": torch.linspace(-1.0, 1.0, 4, device=device)}
