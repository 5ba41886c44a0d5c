"""The Qwen3-Next model of transformers with its attention cores replaced by opreg's ops, and its step on flat tokens.

Nothing of the model is rewritten: its own forward runs on a batch of one row that holds the tokens of all sequences one
after another. Projections, norms, rotary embedding and experts treat tokens one by one, so they do not care; the two
cores do, and they find the borders of the sequences in the forward context.

The experts need nothing either. transformers' default for them, "grouped_mm", has no data-dependent control flow, so it
traces; its loop over the experts that were hit ("eager") would break the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from opreg.ops import gdn_attention_core, paged_attention_core
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextGatedDeltaNet

from .scheduler import Room


def build_model(pattern: str, *, seed: int = 0) -> Qwen3NextForCausalLM:
    """A small random Qwen3-Next over bytes in float32; in `pattern`, G is a GDN layer and A one of full attention."""
    torch.manual_seed(seed)
    config = Qwen3NextConfig(
        vocab_size=256,
        hidden_size=192,
        num_hidden_layers=len(pattern),
        layer_types=["linear_attention" if kind == "G" else "full_attention" for kind in pattern],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        max_position_embeddings=4096,
        # Three times the default: with 0.02 a random model of this size soon repeats one token, which proves little.
        initializer_range=0.06,
        pad_token_id=0,
        eos_token_id=None,
    )
    return Qwen3NextForCausalLM(config).eval()


class PagedGatedDeltaNet(nn.Module):
    """A GDN layer whose core is opreg::gdn_attention_core; projections, gated norm and output are the model's own."""

    def __init__(self, original: Qwen3NextGatedDeltaNet, name: str, slots: int) -> None:
        super().__init__()
        self.layer_name = name
        self.in_proj_qkvz = original.in_proj_qkvz
        self.in_proj_ba = original.in_proj_ba
        self.norm = original.norm
        self.out_proj = original.out_proj
        # From here on: what the op reads from its layer. It finds all of it by name, so a graph never holds it.
        self.num_k_heads = original.num_k_heads
        self.num_v_heads = original.num_v_heads
        self.head_k_dim = original.head_k_dim
        self.head_v_dim = original.head_v_dim
        self.activation = original.activation
        self.conv1d = original.conv1d
        self.A_log = original.A_log
        self.dt_bias = original.dt_bias
        self.gqa_interleaved_layout = True  # Qwen3-Next packs q, k, v and z per key head; Qwen3.5 does not
        conv_state = torch.zeros(slots, original.conv_kernel_size - 1, original.conv_dim)
        ssm_state = torch.zeros(slots, self.num_v_heads, self.head_v_dim, self.head_k_dim)
        self.kv_cache = (conv_state, ssm_state)

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: None = None,
        attention_mask: None = None,
        use_cache: bool | None = None,
    ) -> Tensor:
        x = hidden_states[0]
        qkvz, ba = self.in_proj_qkvz(x), self.in_proj_ba(x)
        core = x.new_empty(x.shape[0], self.num_v_heads, self.head_v_dim)
        z = torch.empty_like(core)
        gdn_attention_core(core, z, qkvz, ba, self.layer_name)
        gated = self.norm(core.flatten(0, 1), z.flatten(0, 1))
        return self.out_proj(gated.view(x.shape[0], -1))[None]


@dataclass(frozen=True)
class PagedAttention:
    """What opreg::paged_attention_core reads from its layer."""

    kv_cache: Tensor
    sm_scale: float


def paged_attention(
    module: Qwen3NextAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
) -> tuple[Tensor, None]:
    """An attention implementation in transformers' sense: query, key, value are [1, heads, tokens, head_dim]."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out = torch.empty_like(q)
    paged_attention_core(q, k, v, out, f"model.layers.{module.layer_idx}.self_attn")
    return out[None], None


class Step(nn.Module):
    """One step of the served model: flat tokens and positions in, one token for each sampled row out."""

    def __init__(self, model: Qwen3NextForCausalLM) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head
        self.no_masks = dict.fromkeys(model.config.layer_types)

    def forward(self, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        hidden = self.model(
            input_ids=tokens[None], position_ids=positions[None], attention_mask=self.no_masks, use_cache=False
        ).last_hidden_state[0]
        return self.lm_head(hidden[rows]).argmax(-1)


def replace_cores(model: Qwen3NextForCausalLM, room: Room) -> dict[str, PagedGatedDeltaNet | PagedAttention]:
    """Put opreg's ops in the place of the model's cores, in place; gives the layers for opreg.forward_context."""
    AttentionInterface.register("opreg", paged_attention)
    model.set_attn_implementation("opreg")
    config = model.config
    layers: dict[str, PagedGatedDeltaNet | PagedAttention] = {}
    for index, layer in enumerate(model.model.layers):
        if config.layer_types[index] == "linear_attention":
            name = f"model.layers.{index}.linear_attn"
            layers[name] = layer.linear_attn = PagedGatedDeltaNet(layer.linear_attn, name, room.slots)
        else:
            shape = (room.pages, room.page_size, 2 * config.num_key_value_heads, config.head_dim)
            layers[f"model.layers.{index}.self_attn"] = PagedAttention(torch.zeros(shape), layer.self_attn.scaling)
    return layers
