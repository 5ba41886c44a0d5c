"""opreg::gdn_attention by the functions of transformers' Qwen3-Next, for sequences of one length."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def transformers(call: Mapping[str, Any]) -> Callable[[], Tensor] | str:
    """The core of Qwen3NextGatedDeltaNet.forward with its cache updates, from packed projections to [tokens, hv, V].

    Its cache is its own, [batch, channels, width] and [batch, hv, K, V]; it starts as the operator's does and moves on
    with every call.
    """
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    lens = call["non_spec_query_start_loc"].diff().tolist()
    count, tokens = len(lens), lens[0]
    if set(lens) != {tokens}:
        return f"its batch has sequences of one length; these are {lens}"
    if call["reorder_input"] or call.get("num_spec_decodes", 0) or call["num_actual_tokens"] is not None:
        return "it is written here for interleaved projections without padding or drafts"
    known = call["has_initial_state"] is None or bool(call["has_initial_state"].all())
    if known != (tokens == 1) or (not known and call["has_initial_state"].any()):
        return "it is written here for one token with a state, or a prompt without"
    qwen = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    hk, hv, k, v = (call[n] for n in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"))
    ratio, weights = hv // hk, call["conv_weights"]
    width = weights.shape[1]
    slots = call["non_spec_state_indices_tensor"].long()
    if known:
        conv_state = torch.nn.functional.pad(call["conv_state"][slots, : width - 1].mT, (1, 0)).contiguous()
        state = call["ssm_state"][slots].mT.float().contiguous()
    else:
        conv_state = weights.new_zeros(count, weights.shape[0], width)
        state = torch.zeros(count, hv, k, v)
    decay = call["A_log"].float().exp()
    # 5.20 wants a key head per value head and leaves repeating them to its module; 5.23's functions do that themselves.
    version = tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])
    repeats = 1 if version >= (5, 23) else ratio

    def of_heads(x: Tensor) -> Tensor:
        x = x.reshape(count, tokens, hk, k)
        return x if repeats == 1 else x.repeat_interleave(repeats, 2)

    def step() -> Tensor:
        qkvz = call["projected_states_qkvz"].view(count, tokens, hk, -1)
        q, key, value, z = qkvz.split([k, k, ratio * v, ratio * v], dim=3)
        b, a = call["projected_states_ba"].view(count, tokens, hk, -1).split([ratio, ratio], dim=3)
        call["z"].copy_(z.reshape(-1, hv, v))
        x = torch.cat([t.reshape(count, tokens, -1) for t in (q, key, value)], dim=-1).transpose(1, 2)
        if tokens == 1:
            y = qwen.causal_conv1d_update(x, conv_state, weights, call["conv_bias"], "silu")
        else:
            conv_state.copy_(torch.nn.functional.pad(x, (width - tokens, 0))[..., -width:])
            y = qwen.causal_conv1d_fn(x, weights, call["conv_bias"], activation="silu")
        q, key, value = y.transpose(1, 2).split([hk * k, hk * k, hv * v], dim=-1)
        rule = qwen.torch_recurrent_gated_delta_rule if tokens == 1 else qwen.torch_chunk_gated_delta_rule
        out, new = rule(
            of_heads(q),
            of_heads(key),
            value.reshape(count, tokens, hv, v),
            g=-decay * torch.nn.functional.softplus(a.reshape(count, tokens, hv).float() + call["dt_bias"]),
            beta=b.reshape(count, tokens, hv).sigmoid(),
            initial_state=state if tokens == 1 else None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        state.copy_(new)
        return out.reshape(-1, hv, v)  # type: ignore[no-any-return]

    return step
