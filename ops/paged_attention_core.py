"""opreg::paged_attention_core: the attention layer of a paged-cache model, found by name in the forward context."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import LayerName, current_layer, forward_context, register_op

from .kv_cache_update import kv_cache_update
from .paged_attention_inputs import make_batch
from .ragged_paged_attention import ragged_paged_attention

_OP = "opreg::paged_attention_core"


@register_op("opreg::paged_attention_core", mutates_args=("output",), kind="attention")
def paged_attention_core(
    query: Annotated[Tensor, "t hq d"],
    key: Annotated[Tensor, "t h d"],
    value: Annotated[Tensor, "t h d"],
    output: Annotated[Tensor, "t hq d"],
    layer_name: LayerName,
) -> None:
    """Write the step's K and V into the layer's paged cache, then attend over it (opreg::ragged_paged_attention).

    query, key, value: the step's tokens, all sequences one after another, then padding; positions already applied.
    layer_name: a layer of the forward context with
        kv_cache        the pages, see kv_pages of opreg::ragged_paged_attention
        sm_scale        factor of the logits, usually d ** -0.5
        and, where it has them: kv_layout ("NHD"), sliding_window, soft_cap, k_scale, v_scale, sinks (each None)
    metadata: an object with
        kv_lens, page_indices, cu_q_lens, num_seqs    as in opreg::ragged_paged_attention
        slot_mapping                                  as in opreg::kv_cache_update, at least one slot per real token
        and, where it has it: num_actual_tokens       rows from here on are padding (default: none is)

    Writes output (zero in padding rows) and the layer's kv_cache. Metadata None: zeros, and the cache stays as it is.
    Raises AttributeError for a layer or metadata that lacks one of these, ValueError as the two operators do.
    """
    layer, metadata = current_layer(layer_name)
    rows = query.shape[0]
    tokens = getattr(metadata, "num_actual_tokens", None)
    tokens = rows if tokens is None else int(tokens)
    if not 0 <= tokens <= rows:
        raise ValueError(f"{_OP}: num_actual_tokens is {tokens}, but query has {rows} rows; it must be 0 to {rows}")
    kv_cache = _need(layer, "kv_cache", layer_name, "layer")
    kv_layout = getattr(layer, "kv_layout", "NHD")
    k_scale, v_scale = getattr(layer, "k_scale", None), getattr(layer, "v_scale", None)
    slot_mapping = _need(metadata, "slot_mapping", layer_name, "metadata")
    if slot_mapping.shape[0] != tokens:  # torch_xla has no views of its tensors in inference mode
        slot_mapping = slot_mapping[:tokens]
    kv_cache_update(
        key[:tokens],
        value[:tokens],
        kv_cache,
        slot_mapping,
        kv_layout=kv_layout,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    output[:tokens] = ragged_paged_attention(
        query[:tokens],
        kv_cache,
        _need(metadata, "kv_lens", layer_name, "metadata"),
        _need(metadata, "page_indices", layer_name, "metadata"),
        _need(metadata, "cu_q_lens", layer_name, "metadata"),
        _need(metadata, "num_seqs", layer_name, "metadata"),
        sm_scale=_need(layer, "sm_scale", layer_name, "layer"),
        sliding_window=getattr(layer, "sliding_window", None),
        soft_cap=getattr(layer, "soft_cap", None),
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        sinks=getattr(layer, "sinks", None),
    )
    output[tokens:].zero_()


def _need(owner: Any, attribute: str, name: object, what: str) -> Any:
    try:
        return getattr(owner, attribute)
    except AttributeError:
        has = ", ".join(sorted(a for a in dir(owner) if not a.startswith("_"))[:20]) or "no attributes"
        raise AttributeError(
            f"{_OP}: {what} of layer '{name}' ({type(owner).__name__}) has no attribute '{attribute}'; it has {has}"
        ) from None


for _dtype, _rms in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
    paged_attention_core.tolerance(_dtype, _rms, "that of opreg::ragged_paged_attention")


# Tensor parallelism by heads. The layer and its cache are those of this rank.
paged_attention_core.register_sharding("hq", "h")


@paged_attention_core.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    name = "opreg.paged_attention_core.inputs"
    for kv_layout in ("NHD", "HND"):
        batch = make_batch(
            [(5, 18), (1, 29), (3, 3)], dtype=dtype, device=device, generator=generator, kv_layout=kv_layout
        )
        tokens = int(batch.cu_q_lens[3])
        slots = [
            int(batch.page_indices[i, p // 4]) * 4 + p % 4
            for i in range(3)
            for p in range(int(batch.kv_lens[i] - batch.cu_q_lens[i + 1] + batch.cu_q_lens[i]), int(batch.kv_lens[i]))
        ]
        layer = SimpleNamespace(kv_cache=batch.kv_pages, sm_scale=0.25, kv_layout=kv_layout)
        metadata = SimpleNamespace(
            **{k: v for k, v in batch._asdict().items() if k not in ("q", "kv_pages")},
            slot_mapping=torch.tensor(slots, device=device),
            num_actual_tokens=tokens,
        )
        rows = batch.q.shape[0]

        def new(rows: int = rows) -> Tensor:
            x = torch.randn(rows, 2, 16, generator=generator, device=generator.device)
            return x.to(device=device, dtype=dtype)

        with forward_context(layers={name: layer}, metadata=metadata):
            yield {
                "query": batch.q,
                "key": new(),
                "value": new(),
                "output": torch.full_like(batch.q, torch.nan),
                "layer_name": name,
            }
