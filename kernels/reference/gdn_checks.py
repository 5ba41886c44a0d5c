"""Checks of gdn_attention's index tensors that look at dtypes and shapes, not at values: any kernel can afford them."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

OP = "opreg::gdn_attention"


def fail(text: str) -> NoReturn:
    """Raise ValueError with the op's name in front."""
    raise ValueError(f"{OP}: {text}")


def check_index(name: str, t: Tensor, count: int, per: str) -> None:
    """Fail unless it is a one-dimensional index tensor of `count` entries or more."""
    if t.dtype not in (torch.int32, torch.int64):
        fail(f"{name} is {t.dtype}, expected torch.int32 or torch.int64")
    if t.dim() != 1 or t.shape[0] < count:
        fail(f"{name} has shape {tuple(t.shape)}, expected at least ({count},): {per}")


def check_batch(
    num_prefills: int,
    num_decodes: int,
    num_spec_decodes: int,
    non_spec_token_indx: Tensor | None,
    spec_token_indx: Tensor | None,
    checkpoint_token_indx: Tensor | None,
) -> None:
    """Fail unless the counts can be, and what goes with them is there."""
    counts = (("num_prefills", num_prefills), ("num_decodes", num_decodes), ("num_spec_decodes", num_spec_decodes))
    for name, value in counts:
        if value < 0:
            fail(f"{name} is {value}, expected 0 or more")
    plain = num_prefills + num_decodes
    if plain and num_spec_decodes and (non_spec_token_indx is None or spec_token_indx is None):
        missing = "spec_token_indx" if spec_token_indx is None else "non_spec_token_indx"
        fail(f"{missing} is None, but a batch of both kinds needs to know the rows of each")
    if not plain and checkpoint_token_indx is not None and checkpoint_token_indx.numel():
        fail("checkpoint_token_indx is given, but there is no sequence that is not speculative")


def check_plain(
    num_prefills: int,
    num_decodes: int,
    query_start_loc: Tensor | None,
    state_indices: Tensor | None,
    source_state_indices: Tensor | None,
    has_initial_state: Tensor | None,
) -> Tensor:
    """Fail unless there is a start, a slot and what else is given for each sequence; return the slots."""
    n = num_prefills + num_decodes
    both = f"num_prefills + num_decodes = {n}"
    if query_start_loc is not None:
        per = f"the first token of each sequence ({both}), then the end"
        check_index("non_spec_query_start_loc", query_start_loc, n + 1, per)
    elif num_prefills:
        fail(f"non_spec_query_start_loc is None, which means one token a sequence, but num_prefills is {num_prefills}")
    per = f"one slot for each sequence ({both})"
    if state_indices is None:
        fail(f"non_spec_state_indices_tensor is None, expected {per}")
    check_index("non_spec_state_indices_tensor", state_indices, n, per)
    if source_state_indices is not None:
        check_index("source_state_indices", source_state_indices, n, per)
    if has_initial_state is not None:
        if has_initial_state.dtype != torch.bool:
            fail(f"has_initial_state is {has_initial_state.dtype}, expected torch.bool")
        if has_initial_state.dim() != 1 or has_initial_state.shape[0] < n:
            fail(f"has_initial_state has shape {tuple(has_initial_state.shape)}, expected at least ({n},): {both}")
    return state_indices


def check_checkpoints(tokens: Tensor | None, states: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Fail unless both are given, in one shape, or neither, which is None."""
    if tokens is None and states is None:
        return None
    if tokens is None or states is None or tokens.shape != states.shape:
        fail("checkpoint_token_indx and checkpoint_state_indices must be given together and have one shape")
    check_index("checkpoint_token_indx", tokens, tokens.numel(), "the last token of each checkpoint")
    check_index("checkpoint_state_indices", states, tokens.numel(), "one slot for each")
    return tokens, states


def check_speculative(
    n: int, query_start_loc: Tensor | None, state_indices: Tensor | None, accepted_tokens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fail unless there is a start, a row of slots and a count for each of n rows."""
    count = f"num_spec_decodes = {n}"
    if query_start_loc is None or state_indices is None or accepted_tokens is None:
        fail(f"{count} needs spec_query_start_loc, spec_state_indices_tensor and num_accepted_tokens")
    check_index("spec_query_start_loc", query_start_loc, n + 1, f"the first token of each row ({count}), then the end")
    check_index("num_accepted_tokens", accepted_tokens, n, f"one number for each row ({count})")
    name = "spec_state_indices_tensor"
    if state_indices.dtype not in (torch.int32, torch.int64):
        fail(f"{name} is {state_indices.dtype}, expected torch.int32 or torch.int64")
    if state_indices.dim() != 2 or state_indices.shape[0] < n or state_indices.shape[1] < 1:
        fail(f"{name} has shape {tuple(state_indices.shape)}, expected at least ({n}, drafts + 1): {count}")
    return query_start_loc, state_indices, accepted_tokens


def holds_rolling_buffer(conv_state: Tensor, width: int, columns: int) -> bool:
    """Whether kernels of the other convention can have written conv_state at all.

    They keep one rolling buffer of width - 1 + drafts rows in a sequence's first slot. With fewer rows to a slot it has
    no room, and whatever the slots hold, a test's random numbers too, is taken for windows of this convention.
    """
    drafts = columns - 1
    return drafts > 0 and conv_state.shape[1] >= width - 1 + drafts


def check_windows(
    conv_state: Tensor, width: int, count: int, columns: Tensor, accepted: Tensor, null_slot: int
) -> None:
    """ValueError unless the columns a row has accepted hold windows of the convolution one token apart.

    That is what every kernel of this package leaves after a speculative step. Kernels that keep a rolling buffer
    (vLLM's, and the vendor's since 0.1.14) leave the other columns alone, as the first 256 channels show.
    """
    if not holds_rolling_buffer(conv_state, width, columns.shape[1]):
        return
    keep = width - 1
    places = []
    for i, (row, n) in enumerate(zip(columns[:count].tolist(), accepted[:count].tolist(), strict=True)):
        for t in range(min(n, len(row)) - 1):
            if not {row[t], row[t + 1]} & {-1, null_slot} and row[t] != row[t + 1]:
                places.append((i, t, row[t], row[t + 1]))
    if keep < 2 or not places:
        return
    older, newer = (conv_state[[p[k] for p in places], :keep, :256] for k in (2, 3))
    bits = torch.int16 if conv_state.element_size() == 2 else torch.int32  # NaN equals itself
    same = older[:, 1:keep].contiguous().view(bits) == newer[:, : keep - 1].contiguous().view(bits)
    for (i, t, a, b), fits in zip(places, same.flatten(1).all(1).tolist(), strict=True):
        if not fits:
            fail(
                f"conv_state: slots {a} and {b} (columns {t} and {t + 1} of row {i} of spec_state_indices_tensor, both "
                "accepted) do not hold windows one token apart, so another kind of kernel wrote this cache: one that "
                "keeps a rolling buffer in column 0. A cache stays with the backend that wrote it; start an empty one"
            )
