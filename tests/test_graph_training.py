"""Training split graphs that write in place: right wherever eager code is, at no price where nothing is written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from opreg.backend import last_report
from opreg.graph import SplitGraph, split_graph
from opreg.graph_gradients import kept

LIB = torch.library.Library("opreg_training", "DEF")
LIB.define("blend(Tensor q, Tensor k) -> Tensor")
LIB.define("fill(Tensor q, Tensor(a!) out) -> ()")
ON = ["opreg_training::blend", "opreg_training::fill"]


def fill(q: Tensor, out: Tensor) -> None:
    out.copy_(q)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


LIB.impl("blend", lambda q, k: q * 0.25 + k.sin(), "CompositeExplicitAutograd")
LIB.impl("fill", fill, "CompositeExplicitAutograd")
torch.library.register_fake("opreg_training::blend", lambda q, k: torch.empty_like(q), lib=LIB)
torch.library.register_fake("opreg_training::fill", lambda q, out: None, lib=LIB)
torch.library.register_autograd(
    "opreg_training::blend",
    lambda ctx, g: (g * 0.25, g * ctx.saved_tensors[0].cos()),
    setup_context=_keep,
    lib=LIB,
)
blend = torch.ops.opreg_training.blend


def dead_write(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    # Nobody reads m after the write, so the backward of relu, which keeps m, must not run.
    m = torch.relu(x * 1)
    z = y * 2
    b = blend(z, w)
    m.copy_(b)
    return b * z.sin()


def dead_result(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    # Written in the piece that makes it, and read by the next for nothing.
    m = torch.relu(x * 1)
    m.copy_(y)
    c = m - m.mean(-1, keepdim=True)
    z = y * 2
    b = blend(z, w)
    d = c * 2  # noqa: F841
    return b * z.sin()


def dead_assignment(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    z = y * 2
    m = torch.relu(z)
    m[:2] = 3.0
    b = blend(z, m)
    b[:2] = 3.0
    return blend(z, w) * z.sin()


def dead_op(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    # blend keeps t, which is written: its backward must not run because the piece that takes m has one.
    t = w * 1
    m = blend(x, t)
    z = x.sin()
    t.copy_(y)
    m.add_(1)
    return blend(z * t, y)


def read_without_gradient(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    m = torch.relu(x * 1)
    z = y * 2
    b = blend(z, y)
    count = (m > 0).sum()
    with torch.no_grad():
        total = (m * 2).sum()
        m.mul_(2)
    return b * total, count


def recomputed(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    # Eager code keeps t + 1, a compiler t.
    t = w * 1
    a = blend(t, y)
    z = (t + 1).sin()
    b = blend(z, a)
    t.add_(1)
    return b * (t + 0)


def recomputed_result(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    t = w * 2
    z = (t + 1).sin()
    b = blend(z, y)
    torch.ops.opreg_training.fill(y.detach(), t.detach())
    return b * (t + 0)


def recomputed_buffer(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    t = y.detach() * 2
    a = blend(w, x)
    z = (t + 1).sin() * a * (t + 1)
    b = blend(z, a)
    torch.ops.opreg_training.fill(b.detach(), t)
    return b * (t + 0)


def recomputed_view(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    t = (w * 2).t()
    a = blend(x, y)
    z = (t[::2] + 1).sin()
    b = blend(a, a + 0)
    t[::2].mul_(2)
    return b.sum() * (t + 0), z


def in_a_region(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    t = w * 2
    a = blend(t, y)
    z = (t + 1).sin()
    with torch.no_grad():
        c = blend(z, y)
        u = t * 2
    b = blend(z, a)
    t.add_(c)
    return b * (t + 0) + u


def old_value_kept(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    t = blend(w, y)
    z = (t + 1) * (t * 2)
    t.add_(1)
    return blend(z, y)


def old_value_kept_of_a_buffer(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    # AOTAutograd lets t be overwritten before the backward of z has read it, without an error.
    t = blend(x.detach(), y.detach())
    z = (t + 1).sin() * w * (t * 2)
    t.add_(1)
    return blend(z, y) * t


def old_value_multiplied(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    t = blend(x, y)
    t.mul_(w * 2)
    a = blend(w, y)
    return t * 2 + a


def written_in_a_region(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    t = blend(x, y)
    z = (t + 1).sin()
    with torch.no_grad():
        t.mul_(2)
    return blend(z, y) * t


def view_of_what_did_not_move(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    # c is a view of a, since the second `contiguous` has nothing to do, and is read for nothing behind the border.
    a = (x * 1).t().contiguous().t()
    c = a.t().contiguous().t()
    m = y * 2
    m.add_(c)
    b = blend(m, w)
    d = c * 2  # noqa: F841
    return b * a


def dead_write_through_a_view(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    # Autograd refuses to write a view of what had no gradient before m was written.
    m = x * 1
    b = blend(y * 2, w)
    part = m[:, :3]
    m.mul_(y.sin())
    part.mul_(0.5)
    return b


PROGRAMS: list[Callable[..., Any]] = [
    dead_write,
    dead_result,
    dead_assignment,
    dead_op,
    read_without_gradient,
    recomputed,
    recomputed_result,
    recomputed_buffer,
    recomputed_view,
    in_a_region,
    old_value_kept,
    old_value_kept_of_a_buffer,
    old_value_multiplied,
    written_in_a_region,
    view_of_what_did_not_move,
    dead_write_through_a_view,
]


def inputs() -> list[Tensor]:
    return [(torch.arange(24.0).reshape(4, 6) / (i + 3) - 1).requires_grad_() for i in range(3)]


def outcome(fn: Callable[..., Any]) -> list[Tensor]:
    given = inputs()
    made = fn(*given)
    results = list(made) if isinstance(made, tuple) else [made]
    loss = sum((r.square().sum() for r in results if r.requires_grad), torch.zeros(()))
    return [*results, *torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_trains_as_eager_code_does(program: Callable[..., Any]) -> None:
    want = outcome(program)
    torch._dynamo.reset()
    split = torch.compile(program, backend="opreg", fullgraph=True, options={"split_on": ON, "inner": "aot_eager"})
    for _ in range(2):
        torch.testing.assert_close(outcome(split), want)
    assert any(p.splitting for p in last_report().pieces)


def split_of(fn: Callable[..., Any]) -> SplitGraph:
    found: list[SplitGraph] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(split_graph(gm, on=ON))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*inputs())
    return found[0]


def test_inference_crosses_borders_as_before() -> None:
    for program in PROGRAMS:
        with torch.no_grad():
            split = split_of(program)
        assert split.keys.gradients is None
        assert not any(p.detached or p.cut or p.copied for p in split.pieces)


def test_training_without_a_write_crosses_borders_as_before() -> None:
    def unwritten(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        dead = x * 2  # noqa: F841
        return blend((x + 1).sin(), y) * w

    assert split_of(unwritten).keys.gradients is None


def test_only_what_needs_it_is_detached_or_copied() -> None:
    split = split_of(recomputed)
    # Piece 0 gives t as a copy, and piece 2, which reads it, takes one; piece 4 writes it for the last time.
    assert [(p.index, n.name) for p in split.pieces for n in p.copied] == [(0, "t"), (2, "t")]
    assert not any(p.detached or p.cut for p in split.pieces[:4])
    (dead,) = [p for p in split_of(dead_write).pieces if p.cut]
    assert (dead.index, [n.name for n in dead.cut]) == (0, ["m"])


def test_memory_for_another_piece_is_not_copied() -> None:
    def attention(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        z = (x + 1).sin()
        out = torch.empty_like(x)
        torch.ops.opreg_training.fill(z.detach(), out.view(-1).view(4, 6))
        return out * z

    assert not any(p.copied for p in split_of(attention).pieces)


def test_what_a_piece_overwrites_or_counts_is_written_in_place() -> None:
    def steps(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        a, b = blend(x, y), blend(x.detach(), y.detach())
        z = x.sin()
        a.copy_(z * 2)
        b.add_(1)
        return blend(z, y) * a * b

    pieces = split_of(steps).pieces
    assert not any(p.renewed for p in pieces)
    assert [n.name for p in split_of(old_value_kept).pieces for n in p.renewed] == ["t"]


def test_pieces_stay_the_same() -> None:
    def layers(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        counter = torch.zeros(4, 6)
        for _ in range(6):
            m = torch.relu(x + counter)
            x = blend(x * 2, y) + m.sum()
            counter.add_(1)
        return x

    split = split_of(layers)
    assert split.keys.gradients is not None
    assert len(split.modules) <= 4, split.report()


@pytest.mark.parametrize(
    "view",
    [lambda t: t, lambda t: t.t(), lambda t: t[:, 1:4], lambda t: t[:1].expand(4, 6), lambda t: t[:0, 1:3]],
    ids=["plain", "turned", "columns", "expanded", "empty"],
)
def test_a_copy_has_the_strides_and_passes_gradients(view: Callable[[Tensor], Tensor]) -> None:
    base = torch.randn(4, 6, requires_grad=True)
    value = view(base)
    with torch.no_grad():
        copy = kept(value)
    assert copy.stride() == value.stride() or not value.numel()
    torch.testing.assert_close(copy, value)
    assert copy.untyped_storage().data_ptr() != value.untyped_storage().data_ptr() or not value.numel()
    weight = torch.randn(value.shape)
    got, want = (torch.autograd.grad((v * weight).sum(), base)[0] for v in (copy, value))
    torch.testing.assert_close(got, want)


def dead_piece(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    # No gradient matters between the borders, though y's does elsewhere; and the write would give m one.
    m = x * 1
    b = blend(y * 2, w)
    m.mul_(y.sin())
    blend(m * 1, w)
    return b * y + (m > 0)


def test_a_piece_in_which_no_gradient_matters_takes_none() -> None:
    piece = next(p for p in split_of(dead_piece).pieces if not p.split and p.index > 0)
    assert {n.name for n in piece.inputs} == {n.name for n in piece.detached}
    assert any("y" in n.name for n in piece.detached)
