"""opreg::splash_attention on torch_xla (PJRT_DEVICE=CPU): the dense JAX kernel, forward and backward."""

from __future__ import annotations

import torch
import torch_xla
from opreg.ops import splash_attention

OPTIONS = {"causal": True, "window": 5, "soft_cap": 0.8}


def run(tensors, ids):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = splash_attention(*leaves, ids, ids, **OPTIONS)
    (out.sin().sum() + lse.sum()).backward()
    return [x.detach().cpu() for x in (out, lse, *(leaf.grad for leaf in leaves))]


def test_results_and_gradients_are_those_of_the_cpu():
    device = torch_xla.device()
    tensors = [torch.randn(2, heads, 12, 8) for heads in (4, 2, 2)]
    ids = torch.arange(12).repeat(2, 1) // 7
    got = run([x.to(device) for x in tensors], ids.to(device))
    for one, other in zip(got, run(tensors, ids), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_pallas_kernel_is_refused_without_a_tpu():
    q = torch.zeros(1, 1, 128, 8).to("xla")
    text = str(splash_attention.explain(q, q, q))
    assert "pallas/splash_attention: refused (wants a TPU, but torch_xla runs on CPU)" in text
    assert "pallas/dense_attention: used" in text
