"""The adapter to Intel's gdn_attention against the stand-in of one schema: `python gdn_xpu_cases.py A|B|C`.

A process serves one schema, since an operator is defined once. Prints a JSON object: case -> "" or its traceback.
"""

import json
import traceback
from typing import Any

import gdn_vendor_stand_in
import gdn_xpu_spec_cases  # noqa: F401 (its cases add themselves)
import pytest
import torch
from gdn_xpu_case import BF16, CALLS, CASES, FLAT, FP16, FP32, SCHEMA, SMALL, case, close, make, raises, run
from opreg.kernels.reference import gdn as reference
from opreg.kernels.xpu import gdn, gdn_vendor
from opreg.ops.gdn_attention_inputs import Heads, clone_call


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
