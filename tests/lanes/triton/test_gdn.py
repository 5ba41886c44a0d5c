"""The Triton gdn_attention in the interpreter (TRITON_INTERPRET=1), against the recurrence in float64."""

from typing import Any

import pytest
import torch
from opreg.kernels.reference import gdn as reference
from opreg.kernels.triton.gdn import gdn_attention, why_not
from opreg.kernels.triton.gdn_launch import AT_MOST
from opreg.ops.gdn_attention_inputs import Heads, clone_call, make_call

from opreg.select import explain

pytestmark = pytest.mark.usefixtures("products")
Call = dict[str, Any]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative RMS error allowed. float32: sums in another order. 16 bits: q, k, v, the corrected values and the state are
# operands of products in that type, and the output is rounded once; a state is as good as what was added to it.
OUT = {FP32: 1e-5, FP16: 1e-3, BF16: 5e-3}
WRITTEN = ("core_attn_out", "z", "conv_state", "ssm_state")
STATE = {FP32: 1e-5, FP16: 1e-3, BF16: 5e-3}


def rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root-mean-square error over root-mean-square truth."""
    got, want = got.double(), want.double()
    return float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-30))


def truth(call: Call) -> Call:
    call = clone_call(call)
    reference._gdn_attention(torch.float64, **call)
    return call


def run(call: Call) -> Call:
    call = clone_call(call)
    gdn_attention(**call)
    return call


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    whole = {2: torch.int16, 4: torch.int32}[got.element_size()]
    return torch.equal(got.contiguous().view(whole), want.contiguous().view(whole))


def check(got: Call, want: Call, before: Call) -> None:
    """Outputs and states within rounding; copies, and slots that no sequence owns, bit for bit."""
    io, kept = want["z"].dtype, want["ssm_state"].dtype
    starts = want["non_spec_query_start_loc"].diff().tolist()
    used = [s for s, n in zip(want["non_spec_state_indices_tensor"].tolist(), starts, strict=True) if n and s >= 0]
    rest = [s for s in range(want["ssm_state"].shape[0]) if s not in used]
    assert rms(got["core_attn_out"], want["core_attn_out"]) < OUT[io]
    assert rms(got["ssm_state"][used], want["ssm_state"][used]) < max(STATE[kept], OUT[io])
    assert same_bits(got["z"], want["z"])
    assert same_bits(got["conv_state"][used], want["conv_state"][used])
    for name in ("conv_state", "ssm_state"):
        assert same_bits(got[name][rest], before[name][rest])


# One token; shorter than the convolution; empty; the chunked form at its shortest; one chunk and a bit.
MIX, FROM = [1, 2, 0, AT_MOST + 1, 70], [True, False, True, False, True]
CASES = [
    (Heads(2, 2, 16, 32, 3), FP32, FP32, True, False),
    (Heads(1, 3, 16, 16, 2), FP32, FP16, False, True),
    (Heads(2, 4, 32, 16, 5, tp=2), FP32, FP32, False, False),
    (Heads(1, 1, 64, 16, 1), FP16, FP32, True, True),
    (Heads(1, 2, 16, 64, 4), FP16, FP16, False, True),
]


@pytest.mark.parametrize(("heads", "io", "kept", "flat", "bias"), CASES)
def test_matches_the_recurrence_in_float64(
    heads: Heads, io: torch.dtype, kept: torch.dtype, flat: bool, bias: bool
) -> None:
    call = make_call(MIX, heads, dtype=io, state_dtype=kept, flat=flat, bias=bias, initial=FROM, padding=3)
    got = run(call)
    check(got, truth(call), call)
    assert not got["core_attn_out"][-3:].any()
    assert not got["z"][-3:].any()


@pytest.mark.parametrize("kept", [FP32, BF16])
def test_qwen3_next_head_sizes_in_bfloat16(kept: torch.dtype) -> None:
    call = make_call([1, 150, 3], Heads(1, 1, 128, 128, 4), dtype=BF16, state_dtype=kept, initial=[True, True, False])
    check(run(call), truth(call), call)


def test_second_run_equals_the_first() -> None:
    call = make_call([1, 20], Heads(1, 1, 16, 16), dtype=FP16)
    first, second = run(call), run(call)
    for name in ("core_attn_out", "z", "conv_state", "ssm_state"):
        assert same_bits(first[name], second[name])


def test_lengths_round_chunk_borders() -> None:
    lens = [AT_MOST, 63, 64, 65, 127, 128, 129]
    call = make_call(lens, Heads(1, 1, 16, 16), initial=[n % 2 == 1 for n in lens], flat=True)
    check(run(call), truth(call), call)


def test_decode_batch_without_starts_continues_every_sequence() -> None:
    call = make_call([1] * 5, Heads(1, 2, 16, 16), spare_conv_rows=2)
    want = truth(call)
    check(run({**call, "non_spec_query_start_loc": None}), want, call)


def part_of(call: Call, first: int, last: int, which: int, known: bool) -> Call:
    """Tokens first..last of a call as a call of their own: sequence `which`, with or without an initial state."""
    part = dict(call, num_prefills=1, num_decodes=0, non_spec_query_start_loc=torch.tensor([0, last - first]))
    for name in ("core_attn_out", "z", "projected_states_qkvz", "projected_states_ba"):
        part[name] = call[name][first:last]
    part["non_spec_state_indices_tensor"] = call["non_spec_state_indices_tensor"][which : which + 1]
    return dict(part, has_initial_state=torch.tensor([known]))


def test_a_prompt_in_two_parts_equals_one_call() -> None:
    total = 75
    whole = make_call([total], Heads(1, 1, 16, 16), initial=[False], flat=True)
    want = truth(whole)
    for cut in (2, 64, 74):
        half = clone_call(whole)
        gdn_attention(**part_of(half, 0, cut, 0, False))
        gdn_attention(**part_of(half, cut, total, 0, True))
        check(half, want, whole)


def test_order_and_company_of_sequences_change_no_bit() -> None:
    lens, known = [1, 70, 3, 33], [True, False, True, True]
    call = make_call(lens, Heads(1, 1, 16, 16), dtype=FP16, initial=known)
    together = run(call)
    starts = [0, 1, 71, 74, 107]
    for i in (3, 1, 0, 2):
        alone = clone_call(call)
        part = part_of(alone, starts[i], starts[i + 1], i, known[i])
        gdn_attention(**part)
        slot = int(part["non_spec_state_indices_tensor"])
        assert same_bits(part["core_attn_out"], together["core_attn_out"][starts[i] : starts[i + 1]])
        for name in ("ssm_state", "conv_state"):
            assert same_bits(alone[name][slot], together[name][slot])


def test_token_index_scatters_rows_and_others_are_zero() -> None:
    call = make_call([2, 1, 40], Heads(1, 2, 16, 16), initial=[True, True, False])
    order = torch.randperm(45, generator=torch.Generator().manual_seed(5))[:43]
    moved = clone_call(call)
    for name in ("core_attn_out", "z", "projected_states_qkvz", "projected_states_ba"):
        wide = torch.full((45, *call[name].shape[1:]), float("nan"))
        moved[name] = wide.index_copy_(0, order, call[name])
    got, want = run(dict(moved, non_spec_token_indx=order)), run(call)
    left_out = [r for r in range(45) if r not in order.tolist()]
    for name in ("core_attn_out", "z"):
        assert same_bits(got[name][order], want[name])
        assert not got[name][left_out].any()
    for name in ("conv_state", "ssm_state"):
        assert same_bits(got[name], want[name])


def test_paged_slots_wide_rows_int64_indices_and_column_of_a_block_table() -> None:
    call = make_call([1, 20, 2], Heads(1, 2, 16, 16), flat=True)
    want = truth(call)
    page = torch.zeros(6, 2000)
    got = dict(call)
    for name, at in (("ssm_state", 0), ("conv_state", 1100)):
        got[name] = page[:, at : at + call[name][0].numel()].view(call[name].shape)
        got[name].copy_(call[name])
    for name in ("core_attn_out", "z", "projected_states_qkvz", "projected_states_ba"):
        width = call[name][0].numel()
        got[name] = torch.zeros(23, 2 * width)[:, :width].view(call[name].shape)
        got[name].copy_(call[name])
    got["non_spec_query_start_loc"] = call["non_spec_query_start_loc"].long()
    table = torch.full((3, 4), 77)
    table[:, 0] = call["non_spec_state_indices_tensor"]
    got["non_spec_state_indices_tensor"] = table[:, 0]
    gdn_attention(**got)
    check(got, want, call)


@pytest.mark.parametrize("null_slot", [-1, 0])
def test_null_slots_are_skipped_and_their_rows_are_zero(null_slot: int) -> None:
    call = make_call([1, 3, 20, 18], Heads(1, 1, 16, 16))
    call["has_initial_state"] = torch.tensor([True, True, False, True])
    call["non_spec_state_indices_tensor"][:] = torch.tensor([3, null_slot, null_slot, 5])
    got = clone_call(call)
    gdn_attention(**got, null_slot=null_slot)
    want = clone_call(call)
    reference._gdn_attention(torch.float64, **want, null_slot=null_slot)
    assert rms(got["core_attn_out"], want["core_attn_out"]) < OUT[FP32]
    assert same_bits(got["z"], want["z"])
    assert not got["core_attn_out"][1:24].any()
    for name in ("conv_state", "ssm_state"):
        assert same_bits(got[name][[0, 1, 2, 4, 6]], call[name][[0, 1, 2, 4, 6]])


def test_slow_decay_after_a_fast_one_keeps_its_digits() -> None:
    call = make_call([80], Heads(1, 2, 16, 16), flat=True)
    call["projected_states_ba"][10, 2:], call["projected_states_ba"][20:22, 2:] = 300.0, 3000.0
    call["A_log"][:] = torch.tensor([16.0, 1.0]).log()
    call["dt_bias"][:] = -9.0
    check(run(call), truth(call), call)


def test_equal_keys_with_full_writes_stay_exact_over_many_chunks() -> None:
    call = make_call([200], Heads(1, 1, 16, 16, 2), initial=[False], flat=True, bias=False)
    call["projected_states_qkvz"][:, :32] = 1.0
    call["projected_states_ba"][:, 0] = 9.0
    call["A_log"][:] = -20.0
    check(run(call), truth(call), call)


def test_zero_vectors_and_no_decay() -> None:
    call = make_call([40, 1], Heads(1, 1, 16, 16), initial=[False, False], bias=False)
    call["projected_states_qkvz"][:, :32] = 0
    call["A_log"][:] = -30.0
    assert not run(call)["core_attn_out"].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, which the interpreter computes with
def test_nan_stays_in_its_own_sequence() -> None:
    call = make_call([40, 1, 40, 2], Heads(1, 2, 16, 16))
    clean = run(call)
    call["projected_states_ba"][5] = float("nan")
    call["projected_states_qkvz"][40, 0] = float("inf")
    got = run(call)
    assert got["core_attn_out"][5:40].isnan().any()
    assert got["core_attn_out"][40].isnan().any()
    assert same_bits(got["core_attn_out"][41:], clean["core_attn_out"][41:])


def test_nothing_to_do_still_defines_the_outputs() -> None:
    for lens in ([], [0, 0]):
        call = make_call(lens, Heads(1, 1, 16, 16), padding=40)
        got = run(call)
        assert not got["core_attn_out"].any()
        assert not got["z"].any()
        assert same_bits(got["ssm_state"], call["ssm_state"])


def test_refusals() -> None:
    assert why_not(**make_call([1])) is None
    assert "head_k_dim=48" in str(why_not(**make_call([1], Heads(1, 1, 48, 32))))
    assert "head_v_dim=40" in str(why_not(**make_call([1], Heads(1, 1, 32, 40))))
    assert "width 9" in str(why_not(**make_call([1], Heads(1, 1, 16, 16, 9))))


def test_it_is_the_kernel_of_cuda_and_xpu() -> None:
    from opreg.ops import gdn_attention as op

    assert explain(op.op, "cuda").selected.name == "triton/gdn_attention"
    kernels = {d.kernel.name: d.state for d in explain(op.op, "xpu").decisions}
    assert kernels["triton/gdn_attention"] in ("used", "ready")


def test_negative_views_are_read_as_what_they_show_and_refused_where_they_are_written() -> None:
    call = make_call([1, 20], Heads(1, 2, 16, 16, 2), flat=True)
    want, shown = run(call), dict(call)
    for name in ("projected_states_qkvz", "projected_states_ba", "conv_weights", "conv_bias", "A_log", "dt_bias"):
        shown[name] = torch._neg_view(-call[name])
    for name in ("non_spec_query_start_loc", "non_spec_state_indices_tensor"):
        shown[name] = torch._neg_view(-call[name])
    got = run(shown)
    for name in WRITTEN:
        assert same_bits(got[name], want[name])
        with pytest.raises(ValueError, match=f"{name} is a negative view"):
            gdn_attention(**{**clone_call(call), name: torch._neg_view(-call[name])})
