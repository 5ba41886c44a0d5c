"""The other side of the comparison: transformers' own generate() on the model as transformers built it."""

from __future__ import annotations

import torch
from transformers import Qwen3NextForCausalLM

from .scheduler import Request


def one_by_one(model: Qwen3NextForCausalLM, requests: list[Request]) -> list[list[int]]:
    """Greedy tokens of each request, generated one prompt after another."""
    return [_generate(model, [request], request.max_new_tokens)[0] for request in requests]


def one_batch(model: Qwen3NextForCausalLM, requests: list[Request]) -> list[list[int]]:
    """The same with all prompts padded on the left to one batch, which runs until the longest answer is done."""
    generated = _generate(model, requests, max(request.max_new_tokens for request in requests))
    return [tokens[: request.max_new_tokens] for tokens, request in zip(generated, requests, strict=True)]


def _generate(model: Qwen3NextForCausalLM, requests: list[Request], new_tokens: int) -> list[list[int]]:
    width = max(len(request.prompt) for request in requests)
    padding = [width - len(request.prompt) for request in requests]
    ids = torch.tensor([[0] * pad + request.prompt for pad, request in zip(padding, requests, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return out[:, width:].tolist()
