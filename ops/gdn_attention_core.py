"""opreg::gdn_attention_core: a Gated DeltaNet layer found by name in the forward context."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import LayerName, current_layer, forward_context, register_op

from .gdn_attention import gdn_attention
from .gdn_attention_inputs import Heads, make_call

_OP = "opreg::gdn_attention_core"


@register_op("opreg::gdn_attention_core", mutates_args=("core_attn_out", "z"), kind="attention")
def gdn_attention_core(
    core_attn_out: Annotated[Tensor, "t hv v"],
    z: Annotated[Tensor, "t hv v"],
    projected_states_qkvz: Annotated[Tensor, "t _"],
    projected_states_ba: Annotated[Tensor, "t _"],
    layer_name: LayerName,
) -> None:
    """Run opreg::gdn_attention with the weights, states and metadata of a layer of the forward context.

    The first four arguments are those of opreg::gdn_attention. layer_name: a layer with
        num_k_heads, num_v_heads, head_k_dim, head_v_dim    of the whole model
        kv_cache                  the pair (conv_state, ssm_state)
        conv1d                    with weight [channels, 1, width] or [channels, width], and bias or None
        activation, A_log, dt_bias
        gqa_interleaved_layout    True: one packed group per key head (Qwen3-Next); False: flat packing (Qwen3.5)
        and, where it has it: tp_size (default 1)
    metadata: an object with num_prefills, num_decodes and, where it has them, the other index arguments of
        opreg::gdn_attention under the same names, null_slot and keyword-only arguments included; what is missing has
        the operator's default

    Writes core_attn_out, z and the layer's kv_cache. Metadata None: zeros, and the cache stays as it is.
    Raises AttributeError for a layer or metadata that lacks one of these, ValueError as opreg::gdn_attention does.
    """
    layer, metadata = current_layer(layer_name)
    cache = _need(layer, "kv_cache", layer_name, "layer")
    if not isinstance(cache, (tuple, list)) or len(cache) != 2:
        found = f"{type(cache).__name__} of {len(cache)}" if isinstance(cache, (tuple, list)) else type(cache).__name__
        raise ValueError(f"{_OP}: kv_cache of layer '{layer_name}' is a {found}, expected (conv_state, ssm_state)")
    conv = _need(layer, "conv1d", layer_name, "layer")
    weight = conv.weight
    if weight.dim() == 3:  # in inference mode torch_xla has no views of tensors made outside it
        weight = torch.squeeze_copy(weight, 1) if weight.device.type == "xla" else weight.squeeze(1)
    gdn_attention(
        core_attn_out,
        z,
        projected_states_qkvz,
        projected_states_ba,
        _need(layer, "num_k_heads", layer_name, "layer"),
        _need(layer, "num_v_heads", layer_name, "layer"),
        _need(layer, "head_k_dim", layer_name, "layer"),
        _need(layer, "head_v_dim", layer_name, "layer"),
        cache[0],
        cache[1],
        weight,
        conv.bias,
        _need(layer, "activation", layer_name, "layer"),
        _need(layer, "A_log", layer_name, "layer"),
        _need(layer, "dt_bias", layer_name, "layer"),
        _need(metadata, "num_prefills", layer_name, "metadata"),
        _need(metadata, "num_decodes", layer_name, "metadata"),
        getattr(metadata, "num_spec_decodes", 0),
        getattr(metadata, "has_initial_state", None),
        getattr(metadata, "non_spec_query_start_loc", None),
        getattr(metadata, "non_spec_token_indx", None),
        getattr(metadata, "non_spec_state_indices_tensor", None),
        getattr(metadata, "spec_query_start_loc", None),
        getattr(metadata, "spec_token_indx", None),
        getattr(metadata, "spec_state_indices_tensor", None),
        getattr(metadata, "num_accepted_tokens", None),
        getattr(metadata, "num_actual_tokens", None),
        getattr(layer, "tp_size", 1),
        not _need(layer, "gqa_interleaved_layout", layer_name, "layer"),
        null_slot=getattr(metadata, "null_slot", -1),
        source_state_indices=getattr(metadata, "source_state_indices", None),
        checkpoint_token_indx=getattr(metadata, "checkpoint_token_indx", None),
        checkpoint_state_indices=getattr(metadata, "checkpoint_state_indices", None),
    )


def _need(owner: Any, attribute: str, name: object, what: str) -> Any:
    try:
        return getattr(owner, attribute)
    except AttributeError:
        has = ", ".join(sorted(a for a in dir(owner) if not a.startswith("_"))[:20]) or "no attributes"
        raise AttributeError(
            f"{_OP}: {what} of layer '{name}' ({type(owner).__name__}) has no attribute '{attribute}'; it has {has}"
        ) from None


for _dtype, _rms in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)):
    gdn_attention_core.tolerance(_dtype, _rms, "that of opreg::gdn_attention")


# Tensor parallelism by heads. The layer (tp_size, weights, states) is that of this rank; the projections are split into
# whole key heads, which only the packing with one group per key head has side by side.
gdn_attention_core.register_sharding("hv", others={"projected_states_qkvz": 1, "projected_states_ba": 1})


@gdn_attention_core.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    name = "opreg.gdn_attention_core.inputs"
    for flat in (False, True):
        call = make_call(
            [1, 33, 0, 5],
            Heads(2, 4),
            device=device,
            dtype=dtype,
            initial=[True, False, True, True],
            padding=2,
            flat=flat,
            generator=generator,
        )
        layer = layer_of(call)
        with forward_context(layers={name: layer}, metadata=metadata_of(call)):
            yield {
                **{k: call[k] for k in ("core_attn_out", "z", "projected_states_qkvz", "projected_states_ba")},
                "layer_name": name,
            }


def layer_of(call: dict[str, Any]) -> SimpleNamespace:
    """A layer that holds the weights and states of a call of opreg::gdn_attention."""
    names = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "activation", "A_log", "dt_bias", "tp_size")
    return SimpleNamespace(
        **{k: call[k] for k in names},
        kv_cache=(call["conv_state"], call["ssm_state"]),
        conv1d=SimpleNamespace(weight=call["conv_weights"][:, None], bias=call["conv_bias"]),
        gqa_interleaved_layout=not call["reorder_input"],
    )


def metadata_of(call: dict[str, Any]) -> SimpleNamespace:
    """The metadata of a call of opreg::gdn_attention."""
    names = ("num_prefills", "num_decodes", "has_initial_state", "non_spec_query_start_loc")
    return SimpleNamespace(
        **{k: call[k] for k in (*names, "non_spec_state_indices_tensor", "num_actual_tokens")},
    )
