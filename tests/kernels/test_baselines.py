"""What the shipped operators are timed beside computes the same, so that the ratios compare like with like."""

import importlib
import importlib.util
from importlib.metadata import version

import pytest
import torch
from opreg.kernels.baselines import gdn, gdn_rule, paged_attention
from opreg.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_backward, make_rule_call
from opreg.ops.gdn_attention import gdn_attention
from opreg.ops.gdn_attention_bench import flops_per_token, moved
from opreg.ops.gdn_attention_inputs import Heads, clone_call, make_call
from opreg.ops.paged_attention_inputs import make_batch
from opreg.ops.ragged_paged_attention import ragged_paged_attention

# Only the lanes with an older torch may lack it; in the main environment its absence fails these tests.
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None and not version("torch").startswith("2.13."),
    reason="transformers is not installed in this lane",
)


@needs_transformers
@pytest.mark.parametrize(("lens", "fresh"), [([70], True), ([2], True), ([1], False), ([1, 1, 1], False)])
def test_gdn_by_transformers(lens: list[int], fresh: bool) -> None:
    initial = [not fresh] * len(lens)
    call = make_call(lens, Heads(2, 4), initial=initial, bias=False)
    run = gdn.transformers(clone_call(call))
    assert not isinstance(run, str)
    mine = clone_call(call)
    # The second call goes on from what the first wrote; a prompt starts anew.
    for _ in range(2):
        gdn_attention(**mine)
        torch.testing.assert_close(run(), mine["core_attn_out"], rtol=1e-4, atol=1e-5)


@needs_transformers
def test_gdn_rule_by_transformers_and_in_other_forms() -> None:
    call = make_rule_call((1, 70, 2, 4, 32, 16))
    call["erase"] = call["write"]
    grads = {"grad_out": torch.randn_like(call["v"]), "grad_state": torch.randn(1, 4, 16, 32)}
    out, state = gated_delta_rule(**call)
    gradients = gated_delta_rule_backward(**grads, **call)
    by = gdn_rule.transformers(call)()
    torch.testing.assert_close(by[0], out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by[1].mT, state, rtol=1e-4, atol=1e-5)
    # One beta is erase and write.
    want = (*gradients[:4], gradients[4] + gradients[5])
    with torch.no_grad():
        found = gdn_rule.transformers_backward({**grads, **call})()
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for form in (gdn_rule.tokens, gdn_rule.chunks):
        torch.testing.assert_close(form(call)(), (out, state), rtol=1e-4, atol=1e-5)
    for form in (gdn_rule.tokens_backward, gdn_rule.chunks_backward):
        torch.testing.assert_close(form({**grads, **call})(), gradients, rtol=1e-4, atol=1e-5)


@needs_transformers
def test_gdn_rule_by_transformers_says_what_it_has_not() -> None:
    call = make_rule_call((1, 3, 1, 1, 16, 16))
    assert gdn_rule.transformers(call) == "it has one number for erase and write"
    assert gdn_rule.transformers_backward({**call, "scale": 1.0, "erase": call["write"]}) == "its scale is k ** -0.5"
    vectors = make_rule_call((1, 3, 1, 1, 16, 16), (True, False, False))
    assert gdn_rule.transformers(vectors) == "it has one decay and one beta a head"


@needs_transformers
@pytest.mark.parametrize(
    ("lens", "options", "reason"),
    [
        ([1, 2], {}, "sequences of one length; these are [1, 2]"),
        ([3], {"initial": [True]}, "a prompt without"),
        ([1], {"initial": [False]}, "one token with a state"),
        ([3], {"initial": [False], "flat": True}, "interleaved projections"),
    ],
)
def test_gdn_by_transformers_says_what_it_is_not_written_for(lens: list[int], options: dict, reason: str) -> None:
    found = gdn.transformers(make_call(lens, Heads(2, 4), **options))
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize("name", ["sdpa_loop", "padded_dense", "ipex_varlen", "xla_nonkernel", "xla_nonkernel_on_cpu"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_paged_attention_baselines(name: str, layout: str) -> None:
    # IPEX knows no other page size on a CPU than multiples of 16.
    batch = make_batch([(5, 18), (1, 29), (20, 40)], head_dim=32, page_size=16, kv_layout=layout, poison=False)
    call = {**batch._asdict(), "sm_scale": 32**-0.5, "kv_layout": layout}
    run = getattr(paged_attention, name)(call)
    if isinstance(run, str):
        assert run.endswith("is not installed")
        pytest.skip(run)
    tokens = 26
    want = ragged_paged_attention(**call)
    torch.testing.assert_close(run().cpu()[:tokens], want[:tokens], rtol=1e-4, atol=1e-5)


def test_paged_attention_baselines_refuse_options() -> None:
    batch = make_batch([(1, 4)])
    for name in ("sdpa_loop", "padded_dense"):
        found = getattr(paged_attention, name)({**batch._asdict(), "sm_scale": 1.0, "soft_cap": 2.0})
        assert found == "it is written here without soft_cap"


def test_the_floor_of_gdn_is_that_of_the_published_count() -> None:
    # 3.93 MFLOP per token at Qwen3-Next's heads and chunks of 64, and 0.066 for the convolution; a decode step moves
    # 4.33 MB per sequence and 0.13 MB of weights and inputs.
    heads = Heads(16, 32, 128, 128, 4)
    assert flops_per_token(heads, 64) == pytest.approx(3.93e6 + 0.066e6, rel=1e-2)
    call = make_call([1], heads, dtype=torch.bfloat16, spare_slots=0)
    assert moved(call, fresh=False) == pytest.approx(4.33e6 + 0.07e6, rel=1e-2)
