"""opreg::gdn_attention: the Gated DeltaNet core of Qwen3-Next and Qwen3.5, from packed projections to its output."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import register_op

from .gdn_attention_inputs import Heads, make_call


@register_op("opreg::gdn_attention", mutates_args=("core_attn_out", "z", "conv_state", "ssm_state"))
def gdn_attention(
    core_attn_out: Annotated[Tensor, "t hv v"],
    z: Annotated[Tensor, "t hv v"],
    projected_states_qkvz: Annotated[Tensor, "t _"],
    projected_states_ba: Annotated[Tensor, "t _"],
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    conv_state: Annotated[Tensor, "slots _ c"],
    ssm_state: Annotated[Tensor, "slots hv v k"],
    conv_weights: Annotated[Tensor, "c _"],
    conv_bias: Annotated[Tensor, "c"] | None,
    activation: str,
    A_log: Annotated[Tensor, "hv"],
    dt_bias: Annotated[Tensor, "hv"],
    num_prefills: int,
    num_decodes: int,
    num_spec_decodes: int = 0,
    has_initial_state: Annotated[Tensor, "_"] | None = None,
    non_spec_query_start_loc: Annotated[Tensor, "_"] | None = None,
    non_spec_token_indx: Annotated[Tensor, "_"] | None = None,
    non_spec_state_indices_tensor: Annotated[Tensor, "_"] | None = None,
    spec_query_start_loc: Annotated[Tensor, "_"] | None = None,
    spec_token_indx: Annotated[Tensor, "_"] | None = None,
    spec_state_indices_tensor: Annotated[Tensor, "_ _"] | None = None,
    num_accepted_tokens: Annotated[Tensor, "_"] | None = None,
    num_actual_tokens: int | None = None,
    tp_size: int = 1,
    reorder_input: bool = False,
    *,
    null_slot: int = -1,
    source_state_indices: Annotated[Tensor, "_"] | None = None,
    checkpoint_token_indx: Annotated[Tensor, "_"] | None = None,
    checkpoint_state_indices: Annotated[Tensor, "_"] | None = None,
) -> None:
    """Causal convolution, normalisation, gates and gated delta rule of a mixed batch (Yang et al. 2025, equation 10).

    Per value head, with S the state [v, k] and q, k, v the convolution's output after silu:

        alpha = exp(-exp(A_log) * softplus(a + dt_bias)),  beta = sigmoid(b)
        k' = k / sqrt(|k|^2 + 1e-6),  q' = q / sqrt(|q|^2 + 1e-6) / sqrt(K)
        S <- alpha S,  S <- S + beta (v - S k') k'^T,  o = S q'

    All of it in float32; q, k, v are rounded once to the model's dtype after silu, o once, S when the call ends.
    Value head h reads key head h // (num_v_heads // num_k_heads).

    core_attn_out, z: outputs [tokens, value heads of this rank, V]; z is copied out of the projections.
    projected_states_qkvz: [tokens, 2*hk*K + 2*hv*V], hk and hv heads of this rank; projected_states_ba: [tokens, 2*hv].
        reorder_input False: one group per key head, [q | k | v of its value heads | z of its value heads] and [b | a].
        reorder_input True: [q of all | k of all | v of all | z of all] and [b of all | a of all].
    num_k_heads, num_v_heads: of the whole model; tp_size ranks share them.
    conv_state: [slots, width - 1 or more, 2*hk*K + hv*V], the last inputs of the convolution, oldest first, in the
        model's dtype; what stands in further rows means nothing. ssm_state: [slots, hv, V, K], float32, bfloat16 or
        float16. Only the slots' stride is free.
    conv_weights: [2*hk*K + hv*V, width], channels [q of all | k of all | v of all] in either packing.
    activation: "silu" or "swish", the same function. A_log: logarithm of the decay rate.
    num_prefills + num_decodes: how many sequences there are, in any order; longer index tensors are cut.
    has_initial_state: bool per sequence, False starts from zeros whatever the slot holds; None means True for all.
    non_spec_query_start_loc: first token of each sequence and the end, from 0; None means one token each.
    non_spec_token_indx: the row of each token; None means that tokens are rows.
    non_spec_state_indices_tensor: slot per sequence, -1 skips the sequence.
    num_spec_decodes: how many further sequences verify drafts, each as many as it has; spec_query_start_loc and
        spec_token_indx are theirs, as above, and a batch with both kinds needs both token indices.
    spec_state_indices_tensor: [sequences, drafts + 1] slots: both states after token t of the step go to column t. All
        kernels of this op keep a cache so, and any of them continues another's. Kernels that keep one rolling buffer of
        width - 1 + drafts rows in column 0 (vLLM's, and Intel's own since 0.1.14) must not share a cache with it: where
        conv_state has that many rows, one that was written so is an error (on a GPU, of this call or a later one).
    num_accepted_tokens: how many tokens of its previous step each such sequence keeps; it goes on from column
        max(accepted - 1, 0). A plain step that follows a speculative one names that slot in source_state_indices.
    num_actual_tokens: rows from here on are padding; None means that there is no padding.
    null_slot: one more slot that skips a sequence, for callers whose padding points at slot 0.
    source_state_indices: slot per sequence (not speculative ones) to start from, which is only read; None: its own.
    checkpoint_token_indx, checkpoint_state_indices: after these tokens, counted as in non_spec_query_start_loc, both
        states are written to these slots as well.

    Writes core_attn_out and z in full (zero in rows that no live sequence owns), and the slots of live sequences.
    Raises ValueError that names the argument, for shapes, dtypes, strides, row and slot numbers that cannot be, and for
    two sequences on one slot.
    """


gdn_attention.register_kernel(None, "opreg.kernels.reference.gdn:gdn_attention", priority=-100)
gdn_attention.register_kernel(None, "opreg.kernels.cpu.gdn_torch:gdn_attention_torch", priority=-50)
gdn_attention.register_kernel(
    "cpu",
    "opreg.kernels.cpu.gdn:gdn_attention",
    requires="c++",
    why_not="opreg.kernels.cpu.gdn:why_not",
    priority=10,
)
gdn_attention.register_kernel(
    "xpu",
    "opreg.kernels.xpu.gdn:gdn_attention",
    requires="vllm_xpu_kernels>=0.1.12",  # earlier ones write past the end of tensors
    why_not="opreg.kernels.xpu.gdn:why_not",
    priority=10,
)
gdn_attention.register_kernel(
    ("cuda", "xpu"),
    "opreg.kernels.triton.gdn:gdn_attention",
    requires="triton",
    why_not="opreg.kernels.triton.gdn:why_not",
    priority=5,
)
gdn_attention.tolerance(torch.float32, 1e-5, "sums over tokens, keys and taps in another order")
gdn_attention.tolerance(torch.bfloat16, 5e-3, "one rounding of the output; bfloat16 products inside a chunk")
gdn_attention.tolerance(torch.float16, 1e-3, "one rounding of the output, and of q, k and v after the convolution")


@gdn_attention.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    def call(lens: list[int], heads: Heads, **more: Any) -> dict[str, Any]:
        return make_call(lens, heads, device=device, dtype=dtype, generator=generator, **more)

    fresh = [True, False, True, True, False]
    yield call([1, 33, 0, 5, 2], Heads(2, 4), initial=fresh, padding=3)
    yield call([1, 33, 0, 5, 2], Heads(1, 3, 32, 64, 3), initial=fresh, flat=True, bias=False, state_dtype=dtype)
    yield call([1, 1, 1], Heads(2, 2), spare_conv_rows=2)
