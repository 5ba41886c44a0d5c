"""opreg::gated_delta_rule: the three rules it covers, and its gradients against autograd through its own body."""

import itertools
from typing import Any

import pytest
import torch
from opreg.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_backward, make_rule_call
from opreg.ops.gdn_attention_inputs import Heads, make_call
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

import opreg

NAMES = ("q", "k", "v", "decay", "erase", "write", "initial_state")
SIZES = (2, 37, 2, 4, 24, 20)
RULES = list(itertools.product((False, True), repeat=3))


def on_the_cpu(op: Any) -> list[str]:
    """Names of its kernels that can be tried here; the Triton ones have tests/lanes/triton/test_gdn_rule.py."""
    return [kernel.name for kernel in op.op.kernels if kernel.takes("cpu")]


def rms(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).pow(2).mean().sqrt() / want.double().pow(2).mean().sqrt())


@pytest.mark.parametrize("vectors", RULES)
def test_kernels_equal_the_body(vectors: tuple[bool, bool, bool]) -> None:
    call = make_rule_call(SIZES, vectors)
    want = gated_delta_rule.op.body(**call)
    for kernel in on_the_cpu(gated_delta_rule):
        with opreg.use_kernel("opreg::gated_delta_rule", kernel):
            got = gated_delta_rule(**call)
        assert rms(got[0], want[0]) < 2e-6
        assert rms(got[1], want[1]) < 2e-6


def gradients(fn: Any, call: dict[str, Any], weights: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    leaves = {n: call[n].clone().requires_grad_() for n in NAMES if call[n] is not None}
    out, state = fn(**{**call, **leaves})
    return list(torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), list(leaves.values())))


@pytest.mark.parametrize(
    ("vectors", "length"), [*((rule, 37) for rule in RULES), (RULES[0], 1), (RULES[0], 32), (RULES[-1], 70)]
)
def test_gradients_equal_autograd_through_the_body(vectors: tuple[bool, bool, bool], length: int) -> None:
    call = make_rule_call((1, length, 1, 2, 24, 20), vectors, state=length != 37)
    out, state = gated_delta_rule(**call)
    weights = (torch.randn_like(out), torch.randn_like(state))
    want = gradients(gated_delta_rule.op.body, call, weights)
    for kernel in on_the_cpu(gated_delta_rule_backward):
        if length < 8 and kernel.endswith("_chunks"):
            continue  # refused: test_gdn_rule_chunks.py
        with opreg.use_kernel("opreg::gated_delta_rule_backward", kernel):
            got = gradients(gated_delta_rule, call, weights)
        for name, a, b in zip(NAMES, got, want, strict=False):
            assert rms(a, b) < 5e-6, name


def test_it_is_the_rule_of_qwen3_next() -> None:
    call = make_rule_call((2, 70, 4, 4, 32, 48))
    want, state = qwen.torch_chunk_gated_delta_rule(
        call["q"],
        call["k"],
        call["v"],
        g=call["decay"],
        beta=call["write"],
        initial_state=call["initial_state"].mT,
        output_final_state=True,
    )
    got = gated_delta_rule(**{**call, "erase": call["write"]})
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], state.mT, rtol=1e-4, atol=1e-5)


def test_equal_vectors_are_the_scalar_rule() -> None:
    call = make_rule_call(SIZES)
    vectors = {
        n: call[n][..., None].expand(*call[n].shape, d) for n, d in (("decay", 24), ("erase", 24), ("write", 20))
    }
    for a, b in zip(gated_delta_rule(**{**call, **vectors}), gated_delta_rule(**call), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_it_is_the_recurrence_of_gdn_attention() -> None:
    """The serving op with a convolution that passes its newest input through, and the training op, agree."""
    serve = make_call([40], Heads(2, 4), initial=[False], flat=True, bias=False)
    serve["conv_weights"].zero_()[:, -1] = 1.0
    opreg.ops.gdn_attention(**serve)
    y = torch.nn.functional.silu(serve["projected_states_qkvz"][None, :, :256])
    q, k, v = (x.unflatten(-1, (-1, 32)) for x in y.split([64, 64, 128], dim=-1))
    b, a = serve["projected_states_ba"][None].chunk(2, dim=-1)
    out, state = gated_delta_rule(
        *(x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k)),
        v,
        -serve["A_log"].exp() * torch.nn.functional.softplus(a + serve["dt_bias"]),
        b.sigmoid(),
        b.sigmoid(),
    )
    torch.testing.assert_close(serve["core_attn_out"], out[0], rtol=1e-4, atol=1e-6)
    slot = int(serve["non_spec_state_indices_tensor"])
    torch.testing.assert_close(serve["ssm_state"][slot], state[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    call = make_rule_call(SIZES, (True, False, True), dtype=dtype)
    want = gated_delta_rule.op.body(**{n: x.float() if n in NAMES else x for n, x in call.items()})
    got = gated_delta_rule(**call)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert rms(got[0], want[0]) < 4e-3


def test_compiled_training_step_equals_eager() -> None:
    call = make_rule_call((1, 9, 1, 2, 16, 16), (True, False, False))
    weights = (torch.ones(1, 9, 2, 16), torch.ones(1, 2, 16, 16))
    torch._dynamo.reset()
    compiled = torch.compile(gated_delta_rule, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, call, weights), gradients(gated_delta_rule, call, weights), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": torch.zeros(2, 37, 4, 23)}, r"decay has shape \(2, 37, 4, 23\), expected \(2, 37, 4\) or"),
        ({"v": torch.zeros(2, 37, 4, 20, dtype=torch.float64)}, "v is torch.float64, but all sums are float32"),
        ({"write": torch.zeros(2, 37, 4, 1, 20)}, r"write has shape \(2, 37, 4, 1, 20\), expected"),
        (
            {"q": torch.zeros(2, 37, 3, 24), "k": torch.zeros(2, 37, 3, 24)},
            "v has 4 heads, which is no multiple of the 3",
        ),
    ],
)
def test_wrong_gates_and_heads_are_named(change: dict[str, Any], message: str) -> None:
    for kernel in on_the_cpu(gated_delta_rule):
        with (
            opreg.use_kernel("opreg::gated_delta_rule", kernel),
            pytest.raises(ValueError, match=f"opreg::gated_delta_rule: {message}"),
        ):
            gated_delta_rule(**{**make_rule_call(SIZES), **change})
