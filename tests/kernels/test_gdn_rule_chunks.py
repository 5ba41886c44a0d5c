"""Every kernel of opreg::gated_delta_rule, in chunks and token by token, against the recurrence in float64."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from opreg.kernels.cpu import gdn, gdn_rule, gdn_rule_torch
from opreg.ops.gated_delta_rule import gated_delta_rule, make_rule_call
from torch import Tensor

Call = dict[str, Any]
Rule = Callable[..., tuple[Tensor, ...]]
RULES = list(itertools.product((False, True), repeat=3))
SETS = [name for name, _ in gdn.INSTRUCTION_SETS]
FORMS = ["torch", "torch chunk by chunk", *(f"{name} {form}" for name in SETS for form in ("tokens", "chunks"))]


@pytest.fixture(params=FORMS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Rule, Rule]:
    """Forward and backward of one kernel."""
    if request.param.startswith("torch"):
        if request.param != "torch":
            monkeypatch.setattr(gdn_rule_torch, "_AT_ONCE", 1)
        return gdn_rule_torch.gated_delta_rule_chunks, gdn_rule_torch.gated_delta_rule_backward_chunks
    name, form = request.param.split()
    if SETS.index(name) > SETS.index(gdn.instruction_set()):
        pytest.skip(f"this CPU has no {name}")
    monkeypatch.setattr(gdn, "instruction_set", lambda: name)
    monkeypatch.setattr(gdn_rule, "CHUNKED_FROM", (0, 0) if form == "chunks" else (1 << 40, 1 << 40))
    return gdn_rule.gated_delta_rule, gdn_rule.gated_delta_rule_backward


def truth(call: Call) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in the dtype of its arguments."""
    q, k, v, decay, erase, write = (call[n] for n in ("q", "k", "v", "decay", "erase", "write"))
    decay, erase, write = (x if x.dim() == 4 else x[..., None] for x in (decay, erase, write))
    ratio = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(ratio, 2), k.repeat_interleave(ratio, 2)
    state = call["initial_state"]
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3])
    outs = []
    for t in range(v.shape[1]):
        state = state * decay[:, t, :, None].exp()
        delta = write[:, t] * v[:, t] - (state * (erase[:, t] * k[:, t])[:, :, None]).sum(-1)
        state = state + delta[..., None] * k[:, t, :, None]
        outs.append((state * q[:, t, :, None]).sum(-1) * k.shape[3] ** -0.5)
    return torch.stack(outs, 1), state


def rms(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-30))


def check(kernel: tuple[Rule, Rule], call: Call, limit: float) -> None:
    """Results and gradients within `limit` of those in float64."""
    given = {n: x for n, x in call.items() if x is not None}
    wide = {n: x.double().requires_grad_() for n, x in given.items()}
    out, state = truth({**call, **wide})
    generator = torch.Generator().manual_seed(3)
    grads = [
        torch.randn(x.shape, generator=generator).to(dtype) for x, dtype in ((out, call["v"].dtype), (state, FP32))
    ]
    want = torch.autograd.grad((out * grads[0]).sum() + (state * grads[1]).sum(), list(wide.values()))
    got = kernel[0](**call)
    assert got[0].dtype == call["v"].dtype
    for a, b in zip(got, (out, state), strict=True):
        assert rms(a, b) < limit
    found = dict(zip(given, kernel[1](*grads, **call), strict=False))
    for name, exact in zip(given, want, strict=True):
        assert rms(found[name], exact) < limit, name


FP32 = torch.float32


@pytest.mark.parametrize("length", [1, 17, 64, 65, 150])
@pytest.mark.parametrize("vectors", RULES)
def test_float32(kernel: tuple[Rule, Rule], vectors: tuple[bool, bool, bool], length: int) -> None:
    check(kernel, make_rule_call((2, length, 1, 2, 24, 20), vectors, state=length != 65), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(kernel: tuple[Rule, Rule], dtype: torch.dtype) -> None:
    check(kernel, make_rule_call((1, 130, 2, 2, 32, 64), (True, False, True), dtype=dtype), 5e-3)


@pytest.mark.parametrize("vector", [False, True])
def test_decays_of_every_kind(kernel: tuple[Rule, Rule], vector: bool) -> None:
    """None at all, slow ones behind fast ones, and a reset: nothing overflows, no digits are lost."""
    call = make_rule_call((1, 100, 1, 3, 16, 16), (vector, False, False))
    decay = call["decay"]
    decay[:, :, 0] = 0.0
    decay[:, :, 1] = -1e-4
    decay[:, 5, 1], decay[:, 40, 1], decay[:, 70:72, 1] = -300.0, -20.0, -80.0
    decay[:, :, 2] = -9.0
    check(kernel, call, 1e-5)
    decay[:, 50, 2] = float("-inf")
    out, state = kernel[0](**call)
    want = truth({n: x.double() for n, x in call.items()})
    assert rms(out, want[0]) < 1e-5
    assert rms(state, want[1]) < 1e-5
    assert all(x.isfinite().all() for x in kernel[1](torch.ones_like(out), torch.ones_like(state), **call))


def test_equal_keys_that_erase_in_full(kernel: tuple[Rule, Rule]) -> None:
    """(I + A)^-1 of equal keys: a series in powers of A would grow like binomial coefficients."""
    call = make_rule_call((1, 200, 1, 1, 16, 16))
    call["k"][:] = 0.25
    call["erase"][:], call["decay"][:] = 1.0, 0.0
    check(kernel, call, 1e-5)


def test_second_run_and_other_thread_counts_change_no_bit(kernel: tuple[Rule, Rule]) -> None:
    call = make_rule_call((2, 100, 2, 4, 32, 32), (True, True, False))
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (before, before, 1):
            torch.set_num_threads(threads)
            out, state = kernel[0](**call)
            runs.append((out, state, *kernel[1](out, state, **call)))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


class InFloat64(torch.autograd.Function):
    """The torch kernel with sums in float64, which the operator refuses."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Any:
        ctx.save_for_backward(*tensors)
        return gdn_rule_torch.forward(torch.float64, *tensors, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return gdn_rule_torch.backward(torch.float64, *grads, *ctx.saved_tensors, None)


@pytest.mark.parametrize("vectors", [RULES[0], RULES[-1]])
def test_gradcheck(vectors: tuple[bool, bool, bool]) -> None:
    call = make_rule_call((1, 19, 1, 2, 3, 2), vectors)
    tensors = [x.double().requires_grad_() for x in call.values()]
    assert torch.autograd.gradcheck(InFloat64.apply, tensors, fast_mode=True)


@pytest.fixture
def precision() -> Iterator[None]:
    gdn_rule_torch._read_once()
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
def test_products_are_float32_whatever_others_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the setting does is up to the device, and on this CPU it may be nothing; it is asked for and put back."""
    seen = []
    monkeypatch.setattr(gdn_rule_torch, "forward", lambda *_: seen.append(torch.get_float32_matmul_precision()))
    monkeypatch.setattr(gdn_rule_torch, "backward", lambda *_: seen.append(torch.get_float32_matmul_precision()))
    call = make_rule_call((1, 70, 1, 1, 32, 32))
    for before in ("medium", "highest"):
        torch.set_float32_matmul_precision(before)
        gdn_rule_torch.gated_delta_rule_chunks(**call)
        gdn_rule_torch.gated_delta_rule_backward_chunks(call["v"], call["initial_state"], **call)
        assert torch.get_float32_matmul_precision() == before
    assert seen == ["highest"] * 4


def test_one_graph_serves_every_length_and_trains() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda **call: gated_delta_rule(**call), backend=count, fullgraph=True, dynamic=True)
    for length in (9, 40, 64, 150):
        call = make_rule_call((1, length, 1, 2, 16, 16))
        call["v"].requires_grad_()
        for a, b in zip(step(**call), gated_delta_rule(**call), strict=True):
            assert torch.equal(a, b)
        (got,) = torch.autograd.grad(step(**call)[0].sum(), call["v"])
        (want,) = torch.autograd.grad(gated_delta_rule(**call)[0].sum(), call["v"])
        assert torch.equal(got, want)
    assert len(graphs) == 1


def test_few_tokens_are_refused_by_the_torch_kernel() -> None:
    few, enough = (make_rule_call((1, n, 1, 1, 16, 16)) for n in (7, 8))
    assert "below 8 they are faster one by one" in str(gdn_rule_torch.gated_delta_rule_chunks_why_not(**few))
    assert gdn_rule_torch.gated_delta_rule_chunks_why_not(**enough) is None


def test_negative_views_are_read_as_what_they_show(kernel: tuple[Rule, Rule]) -> None:
    call = make_rule_call((1, 70, 1, 2, 16, 16), (False, True, False))
    shown = {name: torch._neg_view(-x) if isinstance(x, Tensor) else x for name, x in call.items()}
    for got, want in zip(kernel[0](**shown), kernel[0](**call), strict=True):
        assert torch.equal(got, want)
