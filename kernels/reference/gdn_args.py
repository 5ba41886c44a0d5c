"""The arguments of gdn_attention, checked, and turned into the list of sequences that its kernels work from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .gdn_checks import check_batch, check_checkpoints, check_index, check_plain, check_speculative, check_windows
from .gdn_checks import fail as fail

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the shapes say: local heads (after tensor parallelism), head sizes, convolution, rows."""

    hk: int
    hv: int
    k: int
    v: int
    width: int
    conv_dim: int
    slots: int
    rows: int
    actual: int


@dataclass(frozen=True, slots=True)
class Sequence:
    """One live sequence: which rows it takes, where its state comes from, where states go after which of its tokens."""

    rows: range | list[int]
    source: int | None
    writes: dict[int, list[int]]
    final: int | None


def _shape(name: str, t: Tensor, want: tuple[int | str, ...], meaning: str) -> None:
    got = tuple(t.shape)
    if len(got) != len(want) or any(isinstance(w, int) and w != g for g, w in zip(got, want, strict=True)):
        shown = "(" + ", ".join(str(w) for w in want) + ")"
        fail(f"{name} has shape {got}, expected {shown} = {meaning}")


def _dtype(name: str, t: Tensor, allowed: tuple[torch.dtype, ...], why: str) -> None:
    if t.dtype not in allowed:
        shown = " or ".join(str(d) for d in dict.fromkeys(allowed))
        fail(f"{name} is {t.dtype}, expected {shown} ({why}); convert it once when the layer is built")


def _inner(name: str, t: Tensor, what: str) -> None:
    # Only the leading stride is free: rows may be a slice of a wider tensor, slots may live in a shared paged cache.
    if not t.numel():
        return  # any strides: numpy gives zeros
    expected = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            fail(f"{name} with strides {t.stride()} is not contiguous inside one {what}; pass {name}.contiguous()")
        expected *= size


def sizes(
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
) -> Sizes:
    """Check everything that shapes, dtypes and strides can tell (no tensor value is read) and return the sizes."""
    if activation not in ACTIVATIONS:
        fail(f"activation is {activation!r}, expected 'silu' or 'swish' (the same function)")
    if tp_size < 1 or num_k_heads % tp_size or num_v_heads % tp_size:
        fail(f"num_k_heads={num_k_heads} and num_v_heads={num_v_heads} must be divisible by tp_size={tp_size}")
    hk, hv, k, v = num_k_heads // tp_size, num_v_heads // tp_size, head_k_dim, head_v_dim
    if hk < 1 or hv < 1 or hv % hk:
        fail(f"num_v_heads={num_v_heads} must be a positive multiple of num_k_heads={num_k_heads}")
    if k < 1 or v < 1:
        fail(f"head_k_dim={k} and head_v_dim={v} must be positive")
    conv_dim = 2 * hk * k + hv * v
    rows = projected_states_qkvz.shape[0] if projected_states_qkvz.dim() else 0
    qkvz_dim = conv_dim + hv * v
    _shape("projected_states_qkvz", projected_states_qkvz, ("tokens", qkvz_dim), "(tokens, 2*hk*K + 2*hv*V)")
    _shape("projected_states_ba", projected_states_ba, (rows, 2 * hv), "(tokens, 2*hv)")
    _shape("core_attn_out", core_attn_out, (rows, hv, v), "(tokens, num_v_heads / tp_size, head_v_dim)")
    _shape("z", z, (rows, hv, v), "(tokens, num_v_heads / tp_size, head_v_dim)")
    if conv_weights.dim() != 2 or conv_weights.shape[0] != conv_dim or conv_weights.shape[1] < 1:
        fail(
            f"conv_weights has shape {tuple(conv_weights.shape)}, expected ({conv_dim}, width) = (2*hk*K + hv*V, width)"
        )
    width = conv_weights.shape[1]
    if conv_bias is not None:
        _shape("conv_bias", conv_bias, (conv_dim,), "(2*hk*K + hv*V,)")
    _shape("A_log", A_log, (hv,), "(num_v_heads / tp_size,)")
    _shape("dt_bias", dt_bias, (hv,), "(num_v_heads / tp_size,)")
    _shape("ssm_state", ssm_state, ("slots", hv, v, k), "(slots, num_v_heads / tp_size, head_v_dim, head_k_dim)")
    slots = ssm_state.shape[0]
    _shape(
        "conv_state", conv_state, (slots, "rows", conv_dim), "(slots of ssm_state, width - 1 or more, 2*hk*K + hv*V)"
    )
    if conv_state.shape[1] < width - 1:
        fail(f"conv_state keeps {conv_state.shape[1]} rows per slot, a convolution of width {width} needs {width - 1}")

    io = projected_states_qkvz.dtype
    _dtype("projected_states_qkvz", projected_states_qkvz, FLOATS, "the dtype of the model")
    same = "the dtype of projected_states_qkvz"
    _dtype("projected_states_ba", projected_states_ba, (io,), same)
    _dtype("core_attn_out", core_attn_out, (io,), same)
    _dtype("z", z, (io,), same)
    _dtype("conv_state", conv_state, (io,), same)
    _dtype("ssm_state", ssm_state, FLOATS, "the state may be kept in any of the three")
    or_fp32 = f"{same}, or float32"
    _dtype("conv_weights", conv_weights, (io, torch.float32), or_fp32)
    if conv_bias is not None:
        _dtype("conv_bias", conv_bias, (io, torch.float32), or_fp32)
    _dtype("A_log", A_log, (io, torch.float32), or_fp32)
    _dtype("dt_bias", dt_bias, (io, torch.float32), or_fp32)

    rowwise = {"core_attn_out": core_attn_out, "z": z, "projected_states_ba": projected_states_ba}
    slotwise = {"conv_state": conv_state, "ssm_state": ssm_state}
    vectors = {"conv_bias": conv_bias, "A_log": A_log, "dt_bias": dt_bias}
    here = projected_states_qkvz.device
    for name, other in {**rowwise, **slotwise, **vectors, "conv_weights": conv_weights}.items():
        if other is not None and other.device != here:
            fail(f"{name} is on {other.device}, but projected_states_qkvz on {here}; move it there")
    for name, t in {**rowwise, "projected_states_qkvz": projected_states_qkvz}.items():
        _inner(name, t, "row")
    for name, t in slotwise.items():
        _inner(name, t, "slot")
    if not conv_weights.is_contiguous():
        fail(f"conv_weights with strides {conv_weights.stride()} is not contiguous; pass conv_weights.contiguous()")
    for name, vector in vectors.items():
        if vector is not None and not vector.is_contiguous():
            fail(f"{name} with strides {vector.stride()} is not contiguous; pass {name}.contiguous()")
    actual = rows if num_actual_tokens is None else num_actual_tokens
    if not 0 <= actual <= rows:
        fail(f"num_actual_tokens={actual} must lie in 0..{rows}, the rows of projected_states_qkvz")
    return Sizes(hk, hv, k, v, width, conv_dim, slots, rows, actual)


def integers(name: str, t: Tensor, count: int, per: str) -> list[int]:
    """Return the first `count` entries of a one-dimensional index tensor."""
    check_index(name, t, count, per)
    out: list[int] = t[:count].tolist()
    return out


def _starts(name: str, values: list[int], limit: int, limit_name: str) -> None:
    for i, (a, b) in enumerate(pairwise(values)):
        if b < a:
            fail(f"{name} must not decrease, but entries {i} and {i + 1} are {a} and {b}")
    if values[0] < 0 or values[-1] > limit:
        fail(f"{name} runs from {values[0]} to {values[-1]}, outside 0..{limit} ({limit_name})")


def _token_rows(name: str, t: Tensor | None, count: int, actual: int) -> list[int] | None:
    if t is None:
        return None
    rows = integers(name, t, count, "one row for each token")
    for i, r in enumerate(rows):
        if not 0 <= r < actual:
            fail(f"{name}[{i}] is row {r}, outside 0..{actual - 1} (num_actual_tokens={actual})")
    return rows


class _Slots:
    """Checks that slots exist and that no sequence of a call writes a slot that another one writes or reads."""

    def __init__(self, slots: int, null_slot: int) -> None:
        self.slots = slots
        self.null_slot = null_slot
        self.written: dict[int, int] = {}
        self.reads: list[tuple[str, int, int]] = []

    def is_null(self, slot: int) -> bool:
        return slot in (-1, self.null_slot)

    def _known(self, where: str, slot: int) -> None:
        if not -1 <= slot < self.slots:
            fail(f"{where} is slot {slot}, outside 0..{self.slots - 1} (slots of ssm_state; -1 skips)")

    def write(self, where: str, slot: int, owner: int) -> int:
        self._known(where, slot)
        if self.written.setdefault(slot, owner) != owner:
            fail(f"{where} is slot {slot}, which another sequence of this call writes too; give each its own slot")
        return slot

    def read(self, where: str, slot: int, owner: int) -> int:
        self._known(where, slot)
        if self.is_null(slot):
            fail(f"{where} is the null slot {slot}, but its sequence starts from a state; pass the slot that holds it")
        self.reads.append((where, slot, owner))
        return slot

    def check_reads(self) -> None:
        """Once every write is known: nobody reads what another sequence writes."""
        for where, slot, owner in self.reads:
            if self.written.get(slot, owner) != owner:
                fail(f"{where} is slot {slot}, which another sequence of this call writes; give each its own slot")


def sequences(
    s: Sizes,
    num_prefills: int,
    num_decodes: int,
    num_spec_decodes: int,
    has_initial_state: Tensor | None,
    non_spec_query_start_loc: Tensor | None,
    non_spec_token_indx: Tensor | None,
    non_spec_state_indices_tensor: Tensor | None,
    spec_query_start_loc: Tensor | None,
    spec_token_indx: Tensor | None,
    spec_state_indices_tensor: Tensor | None,
    num_accepted_tokens: Tensor | None,
    null_slot: int,
    source_state_indices: Tensor | None,
    checkpoint_token_indx: Tensor | None,
    checkpoint_state_indices: Tensor | None,
    conv_state: Tensor | None = None,
) -> list[Sequence]:
    """Check the values of the metadata and return the live sequences; empty and null ones are left out.

    conv_state: the cache, where its values can be read without waiting: was it written by kernels of this convention?
    """
    check_batch(
        num_prefills, num_decodes, num_spec_decodes, non_spec_token_indx, spec_token_indx, checkpoint_token_indx
    )
    slots = _Slots(s.slots, null_slot)
    n = num_prefills + num_decodes
    out: list[Sequence] = []
    if n:
        out += _non_spec(
            s,
            slots,
            num_prefills,
            num_decodes,
            has_initial_state,
            non_spec_query_start_loc,
            non_spec_token_indx,
            non_spec_state_indices_tensor,
            source_state_indices,
            _checkpoints(checkpoint_token_indx, checkpoint_state_indices),
        )
    if num_spec_decodes:
        given = (spec_query_start_loc, spec_token_indx, spec_state_indices_tensor, num_accepted_tokens)
        out += _spec(s, slots, num_spec_decodes, n, *given)
        if conv_state is not None and spec_state_indices_tensor is not None and num_accepted_tokens is not None:
            check_windows(
                conv_state, s.width, num_spec_decodes, spec_state_indices_tensor, num_accepted_tokens, null_slot
            )
    slots.check_reads()
    if any(isinstance(q.rows, list) for q in out):
        seen: set[int] = set()
        for q in out:
            for row in q.rows:
                if row in seen:
                    fail(f"row {row} is given to two tokens; every entry of the token indices must be another row")
                seen.add(row)
    return out


def _non_spec(
    s: Sizes,
    slots: _Slots,
    num_prefills: int,
    num_decodes: int,
    has_initial_state: Tensor | None,
    query_start_loc: Tensor | None,
    token_indx: Tensor | None,
    state_indices: Tensor | None,
    source_state_indices: Tensor | None,
    checkpoints: list[tuple[int, int]],
) -> list[Sequence]:
    n = num_prefills + num_decodes
    state_indices = check_plain(
        num_prefills, num_decodes, query_start_loc, state_indices, source_state_indices, has_initial_state
    )
    starts: list[int] = list(range(n + 1)) if query_start_loc is None else query_start_loc[: n + 1].tolist()
    _starts("non_spec_query_start_loc", starts, s.actual, "num_actual_tokens")
    rows = _token_rows("non_spec_token_indx", token_indx, starts[-1], s.actual)
    name = "non_spec_state_indices_tensor"
    index: list[int] = state_indices[:n].tolist()
    sources, source_name = index, name
    if source_state_indices is not None:
        sources, source_name = source_state_indices[:n].tolist(), "source_state_indices"
    known: list[bool] = [True] * n if has_initial_state is None else has_initial_state[:n].tolist()
    out: list[Sequence] = []
    for i, slot in enumerate(index):
        first, last = starts[i], starts[i + 1]
        if first == last or slots.is_null(slot):
            continue
        slots.write(f"{name}[{i}]", slot, i)
        source = slots.read(f"{source_name}[{i}]", sources[i], i) if known[i] else None
        writes: dict[int, list[int]] = {}
        for j, (token, to) in enumerate(checkpoints):
            if first <= token < last and not slots.is_null(to):
                writes.setdefault(token - first, []).append(slots.write(f"checkpoint_state_indices[{j}]", to, i))
        out.append(Sequence(range(first, last) if rows is None else rows[first:last], source, writes, slot))
    for j, (token, _) in enumerate(checkpoints):
        if not starts[0] <= token < starts[-1]:
            fail(f"checkpoint_token_indx[{j}] is token {token}, outside {starts[0]}..{starts[-1] - 1}")
    return out


def _checkpoints(tokens: Tensor | None, states: Tensor | None) -> list[tuple[int, int]]:
    given = check_checkpoints(tokens, states)
    return [] if given is None else list(zip(given[0].tolist(), given[1].tolist(), strict=True))


def _spec(
    s: Sizes,
    slots: _Slots,
    n: int,
    owners: int,
    query_start_loc: Tensor | None,
    token_indx: Tensor | None,
    state_indices: Tensor | None,
    accepted_tokens: Tensor | None,
) -> list[Sequence]:
    """Speculative rows: column t of a row of state indices is the slot of the state after its token t."""
    query_start_loc, state_indices, accepted_tokens = check_speculative(
        n, query_start_loc, state_indices, accepted_tokens
    )
    starts: list[int] = query_start_loc[: n + 1].tolist()
    _starts("spec_query_start_loc", starts, s.actual, "num_actual_tokens")
    rows = _token_rows("spec_token_indx", token_indx, starts[-1], s.actual)
    accepted: list[int] = accepted_tokens[:n].tolist()
    name = "spec_state_indices_tensor"
    columns: list[list[int]] = state_indices[:n].tolist()
    out: list[Sequence] = []
    for i, row in enumerate(columns):
        first, last = starts[i], starts[i + 1]
        if first == last or slots.is_null(row[0]):
            continue
        if last - first > len(row):
            fail(f"spec_query_start_loc gives row {i} {last - first} tokens, but {name} has {len(row)} columns")
        if not 0 <= accepted[i] <= len(row):
            fail(f"num_accepted_tokens[{i}] is {accepted[i]}, outside 0..{len(row)} (columns of {name})")
        owner, column = owners + i, max(accepted[i] - 1, 0)
        source = slots.read(f"{name}[{i}, {column}]", row[column], owner)
        writes = {
            t: [slots.write(f"{name}[{i}, {t}]", row[t], owner)]
            for t in range(last - first)
            if not slots.is_null(row[t])
        }
        out.append(Sequence(range(first, last) if rows is None else rows[first:last], source, writes, None))
    return out
