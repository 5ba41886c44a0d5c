"""Keys that are nearly equal, full writes and no decay: what chunks amplify roundings by. Against float64."""

import inspect
from typing import Any

import pytest
import torch
from opreg.kernels.cpu import gdn
from opreg.kernels.reference import gdn as reference
from opreg.ops.gdn_attention_inputs import Heads, clone_call, make_call

Call = dict[str, Any]
SETS = [name for name, _ in gdn.INSTRUCTION_SETS]
CAN_RUN = SETS[: SETS.index(gdn.instruction_set()) + 1]


def run(name: str, call: Call) -> Call:
    call = clone_call(call)
    bound = inspect.signature(gdn.gdn_attention).bind(**call)
    bound.apply_defaults()
    gdn._run(name, *bound.arguments.values())
    return call


def rms(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt())


def make(tokens: int, dim: int, apart: float, decay: float, write: float) -> Call:
    """One bfloat16 sequence whose keys differ from one another by `apart`."""
    call = make_call([tokens], Heads(1, 2, dim, dim, 2), dtype=torch.bfloat16, initial=[False], flat=True, bias=False)
    rows = call["projected_states_qkvz"]
    rows[:, dim : 2 * dim] = rows[0, dim : 2 * dim] + apart * rows[:, dim : 2 * dim]
    call["projected_states_ba"][:, :2] = write
    call["A_log"][:] = decay
    return call


@pytest.mark.parametrize("name", CAN_RUN)
@pytest.mark.parametrize("tokens", [40, 300])
@pytest.mark.parametrize(
    ("dim", "apart", "decay", "write", "limit"),
    [
        (128, 0.0, -20.0, 9.0, 3e-3),
        (64, 0.01, -20.0, 9.0, 3e-3),
        (128, 0.3, -20.0, 9.0, 3e-3),
        (64, 0.05, -20.0, 0.0, 3e-3),
        (128, 3.0, -20.0, 9.0, 3e-3),
        (64, 0.3, -1.5, -1.0, 3e-3),
        (64, 1.0, -20.0, -1.0, 3.8e-3),  # all in bfloat16
    ],
    ids=["equal", "nearly equal", "alike", "half writes", "different", "small writes", "just tame"],
)
def test_nearly_equal_keys_stay_within_the_tolerance(
    name: str, tokens: int, dim: int, apart: float, decay: float, write: float, limit: float
) -> None:
    call = make(tokens, dim, apart, decay, write)
    want = clone_call(call)
    reference._gdn_attention(torch.float64, **want)
    got, slot = run(name, call), want["non_spec_state_indices_tensor"].long()
    assert rms(got["core_attn_out"], want["core_attn_out"]) < limit
    assert rms(got["ssm_state"][slot], want["ssm_state"][slot]) < limit


def test_equal_keys_over_2048_tokens() -> None:
    call = make(2048, 64, 0.0, -20.0, 9.0)
    want = clone_call(call)
    reference._gdn_attention(torch.float64, **want)
    assert rms(run(CAN_RUN[-1], call)["core_attn_out"], want["core_attn_out"]) < 3e-3


@pytest.mark.parametrize("name", CAN_RUN)
def test_a_tame_chunk_between_two_in_float(name: str) -> None:
    call, before, results = make(200, 64, 0.05, -20.0, 9.0), torch.get_num_threads(), []
    rows = call["projected_states_qkvz"][64:128]
    rows[:] = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    call["projected_states_ba"][64:128, :2] = -3.0
    want = clone_call(call)
    reference._gdn_attention(torch.float64, **want)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(name, call))
    finally:
        torch.set_num_threads(before)
    assert rms(results[0]["core_attn_out"], want["core_attn_out"]) < 5e-3
    for tensor in ("core_attn_out", "ssm_state"):
        assert torch.equal(results[0][tensor].nan_to_num(), results[1][tensor].nan_to_num())
