"""torch.compile(backend="opreg"): every distinct piece compiled once, for all sizes, in inference and training."""

import io
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from opreg import LayerName, current_layer, forward_context, register_op, splitting_ops
from opreg.backend import BackendError, last_report, opreg_backend, reports
from opreg.errors import UnknownOpError

LIB = torch.library.Library("opreg_backend", "DEF")
LIB.define("attn(Tensor q, Tensor k, Tensor v, Tensor(a!) out, str name) -> ()")
LIB.define("core(Tensor q, Tensor k, Tensor v) -> Tensor")
LIB.define("expert(Tensor x, str name='', *, int scale=1, bool flag=False) -> Tensor")
LIB.define("touch(Tensor(a!) x, int number) -> ()")
LIB.define("cut(Tensor x, int width) -> Tensor")
LIB.impl("expert", lambda x, name="", *, scale=1, flag=False: x * 0.1 + len(name) + scale, "CompositeExplicitAutograd")
LIB.impl("touch", lambda x, number: (x.add_(0.1 * number), None)[1], "CompositeExplicitAutograd")
LIB.impl("cut", lambda x, width: x[:, :width].clone(), "CompositeExplicitAutograd")
torch.library.register_fake(
    "opreg_backend::expert", lambda x, name="", *, scale=1, flag=False: x.new_empty(x.shape), lib=LIB
)
torch.library.register_fake("opreg_backend::touch", lambda x, number: None, lib=LIB)
torch.library.register_fake("opreg_backend::cut", lambda x, width: x.new_empty(x.shape[0], width), lib=LIB)
LIB.impl("attn", lambda q, k, v, out, name: (out.copy_(q * k + v), None)[1], "CompositeExplicitAutograd")
LIB.impl("core", lambda q, k, v: q * k + v, "CompositeExplicitAutograd")
torch.library.register_fake("opreg_backend::attn", lambda q, k, v, out, name: None, lib=LIB)
torch.library.register_fake("opreg_backend::core", lambda q, k, v: torch.empty_like(q), lib=LIB)
torch.library.register_autograd(
    "opreg_backend::core",
    lambda ctx, g: (g * ctx.saved_tensors[1], g * ctx.saved_tensors[0], g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=LIB,
)
ON = ["opreg_backend::attn", "opreg_backend::core"]


class Layer(nn.Module):
    def __init__(self, width: int, name: str, functional: bool) -> None:
        super().__init__()
        self.name = name
        self.functional = functional
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.o = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        if self.functional:
            out = torch.ops.opreg_backend.core(q, k, v)
        else:
            out = torch.empty_like(x)
            torch.ops.opreg_backend.attn(q, k, v, out.view(-1).view(x.shape), self.name)
        return x + torch.relu(self.o(out))


class Model(nn.Module):
    def __init__(self, layers: int, width: int = 8, functional: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, f"layers.{i}", functional) for i in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Counting:
    """An inner compiler that counts its compilations and runs what it gets."""

    def __init__(self) -> None:
        self.compiled: list[GraphModule] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        assert len(placeholders) == len(example_inputs)
        self.compiled.append(gm)
        return gm.forward


def compiled(model: nn.Module, inner: Any, **kwargs: Any) -> Callable[..., torch.Tensor]:
    options = {"inner": inner, "split_on": ON}
    made: Callable[..., torch.Tensor] = torch.compile(model, backend="opreg", fullgraph=True, options=options, **kwargs)
    return made


@torch.no_grad()
def test_32_layers_are_three_compilations() -> None:
    model, inner, x = Model(32), Counting(), torch.randn(5, 8)
    torch.testing.assert_close(compiled(model, inner)(x), model(x))
    assert len(inner.compiled) == 3
    report = last_report()
    assert len(report.pieces) == 65
    assert len(report.distinct) == 3
    assert report.splits == ("opreg_backend::attn",) * 32
    assert report is reports()[-1]


@register_op("opreg_backend::core_of_layer", mutates_args=("out",), kind="attention")
def core_of_layer(x: Annotated[Tensor, "t c"], out: Annotated[Tensor, "t c"], layer_name: LayerName) -> None:
    """Scales by what the layer holds."""
    layer, metadata = current_layer(layer_name)
    out.copy_(x * layer + metadata)


@register_op("opreg_backend::inner_of_layer", mutates_args=("out",))
def inner_of_layer(x: Annotated[Tensor, "t c"], out: Annotated[Tensor, "t c"], layer_name: LayerName) -> None:
    """The same, but compiled into the pieces."""
    layer, metadata = current_layer(layer_name)
    out.copy_(x - layer * metadata)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@torch.no_grad()
def test_registered_layer_ops_split_by_their_kind_and_share_pieces(inner: str) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for i in range(6):
                y, z = torch.empty_like(x), torch.empty_like(x)
                inner_of_layer(torch.sin(x), y, f"layers.{i}")
                core_of_layer(torch.cos(y), z, f"layers.{i}")
                x = x + z
            return x

    layers = {f"layers.{i}": float(i) for i in range(6)}
    x = torch.randn(4, 8)
    fn = torch.compile(Net(), backend="opreg", fullgraph=True, options={"inner": inner})
    for metadata in (2.0, 3.0):
        with forward_context(layers=layers, metadata=metadata):
            torch.testing.assert_close(fn(x), Net()(x))
    report = last_report()
    assert "opreg_backend::core_of_layer" in splitting_ops()
    assert report.splits == ("opreg_backend::core_of_layer",) * 6
    assert len(report.distinct) == 3
    assert not report.lifted, "a layer's name is an input already"


class Expert(nn.Module):
    """A layer whose name sits in an op inside the pieces, and whose number does too."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.opreg_backend.expert(self.lin(x), f"layers.{self.number}", scale=self.number, flag=True)
        torch.ops.opreg_backend.touch(y, self.number)
        y = torch.sin(y)
        return x + torch.ops.opreg_backend.core(y, y, y)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_names_inside_pieces_become_inputs(inner: str) -> None:
    model, x = nn.Sequential(*(Expert(i) for i in range(8))), torch.randn(5, 8)
    fn = compiled(model, inner)
    torch.testing.assert_close(fn(x), model(x))
    torch.testing.assert_close(fn(x + 1), model(x + 1))
    report = last_report()
    assert len(report.distinct) == 3
    assert any("name, scale of opreg_backend::expert in 7 pieces" in line for line in report.lifted), report.lifted
    assert any("number of opreg_backend::touch" in line for line in report.lifted)


def test_names_that_cannot_become_inputs_are_reported() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        for width in (2, 3):
            x = torch.ops.opreg_backend.cut(x * 2, width).sum(-1, keepdim=True) + x
            x = torch.ops.opreg_backend.core(x, x, x)
        return x

    x = torch.randn(5, 8)
    torch.testing.assert_close(compiled(fn, "eager")(x), fn(x))
    (note,) = last_report().notes
    assert note.startswith("argument width of opreg_backend::cut decides the shape of its result; pieces 0, 2")
    model = nn.Sequential(*(Expert(i) for i in range(4)))
    torch.testing.assert_close(compiled(model, "eager")(x), model(x))
    assert "is not lifted while gradients are wanted" in last_report().notes[0]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("functional", [False, True])
@torch.no_grad()
def test_one_graph_serves_many_sizes(inner: str, functional: bool) -> None:
    model = Model(3, functional=functional)
    fn = compiled(model, inner, dynamic=True)
    fn(torch.randn(5, 8))
    compiled_once = last_report()
    for rows in (7, 2, 64):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(fn(x), model(x))
    assert last_report() is compiled_once, "no size compiled anything again"


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_flow_through_pieces_and_splits(inner: str) -> None:
    model, x = Model(4, functional=True), torch.randn(5, 8)
    fn = compiled(model, inner)
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(fn(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(got, want)
    report = last_report()
    # The first layer's input wants no gradient, so that the second of the like pieces is not quite like the others.
    assert len(report.distinct) == 4
    assert len(report.pieces) == 9


def test_training_through_a_registered_op_shares_its_pieces() -> None:
    @register_op("opreg_backend::gate", kind="attention")
    def gate(x: Annotated[Tensor, "n d"], w: Annotated[Tensor, "d"]) -> Annotated[Tensor, "n d"]:
        return x * w

    gate.register_autograd(
        lambda ctx, g: (g * ctx.saved_tensors[1], (g * ctx.saved_tensors[0]).sum(0)),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    weights = [torch.randn(4, requires_grad=True) for _ in range(4)]

    def model(x: Tensor) -> Tensor:
        for w in weights:
            x = gate(torch.sin(x) + 1, w)
        return x

    x = torch.randn(3, 4, requires_grad=True)
    run = torch.compile(model, backend="opreg", options={"inner": "aot_eager"}, fullgraph=True)
    want = torch.autograd.grad(model(x).square().sum(), [x, *weights])
    torch.testing.assert_close(torch.autograd.grad(run(x).square().sum(), [x, *weights]), want)
    assert last_report().summary() == "8 pieces: 4 at opreg_backend::gate, 4 compiled as 1 distinct"


def test_backward_is_split_and_shared_as_forward_is() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    calls: list[str] = []
    graphs: dict[str, list[set[Any]]] = {"forward": [], "backward": []}

    @register_op("opreg_backend::scaled", kind="attention")
    def scaled(x: Annotated[Tensor, "n d"], w: Annotated[Tensor, "d"]) -> Annotated[Tensor, "n d"]:
        return x * w

    def formula(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        calls.append("formula")
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)

    scaled.register_autograd(formula, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

    def compiler(which: str) -> Callable[..., Any]:
        def compile_one(gm: GraphModule, values: Any) -> Any:
            graphs[which].append({n.target for n in gm.graph.nodes if n.op == "call_function"})
            return make_boxed_func(gm.forward)

        return compile_one

    inner = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    weights = [torch.randn(4, requires_grad=True) for _ in range(6)]

    def model(x: Tensor) -> Tensor:
        for w in weights:
            x = scaled(torch.sin(x) + 1, w)
        return torch.cos(x)

    x = torch.randn(3, 4, requires_grad=True)
    run = torch.compile(model, backend="opreg", options={"inner": inner}, fullgraph=True)
    want = torch.autograd.grad(model(x).square().sum(), [x, *weights])
    calls.clear()
    torch.testing.assert_close(torch.autograd.grad(run(x).square().sum(), [x, *weights]), want)
    assert last_report().summary() == "13 pieces: 6 at opreg_backend::scaled, 7 compiled as 2 distinct"
    assert len(calls) == 6, "each layer's formula runs between the pieces"
    assert [len(made) for made in graphs.values()] == [2, 2], "a backward is compiled once per distinct piece, too"
    assert not any(scaled.overload in targets for made in graphs.values() for targets in made)
    assert any(torch.ops.aten.cos.default in targets for targets in graphs["backward"])


@torch.no_grad()
def test_inductor_compiles_the_pieces() -> None:
    model, x = Model(5), torch.randn(5, 8)
    fn = compiled(model, "inductor", dynamic=True)
    torch.testing.assert_close(fn(x), model(x))
    x = torch.randn(9, 8)
    torch.testing.assert_close(fn(x), model(x))
    assert len(last_report().distinct) == 3
    assert last_report().inner == "inductor"
    assert set(last_report().seconds) == set(last_report().distinct)


@torch.no_grad()
def test_inputs_written_in_place_are_seen_by_the_caller() -> None:
    def fn(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache[0].add_(1)
        torch.ops.opreg_backend.attn(x, x, x, cache[1], "l")
        cache.mul_(2)
        return cache[1] + x

    x = torch.randn(3)
    mine, theirs = torch.ones(2, 3), torch.ones(2, 3)
    torch.testing.assert_close(compiled(fn, "aot_eager")(x, mine), fn(x, theirs))
    torch.testing.assert_close(mine, theirs)


@torch.no_grad()
def test_progress_and_summary_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="opreg"):
        compiled(Model(3), Counting())(torch.randn(2, 8))
    text = [r.getMessage() for r in caplog.records if r.name == "opreg"]
    assert text[0] == "7 pieces: 3 at opreg_backend::attn, 4 compiled as 3 distinct"
    assert text[2].startswith("compiled piece 2 (2 of 3,")
    assert "runs 2 times" in text[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@torch.no_grad()
def test_a_terminal_shows_what_is_being_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (file, terminal):
        torch._dynamo.reset()
        monkeypatch.setattr(sys, "stderr", stream)
        compiled(Model(3), "eager")(torch.randn(5, 8))
    assert file.getvalue() == ""
    shown = terminal.getvalue().split("\r\x1b[K")
    assert [line.partition(" (")[0] for line in shown if line] == [
        f"opreg: compiling piece {i} of 3" for i in (1, 2, 3)
    ]
    assert shown[-1] == "", "the line is cleared at the end"


def test_a_graph_without_fake_values_is_given_some() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    inner = Counting()
    x = torch.randn(2, 4)
    torch.testing.assert_close(opreg_backend(model, [x], options={"inner": inner, "split_on": ON})(x), model(x))
    assert len(inner.compiled) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"iner": "eager"}, BackendError, r"no option 'iner'\. Did you mean 'inner'"),
        ({"inner": "inducto"}, BackendError, r"'inducto', which is no backend.*Did you mean 'inductor'"),
        ({"inner": "opreg"}, BackendError, "no backend that could compile a piece"),
        ({"split_on": ["opreg_backend::atn"]}, UnknownOpError, "Did you mean 'opreg_backend::attn'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        opreg_backend(torch.fx.symbolic_trace(nn.ReLU()), [torch.ones(1)], options=options)


def test_the_report_reads_as_text_and_as_data() -> None:
    with torch.no_grad():
        compiled(Model(2), "eager")(torch.randn(2, 8))
    report = last_report()
    text = str(report)
    assert text.splitlines()[0] == "5 pieces: 2 at opreg_backend::attn, 3 compiled as 3 distinct"
    assert "opreg_backend::attn" in text.splitlines()[2]
    data = report.to_dict()
    assert [p["splitting"] for p in data["pieces"]] == [False, True, False, True, False]
    assert data["pieces"][0]["inputs"][0].startswith("float32[")
    assert data["distinct"] == [0, 2, 4]
