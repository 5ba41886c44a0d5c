"""gated_delta_rule inside models that nobody here wrote: in place of transformers' own functions, with gradients.

Qwen3-Next has one decay per head (GDN), OLMo Hybrid beta up to two, Kimi Linear a decay per key channel (KDA).
"""

from typing import Any

import pytest
import torch
from opreg.ops import gated_delta_rule
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.olmo_hybrid import modeling_olmo_hybrid as olmo
from transformers.models.olmo_hybrid.configuration_olmo_hybrid import OlmoHybridConfig
from transformers.models.qwen3_next import modeling_qwen3_next as qwen
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
QWEN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "head_dim": 16,
}
OLMO = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_allow_neg_eigval": True,
}
KIMI = {
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
GDN_NAMES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
KDA_NAMES = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
MODELS = {
    "qwen3_next": (qwen, qwen.Qwen3NextForCausalLM, Qwen3NextConfig, QWEN, GDN_NAMES),
    "olmo_hybrid": (olmo, olmo.OlmoHybridForCausalLM, OlmoHybridConfig, OLMO, GDN_NAMES),
    "kimi_linear": (kimi, kimi.KimiLinearForCausalLM, KimiLinearConfig, KIMI, KDA_NAMES),
}


def of_length_one(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + 1e-6)


class Ours:
    """transformers' functions by one call of gated_delta_rule; its states are [b, h, V, K], theirs [b, h, K, V]."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.calls += 1
        if use_qk_l2norm_in_kernel:
            query, key = of_length_one(query), of_length_one(key)
        before = None if initial_state is None else initial_state.float().mT
        beta = beta.float()
        out, state = gated_delta_rule(query, key, value, g.float(), beta, beta, initial_state=before)
        return out, state.mT if output_final_state else None


@pytest.mark.parametrize("name", list(MODELS))
def test_logits_gradients_and_generated_tokens_are_those_of_the_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, model_class, config_class, sizes, functions = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **sizes))
    tokens = torch.randint(3, 97, (2, 70))
    prompts = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    prompts["attention_mask"][0, :11] = 0

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        model.zero_grad()
        out = model(tokens, labels=tokens)
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return out.logits.detach(), grads, model.generate(tokens, **prompts)

    want = run()
    ours = Ours()
    for function in functions:
        monkeypatch.setattr(code, function, ours)
    got = run()
    assert ours.calls == 1 + 6  # one linear layer: a forward pass for the loss, then a prompt and five tokens
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(got[2], want[2])
    assert got[1].keys() == want[1].keys()
    for parameter, grad in want[1].items():
        # A_log's are sums of terms of both signs over all tokens, a thousandth of each.
        torch.testing.assert_close(
            got[1][parameter], grad, rtol=1e-3, atol=1e-6, msg=lambda m, p=parameter: f"{p}: {m}"
        )
