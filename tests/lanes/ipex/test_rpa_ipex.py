"""Ragged paged attention by IPEX: what its paged variable-length attention takes is right, the rest is refused."""

from typing import Any

import pytest
import torch
from opreg.kernels.cpu import rpa_ipex, rpa_torch
from opreg.ops import ragged_paged_attention
from opreg.ops.paged_attention_inputs import MIXED16, make_batch

import opreg

NAME = "cpu/rpa_ipex"
LENGTHS = [(5, 18), (1, 29), (0, 9), (20, 59), (0, 0), (3, 3), (1, 64), (33, 33)]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("heads", "head_dim", "page_size"), [((4, 2), 16, 4), ((5, 1), 128, 16), ((3, 3), 33, 16)])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_against_torch(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int, page_size: int, soft_cap: float | None
) -> None:
    batch = make_batch(LENGTHS, dtype=dtype, kv_layout="HND", heads=heads, head_dim=head_dim, page_size=page_size)
    options: dict[str, Any] = {"kv_layout": "HND", "sm_scale": 0.2, "k_scale": 0.5, "v_scale": 2.0}
    options["soft_cap"] = soft_cap
    want = rpa_torch.rpa_torch(*batch, **options)
    got = rpa_ipex.rpa_ipex(*batch, **options)
    assert (got.double() - want.double()).norm() <= LIMITS[dtype] * want.double().norm()
    assert (got[int(batch.cu_q_lens[len(LENGTHS)]) :] == 0).all()


def test_mixed_batch_through_the_operator() -> None:
    batch = make_batch(MIXED16, dtype=torch.bfloat16, kv_layout="HND", heads=(8, 2), head_dim=64, page_size=16)
    want = ragged_paged_attention(*batch, kv_layout="HND", sm_scale=0.125)
    with opreg.use_kernel("opreg::ragged_paged_attention", NAME):
        got = ragged_paged_attention(*batch, kv_layout="HND", sm_scale=0.125)
    assert (got.double() - want.double()).norm() <= 1e-2 * want.double().norm()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "kv_layout='HND' only"),
        ({"kv_layout": "HND", "sinks": torch.zeros(4)}, "it knows no sinks"),
        ({"kv_layout": "HND", "sliding_window": 4}, "pages before the sliding window"),
    ],
)
def test_reasons(options: dict[str, Any], reason: str) -> None:
    batch = make_batch([(5, 18)], kv_layout=options.get("kv_layout", "NHD"))
    assert reason in str(ragged_paged_attention.explain(*batch, **options))


def test_another_dtype_in_the_cache_is_refused() -> None:
    batch = make_batch([(5, 18)], kv_layout="HND", kv_dtype=torch.bfloat16)
    assert "it wants one dtype" in str(ragged_paged_attention.explain(*batch, kv_layout="HND"))


def test_a_length_out_of_range_never_reaches_it() -> None:
    batch = make_batch([(5, 18)], kv_layout="HND")
    batch.kv_lens[0] = 99
    with pytest.raises(ValueError, match=r"opreg::ragged_paged_attention: kv_lens\[0\] is 99"):
        rpa_ipex.rpa_ipex(*batch, kv_layout="HND")
