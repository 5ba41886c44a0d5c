"""Compiles the Triton gdn_attention for sm_90 with no GPU, and prints one line for each kernel that was made.

Arguments: `qwen`, for Qwen3-Next's sizes, or a dtype and a number of head sizes KxV. A process of its own, because the
interpreter, in which the tests run, replaces the compiler.
"""

import sys
from contextlib import nullcontext

import sm90
import torch
from opreg.kernels.triton import gdn, gdn_launch
from opreg.ops.gdn_attention_inputs import Heads, make_call

sm90.install()
gdn.on_device = lambda _: nullcontext()


class Unreported:
    """In place of reports on caches of another convention, which need a device."""

    def report(self, device):
        return torch.empty(1, dtype=torch.int32, device=device)

    def check(self, device):
        pass


gdn.windows = gdn_launch.windows = Unreported()
bf16, meta = torch.bfloat16, {"device": "meta", "generator": torch.Generator()}


def call(lens, heads, **more):
    given = {"dtype": bf16, "flat": True, "bias": False, **meta, **more}
    return make_call(lens, heads, **given)


def drafts(heads, **more):
    """Eight sequences of two drafts."""
    made = call([3] * 8, heads, **more)
    made.update(
        num_prefills=0,
        num_spec_decodes=8,
        spec_query_start_loc=made["non_spec_query_start_loc"],
        spec_token_indx=torch.empty(24, dtype=torch.int64, device="meta"),
        spec_state_indices_tensor=torch.empty(8, 3, dtype=torch.int32, device="meta"),
        num_accepted_tokens=made["non_spec_state_indices_tensor"],
    )
    return made


def qwen3_next():
    """A decode step of 64 sequences, drafts, a prompt, one with checkpoints: the state in float32, then in bfloat16."""
    heads = Heads(16, 32, 128, 128)
    gdn.gdn_attention(**call([1] * 64, heads, flat=False))
    gdn.gdn_attention(**call([1] * 8, heads, state_dtype=bf16))
    gdn.gdn_attention(**drafts(heads))
    prompt = call([2048], heads)
    gdn.gdn_attention(**prompt)
    marks = torch.empty(5, dtype=torch.int32, device="meta")
    gdn.gdn_attention(**prompt, checkpoint_token_indx=marks, checkpoint_state_indices=marks)


if sys.argv[1] == "qwen":
    qwen3_next()
else:
    for size in sys.argv[2:]:
        heads = Heads(2, 4, *map(int, size.split("x")))
        more = {"dtype": getattr(torch, sys.argv[1]), "bias": True}
        gdn.gdn_attention(**call([1] * 8, heads, **more))
        gdn.gdn_attention(**drafts(heads, **more))
        gdn.gdn_attention(**call([2048], heads, **more))
