"""gdn_attention against functions that nobody here wrote: the Qwen3-Next model code of the transformers package."""

import pytest
import torch
from opreg.kernels.cpu import gdn_torch
from opreg.kernels.reference import gdn as reference
from opreg.ops.gdn_attention_inputs import Heads, make_call
from transformers.models.qwen3_next import modeling_qwen3_next as qwen


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
        q.unflatten(-1, (hk, k)),
        kk.unflatten(-1, (hk, k)),
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
