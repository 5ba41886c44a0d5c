"""The gated delta rule and its gradients in Triton, for cuda and xpu: what launches the kernels of gdn_rule_*.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..reference.gdn_rule_check import check_rule
from .gdn_launch import on_device
from .gdn_rule_back import back_rule, part_rule
from .gdn_rule_chunk import run_rule, solve_rule
from .gdn_rule_share import share_rule
from .gdn_rule_step import step_rule

AT_MOST = 16
"""Tokens up to which a call goes token by token. Their number alone decides, so that company changes no bit."""
_WIDEST = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Rule:
    """A call as the kernels read it: any strides, but channels side by side and no negative views."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    erase: Tensor
    write: Tensor
    initial: Tensor | None
    scale: float

    @property
    def entries(self) -> int:
        return self.v.shape[0]

    @property
    def tokens(self) -> int:
        return self.v.shape[1]

    @property
    def heads(self) -> int:
        return self.v.shape[2]

    @property
    def width(self) -> int:
        """Columns of a tile that holds all channels of a key."""
        return padded(self.k.shape[3])

    @property
    def bfloat16(self) -> bool:
        """Whether products may have operands of 11 bits: q, k and v have 8.

        Not 8 bits, though: chunks amplify what X and P lose, by 6e-2 of o where keys are equal, and so does a gate's
        gradient, a sum of terms that cancel. Results in float16 have 11 bits themselves.
        """
        return {x.dtype for x in (self.q, self.k, self.v)} == {torch.bfloat16}

    @property
    def precision(self) -> str:
        """Of products: TF32, or as the sum of three TF32 products all digits of float32."""
        return "tf32" if self.bfloat16 else "tf32x3"

    def of_keys(self) -> dict[str, Any]:
        """The arguments of kernels that read keys."""
        heads = {"HV": self.heads, "RATIO": self.heads // self.k.shape[2], "K": self.k.shape[3], "KP": self.width}
        gates = {"DECAYS": self.decay.dim() == 4, "ERASES": self.erase.dim() == 4}
        return {**self._named("q", "k", "decay", "erase"), "scale": self.scale, **heads, **gates}

    def of_values(self) -> dict[str, Any]:
        """The arguments of kernels that read values."""
        sizes = {"HV": self.heads, "K": self.k.shape[3], "V": self.v.shape[3], "KP": self.width}
        return {**self._named("v", "write"), **sizes, "WRITES": self.write.dim() == 4}

    def _named(self, *names: str) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in names}
        return {**tensors, **{f"{name}_strides": x.stride()[:3] for name, x in tensors.items()}}


def padded(n: int) -> int:
    return max(int(triton.next_power_of_2(n)), 16)


def rule_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None,
    scale: float | None,
) -> Rule:
    """Check a call and make it readable. ValueError for what `opreg::gated_delta_rule` names."""
    check_rule(q, k, v, decay, erase, write, initial_state)
    initial = None if initial_state is None else _readable(initial_state).contiguous()
    q, k, v, decay, erase, write = (_readable(x) for x in (q, k, v, decay, erase, write))
    return Rule(q, k, v, decay, erase, write, initial, k.shape[3] ** -0.5 if scale is None else scale)


def _readable(x: Tensor) -> Tensor:
    """A negative view's memory holds other values; float64 is rounded here, since not every GPU has it."""
    x = x.resolve_neg()
    if x.dtype not in _DTYPES:
        x = x.float()
    return x.contiguous() if x.dim() == 4 and x.shape[3] > 1 and x.stride(3) != 1 else x


def step_rows(rule: Rule) -> int:
    """Rows of the state [V, K] that one program of `step_rule` keeps: at most 4096 numbers, 32 a thread of 4 warps."""
    return min(padded(rule.v.shape[3]), 32, 4096 // rule.width)


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the kernels in chunks divide a call; with more, ptxas spills registers for sm_90 (test_gdn_rule_sm90.py).

    tokens: of a chunk. rows: of the state of one program of the passes over the chunks, in so many blocks. channels: at
    once, of a program that has a chunk. number: of chunks.
    """

    tokens: int
    rows: int
    channels: int
    number: int
    blocks: int

    def sizes(self, rule: Rule) -> dict[str, Any]:
        return {"count": rule.tokens, "chunks": self.number, "C": self.tokens, "PRECISION": rule.precision}

    def passes(self, rule: Rule) -> dict[str, Any]:
        """What both passes over the chunks take. Two chunks in flight take 94 KB of shared memory with 64 channels and
        140 KB with 128, which not every GPU has."""
        return {**self.value_sizes(rule), "STAGES": 2 if rule.bfloat16 and rule.width <= 64 else 1, "num_warps": 8}

    def value_sizes(self, rule: Rule) -> dict[str, Any]:
        return {**self.sizes(rule), "VP": self.blocks * self.rows, "BV": self.rows}

    def new(self, rule: Rule, *shape: int) -> Tensor:
        """Memory for each chunk."""
        place = (rule.entries, rule.heads, self.number)
        return torch.empty(*place, *shape, dtype=torch.float32, device=rule.v.device)


def tiles(rule: Rule) -> Tiles:
    values = rule.v.shape[3]
    tokens = 64 if rule.bfloat16 and rule.width <= 128 else 32
    rows = max(16, min(padded(values), 32, 2048 // rule.width))
    channels = min(rule.width, 16 if rule.decay.dim() == 4 else 32)
    return Tiles(tokens, rows, channels, triton.cdiv(rule.tokens, tokens), triton.cdiv(values, rows))


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the rule, calls of up to 16 tokens token by token; the arguments are those of `opreg::gated_delta_rule`."""
    rule = rule_of(q, k, v, decay, erase, write, initial_state, scale)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    shape = (v.shape[0], v.shape[2], v.shape[3], k.shape[3])
    final = torch.empty(shape, dtype=torch.float32, device=v.device)
    if final.numel():
        with on_device(v):
            (steps if rule.tokens <= AT_MOST else chunks)(rule, out, final)
    return out, final


def steps(rule: Rule, out: Tensor, final: Tensor) -> None:
    """Token by token."""
    rows = step_rows(rule)
    step_rule[(rule.entries * rule.heads * triton.cdiv(rule.v.shape[3], rows),)](
        **{**rule.of_keys(), **rule.of_values()},
        initial=rule.initial,
        out=out,
        final=final,
        count=rule.tokens,
        BV=rows,
        num_warps=4,
    )


def chunks(rule: Rule, out: Tensor, final: Tensor) -> None:
    """Chunk by chunk."""
    given = tiles(rule)
    run(rule, given, solve(rule, given), out, final)


def solve(rule: Rule, given: Tiles) -> dict[str, Tensor]:
    """What chunks can do alone."""
    c = given.tokens
    alone = {name: given.new(rule, c, c) for name in ("solved", "mixed")}
    alone |= {name: given.new(rule, c, rule.width) for name in ("left", "asked", "kept")}
    alone["whole"] = given.new(rule, rule.width)
    solve_rule[(rule.entries * given.number, rule.heads)](
        **rule.of_keys(),
        **alone,
        **given.sizes(rule),
        BK=given.channels,
        LEVELS=c.bit_length() - 1,
        num_warps=8 if c == 64 and rule.decay.dim() == 4 else 4,
    )
    return alone


def run(
    rule: Rule,
    given: Tiles,
    alone: dict[str, Tensor],
    out: Tensor | None,
    final: Tensor | None,
    marks: Tensor | None = None,
    corrected: Tensor | None = None,
) -> None:
    """The pass over the chunks."""
    run_rule[(rule.entries * rule.heads * given.blocks,)](
        **rule.of_values(),
        **alone,
        **given.passes(rule),
        initial=rule.initial,
        out=out,
        final=final,
        marks=marks,
        corrected=corrected,
    )


def gated_delta_rule_backward(
    grad_out: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in chunks, with two states in memory for each; as `opreg::gated_delta_rule_backward`."""
    rule = rule_of(q, k, v, decay, erase, write, initial_state, scale)
    heads = v.shape[:3]
    # What several value heads add to one key head is rounded once.
    alone = rule.heads == k.shape[2]
    dtypes = [_writable(x) if alone else torch.float32 for x in (q, k)]
    found = [torch.empty(*heads, k.shape[3], dtype=dtype, device=v.device) for dtype in dtypes]
    found += [torch.empty(x.shape, dtype=_writable(x), device=v.device) for x in (v, decay, erase, write)]
    first = _readable(grad_state).float().contiguous()
    if first.numel() and rule.tokens:
        with on_device(v):
            first = _gradients(rule, _readable(grad_out), first, found)
    else:
        first, found = first.clone(), [x.zero_() for x in found]
    dq, dk = (
        (x if x.shape[2] == like.shape[2] else x.unflatten(2, (like.shape[2], -1)).sum(3)).to(like.dtype)
        for x, like in zip(found[:2], (q, k), strict=True)
    )
    dv, ddecay, derase, dwrite = (x.to(like.dtype) for x, like in zip(found[2:], (v, decay, erase, write), strict=True))
    return dq, dk, dv, ddecay, derase, dwrite, first


def _writable(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in _DTYPES else torch.float32


def _gradients(rule: Rule, grad_out: Tensor, grad_state: Tensor, found: list[Tensor]) -> Tensor:
    """Write `found`, the gradients of q, k (for each value head), v and the gates; return that of the first state."""
    given = tiles(rule)
    alone = solve(rule, given)
    rows = given.blocks * given.rows
    marks, back_marks = (given.new(rule, rows, rule.width) for _ in range(2))
    corrected, grad_corrected = (given.new(rule, given.tokens, rows) for _ in range(2))
    run(rule, given, alone, None, None, marks, corrected)
    grad_initial = torch.empty_like(grad_state)
    common: dict[str, Any] = {
        "grad": grad_out,
        "grad_strides": grad_out.stride()[:3],
        "back_marks": back_marks,
        "grad_corrected": grad_corrected,
    }
    keys, values = rule.of_keys(), rule.of_values()
    back_rule[(rule.entries * rule.heads * given.blocks,)](
        **common,
        **alone,
        **{name: values[name] for name in ("HV", "K", "V", "KP")},
        **given.passes(rule),
        grad_final=grad_state,
        grad_initial=grad_initial,
    )
    dq, dk, dv, ddecay, derase, dwrite = found
    parts = {f"d{name}": torch.empty_like(x, dtype=torch.float32) for name, x in alone.items()}
    part_rule[(rule.entries * given.number, rule.heads)](
        **common,
        **given.value_sizes(rule),
        **parts,
        **values,
        **{name: keys[name] for name in ("decay", "decay_strides", "scale", "DECAYS")},
        marks=marks,
        corrected=corrected,
        dv_out=dv,
        dwrite=dwrite,
        BK=16,
        num_warps=4,
    )
    share_rule[(rule.entries * given.number, rule.heads)](
        **parts,
        **keys,
        **given.sizes(rule),
        dq_out=dq,
        dk_out=dk,
        ddecay=ddecay,
        derase=derase,
        BK=16,
        LEVELS=given.tokens.bit_length() - 1,
        num_warps=8 if rule.bfloat16 and not keys["DECAYS"] else 4,
    )
    return grad_initial


def gated_delta_rule_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> str | None:
    """Heads wider than 256, whose state would not fit in the registers."""
    return _limits(k, v)


def _limits(k: Tensor, v: Tensor) -> str | None:
    for name, x in (("keys", k), ("values", v)):
        if x.shape[3] > _WIDEST:
            return f"{name} of {x.shape[3]} channels; at most {_WIDEST}"
    return None


def gated_delta_rule_backward_why_not(
    grad_out: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    erase: Tensor,
    write: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> str | None:
    """The same for the gradients."""
    return _limits(k, v)
