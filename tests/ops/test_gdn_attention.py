"""opreg::gdn_attention as users meet it: eager, compiled, and what it says about wrong input."""

from typing import Any

import pytest
import torch
from opreg.ops.gdn_attention import gdn_attention
from opreg.ops.gdn_attention_inputs import Heads, clone_call, make_call

import opreg

WRITTEN = ("core_attn_out", "z", "conv_state", "ssm_state")


def mixed(**more: Any) -> dict[str, Any]:
    return make_call([1, 40, 0, 3], Heads(2, 4), initial=[True, False, True, True], padding=2, **more)


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    for name in WRITTEN:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, equal_nan="state" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    call = mixed(dtype=dtype)
    for name in ("conv_state", "ssm_state"):
        call[name] = call[name].nan_to_num()
    torch.library.opcheck(gdn_attention.overload, (), call)


def test_compiled_equals_eager_with_one_graph_for_many_sizes() -> None:
    def step(qkvz: torch.Tensor, ba: torch.Tensor, call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty(qkvz.shape[0], 4, 32)
        z = torch.empty_like(out)
        rest = {k: v for k, v in call.items() if k not in ("core_attn_out", "z", "num_prefills", "num_decodes")}
        rest.update(projected_states_qkvz=qkvz * 1.0, projected_states_ba=ba, num_prefills=3, num_decodes=0)
        gdn_attention(core_attn_out=out, z=z, **rest)
        return out * 2, z

    torch._dynamo.reset()
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for lens in ([1, 40, 3], [7, 2, 9], [1, 1, 5]):
        call = make_call(lens)
        eager, traced = clone_call(call), clone_call(call)
        names = ("projected_states_qkvz", "projected_states_ba")
        want = step(*(eager[n] for n in names), eager)
        got = compiled(*(traced[n] for n in names), traced)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(traced["ssm_state"], eager["ssm_state"])
        torch.testing.assert_close(traced["conv_state"], eager["conv_state"])
    assert len(seen) == 1


# torch's own import of Inductor warns about torch.jit.
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_inductor_keeps_every_mutation() -> None:
    def step(call: dict[str, Any]) -> torch.Tensor:
        gdn_attention(**call)
        return call["core_attn_out"] + call["z"]

    call = mixed()
    eager, compiled = clone_call(call), clone_call(call)
    want = step(eager)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(compiled), want)
    assert_same(compiled, eager)


def test_every_kernel_agrees_with_the_reference() -> None:
    call = mixed()
    want = clone_call(call)
    with opreg.use_kernel("opreg::gdn_attention", "reference"):
        gdn_attention(**want)
    names = [kernel.name for kernel in gdn_attention.op.kernels if kernel.takes("cpu")]
    assert "reference" in names
    assert "cpu/gdn_attention_torch" in names
    for name in names:
        got = clone_call(call)
        with opreg.use_kernel("opreg::gdn_attention", name):
            gdn_attention(**got)
        assert_same(got, want)


def wrong(**change: Any) -> dict[str, Any]:
    return {**mixed(), **change}


STARTS = torch.tensor([0, 1, 41, 41, 44], dtype=torch.int32)
BAD = [
    ({"activation": "gelu"}, "activation is 'gelu', expected 'silu' or 'swish'"),
    ({"num_k_heads": 3}, r"num_v_heads=4 must be a positive multiple of num_k_heads=3"),
    ({"tp_size": 3}, r"must be divisible by tp_size=3"),
    ({"num_actual_tokens": 47}, r"num_actual_tokens=47 must lie in 0..46"),
    ({"num_prefills": -1}, r"num_prefills is -1, expected 0 or more"),
    ({"non_spec_query_start_loc": None}, r"non_spec_query_start_loc is None.* but num_prefills is 2"),
    ({"non_spec_query_start_loc": STARTS.float()}, r"non_spec_query_start_loc is torch.float32, expected torch.int32"),
    ({"non_spec_query_start_loc": STARTS[:4]}, r"non_spec_query_start_loc has shape \(4,\), expected at least \(5,\)"),
    ({"non_spec_query_start_loc": STARTS.flip(0)}, r"must not decrease, but entries 0 and 1 are 44 and 41"),
    ({"non_spec_query_start_loc": STARTS + 1}, r"runs from 1 to 45, outside 0..44 \(num_actual_tokens\)"),
    ({"non_spec_state_indices_tensor": None}, "non_spec_state_indices_tensor is None, expected one slot"),
    ({"non_spec_state_indices_tensor": torch.tensor([0, 7, 1, 2])}, r"\[1\] is slot 7, outside 0..6"),
    ({"non_spec_state_indices_tensor": torch.tensor([0, -2, 1, 2])}, r"\[1\] is slot -2, outside 0..6"),
    ({"non_spec_state_indices_tensor": torch.tensor([0, 5, 1, 5])}, r"\[3\] is slot 5, which another sequence"),
    ({"has_initial_state": torch.ones(4)}, "has_initial_state is torch.float32, expected torch.bool"),
    ({"has_initial_state": torch.ones(2, dtype=torch.bool)}, r"has_initial_state has shape \(2,\), expected at least"),
    ({"non_spec_token_indx": torch.arange(44) + 1}, r"non_spec_token_indx\[43\] is row 44, outside 0..43"),
    ({"A_log": torch.zeros(4, dtype=torch.float64)}, "A_log is torch.float64, expected torch.float32"),
    ({"conv_weights": torch.zeros(4, 256).T}, "conv_weights with strides .* not contiguous"),
    ({"ssm_state": torch.zeros(7, 4, 32, 32, dtype=torch.float64)}, "ssm_state is torch.float64, expected"),
    (
        {"conv_state": torch.zeros(7, 3, 256, dtype=torch.bfloat16)},
        "conv_state is torch.bfloat16, expected torch.float32",
    ),
    ({"conv_state": torch.zeros(7, 2, 256)}, "conv_state keeps 2 rows per slot, a convolution of width 4 needs 3"),
    ({"ssm_state": torch.zeros(7, 4, 32, 64)[..., ::2]}, "ssm_state with strides .* not contiguous inside one slot"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_wrong_input_names_the_argument_and_the_values(change: dict[str, Any], message: str) -> None:
    for name in [kernel.name for kernel in gdn_attention.op.kernels if kernel.takes("cpu")]:
        with (
            opreg.use_kernel("opreg::gdn_attention", name),
            pytest.raises(ValueError, match=f"opreg::gdn_attention: .*{message}"),
        ):
            gdn_attention(**wrong(**change))
