"""Every kernel of gdn_attention against the token-by-token recurrence in float64."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opreg.kernels.cpu import gdn, gdn_torch
from opreg.kernels.reference import gdn as reference
from opreg.ops.gdn_attention_inputs import Heads, clone_call, make_call

Call = dict[str, Any]
Kernel = Callable[..., None]


def compiled(name: str) -> Kernel:
    """The C++ kernels for one instruction set, whether or not it is the best here."""

    def run(**call: Any) -> None:
        bound = inspect.signature(gdn.gdn_attention).bind(**call)
        bound.apply_defaults()
        gdn._run(name, *bound.arguments.values())

    return run


# Whatever this machine can run: the best set must not hide that another one is wrong.
CAN_RUN = [name for name, _ in gdn.INSTRUCTION_SETS]
CAN_RUN = CAN_RUN[: CAN_RUN.index(gdn.instruction_set()) + 1]
KERNELS: dict[str, Kernel] = {
    "reference": reference.gdn_attention,
    "torch": gdn_torch.gdn_attention_torch,
    **{name: compiled(name) for name in CAN_RUN},
}
# Relative RMS error allowed. Outputs and 16-bit states are one rounding away from the truth, and a convolution sum that
# falls on the other side of a rounding border moves a whole sequence a little; float32 has nothing to hide behind.
OUT = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
STATE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root-mean-square error over root-mean-square truth."""
    got, want = got.double(), want.double()
    return float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-30))


_KNOWN: dict[object, Call] = {}


def truth(call: Call, key: object = None) -> Call:
    """What the op leaves behind, computed in float64; once for all kernels where the call has a key."""
    if key is None or key not in _KNOWN:
        call = clone_call(call)
        reference._gdn_attention(torch.float64, **call)
        _KNOWN[key] = call
    return _KNOWN[key]


def run(kernel: Kernel, call: Call) -> Call:
    """Run a kernel on its own copy of what it writes."""
    call = clone_call(call)
    kernel(**call)
    return call


def check(got: Call, want: Call) -> None:
    """Outputs and states within rounding, copies exact, slots that no sequence owns bit for bit as they were."""
    io, kept = want["z"].dtype, want["ssm_state"].dtype
    used = torch.zeros(want["ssm_state"].shape[0], dtype=torch.bool)
    starts = want["non_spec_query_start_loc"].diff().tolist()
    for slot, n in zip(want["non_spec_state_indices_tensor"].tolist(), starts, strict=True):
        used[slot] |= n > 0 and slot >= 0
    assert rms(got["core_attn_out"], want["core_attn_out"]) < OUT[io]
    limit = max(STATE[kept], 0.5 * OUT[io] if io == torch.bfloat16 else OUT[io])
    assert rms(got["ssm_state"][used], want["ssm_state"][used]) < limit
    torch.testing.assert_close(got["z"], want["z"], rtol=0, atol=0)
    for name in ("conv_state", "ssm_state"):
        rest = slice(None) if name == "conv_state" else ~used
        torch.testing.assert_close(got[name][rest], want[name][rest], rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=list(KERNELS))
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Each kernel in turn."""
    return KERNELS[request.param]


MIX = [1, 5, 0, 70, 1, 2, 64, 31, 3]
FROM = [True, False, True, True, True, False, False, True, True]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    (Heads(2, 2, 32, 32, 4), FP32, FP32, False, True),
    (Heads(2, 4, 32, 32, 4), FP32, FP32, True, False),
    (Heads(2, 6, 64, 32, 3), FP32, FP32, False, True),
    (Heads(1, 8, 32, 64, 2), FP32, BF16, True, True),
    (Heads(4, 8, 32, 32, 5, tp=2), FP32, FP16, False, False),
    (Heads(4, 4, 32, 32, 4, tp=4), FP32, FP32, True, True),
    (Heads(1, 2, 64, 128, 4), BF16, FP32, False, False),
    (Heads(1, 3, 128, 128, 4), BF16, BF16, True, True),
    (Heads(2, 4, 32, 32, 3), BF16, FP16, False, True),
    (Heads(2, 4, 64, 64, 4), FP16, FP16, True, False),
    (Heads(2, 2, 32, 64, 5), FP16, FP32, False, True),
    (Heads(1, 2, 48, 40, 4), FP32, FP32, False, True),
    (Heads(1, 1, 256, 32, 4), BF16, FP32, True, False),
]


@pytest.mark.parametrize(("heads", "io", "kept", "flat", "bias"), CASES)
def test_matches_the_recurrence_in_float64(
    kernel: Kernel, heads: Heads, io: torch.dtype, kept: torch.dtype, flat: bool, bias: bool
) -> None:
    call = make_call(MIX, heads, dtype=io, state_dtype=kept, flat=flat, bias=bias, initial=FROM, padding=3)
    got, want = run(kernel, call), truth(call, (heads, io, kept, flat, bias))
    check(got, want)
    assert not got["core_attn_out"][-3:].any()
    assert not got["z"][-3:].any()


@pytest.mark.parametrize("flat", [False, True])
def test_decode_batch_without_has_initial_state_continues_every_sequence(kernel: Kernel, flat: bool) -> None:
    call = make_call([1] * 7, dtype=BF16, flat=flat, spare_conv_rows=2)
    check(run(kernel, call), truth(call, ("decode", flat)))


@pytest.mark.parametrize("length", [1, 2, 3, 16, 29, 30, 31, 32, 33, 63, 65, 127, 128, 129, 200])
def test_every_length_round_a_chunk_border(kernel: Kernel, length: int) -> None:
    call = make_call([length], Heads(1, 2), initial=[length % 2 == 0], flat=True)
    check(run(kernel, call), truth(call, length))


@pytest.mark.parametrize("width", [2, 4, 5])
def test_a_prompt_in_two_parts_equals_one_call(kernel: Kernel, width: int) -> None:
    heads, total = Heads(1, 2, 32, 32, width), 75
    whole = make_call([total], heads, initial=[False], flat=True)
    want = run(kernel, whole)
    for cut in (1, 2, 3, 4, 5, 31, 64, 73, 74):
        half = clone_call(whole)
        for first, last, known in ((0, cut, False), (cut, total, True)):
            part = dict(half, num_prefills=1, num_decodes=0, has_initial_state=torch.tensor([known]))
            for name in ("core_attn_out", "z", "projected_states_qkvz", "projected_states_ba"):
                part[name] = half[name][first:last]
            part["non_spec_query_start_loc"] = torch.tensor([0, last - first])
            kernel(**part)
        check(half, want)


def test_order_and_company_of_sequences_change_no_bit(kernel: Kernel) -> None:
    call = make_call([1, 70, 5, 1, 33], dtype=BF16, initial=[True, False, True, True, True])
    together = run(kernel, call)
    starts = [0, 1, 71, 76, 77, 110]
    for i in (4, 2, 0, 3, 1):
        alone, rows = clone_call(call), slice(starts[i], starts[i + 1])
        for name in ("core_attn_out", "z", "projected_states_qkvz", "projected_states_ba"):
            alone[name] = alone[name][rows]
        alone.update(num_prefills=1, num_decodes=0, non_spec_query_start_loc=torch.tensor([0, rows.stop - rows.start]))
        for name in ("has_initial_state", "non_spec_state_indices_tensor"):
            alone[name] = alone[name][i : i + 1]
        kernel(**alone)
        slot = int(alone["non_spec_state_indices_tensor"])
        assert torch.equal(alone["core_attn_out"], together["core_attn_out"][rows])
        assert torch.equal(alone["ssm_state"][slot], together["ssm_state"][slot])
        assert torch.equal(alone["conv_state"][slot], together["conv_state"][slot])


def test_same_bits_run_to_run_and_with_one_or_two_threads(kernel: Kernel) -> None:
    call = make_call([1, 65, 1, 40, 3], Heads(2, 4, 64, 64), dtype=BF16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            results.append(run(kernel, call))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name in ("core_attn_out", "z", "conv_state", "ssm_state"):
            assert torch.equal(results[0][name], other[name])


def test_padding_slots_are_skipped_and_their_rows_are_zero(kernel: Kernel) -> None:
    call = make_call([1, 3, 40], initial=[True, True, False])
    call["non_spec_state_indices_tensor"][1] = -1
    before = clone_call(call)
    got, want = run(kernel, call), truth(call)
    check(got, want)
    assert not got["core_attn_out"][1:4].any()
    assert not got["z"][1:4].any()
    last = int(call["non_spec_state_indices_tensor"][2])
    others = [s for s in range(6) if s not in (int(call["non_spec_state_indices_tensor"][0]), last)]
    assert torch.equal(got["ssm_state"][others].isnan(), before["ssm_state"][others].isnan())


def test_longer_metadata_than_sequences_is_cut(kernel: Kernel) -> None:
    call = make_call([1, 9, 1, 1], initial=[True] * 4)
    call.update(num_prefills=1, num_decodes=1, num_actual_tokens=10)
    call["non_spec_state_indices_tensor"][2:] = 99
    got = run(kernel, call)
    assert not got["core_attn_out"][10:].any()
    short = dict(call, **{k: call[k][:2] for k in ("non_spec_state_indices_tensor", "has_initial_state")})
    short["non_spec_query_start_loc"] = call["non_spec_query_start_loc"][:3]
    check(got, truth(dict(short, non_spec_query_start_loc=short["non_spec_query_start_loc"])))


def test_token_index_scatters_rows(kernel: Kernel) -> None:
    call = make_call([2, 1, 40], initial=[True, True, False])
    order = torch.randperm(43, generator=torch.Generator().manual_seed(5))
    moved = dict(clone_call(call), non_spec_token_indx=order)
    for name in ("projected_states_qkvz", "projected_states_ba"):
        moved[name] = torch.empty_like(call[name]).index_copy_(0, order, call[name])
    got, want = run(kernel, moved), run(kernel, call)
    assert torch.equal(got["core_attn_out"][order], want["core_attn_out"])
    assert torch.equal(got["z"][order], want["z"])
    assert torch.equal(got["ssm_state"].nan_to_num(), want["ssm_state"].nan_to_num())


def test_paged_slots_wide_rows_and_int64_indices(kernel: Kernel) -> None:
    call = make_call([1, 40, 2], Heads(2, 4), dtype=BF16, flat=True)
    want = truth(clone_call(call))
    page = torch.zeros(6, 40_000)
    got = dict(call)
    for name, at in (("ssm_state", 0), ("conv_state", 20_000)):
        plain = call[name]
        flat = page.to(plain.dtype)
        got[name] = flat[:, at : at + plain[0].numel()].view(plain.shape)
        got[name].copy_(plain)
    for name in ("core_attn_out", "z", "projected_states_qkvz", "projected_states_ba"):
        wide = torch.zeros(43, 2 * call[name][0].numel(), dtype=BF16)
        got[name] = wide[:, : call[name][0].numel()].view(call[name].shape)
        got[name].copy_(call[name])
    for name in ("non_spec_query_start_loc", "non_spec_state_indices_tensor"):
        got[name] = got[name].long()
    kernel(**got)
    check(got, want)


def test_extreme_gates_and_empty_vectors(kernel: Kernel) -> None:
    call = make_call([90, 1], Heads(2, 4), flat=True)
    s = call["projected_states_qkvz"]
    s[3:9, :128] = 0  # q and k of these rows become zero if the history is zero too
    ba = call["projected_states_ba"]
    ba[10, 4:], ba[20, 4:], ba[30:33, 4:] = 50.0, -50.0, 300.0
    ba[40, :4], ba[41, :4] = 50.0, -50.0
    call["A_log"][:2] = torch.tensor(16.0).log()
    call["A_log"][3] = -30.0  # no decay at all
    check(run(kernel, call), truth(call, "extreme"))


def test_equal_keys_with_full_writes_stay_exact_over_a_long_sequence(kernel: Kernel) -> None:
    heads = Heads(1, 1, 32, 32, 2)
    call = make_call([700], heads, initial=[False], flat=True, bias=False)
    call["projected_states_qkvz"][:, :64] = 1.0
    call["projected_states_ba"][:, 0] = 9.0
    call["A_log"][:] = -20.0
    check(run(kernel, call), truth(call, "equal keys"))


def test_nan_stays_in_its_own_sequence(kernel: Kernel) -> None:
    call = make_call([40, 1, 40, 2], dtype=BF16)
    clean = run(kernel, call)
    call["projected_states_qkvz"][5] = float("nan")
    call["projected_states_ba"][40] = float("inf")
    call["projected_states_qkvz"][40, 0] = float("inf")
    got = run(kernel, call)
    assert got["core_attn_out"][5:40].isnan().any()
    assert torch.equal(got["core_attn_out"][41:], clean["core_attn_out"][41:])


def test_nothing_to_do_still_defines_the_outputs(kernel: Kernel) -> None:
    for lens in ([], [0, 0]):
        call = make_call(lens, padding=4)
        got = run(kernel, call)
        assert not got["core_attn_out"].any()
        assert not got["z"].any()
        assert torch.equal(got["ssm_state"], call["ssm_state"])


@pytest.mark.parametrize("name", ["A_log", "conv_weights", "ssm_state"])
def test_a_tensor_on_another_device_is_named(kernel: Kernel, name: str) -> None:
    call = make_call([1, 2])
    with pytest.raises(ValueError, match=f"{name} is on meta, but projected_states_qkvz on cpu; move it there"):
        kernel(**{**call, name: call[name].to("meta")})
