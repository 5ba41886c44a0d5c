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


def check_initial(t: Tensor, n: int, both: str) -> None:
    """Fail unless it is a bool for each of n sequences."""
    if t.dtype != torch.bool:
        fail(f"has_initial_state is {t.dtype}, expected torch.bool")
    if t.dim() != 1 or t.shape[0] < n:
        fail(f"has_initial_state has shape {tuple(t.shape)}, expected at least ({n},): {both}")


def check_checkpoints(tokens: Tensor | None, states: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fail unless both are given, in one shape."""
    if tokens is None or states is None or tokens.shape != states.shape:
        fail("checkpoint_token_indx and checkpoint_state_indices must be given together and have one shape")
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
