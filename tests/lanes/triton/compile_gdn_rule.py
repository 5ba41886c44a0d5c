"""Compiles the Triton gated_delta_rule for sm_90 with no GPU, and prints one line for each kernel that was made.

Arguments: a dtype, a rule (gdn, kda or gdn2) and head sizes KxV, as often as wanted. The calls are made with tensors
that hold no data.
"""

import sys
from contextlib import nullcontext

import sm90
import torch
from opreg.kernels.triton import gdn_rule
from opreg.ops.gated_delta_rule import make_rule_call

VECTORS = {"gdn": (False, False, False), "kda": (True, False, False), "gdn2": (True, True, True)}

sm90.install()
gdn_rule.on_device = lambda _: nullcontext()

for dtype, rule, size in zip(*[iter(sys.argv[1:])] * 3, strict=True):
    more = {"device": "meta", "dtype": getattr(torch, dtype), "generator": torch.Generator()}
    for length in (1, 2048):
        call = make_rule_call((1, length, 16, 32, *map(int, size.split("x"))), VECTORS[rule], **more)
        out, state = gdn_rule.gated_delta_rule(**call)
    gdn_rule.gated_delta_rule_backward(out, state, **call)
