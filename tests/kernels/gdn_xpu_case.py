"""What the cases of the adapter to Intel's gdn_attention share: one schema a process, calls, and their comparison."""

import re
import sys
from collections.abc import Callable
from typing import Any

import gdn_vendor_stand_in
import pytest
import torch
from opreg.kernels.reference import gdn as reference
from opreg.kernels.xpu import gdn
from opreg.ops.gdn_attention_inputs import Heads, clone_call, make_call

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
    off = rms(got["core_attn_out"], want["core_attn_out"])
    assert off < limit, f"core_attn_out is off by {off:.2e}"
    assert torch.equal(got["z"], want["z"])
    keep = got["conv_weights"].shape[1] - 1
    assert torch.equal(got["conv_state"][:, :keep].nan_to_num(7.0), want["conv_state"][:, :keep].nan_to_num(7.0))
    # The convolution's result is rounded to the model's dtype. A value in the middle between two such numbers may go
    # either way, as sums in float32 depend on the memory's alignment: one in 50 runs did, and moved the states by 8e-5.
    exact = 1e-5 if want["z"].dtype == FP32 else 3e-4
    kept = exact if want["ssm_state"].dtype == FP32 else 5e-3
    assert torch.equal(got["ssm_state"].isnan(), want["ssm_state"].isnan())
    off = rms(got["ssm_state"].nan_to_num(), want["ssm_state"].nan_to_num())
    assert off < kept, f"ssm_state is off by {off:.2e}"


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


def raises(kind: type[Exception], message: str) -> Any:
    return pytest.raises(kind, match=re.escape(message))
