"""gdn_attention against functions that nobody here wrote: the Qwen3-Next model code of the transformers package."""

from itertools import pairwise

import pytest
import torch
from opreg.kernels.cpu import gdn, gdn_torch
from opreg.kernels.reference import gdn as reference
from opreg.ops.gdn_attention_inputs import Heads, make_call
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen35
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_next import modeling_qwen3_next as qwen
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig


def by_transformers(call: dict, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One fresh sequence through transformers' convolution and chunked delta rule: out, z and state in [hv, V, K]."""
    hk, hv, k, v = (call[n] for n in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"))
    ratio, rows = hv // hk, slice(first, last)
    qkvz, ba = call["projected_states_qkvz"][None, rows], call["projected_states_ba"][None, rows]
    if call["reorder_input"]:
        x, z = qkvz.split([2 * hk * k + hv * v, hv * v], dim=-1)
        b, a = ba.chunk(2, dim=-1)
    else:
        q, kk, vv, z = qkvz.unflatten(-1, (hk, -1)).split([k, k, ratio * v, ratio * v], dim=-1)
        x = torch.cat([t.flatten(2) for t in (q, kk, vv)], dim=-1)
        b, a = (t.flatten(2) for t in ba.unflatten(-1, (hk, -1)).chunk(2, dim=-1))
    y = qwen.causal_conv1d_fn(x.mT, call["conv_weights"], call["conv_bias"], activation="silu").mT
    q, kk, vv = y.split([hk * k, hk * k, hv * v], dim=-1)
    out, state = qwen.torch_chunk_gated_delta_rule(
        # transformers 5.20 wants a key head per value head; 5.23 repeats them itself where they are fewer.
        q.unflatten(-1, (hk, k)).repeat_interleave(ratio, 2),
        kk.unflatten(-1, (hk, k)).repeat_interleave(ratio, 2),
        vv.unflatten(-1, (hv, v)),
        g=-call["A_log"].exp() * torch.nn.functional.softplus(a + call["dt_bias"]),
        beta=b.sigmoid(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out[0], z.reshape(-1, hv, v), state[0].mT


@pytest.mark.parametrize("kernel", [reference.gdn_attention, gdn_torch.gdn_attention_torch])
@pytest.mark.parametrize("flat", [False, True])
def test_equals_the_functions_of_qwen3_next(kernel, flat: bool) -> None:
    call = make_call([70, 3], Heads(2, 4, 32, 48), initial=[False, False], flat=flat)
    want = [by_transformers(call, 0, 70), by_transformers(call, 70, 73)]
    kernel(**call)
    for i, (first, last) in enumerate(((0, 70), (70, 73))):
        slot = call["non_spec_state_indices_tensor"][i]
        torch.testing.assert_close(call["core_attn_out"][first:last], want[i][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(call["z"][first:last], want[i][1], rtol=0, atol=0)
        torch.testing.assert_close(call["ssm_state"][slot], want[i][2], rtol=1e-4, atol=1e-5)


def tiny(config_class: type) -> object:
    """A configuration small enough to run in a second, with grouped value heads."""
    return config_class(
        hidden_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        layer_types=["linear_attention"],
        num_hidden_layers=1,
    )


@pytest.mark.parametrize("flat", [False, True])
def test_whole_layers_in_one_shot_in_parts_and_token_by_token(flat: bool) -> None:
    torch.manual_seed(0)
    if flat:
        layer = qwen35.Qwen3_5GatedDeltaNet(tiny(Qwen3_5TextConfig), 0)
    else:
        layer = qwen.Qwen3NextGatedDeltaNet(tiny(Qwen3NextConfig), 0)
    hidden = torch.randn(1, 80, 32)
    with torch.no_grad():
        want = layer(hidden)
        if flat:
            qkvz = torch.cat([layer.in_proj_qkv(hidden), layer.in_proj_z(hidden)], -1)[0]
            ba = torch.cat([layer.in_proj_b(hidden), layer.in_proj_a(hidden)], -1)[0]
        else:
            qkvz, ba = layer.in_proj_qkvz(hidden)[0], layer.in_proj_ba(hidden)[0]
        for cuts in ([0, 80], [0, 2, 33, 80], [0, *range(70, 81)]):
            conv_state, ssm_state = torch.zeros(1, 3, layer.conv_dim), torch.zeros(1, 4, 32, 16)
            core, z = torch.empty(80, 4, 32), torch.empty(80, 4, 32)
            for first, last in pairwise(cuts):
                gdn.gdn_attention(
                    core[first:last],
                    z[first:last],
                    qkvz[first:last],
                    ba[first:last],
                    2,
                    4,
                    16,
                    32,
                    conv_state,
                    ssm_state,
                    layer.conv1d.weight.squeeze(1),
                    layer.conv1d.bias,
                    layer.activation,
                    layer.A_log,
                    layer.dt_bias,
                    num_prefills=1,
                    num_decodes=0,
                    has_initial_state=torch.tensor([first > 0]),
                    non_spec_query_start_loc=torch.tensor([0, last - first]),
                    non_spec_state_indices_tensor=torch.tensor([0]),
                    reorder_input=flat,
                )
            got = layer.out_proj(layer.norm(core.reshape(-1, 32), z.reshape(-1, 32)).reshape(1, 80, -1))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
