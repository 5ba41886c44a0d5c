"""The Triton splash attention and its gradients: numbers in the interpreter, programs compiled for sm_90."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from opreg.kernels.cpu import splash_attention as plain
from opreg.kernels.triton import splash_attention as triton_splash
from opreg.ops import splash_attention, splash_attention_backward

from opreg.select import explain


def relative_rms(got, want):
    return ((got.double() - want.double()).pow(2).mean() / want.double().pow(2).mean().clamp_min(1e-30)).sqrt().item()


def compare(dtype, b, h, g, n, m, d, e, segments=0, **options):
    """Both results and all gradients beside float64 in plain torch, within the op's tolerance."""
    generator = torch.Generator().manual_seed(n + m)
    q, k, v, grad = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((b, h, n, d), (b, g, m, d), (b, g, m, e), (b, h, n, e))
    )
    grad_lse = torch.randn(b, h, n, generator=generator)
    if segments:
        ids = (torch.arange(max(n, m)) * segments // max(n, m)).repeat(b, 1)
        options["q_segments"], options["kv_segments"] = ids[:, -n:], ids[:, -m:]
    rms = splash_attention.op.tolerances[dtype][0]
    out, lse = plain.splash_attention(*(x.double() for x in (q, k, v)), **options)
    got = triton_splash.splash_attention(q, k, v, **options)
    assert got[0].dtype is dtype
    assert relative_rms(got[0], out) < rms
    torch.testing.assert_close(got[1].double(), lse, rtol=rms, atol=rms)
    want = plain.splash_attention_backward(
        *(x.double() for x in (grad, grad_lse, q, k, v)), out.to(dtype).double(), lse, **options
    )
    grads = triton_splash.splash_attention_backward(grad, grad_lse, q, k, v, out.to(dtype), lse.float(), **options)
    for one, other in zip(grads, want, strict=True):
        assert one.dtype is dtype
        assert relative_rms(one, other) < rms


OPTIONS = list(itertools.product((False, True), (None, 3, 70), (None, 1.5), (0, 3)))


# Every fifth: 5 shares no factor with the numbers of values, so each value meets each other one.
@pytest.mark.parametrize(("causal", "window", "soft_cap", "segments"), OPTIONS[::5])
@pytest.mark.parametrize(("n", "m"), [(5, 7), (70, 130), (130, 70)])
def test_options(causal, window, soft_cap, segments, n, m):
    compare(torch.float32, 2, 4, 2, n, m, 16, 8, segments=segments, causal=causal, window=window, soft_cap=soft_cap)


@pytest.mark.parametrize("d", [1, 40, 128])
def test_sizes_and_half_precision(d):
    compare(torch.float16, 1, 2, 1, 66, 66, d, d, causal=True, scale=0.2)


def test_rows_that_see_nothing_and_sizes_of_zero():
    q, k = torch.randn(1, 2, 100, 16), torch.randn(1, 1, 20, 16)
    out, lse = triton_splash.splash_attention(q, k, k, causal=True)
    assert out[:, :, :80].eq(0).all()
    assert lse[:, :, :80].eq(-math.inf).all()
    assert lse[:, :, 80:].isfinite().all()
    grads = triton_splash.splash_attention_backward(out, torch.ones_like(lse), q, k, k, out, lse, causal=True)
    assert all(x.isfinite().all() and x.abs().sum() > 0 for x in grads)
    assert grads[0][:, :, :80].eq(0).all()
    for n, m in ((0, 3), (3, 0)):
        out, lse = triton_splash.splash_attention(q[:, :, :n], k[:, :, :m], k[:, :, :m])
        assert out.shape == (1, 2, n, 16)
        assert lse.eq(-math.inf).all()


def test_refusals_and_who_is_chosen():
    q = torch.ones(1, 1, 4, 8)
    none = (None, None, False, None, None, None)
    assert triton_splash.why_not(q, q, q, *none) is None
    assert "float64" in triton_splash.why_not(*[q.double()] * 3, *none)
    assert "one dtype" in triton_splash.why_not(q, q.half(), q, *none)
    assert "at most 256" in triton_splash.why_not(*[torch.ones(1, 1, 4, 300)] * 3, *none)
    for device, op in itertools.product(("cuda", "xpu"), (splash_attention, splash_attention_backward)):
        name = op.name.partition("::")[2]
        assert explain(op.op, device).selected.name == f"triton/{name}"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from opreg.kernels.triton import splash_attention_kernels as s

FLAGS = {"CAUSAL": True, "WINDOW": True, "CAP": True, "SEGMENTS": True}
for dtype, rows, keys, d in (("*bf16", 64, 64, 64), ("*fp16", 64, 32, 128), ("*fp32", 32, 32, 128)):
    for fn in (s.attend, s.grad_queries, s.grad_keys):
        constants = {**FLAGS, "ROWS": rows, "KEYS": keys, "D": d, "E": d}
        types = dict.fromkeys(("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"), dtype)
        types |= {"lse": "*fp32", "through": "*fp32", "q_ids": "*i32", "k_ids": "*i32", "scale": "fp32", "cap": "fp32"}
        signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in fn.arg_names}
        constexprs = {(fn.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=fn, signature=signature, constexprs=constexprs)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert made.asm["cubin"]
        print(fn.__name__, dtype, made.metadata.shared, made.asm["ptx"].count(".local"))
"""


def test_all_programs_compile_for_sm_90():
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=settings, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 9
    assert all(int(shared) <= 227 * 1024 and int(local) == 0 for _, _, shared, local in lines), done.stdout


def test_negative_views_are_read_as_what_they_show():
    generator = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(4))
    shown = [torch._neg_view(-x) for x in (q, k, v, grad)]
    out, lse = triton_splash.splash_attention(q, k, v, causal=True)
    for got, want in zip(triton_splash.splash_attention(*shown[:3], causal=True), (out, lse), strict=True):
        assert torch.equal(got, want)
    zeros = torch.zeros_like(lse)
    want = triton_splash.splash_attention_backward(grad, zeros, q, k, v, out, lse, causal=True)
    given = (shown[3], zeros, *shown[:3], torch._neg_view(-out), torch._neg_view(-lse))
    for got, one in zip(triton_splash.splash_attention_backward(*given, causal=True), want, strict=True):
        assert torch.equal(got, one)
