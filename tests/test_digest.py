"""The contract digest: two processes share a disk cache, the op changes between them, the second must be right."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opreg import digest, register_op

# No arithmetic beside the op: then Inductor writes no C++, and a process takes seconds.
PROGRAM = """
import os, sys, torch
from typing import Annotated
from torch import Tensor
from opreg import register_op

variant = os.environ["VARIANT"]

{op}

def f(x):
    return model(x)

if os.environ.get("TAG"):
    torch.compiler.config.cache_key_tag = os.environ["TAG"]
from torch._dynamo.utils import counters
got = torch.compile(f, fullgraph=True)(torch.arange(6.0).reshape(2, 3))
got = got if isinstance(got, tuple) else (got,)
seen = counters["inductor"]
print([(g.tolist(), g.dtype, g.stride()) for g in got], seen["fxgraph_cache_hit"], seen["fxgraph_cache_miss"])
"""

MUTATES = """
if variant == "old":
    @register_op("two::op", mutates_args=("y",))
    def op(x: Tensor, y: Tensor) -> Tensor:
        y += 1
        return x * 2
else:
    @register_op("two::op", mutates_args=("x", "y"))
    def op(x: Tensor, y: Tensor) -> Tensor:
        x += 1
        y += 1
        return x * 2

@op.register_fake
def _(x, y):
    return torch.empty_like(x)

def model(x):
    y = torch.ops.aten.sort(x)[0]
    return op(x, y), x, y
"""

FAKE_DTYPE = """
dtype = torch.float32 if variant == "old" else torch.float64

@register_op("two::op")
def op(x: Tensor) -> Tensor:
    return x.to(dtype) * 2

@op.register_fake
def _(x):
    return torch.empty_like(x, dtype=dtype)

def model(x):
    return op(x)
"""

CONTRACT = """
if variant == "old":
    @register_op("two::op")
    def op(x: Annotated[Tensor, "n d"]) -> Annotated[Tensor, "n d"]:
        return x * 2
else:
    @register_op("two::op")
    def op(x: Annotated[Tensor, "n d"]) -> Annotated[Tensor, "d n"]:
        return (x * 2).t().contiguous()

def model(x):
    return op(x)
"""

STRIDES = """
@register_op("two::op")
def op(x: Tensor) -> Tensor:
    return (x * 2) if variant == "old" else (x * 2).t().contiguous().t()

@op.register_fake
def _(x):
    return torch.empty_like(x) if variant == "old" else torch.empty_like(x.t().contiguous()).t()

def model(x):
    return op(x)
"""

TAG = """
tags = () if variant == "old" else torch.Tag.needs_fixed_stride_order

@register_op("two::op", tags=tags)
def op(x: Annotated[Tensor, "n d"]) -> Annotated[Tensor, "n d"]:
    return x * 2

def model(x):
    return op(x.t())
"""

KIND = """
@register_op("two::op", kind=None if variant == "old" else "attention")
def op(x: Annotated[Tensor, "n d"]) -> Annotated[Tensor, "n d"]:
    return x * 2

def model(x):
    return op(x)
"""

CHANGES = {
    "mutates_args": MUTATES,
    "fake dtype": FAKE_DTYPE,
    "shape": CONTRACT,
    "fake strides": STRIDES,
    "tag": TAG,
    "kind": KIND,
}


def run(op: str, variant: str, cache: Path, tag: str = "") -> tuple[str, int, int]:
    """(values, disk cache hits, misses) of the program in a process of its own."""
    env = {**os.environ, "VARIANT": variant, "TAG": tag, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    code = PROGRAM.format(op=textwrap.dedent(op))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    values, hits, misses = done.stdout.strip().splitlines()[-1].rsplit(" ", 2)
    return values, int(hits), int(misses)


def check(change: str, tmp_path: Path) -> None:
    fresh = run(CHANGES[change], "new", tmp_path / "fresh")
    first = run(CHANGES[change], "old", tmp_path / "shared")
    assert first[1:] == (0, 1)
    second = run(CHANGES[change], "new", tmp_path / "shared")
    assert second == (fresh[0], 0, 1)


def test_a_changed_op_misses_the_disk_cache(tmp_path: Path) -> None:
    old = run(FAKE_DTYPE, "old", tmp_path)
    new = run(FAKE_DTYPE, "new", tmp_path)
    assert old[1:] == new[1:] == (0, 1)
    assert "torch.float64" in new[0]


@pytest.mark.slow
def test_an_unchanged_op_hits_and_the_users_tag_counts(tmp_path: Path) -> None:
    hits = [run(MUTATES, "new", tmp_path, tag)[1:] for tag in ("", "", "mine")]
    assert hits == [(0, 1), (1, 0), (0, 1)]
    assert run(MUTATES, "old", tmp_path, "mine")[1:] == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_misses_the_disk_cache(change: str, tmp_path: Path) -> None:
    check(change, tmp_path)


def test_the_users_tag_stays_in_front() -> None:
    with torch.compiler.config.patch(cache_key_tag="mine"):
        digest.in_cache_key()
        tag = torch.compiler.config.cache_key_tag
        assert tag == f"mine|opreg={digest.of_registry()}"
        torch.compiler.config.cache_key_tag = "other"
        digest.in_cache_key()
        assert torch.compiler.config.cache_key_tag == tag.replace("mine", "other")


FACTOR = 2


def _shape(x: Tensor) -> list[int]:
    return [x.shape[0] * FACTOR]


def test_the_fakes_own_helpers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    @register_op("t_digest::helped")
    def helped(x: Tensor) -> Tensor:
        return x.repeat(2)

    @helped.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(_shape(x))

    before = digest.of_op(helped.op)
    assert digest.of_op(helped.op) == before
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert digest.of_op(helped.op) != before
    monkeypatch.undo()
    assert digest.of_op(helped.op) == before


def test_a_fake_that_comes_after_a_compile_is_used() -> None:
    @register_op("t_digest::late")
    def late(x: Tensor) -> Tensor:
        return torch.cat([x, x])

    compiled = torch.compile(late, backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(3)).shape == (6,)
    calls = []

    @late.register_fake
    def _(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return x.new_empty(2 * x.shape[0])

    assert compiled(torch.ones(3)).shape == (6,)
    assert calls
