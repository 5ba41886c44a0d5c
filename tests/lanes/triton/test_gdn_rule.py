"""The Triton gated_delta_rule and its gradients in the interpreter, against the recurrence in float64."""

import itertools

import pytest
import torch
from opreg.kernels.triton import gdn_rule
from opreg.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_backward, make_rule_call

from opreg.select import explain

NAMES = ("q", "k", "v", "decay", "erase", "write", "initial_state")
GDN, KDA, GDN2 = (False, False, False), (True, False, False), (True, True, True)
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Gradients of a gate are sums of terms that cancel. In bfloat16 most of it is that the interpreter, as `products` is,
# cuts operands to TF32: where they are rounded, as in programs for NVIDIA (cvt.rna), 5.1e-3 are 1.5e-3.
OF_GRADIENTS = {FP32: 1e-5, BF16: 8e-3, FP16: 1e-3}


@pytest.fixture(autouse=True)
def poisoned():
    """NaN in memory that nothing has written, which kernels may not read."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def truth(call):
    """The recurrence as it is written, in float64."""
    q, k, v, decay, erase, write = (call[name].double() for name in NAMES[:6])
    decay, erase, write = (x if x.dim() == 4 else x[..., None] for x in (decay, erase, write))
    ratio = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(ratio, 2), k.repeat_interleave(ratio, 2)
    state = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3])
    if call["initial_state"] is not None:
        state = state + call["initial_state"].double()
    outs = []
    for t in range(v.shape[1]):
        state = state * decay[:, t, :, None].exp()
        delta = write[:, t] * v[:, t] - (state * (erase[:, t] * k[:, t])[:, :, None]).sum(-1)
        state = state + delta[..., None] * k[:, t, :, None]
        scale = call.get("scale") or k.shape[3] ** -0.5
        outs.append((state * q[:, t, :, None]).sum(-1) * scale)
    return torch.stack(outs, 1), state


def rms(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-30))


def grads_for(call):
    g = torch.Generator().manual_seed(3)
    b, _, h, v = call["v"].shape
    grad_out = torch.randn(call["v"].shape, generator=g).to(call["v"].dtype)
    return grad_out, torch.randn(b, h, v, call["k"].shape[3], generator=g)


def check(call, limit=None, backward=True):
    """Results as near to float64 as the op allows its kernels to be, and gradients."""
    of_gradients = limit or OF_GRADIENTS[call["v"].dtype]
    limit = limit or gated_delta_rule.op.tolerances[call["v"].dtype][0]
    given = {name: x for name, x in call.items() if isinstance(x, torch.Tensor)}
    wide = {name: x.double().requires_grad_() for name, x in given.items()}
    out, state = truth({**call, **wide})
    got = gdn_rule.gated_delta_rule(**call)
    assert [x.dtype for x in got] == [call["v"].dtype, FP32]
    assert rms(got[0], out) < limit
    assert rms(got[1], state) < limit
    if not backward:
        return
    grads = grads_for(call)
    want = torch.autograd.grad((out * grads[0]).sum() + (state * grads[1]).sum(), list(wide.values()))
    found = dict(zip(NAMES, gdn_rule.gated_delta_rule_backward(*grads, **call), strict=True))
    for (name, x), exact in zip(given.items(), want, strict=True):
        assert found[name].dtype == (FP32 if name == "initial_state" else x.dtype)
        assert found[name].shape == x.shape
        assert rms(found[name], exact) < of_gradients, name


# Sizes (b, t, hk, hv, k, v): ratios 1, 2 and 4, odd channels, tokens around 16 (the last without chunks), 32 and 64.
CALLS = [
    ((2, 17, 1, 2, 32, 32), GDN, True),
    ((1, 65, 1, 4, 40, 17), GDN, False),
    ((1, 33, 1, 2, 64, 33), KDA, True),
    ((2, 64, 1, 1, 16, 16), KDA, False),
    ((1, 70, 1, 2, 33, 65), GDN2, True),
    ((1, 31, 2, 2, 128, 128), GDN2, True),
    ((1, 40, 1, 1, 32, 16), (False, True, False), True),
    ((1, 40, 1, 1, 16, 32), (False, False, True), True),
]


@pytest.mark.parametrize(("sizes", "vectors", "state"), CALLS)
def test_float32(sizes, vectors, state):
    check(make_rule_call(sizes, vectors, state=state))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("vectors", [GDN, KDA, GDN2])
@pytest.mark.usefixtures("products")
def test_16_bits(vectors, dtype):
    check(make_rule_call((1, 70, 1, 2, 32, 48), vectors, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("length", [1, 16, 17, 32, 33, 63, 64, 65, 129])
@pytest.mark.parametrize("vectors", list(itertools.product((False, True), repeat=3)))
@pytest.mark.usefixtures("products")
def test_every_rule_and_length(vectors, length, dtype):
    ratio, k, v = ((1, 128, 64), (2, 60, 100), (4, 32, 256))[(length + sum(vectors)) % 3]
    call = make_rule_call((1, length, 1, ratio, k, v), vectors, state=length % 2 == 0, dtype=dtype)
    # A gate's gradient at one token is one number, which may be any part of the terms that it is the sum of.
    check(call, backward=length > 1 or dtype == FP32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("vectors", [GDN, KDA, GDN2])
@pytest.mark.usefixtures("products")
def test_the_widest_heads(vectors, dtype):
    check(make_rule_call((1, 65, 1, 2, 256, 256), vectors, dtype=dtype))


@pytest.mark.parametrize("vectors", [GDN, GDN2])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_few_tokens_go_one_by_one(vectors, length):
    check(make_rule_call((2, length, 1, 2, 24, 20), vectors, state=length != 5), backward=length != 16)


@pytest.mark.parametrize("sizes", [(1, 3, 1, 1, 1, 1), (1, 20, 1, 1, 1, 3), (1, 20, 1, 1, 3, 1)])
def test_one_channel(sizes):
    check({**make_rule_call(sizes, GDN2), "scale": 0.7})


@pytest.mark.parametrize("vector", [False, True])
def test_decays_of_every_kind(vector):
    """None at all, slow ones behind fast ones, and a reset: nothing overflows, no digits are lost."""
    call = make_rule_call((1, 70, 1, 3, 16, 16), (vector, False, False))
    decay = call["decay"]
    decay[:, :, 0] = 0.0
    decay[:, :, 1] = -1e-4
    decay[:, 5, 1], decay[:, 36, 1], decay[:, 60:62, 1] = -300.0, -20.0, -80.0
    decay[:, :, 2] = -9.0
    decay[:, 50, 2] = float("-inf")
    check(call, 1e-5)
    decay[:] = float("-inf")
    check(call, 1e-5)


def test_fast_channels_beside_slow_ones():
    """Sums down to -2100 in a chunk beside some of -0.07: a quotient of two exponentials would be inf or 0 / 0."""
    call = make_rule_call((1, 70, 1, 1, 32, 16), GDN2)
    call["decay"][..., ::3] = -30.0
    call["decay"][..., 1::3] = -1e-3
    call["decay"][..., 2::3] = 0.0
    call["decay"][:, 40:45] = -1e6
    check(call, 1e-5)


def test_small_gradients_of_slow_decays_are_not_lost_behind_fast_ones():
    """The gradient of each decay alone, not beside those of others a million times as large."""
    call = make_rule_call((1, 40, 1, 1, 16, 16), KDA)
    call["decay"][:] = -1e-3
    call["decay"][..., :8] = -12.0
    grads = grads_for(call)
    wide = {name: x.double().requires_grad_() for name, x in call.items()}
    out, state = truth(wide)
    (want,) = torch.autograd.grad((out * grads[0]).sum() + (state * grads[1]).sum(), wide["decay"])
    got = gdn_rule.gated_delta_rule_backward(*grads, **call)[3]
    for channels in (slice(8), slice(8, 16)):
        assert rms(got[..., channels], want[..., channels]) < 1e-5


@pytest.mark.parametrize("vectors", [GDN, KDA])
def test_equal_keys_that_erase_in_full(vectors):
    """(I + A)^-1 of equal keys: a series in powers of A would grow like binomial coefficients."""
    call = make_rule_call((1, 70, 1, 1, 16, 16), vectors)
    call["k"][:] = 0.25
    call["erase"][:], call["decay"][:] = 1.0, 0.0
    check(call, 1e-5)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.usefixtures("products")
def test_nearly_equal_keys_in_bfloat16(noise):
    """Chunks amplify what the corrected values lose: with operands of 8 bits by 6e-2 of the outputs."""
    g = torch.Generator().manual_seed(5)
    call = make_rule_call((1, 130, 1, 1, 32, 32), GDN)
    keys = torch.randn(1, 1, 1, 32, generator=g) + noise * torch.randn(1, 130, 1, 32, generator=g)
    call["k"] = torch.nn.functional.normalize(keys, dim=-1)
    call["q"] = torch.nn.functional.normalize(keys + 0.3 * torch.randn(1, 130, 1, 32, generator=g), dim=-1)
    call["erase"][:], call["write"][:], call["decay"][:] = 1.0, 1.0, -1e-4
    check({name: x.to(BF16) for name, x in call.items()}, 5e-3)


@pytest.mark.parametrize(("vectors", "length"), [(GDN, 9), (GDN, 40), (GDN2, 40)])
def test_neither_a_second_run_nor_company_changes_a_bit(vectors, length):
    call = make_rule_call((3, length, 1, 2, 16, 16), vectors)
    grads = grads_for(call)
    first = (*gdn_rule.gated_delta_rule(**call), *gdn_rule.gated_delta_rule_backward(*grads, **call))
    again = (*gdn_rule.gated_delta_rule(**call), *gdn_rule.gated_delta_rule_backward(*grads, **call))
    one = {name: x[1:2] for name, x in call.items()}
    alone = (
        *gdn_rule.gated_delta_rule(**one),
        *gdn_rule.gated_delta_rule_backward(*(x[1:2] for x in grads), **one),
    )
    for x, y, z in zip(first, again, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[1:2], z)


def test_two_calls_are_one():
    call = make_rule_call((1, 60, 1, 2, 16, 16), GDN2)
    out, state = gdn_rule.gated_delta_rule(**call)
    for cut in (1, 16, 17, 32, 45):
        first, second = (
            {name: x if name == "initial_state" else x[:, part] for name, x in call.items()}
            for part in (slice(cut), slice(cut, None))
        )
        head, between = gdn_rule.gated_delta_rule(**first)
        tail, end = gdn_rule.gated_delta_rule(**{**second, "initial_state": between})
        assert rms(torch.cat((head, tail), 1), out) < 2e-6
        assert rms(end, state) < 2e-6


def other_strides(x):
    """Views of the same numbers: rows of a wider tensor, another order of dimensions, every second number."""
    wide = torch.cat((x, x.new_full(x.shape, float("nan"))), -1)[..., : x.shape[-1]]
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    spread = torch.stack((x, x.new_full(x.shape, float("nan"))), -1)[..., 0]
    return wide, x.transpose(1, 2).contiguous().transpose(1, 2), turned, spread


@pytest.mark.parametrize(("vectors", "length"), [(GDN, 5), (GDN, 20), (GDN2, 20)])
def test_any_strides_and_negative_views_give_the_same_bits(vectors, length):
    call = make_rule_call((2, length, 2, 2, 16, 20), vectors)
    grads = grads_for(call)
    want = (*gdn_rule.gated_delta_rule(**call), *gdn_rule.gated_delta_rule_backward(*grads, **call))
    views = {
        name: other_strides(x) for name, x in (*call.items(), *zip(("grad_out", "grad_state"), grads, strict=True))
    }
    for i in range(4):
        shown = {name: x[i] for name, x in views.items()}
        if i == 3:
            shown = {name: torch._neg_view(-x) for name, x in shown.items()}
        back = gdn_rule.gated_delta_rule_backward(**shown)
        got = (*gdn_rule.gated_delta_rule(**{name: shown[name] for name in NAMES}), *back)
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)
    expanded = {**call, "erase": call["erase"][:, :1].expand_as(call["erase"])}
    copied = {name: x.contiguous() for name, x in expanded.items()}
    for x, y in zip(gdn_rule.gated_delta_rule(**expanded), gdn_rule.gated_delta_rule(**copied), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("length", [3, 20])
@pytest.mark.usefixtures("products")
def test_dtypes_mix(length):
    call = make_rule_call((1, length, 1, 2, 16, 16), KDA)
    for dtypes in (
        {"q": BF16, "k": BF16, "v": BF16, "initial_state": BF16},
        {"q": BF16, "k": FP16, "decay": FP64, "write": BF16, "initial_state": FP64},
        {"q": FP64, "k": FP64, "v": FP16, "erase": FP16, "initial_state": FP16},
    ):
        check({name: x.to(dtypes.get(name, FP32)) for name, x in call.items()}, 5e-3)


@pytest.mark.parametrize(
    "sizes", [(2, 0, 1, 2, 16, 24), (0, 20, 1, 2, 16, 24), (1, 20, 1, 2, 16, 0), (1, 3, 1, 0, 4, 4)]
)
def test_nothing(sizes):
    call = make_rule_call(sizes, GDN2)
    out, state = gdn_rule.gated_delta_rule(**call)
    assert out.shape == call["v"].shape
    assert torch.equal(state, call["initial_state"])
    grads = grads_for(call)
    found = gdn_rule.gated_delta_rule_backward(*grads, **call)
    assert [x.shape for x in found] == [call[name].shape for name in NAMES]
    assert all(x.isfinite().all() for x in found)
    assert torch.equal(found[6], grads[1])
    assert found[6].data_ptr() != grads[1].data_ptr() or not found[6].numel()


def test_a_broken_sequence_harms_no_other():
    call = make_rule_call((2, 40, 1, 2, 16, 16), GDN2)
    want = gdn_rule.gated_delta_rule(**call)
    call["v"][0, 3, 1], call["decay"][0, 20, 1] = float("inf"), float("nan")
    for got, clean in zip(gdn_rule.gated_delta_rule(**call), want, strict=True):
        assert torch.equal(got[1], clean[1])
        assert not got[0].isfinite().all()
    out = gdn_rule.gated_delta_rule(**call)[0]
    assert torch.equal(out[0, :, 0], want[0][0, :, 0])


def test_refusals_and_who_is_chosen():
    call = make_rule_call((1, 20, 1, 1, 16, 16))
    wide = make_rule_call((1, 20, 1, 1, 16, 257))
    assert gdn_rule.gated_delta_rule_why_not(**call) is None
    assert gdn_rule.gated_delta_rule_why_not(**wide) == "values of 257 channels; at most 256"
    wide = make_rule_call((1, 20, 1, 1, 300, 16))
    assert gdn_rule.gated_delta_rule_backward_why_not(*grads_for(wide), **wide) == "keys of 300 channels; at most 256"
    for device, op in itertools.product(("cuda", "xpu"), (gated_delta_rule, gated_delta_rule_backward)):
        name = op.name.partition("::")[2]
        assert explain(op.op, device).selected.name == f"triton/{name}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": torch.zeros(1, 20, 2, 15)}, r"decay has shape \(1, 20, 2, 15\), expected \(1, 20, 2\) or"),
        ({"v": torch.zeros(1, 20, 2, 16, dtype=FP64)}, "v is torch.float64, but all sums are float32"),
        ({"q": torch.zeros(1, 20, 3, 16), "k": torch.zeros(1, 20, 3, 16)}, "v has 2 heads, which is no multiple of"),
    ],
)
def test_mistakes_are_named(change, message):
    call = {**make_rule_call((1, 20, 1, 2, 16, 16)), **change}
    for fn, more in ((gdn_rule.gated_delta_rule, ()), (gdn_rule.gated_delta_rule_backward, grads_for(call))):
        with pytest.raises(ValueError, match=f"opreg::gated_delta_rule: {message}"):
            fn(*more, **call)
