"""opreg::splash_attention and its gradients: kernels against the reference and torch's attention, options, errors."""

import importlib
import itertools
import math

import jax
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import opreg
from opreg.errors import AutogradError

splash = importlib.import_module("opreg.ops.splash_attention")
attention, backward = splash.splash_attention, splash.splash_attention_backward
KERNELS = ("cpu/splash_attention", "pallas/dense_attention", "pallas/splash_attention")
# Where 64-bit ids have switched x64 on, the interpreter of jax 0.7 mixes int32 and int64 inside a Pallas kernel.
IDS = torch.int64 if jax.__version_info__ >= (0, 8) else torch.int32


def heads(b, h, g, n, m, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, n, d), (b, g, m, d), (b, g, m, d))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def segments(b, n, m, count=3):
    ids = (torch.arange(max(n, m), dtype=IDS) * count // max(n, m)).repeat(b, 1)
    return ids[:, -n:], ids[:, -m:]


def relative_rms(got, want):
    return ((got.double() - want.double()).pow(2).mean() / want.double().pow(2).mean().clamp_min(1e-30)).sqrt().item()


def compare(kernel, call, dtype):
    """Results and gradients of a kernel against the reference, within the op's tolerance."""
    with opreg.use_kernel(attention.name, "reference"):
        want = attention(**call)
    with opreg.use_kernel(attention.name, kernel):
        got = attention(**call)
    rms = attention.op.tolerances[dtype][0]
    assert relative_rms(got[0], want[0]) < rms
    torch.testing.assert_close(got[1], want[1], rtol=rms, atol=rms)
    grads = {"grad_out": torch.randn_like(want[0]), "grad_lse": torch.randn_like(want[1])}
    grads |= {name: call[name] for name in "qkv"} | {"out": want[0], "lse": want[1]}
    grads |= {name: value for name, value in call.items() if name not in "qkv"}
    with opreg.use_kernel(backward.name, "reference"):
        want = backward(**grads)
    with opreg.use_kernel(backward.name, kernel + "_backward"):
        got = backward(**grads)
    for one, other in zip(got, want, strict=True):
        assert one.dtype is dtype
        assert relative_rms(one, other) < rms


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_option_at_once(kernel):
    q, k, v = heads(2, 4, 2, 128, 256, 16)
    q_segments, kv_segments = segments(2, 128, 256)
    options = {"causal": True, "window": 90, "soft_cap": 1.5, "scale": 0.4}
    call = {"q": q, "k": k, "v": v, "q_segments": q_segments, "kv_segments": kv_segments, **options}
    compare(kernel, call, torch.float32)


OPTIONS = itertools.product(
    (False, True), (None, 3, 100), (None, 0.7, 30.0), (False, True), ((128, 128), (128, 256), (256, 128))
)
# Every fifth: 5 shares no factor with the numbers of values, so each value meets each other one.
CASES = list(OPTIONS)[::5]


@pytest.mark.slow
@pytest.mark.parametrize(("causal", "window", "soft_cap", "segmented", "sizes"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_options(kernel, causal, window, soft_cap, segmented, sizes, dtype):
    q, k, v = heads(1, 4, 2, *sizes, 16, dtype)
    call = {"q": q, "k": k, "v": v, "causal": causal, "window": window, "soft_cap": soft_cap}
    if segmented:
        call["q_segments"], call["kv_segments"] = segments(1, *sizes)
    compare(kernel, call, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_see_nothing_are_zero_and_have_no_gradient(kernel):
    q, k, v = heads(1, 1, 1, 256, 128, 8)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    with opreg.use_kernel(attention.name, kernel), opreg.use_kernel(backward.name, kernel + "_backward"):
        out, lse = attention(q, k, v, causal=True)
        out.sum().backward()
    assert out[:, :, :128].eq(0).all()
    assert lse[:, :, :128].eq(-math.inf).all()
    assert lse[:, :, 128:].isfinite().all()
    assert q.grad[:, :, :128].eq(0).all()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_is_torch_s_attention(dtype):
    q, k, v = heads(2, 4, 2, 9, 9, 8, dtype)
    with opreg.use_kernel(attention.name, "reference"):
        out, lse = attention(q, k, v, causal=True)
    want = scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
    assert out.dtype is dtype
    assert lse.dtype is torch.float32
    torch.testing.assert_close(out.float(), want, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=4e-3)


def plain(q, k, v, soft_cap):
    """The formula on its own, for torch's autograd: causal, two query heads to a key head."""
    scores = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
    scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ v.repeat_interleave(2, 1), scores.logsumexp(-1)


def test_gradients_of_both_results_are_those_of_autograd_with_a_float_soft_cap():
    tensors = [x.double().requires_grad_() for x in heads(1, 4, 2, 7, 7, 4)]
    mix = lambda out, lse: out.sin().sum() + (lse * torch.arange(7)).sum()  # noqa: E731
    got = torch.autograd.grad(mix(*attention(*tensors, causal=True, soft_cap=0.9)), tensors)
    want = torch.autograd.grad(mix(*plain(*tensors, 0.9)), tensors)
    torch.testing.assert_close(got, want)


def test_it_trains_in_a_compiled_graph():
    tensors = [x.requires_grad_() for x in heads(1, 2, 1, 6, 6, 4)]
    loss = lambda q, k, v: attention(q, k, v, causal=True, window=3)[0].pow(2).sum()  # noqa: E731
    want = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    torch.testing.assert_close(got, want)


class Seen(TorchDispatchMode):
    """The names of our operators that pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "opreg":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_gradients_do_not_run_the_forward_pass_again():
    tensors = [x.requires_grad_() for x in heads(1, 1, 1, 4, 4, 4)]
    with Seen() as seen:
        out, _ = attention(*tensors)
        assert seen.names == ["opreg::splash_attention"]
        out.sum().backward()
    assert seen.names == ["opreg::splash_attention", "opreg::splash_attention_backward"]


WRONG = [
    ((1, 3, 2, 4, 4, 4), {}, "q has 3 heads, which is no multiple of the 2 heads of k"),
    ((1, 1, 1, 4, 4, 4), {"window": 0}, "window is 0; it must be at least 1"),
    ((1, 1, 1, 4, 4, 4), {"soft_cap": 0.0}, "soft_cap is 0.0; it must be positive"),
    ((1, 1, 1, 4, 4, 4), {"q_segments": torch.zeros(1, 4)}, "kv_segments is missing; .* go together"),
]


@pytest.mark.parametrize(("sizes", "options", "words"), WRONG)
@pytest.mark.parametrize("kernel", ["reference", *KERNELS[:2]])
def test_wrong_arguments_are_named(kernel, sizes, options, words):
    with opreg.use_kernel(attention.name, kernel), pytest.raises(ValueError, match=f"splash_attention: {words}"):
        attention(*heads(*sizes), **options)


def test_the_pallas_kernel_says_what_it_wants():
    text = str(attention.explain(*heads(1, 1, 1, 4, 256, 4)))
    assert "cpu/splash_attention: used" in text
    assert "pallas/splash_attention: refused (wants multiples of 128, but n is 4)" in text
    text = str(attention.explain(*heads(1, 1, 1, 128, 128, 4, torch.float16)))
    assert "refused (wants float32 or bfloat16, but q is torch.float16)" in text


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
def test_lowered_for_tpu_it_is_the_pallas_kernel(back):
    module = importlib.import_module("opreg.kernels.pallas.splash_attention")
    struct = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    x, lse = struct(1, 2, 128, 128), struct(1, 2, 128, dtype="float32")
    fn = module.splash_attention_backward if back else module.splash_attention
    args = (x, lse, x, x, x, x, lse) if back else (x, x, x)
    traced = jax.jit(lambda *arrays: fn(*arrays, causal=True, soft_cap=30.0)).trace(*args)
    found = {
        kind: traced.lower(lowering_platforms=(kind,)).as_text().count("tpu_custom_call") for kind in ("tpu", "cpu")
    }
    assert found == {"tpu": 1, "cpu": 0}


@pytest.mark.parametrize("soft_cap", [None, 0.9])
def test_second_derivatives(soft_cap):
    tensors = [x.double().requires_grad_() for x in heads(1, 2, 1, 3, 4, 2)]
    ids = [torch.tensor([[0, 0, 1]]), torch.tensor([[0, 0, 1, 1]])]
    run = lambda *x: attention(*x, *ids, causal=True, window=3, soft_cap=soft_cap, scale=0.7)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, tensors)


def test_second_derivatives_are_those_of_autograd():
    q, k, v = (x.double() for x in heads(1, 2, 1, 3, 3, 2))
    mix = lambda out, lse: out.sin().sum() + lse.cos().sum()  # noqa: E731
    ours = torch.autograd.functional.hessian(lambda q: mix(*attention(q, k, v, causal=True, soft_cap=0.9)), q)
    want = torch.autograd.functional.hessian(lambda q: mix(*plain(q, k, v, 0.9)), q)
    torch.testing.assert_close(ours, want)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, for tangents
def test_torch_func_equals_autograd():
    q, k, v = (x.double() for x in heads(1, 2, 1, 4, 4, 3))

    def mixed(out, lse):
        return out.sin().sum() + lse.cos().sum()

    def loss(q, k, v):
        return mixed(*attention(q, k, v, causal=True, soft_cap=0.9))

    def want(q, k, v):
        return mixed(*plain(q, k, v, 0.9))

    every = (0, 1, 2)
    torch.testing.assert_close(torch.func.grad(loss, every)(q, k, v), torch.func.grad(want, every)(q, k, v))
    second = torch.func.jacrev(torch.func.grad(loss))(q, k, v)
    torch.testing.assert_close(second, torch.func.jacrev(torch.func.grad(want))(q, k, v))
    batch = torch.stack([q, q + 1])
    each = torch.vmap(torch.func.grad(loss, every), in_dims=(0, None, None))(batch, k, v)
    for i, one in enumerate(batch):
        torch.testing.assert_close([grad[i] for grad in each], [*torch.func.grad(want, every)(one, k, v)])
    with pytest.raises(AutogradError, match=r"splash_attention.*dual tensor.*torch\.func\.jacrev"):
        torch.func.hessian(loss)(q, k, v)


def test_vmap_of_the_op_and_of_its_gradients():
    q, k, v = (x.double() for x in heads(6, 2, 1, 4, 4, 2))
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    batched = [x.view(3, 2, *x.shape[1:]) for x in (q, k)]
    run = lambda q, k: attention(q, k, v[:2], ids, ids, causal=True)  # noqa: E731
    back = lambda q, k: backward(q, q[..., 0], q, k, v[:2], q * 2, q[..., 1], ids, ids, causal=True)  # noqa: E731
    for fn in (run, back):
        got = torch.vmap(fn)(*batched)
        want = [torch.stack(rows) for rows in zip(*(fn(q, k) for q, k in zip(*batched, strict=True)), strict=True)]
        torch.testing.assert_close(list(got), want)
