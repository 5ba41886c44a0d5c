"""What the C++ kernel of gdn_attention checks before a call: quickly, leaving messages to the reference's checks."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.gdn_args import Sequence, Sizes

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDE = {torch.int32: 0, torch.int64: 1}


def sizes_if_plain(
    core_attn_out: Tensor,
    z: Tensor,
    projected_states_qkvz: Tensor,
    projected_states_ba: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weights: Tensor,
    conv_bias: Tensor | None,
    activation: str,
    A_log: Tensor,
    dt_bias: Tensor,
    num_actual_tokens: int | None,
    tp_size: int,
) -> Sizes | None:
    """Return the sizes of a call that is right in the plainest way and dense, None for one that `sizes` has to look at.

    A decode step takes 60 us; checks that can say what is wrong take 18 us of Python, these 6 us.
    """
    if tp_size != 1 or conv_bias is not None or activation not in ("silu", "swish"):
        return None
    packed, weights, inputs = projected_states_qkvz.shape, conv_weights.shape, conv_state.shape
    if len(packed) != 2 or len(weights) != 2 or len(inputs) != 3:
        return None
    k, v, hk, hv = head_k_dim, head_v_dim, num_k_heads, num_v_heads
    io, (rows, columns), (channels, width), (slots, kept, wide) = z.dtype, packed, weights, inputs
    actual = rows if num_actual_tokens is None else num_actual_tokens
    plain = (
        hk > 0
        and hv > 0
        and k > 0
        and v > 0
        and hv % hk == 0
        and channels == 2 * hk * k + hv * v
        and columns == channels + hv * v
        and 0 < width <= kept + 1
        and 0 <= actual <= rows
        and core_attn_out.shape == z.shape == (rows, hv, v)
        and projected_states_ba.shape == (rows, 2 * hv)
        and wide == channels
        and ssm_state.shape == (slots, hv, v, k)
        and A_log.shape == dt_bias.shape == (hv,)
        and io in TYPES
        and core_attn_out.dtype == projected_states_qkvz.dtype == projected_states_ba.dtype == conv_state.dtype == io
        and ssm_state.dtype in TYPES
        and conv_weights.dtype in (io, torch.float32)
        and A_log.dtype in (io, torch.float32)
        and dt_bias.dtype in (io, torch.float32)
        and core_attn_out.is_cpu
        and z.is_cpu
        and projected_states_qkvz.is_cpu
        and projected_states_ba.is_cpu
        and conv_state.is_cpu
        and ssm_state.is_cpu
        and conv_weights.is_cpu
        and A_log.is_cpu
        and dt_bias.is_cpu
        and core_attn_out.is_contiguous()
        and z.is_contiguous()
        and projected_states_qkvz.is_contiguous()
        and projected_states_ba.is_contiguous()
        and conv_state.is_contiguous()
        and ssm_state.is_contiguous()
        and conv_weights.is_contiguous()
        and A_log.is_contiguous()
        and dt_bias.is_contiguous()
    )
    return Sizes(hk, hv, k, v, width, channels, slots, rows, actual) if plain else None


def row_strides(s: Sizes, plain: bool, conv_state: Tensor, *others: Tensor) -> tuple[int, ...]:
    """Return the strides of a slot of conv_state and ssm_state, and of a row of core_attn_out, z, qkvz and ba.

    `others` are those after conv_state, in this order; elements are counted.

    Those of a plain call follow from its sizes: with cold caches, asking for them costs 20 us of a step of 400.
    """
    if plain:
        values = s.hv * s.v
        return conv_state.shape[1] * s.conv_dim, values * s.k, values, values, s.conv_dim + values, 2 * s.hv
    return tuple(x.stride(0) for x in (conv_state, *others))


def readable(
    count: int,
    num_prefills: int,
    num_decodes: int,
    has_initial_state: Tensor | None,
    starts: Tensor | None,
    tokens: Tensor | None,
    index: Tensor | None,
) -> bool:
    """Whether the index tensors have dtypes and sizes that the C++ side may read; their values are checked there."""
    if num_prefills < 0 or num_decodes < 0 or (starts is None and num_prefills):
        return False
    if not count:
        return True
    if index is None or (starts is not None and not _index(starts, count + 1)) or not _index(index, count):
        return False
    if tokens is not None and (starts is None or not _index(tokens, int(starts[count]))):
        return False
    return has_initial_state is None or (
        has_initial_state.dtype == torch.bool and has_initial_state.is_cpu and has_initial_state.numel() >= count
    )


def _index(t: Tensor, count: int) -> bool:
    return t.dtype in WIDE and t.is_cpu and t.dim() == 1 and t.shape[0] >= count


def dense(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


@dataclass(frozen=True, slots=True)
class Packed:
    """Checked sequences as the C++ side reads them: six numbers each, the rows of their tokens, (token, slot) pairs."""

    count: int
    sequences: array[int]
    rows: array[int]
    writes: array[int]

    def addresses(self) -> tuple[int, int, int]:
        """Return the addresses of the three; they live as long as this object."""
        return self.sequences.buffer_info()[0], self.rows.buffer_info()[0], self.writes.buffer_info()[0]


def pack(todo: list[Sequence]) -> Packed:
    """Pack sequences that `sequences` has checked."""
    flat, rows, writes = array("q"), array("q"), array("q")
    for q in todo:
        first, before = len(rows), len(writes) // 2
        rows.extend(q.rows)
        for token in sorted(q.writes):
            for slot in q.writes[token]:
                writes.extend((token, slot))
        source, final = (-1 if slot is None else slot for slot in (q.source, q.final))
        flat.extend((first, len(q.rows), source, final, before, len(writes) // 2))
    return Packed(len(todo), flat, rows, writes)
