"""The adapter to Intel's gdn_attention against the stand-in of one schema: `python gdn_xpu_cases.py A|B|C`.

A process serves one schema, since an operator is defined once. Prints a JSON object: case -> "" or its traceback.
"""

import json
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import gdn_vendor_stand_in
import pytest
import torch
from opreg.kernels.reference import gdn as reference
from opreg.kernels.xpu import gdn, gdn_vendor
from opreg.ops.gdn_attention_inputs import Heads, clone_call, make_call
from test_gdn_spec import Server, check_trajectory

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = Heads(2, 4, 64, 64)
SCHEMA = sys.argv[1] if len(sys.argv) > 1 else "C"
CALLS: list[dict[str, Any]] = []
CASES: dict[str, Callable[[], None]] = {}
FLAT = SCHEMA != "A"


def case(schemas: str = "ABC", conventions: tuple[bool, ...] = (False,)) -> Callable[[Callable[[], None]], None]:
    """Add a case for these schemas, and for the vendor's speculative convention before 0.1.14, since, or both."""

    def add(fn: Callable[[], None]) -> None:
        def run() -> None:
            for rolling in conventions:
                gdn_vendor_stand_in.ROLLING[0] = rolling
                fn()

        if SCHEMA in schemas:
            CASES[fn.__name__] = run

    return add


BOTH = (False, True)


def make(lens: list[int], heads: Heads = SMALL, **more: Any) -> dict[str, Any]:
    """A call that the schema can take. Schema A reads state and A_log in the model's dtype."""
    more = {"dtype": BF16, "flat": FLAT, **more}
    if SCHEMA == "A":
        more["state_dtype"] = more["dtype"]
    call = make_call(lens, heads, **more)
    if SCHEMA == "A":
        call["A_log"] = call["A_log"].to(more["dtype"])
    return call


def rms(got: torch.Tensor, want: torch.Tensor) -> float:
    scale = want.double().square().mean().sqrt().clamp_min(1e-20)
    return float((got.double() - want.double()).square().mean().sqrt() / scale)


def close(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Outputs and states of two calls. Of a slot's convolution rows the first width - 1 mean something."""
    limit = 1e-3 if want["z"].dtype == FP16 else 5e-3
    assert not got["core_attn_out"].isnan().any(), "core_attn_out has rows that nobody wrote"
    assert rms(got["core_attn_out"], want["core_attn_out"]) < limit
    assert torch.equal(got["z"], want["z"])
    keep = got["conv_weights"].shape[1] - 1
    assert torch.equal(got["conv_state"][:, :keep].nan_to_num(7.0), want["conv_state"][:, :keep].nan_to_num(7.0))
    kept = 1e-5 if want["ssm_state"].dtype == FP32 else 5e-3
    assert torch.equal(got["ssm_state"].isnan(), want["ssm_state"].isnan())
    assert rms(got["ssm_state"].nan_to_num(), want["ssm_state"].nan_to_num()) < kept


def run(call: dict[str, Any], change: dict[str, Any] | None = None) -> dict[str, Any]:
    """The adapter on a copy of the call, with other spellings of some arguments; compared with the reference."""
    got, want = clone_call(call), clone_call(call)
    CALLS.clear()
    gdn.gdn_attention(**{**got, **(change or {})})
    reference._gdn_attention(torch.float64, **want)
    close(got, want)
    for slot in range(len(call["ssm_state"])):
        if torch.equal(want["ssm_state"][slot].nan_to_num(), call["ssm_state"][slot].nan_to_num()):
            for name in ("conv_state", "ssm_state"):  # nobody's: every bit stays
                assert torch.equal(got[name][slot].nan_to_num(7.0), call[name][slot].nan_to_num(7.0))
    return got


@case()
def mixed_batch_in_every_dtype() -> None:
    fresh = [True, False, True, True, False]
    for io, state, flat, bias in ((BF16, FP32, FLAT, True), (FP16, FP16, False, False), (BF16, BF16, FLAT, False)):
        run(make([1, 33, 1, 5, 2], dtype=io, state_dtype=state, flat=flat, bias=bias, initial=fresh, padding=3))


@case()
def head_counts_and_widths() -> None:
    for heads in (Heads(1, 4, 64, 128, 2), Heads(2, 2, 128, 64, 5), Heads(1, 3, 64, 64), Heads(4, 8, 64, 64, tp=2)):
        run(make([3, 1], heads, initial=[True, True], flat=False))


@case()
def decodes_and_prefills_go_in_calls_of_their_own() -> None:
    run(make([1, 4, 1, 3], initial=[True, False, True, True]))
    assert sorted((c["num_prefills"], c["num_decodes"]) for c in CALLS) == [(0, 2), (2, 0)]
    run(make([1, 1, 1]))
    assert [(c["num_prefills"], c["num_decodes"]) for c in CALLS] == [(0, 3)]
    # Whole contiguous batches are handed over as they are: no copy of rows.
    call = make([1, 1, 1])
    gdn.gdn_attention(**call)
    assert CALLS[-1]["core_attn_out"].data_ptr() == call["core_attn_out"].data_ptr()
    assert CALLS[-1]["projected_states_qkvz"].data_ptr() == call["projected_states_qkvz"].data_ptr()
    assert CALLS[-1]["ssm_state"].data_ptr() == call["ssm_state"].data_ptr()


@case()
def a_decode_row_is_the_same_bits_in_any_company() -> None:
    call = make([1, 40, 1], initial=[True, False, True])
    got = run(call)
    alone = clone_call(call)
    alone.update(num_prefills=0, num_decodes=1, has_initial_state=None)
    for name in ("core_attn_out", "z", "projected_states_qkvz", "projected_states_ba"):
        alone[name] = alone[name][41:42]
    alone["non_spec_query_start_loc"] = torch.tensor([0, 1])
    alone["non_spec_state_indices_tensor"] = call["non_spec_state_indices_tensor"][2:3]
    gdn.gdn_attention(**alone)
    assert torch.equal(alone["core_attn_out"][0], got["core_attn_out"][41])


@case()
def empty_sequences_keep_their_slots() -> None:
    run(make([0, 3, 0, 1, 0], initial=[True, True, False, True, True], padding=2))
    got = run(make([0, 0], padding=2))
    assert not CALLS
    assert not got["core_attn_out"].any()
    run(make([], padding=3))
    assert not CALLS


@case()
def shuffled_tokens_and_sequences() -> None:
    call = make([2, 1, 9, 1], initial=[True, True, False, True], padding=2)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(5))
    for name in ("projected_states_qkvz", "projected_states_ba"):
        call[name][:13] = torch.empty_like(call[name][:13]).index_copy_(0, order, call[name][:13])
    run(dict(call, non_spec_token_indx=order))
    run(dict(call, non_spec_token_indx=order.to(torch.int32)))


@case()
def indices_longer_wider_and_strided() -> None:
    call = make([1, 9, 1, 1], initial=[True] * 4)
    call.update(num_prefills=1, num_decodes=1, num_actual_tokens=10)
    call["non_spec_state_indices_tensor"][2:] = 99
    wide = {}
    for name in ("non_spec_state_indices_tensor", "non_spec_query_start_loc", "has_initial_state"):
        t = call[name]
        table = torch.zeros(t.shape[0] + 3, 5, dtype=torch.bool if t.dtype == torch.bool else torch.int64)
        table[: t.shape[0], 2] = t
        wide[name] = table[:, 2]
    assert not wide["non_spec_query_start_loc"].is_contiguous()
    run(call, wide)


@case()
def rows_of_wider_tensors_and_paged_slots() -> None:
    call = make([1, 12, 2], initial=[True] * 3)
    got = dict(call)
    page = torch.zeros(call["ssm_state"].shape[0], 60_000)
    for name, at in (("ssm_state", 0), ("conv_state", 40_000)):
        got[name] = page.to(call[name].dtype)[:, at : at + call[name][0].numel()].view(call[name].shape)
        got[name].copy_(call[name])
    for name in ("core_attn_out", "z", "projected_states_qkvz", "projected_states_ba"):
        wide = torch.zeros(15, 2 * call[name][0].numel(), dtype=BF16)
        got[name] = wide[:, : call[name][0].numel()].view(call[name].shape)
        got[name].copy_(call[name])
        assert not got[name].is_contiguous()
    gdn.gdn_attention(**got)
    want = clone_call(call)
    reference._gdn_attention(torch.float64, **want)
    close(got, want)


@case()
def null_slots_never_reach_the_vendor() -> None:
    call = make([1, 3, 4, 1], initial=[True] * 4)
    call["non_spec_state_indices_tensor"] = torch.tensor([-1, 3, 0, -1], dtype=torch.int32)
    run(call)
    run(dict(call, null_slot=0))
    call["non_spec_state_indices_tensor"] = torch.tensor([-1, -1, 0, 0], dtype=torch.int32)
    run(dict(call, null_slot=0))
    assert not CALLS


@case()
def a_state_is_taken_from_another_slot() -> None:
    call = make([1, 3, 1], initial=[True] * 3, spare_slots=5, spare_conv_rows=1)
    own = call["non_spec_state_indices_tensor"].tolist()
    free = [slot for slot in range(8) if slot not in own]
    source = torch.tensor([free[0], free[0], own[2]])
    got = run(dict(call, source_state_indices=source))
    assert torch.equal(got["ssm_state"][free], call["ssm_state"][free])


@case("BC")
def a_log_in_the_models_dtype_is_widened() -> None:
    call = make([1, 3], initial=[True, True])
    run(dict(call, A_log=call["A_log"].to(BF16)))


@case()
def wrong_values_are_named_before_the_vendor_is_called() -> None:
    for change, message in (
        ({"non_spec_state_indices_tensor": torch.tensor([9, 1])}, "is slot 9, outside 0..4"),
        ({"non_spec_state_indices_tensor": torch.tensor([1, 1])}, "which another sequence of this call writes too"),
        ({"non_spec_query_start_loc": torch.tensor([0, 5, 4])}, "must not decrease"),
        ({"non_spec_token_indx": torch.tensor([0, 0, 1, 2])}, "row 0 is given to two tokens"),
        ({"checkpoint_token_indx": torch.tensor([0]), "checkpoint_state_indices": torch.tensor([0])}, "no checkpoints"),
        ({"A_log": torch.zeros(3)}, "A_log has shape"),
    ):
        call = make([1, 3], initial=[True, True])
        call["non_spec_state_indices_tensor"] = torch.tensor([1, 2])
        CALLS.clear()
        with raises(ValueError, message):
            gdn.gdn_attention(**{**call, **change})
        assert not CALLS


def raises(kind: type[Exception], message: str) -> Any:
    return pytest.raises(kind, match=re.escape(message))


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


@case()
def metadata_is_read_once_for_all_layers_of_a_step() -> None:
    read = []
    plain = gdn.sequences
    gdn.sequences = lambda *args: read.append(1) or plain(*args)  # type: ignore[func-returns-value]
    try:
        layers = [clone_call(make([1, 1])) for _ in range(3)]
        shared = ("non_spec_query_start_loc", "non_spec_state_indices_tensor")
        for layer in layers:
            layer.update({name: layers[0][name] for name in shared})

        def step() -> int:
            read.clear()
            for layer in layers:
                want = clone_call(layer)
                gdn.gdn_attention(**layer)
                reference._gdn_attention(torch.float64, **want)
                close(layer, want)
            return len(read)

        assert step() == 1
        # A layer that comes again is another step: its metadata may have changed without torch's knowledge.
        layers[0]["non_spec_state_indices_tensor"].numpy()[0] = 4
        assert step() == 1
        # A change that torch counts is seen by a layer that this plan has not served yet; other tensor objects too.
        gdn.gdn_attention(**layers[0])
        layers[0]["non_spec_state_indices_tensor"].fill_(-1)
        gdn.gdn_attention(**layers[1])
        assert not layers[1]["core_attn_out"].any()
        assert step() == 1
        read.clear()
        gdn.gdn_attention(**layers[1])
        gdn.gdn_attention(**{**layers[2], shared[0]: layers[0][shared[0]].clone()})
        assert len(read) == 2
        with torch.inference_mode():
            index = torch.tensor([3, 4], dtype=torch.int32)
            layers = [{**layer, shared[1]: index} for layer in layers]
            assert step() == 3
    finally:
        gdn.sequences = plain


def refused(**change: Any) -> str | None:
    call = {**make([1, 3], SMALL, flat=False), **change}
    return gdn.why_not(**call)


@case("BC")
def limits_are_reasons() -> None:
    assert refused() is None
    assert gdn.why_not(**make([1], Heads(2, 4, 32, 32))).startswith("head_k_dim=32 must be 64, 128 or 256")
    assert "head_v_dim=96 a multiple of 64" in gdn.why_not(**make([1], Heads(2, 4, 64, 96)))
    assert "the model is float32" in gdn.why_not(**make([1], dtype=FP32))
    assert gdn.why_not(**make([1], Heads(2, 4, 64, 64, 6))) == "the convolution's width is 6, compiled are 2 to 5"
    assert "6 value heads on this rank are no multiple of 4" in gdn.why_not(**make([1], Heads(2, 6, 64, 64), flat=True))
    assert gdn.why_not(**make([1], Heads(2, 6, 64, 64), flat=False)) is None
    assert "6 value heads to a key head" in gdn.why_not(**make([1], Heads(1, 6, 64, 64), flat=False))
    assert "2 value heads on this rank" in gdn.why_not(**make([1], Heads(2, 4, 64, 64, tp=2), flat=True))
    assert "dt_bias is float32 and read as bfloat16" in refused(dt_bias=torch.zeros(4))
    assert "conv_weights is float32" in refused(conv_weights=torch.zeros(512, 4))
    assert "no checkpoints" in refused(checkpoint_token_indx=torch.zeros(1))
    # 32-bit addresses; nothing of this cache is allocated.
    cache = torch.empty(4096, 3, 512, dtype=BF16, device="meta").as_strided((4096, 3, 512), (2**20, 512, 1))
    assert "conv_state spans 4294967296 elements" in refused(conv_state=cache)


@case("A")
def limits_of_schema_a() -> None:
    assert refused() is None
    assert "interleaved packing only" in refused(reorder_input=True)
    assert "reads ssm_state (float32) and A_log (bfloat16) as bfloat16" in refused(ssm_state=torch.zeros(5, 4, 64, 64))


@case("AB")
def speculative_rows_are_refused_by_old_schemas() -> None:
    assert refused(num_spec_decodes=1) == f"schema {SCHEMA} of vllm-xpu-kernels knows no speculative rows"


@case()
def static_limits_are_decided_once() -> None:
    gdn_vendor.why_not_layer.cache_clear()
    for tokens in ([1, 3], [1], [9, 9, 9]):
        gdn.why_not(**make(tokens))
    assert gdn_vendor.why_not_layer.cache_info().misses == 1


def main() -> None:
    gdn_vendor_stand_in.define(SCHEMA, CALLS)
    found = gdn_vendor.find()
    assert isinstance(found, gdn_vendor.Vendor), found
    assert found.schema == SCHEMA
    results = {}
    for name, fn in CASES.items():
        try:
            fn()
            results[name] = ""
        except (Exception, pytest.fail.Exception):
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
