"""The flash-attention-like entry: same numbers, the other names."""

import pytest
import torch
from opreg.ops import ragged_paged_attention_lse
from opreg.ops.flash_attention_paged import flash_attention_paged, split_cache
from opreg.ops.paged_attention_inputs import make_batch


def test_names_map_to_the_operator() -> None:
    batch = make_batch([(5, 18), (1, 29)], window=7, spare_seqs=0)
    sinks = torch.linspace(-1, 1, 4)
    arguments = (batch.q, batch.kv_pages, batch.cu_q_lens, batch.kv_lens, batch.page_indices)
    options = {"window_size": (6, 0), "softcap": 5.0, "k_descale": 0.5, "s_aux": sinks}
    out, lse = flash_attention_paged(*arguments, **options, return_softmax_lse=True)
    want, want_lse = ragged_paged_attention_lse(
        *batch, sm_scale=0.25, sliding_window=7, soft_cap=5.0, k_scale=0.5, sinks=sinks
    )
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse.T)
    assert torch.equal(flash_attention_paged(*arguments, **options), want)
    plain = flash_attention_paged(*arguments[:4], batch.page_indices.clamp(min=0), softmax_scale=0.25)
    assert plain.shape == batch.q.shape


def test_what_it_cannot_do_is_said() -> None:
    batch = make_batch([(5, 18)], spare_seqs=0)
    arguments = (batch.q, batch.kv_pages, batch.cu_q_lens, batch.kv_lens, batch.page_indices)
    with pytest.raises(ValueError, match="causal=False"):
        flash_attention_paged(*arguments, causal=False)
    with pytest.raises(ValueError, match=r"window_size is \(3, 2\); nothing to the right"):
        flash_attention_paged(*arguments, window_size=(3, 2))
    with pytest.raises(ValueError, match=r"window_size is \(-2, 0\); left is -1"):
        flash_attention_paged(*arguments, window_size=(-2, 0))


def test_split_cache_gives_views() -> None:
    cache = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    k, v = split_cache(cache)
    assert torch.equal(k[1, 2, 1], cache[1, 2, 2])
    assert torch.equal(v[1, 2, 1], cache[1, 2, 3])
    k, v = split_cache(cache.transpose(1, 2), "HND")
    assert torch.equal(v[1, 1, 2], cache[1, 2, 3])
    v.zero_()
    assert (cache[:, :, 1::2] == 0).all()
