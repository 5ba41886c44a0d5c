"""Where split_graph cuts, what may cross a border, and what counts as the same."""

import operator
import re
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.fx import Graph, GraphModule, symbolic_trace

from opreg.graph import SplitGraph, split_graph

LIB = torch.library.Library("opreg_graph", "DEF")
LIB.define("attn(Tensor q, Tensor(a!) out, str name) -> ()")
LIB.define("pair(Tensor x) -> (Tensor, Tensor)")
LIB.define("moe(Tensor x, str name) -> Tensor")
LIB.impl("attn", lambda q, out, name: (out.copy_(q + 1), None)[1], "CompositeExplicitAutograd")
LIB.impl("pair", lambda x: (x + 1, x * 2), "CompositeExplicitAutograd")
LIB.impl("moe", lambda x, name: x * len(name), "CompositeExplicitAutograd")
torch.library.register_fake("opreg_graph::attn", lambda q, out, name: None, lib=LIB)
torch.library.register_fake("opreg_graph::pair", lambda x: (torch.empty_like(x), torch.empty_like(x)), lib=LIB)
torch.library.register_fake("opreg_graph::moe", lambda x, name: torch.empty_like(x), lib=LIB)
ns = torch.ops.opreg_graph
ON = ["opreg_graph::attn", "opreg_graph::pair"]


def trace(fn: Any, *args: Any, dynamic: bool | None = False) -> GraphModule:
    """The Dynamo graph of `fn`."""
    found: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        found.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    (gm,) = found
    return gm


def kinds(split: SplitGraph) -> str:
    """'ASA': compiled, splitting, compiled."""
    return "".join("S" if piece.split else "C" for piece in split.pieces)


def names(split: SplitGraph, index: int) -> list[str]:
    return list(split.report().pieces[index].ops)


def same(split: SplitGraph, gm: GraphModule, *args: Any) -> None:
    torch.testing.assert_close(split(*args), gm(*args), rtol=0, atol=0)


X = torch.arange(12.0).reshape(4, 3)


def test_splits_before_and_after_an_op() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        out = torch.empty_like(y)
        ns.attn(y, out, "layers.0")
        return out + 1

    gm = trace(fn, X)
    split = split_graph(gm, on=["opreg_graph::attn"])
    assert kinds(split) == "CSC"
    assert names(split, 0) == ["mul", "empty_like"], "the allocation is compiled with what is before it"
    same(split, gm, X)


def test_neighbouring_splits_share_a_piece_across_getitem_view_and_allocation() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        a, b = ns.pair(x)
        out = torch.empty_like(a)
        ns.attn(b.view(-1).view(4, 3), out, "l")
        c, d = ns.pair(out[0:2])
        return c.sum() + d.sum() + a.sum()

    gm = trace(fn, X)
    split = split_graph(gm, on=ON)
    assert kinds(split) == "SC"
    same(split, gm, X)


def test_a_leading_empty_joins_its_neighbour_and_no_piece_only_allocates() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(4, 3)
        ns.attn(x, out, "l")
        other = torch.empty(4, 3)
        ns.attn(out, other, "l")
        return other

    gm = trace(fn, X)
    split = split_graph(gm, on=ON)
    assert kinds(split) == "S"
    same(split, gm, X)


def test_a_graph_of_allocations_alone_is_not_compiled() -> None:
    split = split_graph(gm := trace(lambda x: torch.zeros_like(x), X), on=ON)
    assert not split.modules
    same(split, gm, X)


def test_keyword_sizes_and_symbols_cross_as_symbols() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        n, m = x.size(0), y.size(0)
        size = (x * 2).size()
        double = 2 * n
        out = torch.empty_like(x)
        ns.attn(x, out, "l")
        return torch.zeros(size=size) + out + torch.ones(double, m).sum() + torch.full(size=x.size(), fill_value=1.0)

    y = torch.ones(5, 2)
    gm = trace(fn, X, y, dynamic=True)
    split = split_graph(gm, on=ON)
    values = [n.meta["example_value"] for piece in split.pieces for n in (*piece.inputs, *piece.exports)]
    assert all(isinstance(v, torch.Tensor | torch.SymInt) for v in values)
    symbols = {p.name for p in split.plan.placeholders if isinstance(p.meta["example_value"], torch.SymInt)}
    assert len(symbols) >= 2
    order = split.plan.placeholders
    for rows in (4, 7):
        x = torch.arange(3.0 * rows).reshape(rows, 3)
        given = [fill(v, x, y) for v in order]
        same(split, gm, *given)


def fill(node: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    """The argument for a placeholder of test_keyword_sizes...: x, y or the size a symbol stood for when traced."""
    value = node.meta["example_value"]
    if isinstance(value, torch.Tensor):
        return x if "x" in node.name else y
    return {4: x.size(0), 3: 3, 5: 5, 2: 2}[value.node.hint]


def test_a_tuple_used_whole_crosses_as_its_elements() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        parts = (x * 2).chunk(2)
        out = torch.empty_like(x)
        ns.attn(x, out, "l")
        return torch.cat(parts) + out

    gm = trace(fn, X)
    split = split_graph(gm, on=ON)
    assert all(isinstance(n.meta["example_value"], torch.Tensor) for p in split.pieces for n in p.exports)
    same(split, gm, X)


def test_views_of_written_storage_are_made_again_where_they_are_used() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        base = x * 2
        view = base.view(-1).view(4, 3)[0:4]
        ns.attn(x, view, "l")
        return base + 1

    gm = trace(fn, X)
    split = split_graph(gm, on=ON)
    (border,) = split.pieces[0].exports
    assert border.name == "base", "only the tensor that owns the storage crosses"
    run = split.modules[0]
    split.use(0, lambda *args: tuple(t.clone() for t in run(*args)))
    same(split, gm, X)


def test_a_view_that_cannot_be_made_again_is_reported() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        base = x * 2
        view = base.as_strided((2, 3), (3, 1))
        base.t_()
        ns.attn(x[0:2], view, "l")
        return base + 1

    split = split_graph(trace(fn, X), on=ON)
    (note,) = split.report().notes
    assert "shares with other tensors" in note
    assert "as_strided" in note or "view" in note


@pytest.mark.parametrize("region", ["autocast", "no_grad"])
def test_regions_are_closed_and_opened_again_at_a_border(region: str) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        with torch.autocast("cpu", dtype=torch.bfloat16) if region == "autocast" else torch.no_grad():
            y = x @ x
            ns.attn(y.float(), out, "l")
            z = x @ x
        return out + z.float() + (x @ x)

    x = torch.randn(3, 3, requires_grad=True)
    gm = trace(fn, x)
    split = split_graph(gm, on=ON)
    assert kinds(split) == "CSC"
    got, want = split(x)[0], gm(x)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    (g1,), (g2,) = torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x)
    # Two autocast regions cast x twice, so that its gradient is summed in float32 rather than in bfloat16.
    torch.testing.assert_close(g1, g2, rtol=1e-2, atol=1e-2)


def test_identical_layers_are_one_piece() -> None:
    def fn(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        for i, w in enumerate(weights):
            y = torch.relu(x @ w)
            out = torch.empty_like(y)
            ns.attn(y, out, f"layers.{i}")
            x = x + out
        return x

    weights = [torch.randn(3, 3) for _ in range(32)]
    gm = trace(fn, X, weights)
    split = split_graph(gm, on=ON)
    assert len(split.pieces) == 65
    assert len(split.modules) == 3
    report = split.report()
    assert report.summary() == "65 pieces: 32 at opreg_graph::attn, 33 compiled as 3 distinct"
    assert report.pieces[4].same_as == 2
    assert report.splits == ("opreg_graph::attn",) * 32
    order = [re.search(r"weights_(\d+)", node.name) for node in split.plan.placeholders]
    same(split, gm, *(weights[int(found[1])] if found else X for found in order))
    again = split_graph(trace(fn, X, weights), on=ON).report()
    assert [p.digest for p in again.pieces] == [p.digest for p in report.pieces]
    assert len({p.digest for p in report.pieces if p.splitting}) == 32  # each names another layer
    assert len({p.digest for p in report.pieces}) == 32 + 3


def test_pieces_that_differ_say_why() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        for name in ("layers.3", "layers.7"):
            x = ns.moe(x, name) * 2
            out = torch.empty_like(x)
            ns.attn(x, out, name)
            x = out
        return x * True + 1

    report = split_graph(trace(fn, X), on=["opreg_graph::attn"]).report()
    assert "differs from 0: constant 'layers.7', not 'layers.3'" in report.pieces[2].why_distinct
    assert "ops, not" in report.pieces[4].why_distinct


def cut(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    ns.attn(x, out, "l")
    return out


def test_equal_looking_constants_keep_pieces_apart() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        for factor in (1, 1.0, True):
            x = cut(x * factor)
        return x

    report = split_graph(trace(fn, X), on=ON).report()
    assert [p.why_distinct for p in report.pieces if not p.splitting] == [
        "",
        "differs from 0: constant 1.0, not 1",
        "differs from 2: constant True, not 1.0",
    ]


def test_the_sign_of_zero_keeps_pieces_apart_and_nan_does_not() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        for limit in (0.0, -0.0, float("nan"), -float("nan"), 0.5, 0.5):
            x = cut(torch.copysign(x, limit))
        return x

    report = split_graph(trace(fn, X), on=ON).report()
    pieces = [p for p in report.pieces if not p.splitting]
    assert [p.same_as for p in pieces] == [None, None, None, 4, None, 8]
    assert pieces[1].why_distinct == "differs from 0: constant -0.0, not 0.0"


def test_dtypes_strides_and_gradients_keep_pieces_apart() -> None:
    def fn(*inputs: torch.Tensor) -> list[torch.Tensor]:
        return [cut(x * 2) for x in inputs]

    square = torch.ones(3, 3)
    inputs = (square, square + 1, square.double(), torch.ones(3, 3).t(), torch.ones(3, 3, requires_grad=True))
    whys = [p.why_distinct for p in split_graph(trace(fn, *inputs), on=ON).report().pieces if not p.splitting]
    assert whys[:2] == ["", ""], "the second is the same as the first"
    assert "input 0 is float64[3, 3]" in whys[2]
    assert "strides (1, 3)" in whys[3]
    assert "with gradient" in whys[4]


def test_inputs_that_share_storage_keep_a_writing_piece_apart() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for a, b in ((x, y), (x, x.view(4, 3))):
            out = ns.pair(a)[0]
            a.mul_(2)
            x = ns.pair(b + out)[0]
        return x

    split = split_graph(trace(fn, X.clone(), X + 1), on=["opreg_graph::pair"])
    writing = [p for p in split.pieces if not p.split]
    assert len({p.key for p in writing}) == len(writing) == 2


def test_a_split_inside_a_checkpoint_is_reported() -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        return ns.pair(torch.sin(x))[0] * 2

    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            x = ns.pair(x)[1]
        return x

    gm = trace(fn, X)
    split = split_graph(gm, on=["opreg_graph::pair"])
    assert any("not split at opreg_graph::pair inside of wrap_body" in note for note in split.report().notes)
    assert kinds(split) == "CSCS"
    same(split, gm, X)


def test_graphs_of_other_tracers_with_modules_and_parameters() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.lin[0](x) * self.scale
            a, b = ns.pair(y)
            z = x.new_zeros(size=x.size())
            return {"out": self.lin[1](a + b + z) * self.scale, "a": a}

    gm = symbolic_trace(Model())
    split = split_graph(gm, on=["opreg_graph::pair"])
    assert kinds(split) == "CSC"
    same(split, gm, X)
    with torch.no_grad():
        gm.scale.fill_(3.0)
    same(split, gm, X)


def layered(layers: int) -> GraphModule:
    """A graph of `layers` like layers of seven calls each, with the weights as placeholders."""
    graph = Graph()
    x = graph.placeholder("x")
    weights = [graph.placeholder(f"w{i}") for i in range(layers)]
    for i, w in enumerate(weights):
        y = graph.call_function(operator.matmul, (x, w))
        y = graph.call_function(torch.relu, (y,))
        y = graph.call_method("view", (y, 4, 3))
        out = graph.call_function(torch.empty_like, (y,))
        graph.call_function(ns.attn.default, (y, out, f"layers.{i}"))
        x = graph.call_function(operator.add, (x, out))
        x = graph.call_function(operator.mul, (x, 0.5))
    graph.output((x,))
    return GraphModule(torch.nn.Module(), graph)


def test_work_grows_in_proportion_to_the_graph() -> None:
    """Counts calls of Python functions, not time: eight times the layers must cost eight times the calls."""
    import sys

    def calls(layers: int) -> int:
        gm, count = layered(layers), 0

        def tracer(frame: Any, event: str, arg: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(tracer)
        try:
            split = split_graph(gm, on=ON)
        finally:
            sys.setprofile(None)
        assert len(split.modules) == 3
        return count

    calls(4)
    small, large = calls(20), calls(160)
    assert large < 8.5 * small, (small, large)
