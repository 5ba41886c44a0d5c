"""Cases of the adapter to Intel's gdn_attention with speculative rows, which schema C alone knows."""

from typing import Any

import torch
from gdn_xpu_case import BF16, BOTH, CALLS, FP16, case, make, raises, run
from opreg.kernels.xpu import gdn
from opreg.ops.gdn_attention_inputs import Heads, clone_call
from test_gdn_spec import Server, check_trajectory


@case("C", BOTH)
def any_trajectory_equals_plain_decoding() -> None:
    # With a convolution row for each draft, with fewer, and without any.
    for dtype, spare, limit in ((BF16, 3, 1e-2), (FP16, 1, 2e-3), (BF16, 0, 1e-2)):
        check_trajectory(Server(gdn.gdn_attention, [40, 33, 29], 3, dtype, Heads(1, 2, 64, 64), spare), limit)


@case("C", BOTH)
def nothing_accepted_goes_on_from_the_first_column() -> None:
    first, second = (Server(gdn.gdn_attention, [12], 2, BF16, Heads(1, 2, 64, 64)) for _ in range(2))
    for server, accepted in ((first, 0), (second, 1)):
        server.step({0: 5}, {}, 0)
        server.accepted[0] = accepted
        server.step({}, {0: (2, 2)}, 1)
    assert torch.equal(first.out.nan_to_num(), second.out.nan_to_num())


def spec(counts: list[int], accepted: list[int], drafts: int = 2, **more: Any) -> dict[str, Any]:
    """Speculative rows of `counts` tokens over a cache whose columns are windows one token apart."""
    call = make(counts, Heads(1, 2, 64, 64), flat=False, spare_slots=len(counts) * (drafts + 1) + 1, **more)
    slots, n = call["conv_state"].shape[0], len(counts)
    table = torch.randperm(slots - 1, generator=torch.Generator().manual_seed(3))[: n * (drafts + 1)] + 1
    keep = call["conv_weights"].shape[1] - 1
    inputs = torch.randn(n, drafts + keep, call["conv_state"].shape[2]).to(call["conv_state"].dtype)
    for i, row in enumerate(table.view(n, -1).tolist()):
        for t, slot in enumerate(row):
            call["conv_state"][slot, :keep] = inputs[i, t : t + keep]
    call.update(
        num_prefills=0,
        num_decodes=0,
        num_spec_decodes=n,
        has_initial_state=None,
        non_spec_query_start_loc=None,
        non_spec_state_indices_tensor=None,
        spec_query_start_loc=call["non_spec_query_start_loc"],
        spec_state_indices_tensor=table.view(n, -1),
        num_accepted_tokens=torch.tensor(accepted),
    )
    return call


@case("C", BOTH)
def speculative_rows_of_one_length_go_in_one_call() -> None:
    run(spec([3, 3, 3, 3], [0, 1, 2, 3], padding=2))
    assert [c["num_spec_decodes"] for c in CALLS] == [4]
    # A cache with a row for each draft, as vLLM allocates it, is handed over as it is.
    call = spec([3, 3], [1, 3], spare_conv_rows=2)
    CALLS.clear()
    gdn.gdn_attention(**call)
    assert CALLS[0]["conv_state"].data_ptr() == call["conv_state"].data_ptr()
    run(spec([3, 3], [2, 3], spare_conv_rows=3))


@case("C", BOTH)
def ragged_rows_and_rows_without_drafts() -> None:
    for spare in (0, 1, 2):
        run(spec([3, 1, 2, 0, 1, 2], [3, 3, 3, 1, 0, 1], padding=1, spare_conv_rows=spare))
        sizes = [(c["num_spec_decodes"], c["spec_state_indices_tensor"].shape[1]) for c in CALLS]
        assert sizes == [(2, 1), (2, 2), (1, 3)]


@case("C", BOTH)
def speculative_null_rows_and_columns() -> None:
    call = spec([3, 3, 2, 3], [1, 2, 3, 1], spare_conv_rows=2)
    call["spec_state_indices_tensor"][0, 2] = -1
    call["spec_state_indices_tensor"][1, 1:] = torch.tensor([call["spec_state_indices_tensor"][1, 1], 0])
    call["spec_state_indices_tensor"][3] = 0
    run(dict(call, null_slot=0))
    call["spec_state_indices_tensor"][3] = -1
    call["spec_state_indices_tensor"][1, 2] = -1
    run(call)
    # A slot in two columns keeps the later one, with and without a column that keeps nothing.
    call["spec_state_indices_tensor"][1] = call["spec_state_indices_tensor"][1, 0]
    call["spec_state_indices_tensor"][0, 1] = call["spec_state_indices_tensor"][0, 0]
    run(call)


@case("C", BOTH)
def speculative_rows_scattered_among_others() -> None:
    call = spec([3, 1, 3], [2, 1, 3], padding=9, spare_conv_rows=2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    call["num_actual_tokens"] = 16
    call["projected_states_qkvz"][7:] = torch.randn(9, call["projected_states_qkvz"].shape[1]).to(BF16)
    call["projected_states_ba"][7:] = torch.randn(9, call["projected_states_ba"].shape[1]).to(BF16)
    used = set(call["spec_state_indices_tensor"].flatten().tolist())
    free = [slot for slot in range(call["conv_state"].shape[0]) if slot not in used]
    run(
        dict(
            call,
            num_prefills=1,
            num_decodes=1,
            has_initial_state=torch.tensor([False, True]),
            non_spec_query_start_loc=torch.tensor([0, 8, 9]),
            non_spec_state_indices_tensor=torch.tensor(free[:2]),
            non_spec_token_indx=order[7:],
            spec_token_indx=order[:7],
        )
    )


@case("C", BOTH)
def a_cache_of_another_convention_is_an_error() -> None:
    # One rolling buffer of width - 1 + drafts rows in column 0; the other columns' slots were never written.
    call = spec([3, 3], [1, 3], spare_conv_rows=2)
    first, *others = call["spec_state_indices_tensor"][1].tolist()
    call["conv_state"][first] = torch.randn_like(call["conv_state"][first])
    call["conv_state"][others] = 0
    before = clone_call(call)
    CALLS.clear()
    with raises(ValueError, "do not hold windows one token apart"):
        gdn.gdn_attention(**call)
    assert not CALLS
    assert torch.equal(call["ssm_state"], before["ssm_state"])
    # With one token accepted the first window is read, which both conventions keep in the same place.
    run(dict(call, num_accepted_tokens=torch.tensor([1, 1])))


@case("C", BOTH)
def wrong_speculative_values_are_named() -> None:
    call = spec([3, 3], [1, 1])
    for change, message in (
        ({"num_accepted_tokens": torch.tensor([1, 4])}, "num_accepted_tokens[1] is 4, outside 0..3"),
        ({"spec_query_start_loc": torch.tensor([0, 4, 6])}, "gives row 0 4 tokens"),
        ({"num_spec_decodes": 3}, "expected at least"),
    ):
        with raises(ValueError, message):
            gdn.gdn_attention(**{**clone_call(call), **change})
