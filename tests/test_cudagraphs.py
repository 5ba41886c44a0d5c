"""options={"cudagraphs"}: what is recorded, replayed and padded, on a stand-in that spoils what a GPU's graphs may."""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from opreg import cudagraph_device
from opreg.backend import BackendError, last_report
from opreg.cudagraph_device import CudaDevice
from opreg.cudagraphs import CaptureError

LIB = torch.library.Library("opreg_cudagraphs", "DEF")
LIB.define("attn(Tensor q, Tensor(a!) out) -> ()")
LIB.define("core(Tensor q) -> Tensor")
LIB.define("host(Tensor x) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
LIB.impl("attn", lambda q, out: (out.copy_(q.cumsum(0)), None)[1], "CompositeExplicitAutograd")
LIB.impl("core", lambda q: q.cumsum(0), "CompositeExplicitAutograd")
LIB.impl("host", lambda x: x + 1, "CompositeExplicitAutograd")
torch.library.register_fake("opreg_cudagraphs::attn", lambda q, out: None, lib=LIB)
torch.library.register_fake("opreg_cudagraphs::core", torch.empty_like, lib=LIB)
torch.library.register_fake("opreg_cudagraphs::host", torch.empty_like, lib=LIB)
ops = torch.ops.opreg_cudagraphs
ON = ["opreg_cudagraphs::attn", "opreg_cudagraphs::core"]
WIDTH = 6


def spoil(tensor: Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


class StandIn:
    """A device on the CPU. Recording executes nothing; a replay repeats the call on the recorded memory, and spoils
    what it may spoil: outputs of captures that came later in the same pool, and inputs that are copied before it."""

    def __init__(self) -> None:
        self.pools = 0
        self.buffers: list[weakref.ref[Tensor]] = []
        self.captures: list[tuple[Any, list[Tensor]]] = []
        self.replays = 0
        self.keep_inputs = False

    def available(self) -> bool:
        return True

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def zeros(self, like: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
        made = torch.empty_strided(size, stride, dtype=like.dtype).zero_()
        self.buffers.append(weakref.ref(made))
        return made

    def living(self) -> list[Tensor]:
        return [t for t in (ref() for ref in self.buffers) if t is not None]

    def warm_up(self, run: Callable[..., Sequence[Tensor]], inputs: Sequence[Any]) -> Sequence[Tensor]:
        return run(*inputs)

    def capture(
        self, run: Callable[..., Sequence[Tensor]], inputs: Sequence[Any], pool: Any
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in inputs]
            promised = [(tuple(t.shape), t.stride(), t.dtype) for t in run(*fakes)]
        outputs = [torch.empty_strided(size, stride, dtype=dtype) for size, stride, dtype in promised]
        for output in outputs:
            spoil(output)
        number = len(self.captures)
        self.captures.append((pool, outputs))

        def replay() -> None:
            self.replays += 1
            made = [t.clone() for t in run(*inputs)]
            for other, later in self.captures[number + 1 :]:
                for tensor in later if other == pool else ():
                    spoil(tensor)
            for output, value in zip(outputs, made, strict=True):
                output.copy_(value)
            for buffer in () if self.keep_inputs else self.living():
                spoil(buffer)

        return replay, outputs


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    made = StandIn()
    monkeypatch.setitem(cudagraph_device.DEVICES, "cpu", made)
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield made


class Counting:
    """An inner compiler that counts what it compiled and how often that ran."""

    def __init__(self) -> None:
        self.compiled = 0
        self.ran = 0

    def __call__(self, gm: GraphModule, values: list[Any]) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return gm.forward(*args)

        return run


class Layer(nn.Module):
    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        q, gate = self.qkv(self.norm(x)).chunk(2, -1)
        if self.functional:
            out = ops.core(q)
        else:
            out = torch.empty_like(x)
            ops.attn(q, out)
        return x + torch.sigmoid(gate) * self.o(out)


class Model(nn.Module):
    def __init__(self, layers: int = 4, functional: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(functional) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def compiled(fn: Any, inner: Any = "eager", dynamic: bool = True, **options: Any) -> Any:
    options = {"inner": inner, "split_on": ON, "cudagraphs": True, **options}
    return torch.compile(fn, backend="opreg", fullgraph=True, dynamic=dynamic, options=options)


def rows(count: int) -> Tensor:
    x = torch.randn(count, WIDTH)
    torch._dynamo.mark_static(x, 1)
    return x


@pytest.mark.parametrize("functional", [False, True])
def test_sizes_are_recorded_replayed_and_padded(device: StandIn, functional: bool) -> None:
    model, inner = Model(functional=functional), Counting()
    run = compiled(model, inner, cudagraphs=[4, 8])
    kept: list[tuple[Tensor, Tensor]] = []
    for _ in range(4):
        for count in (3, 8, 4, 7, 2, 9):
            x = rows(count)
            kept.append((run(x), model(x)))
    for got, want in kept:  # after all calls: what one returned, no later replay wrote
        torch.testing.assert_close(got, want)
    assert inner.compiled == 3, "like layers are compiled once"
    assert len(device.captures) == 2 * 5, "and recorded once each, per size"
    assert device.pools == 1
    padded = sum(c <= 8 for c in (3, 8, 4, 7, 2, 9)) * 4 * 5
    assert device.replays == padded - 2 * 5, "all but the first call of each size"
    # x for the first two pieces, and what a functional attention returns; all else is read where it is.
    assert len(device.living()) == 2 * (3 if functional else 2)
    assert last_report().recorded == (
        "x.size(0) = 4: 5 of 5 pieces recorded, 5 padded from smaller sizes",
        "x.size(0) = 8: 5 of 5 pieces recorded, 5 padded from smaller sizes",
    )
    assert "cudagraphs: x.size(0) = 4" in str(last_report())


def test_a_static_graph_is_recorded_at_its_sizes(device: StandIn) -> None:
    model, x = Model(2), rows(5)
    run = compiled(model, dynamic=False)
    for _ in range(3):
        torch.testing.assert_close(run(x), model(x))
    assert last_report().recorded == ("its sizes: 3 of 3 pieces recorded",)
    assert len(device.captures) == 3


def test_specialised_pieces_are_the_ones_recorded(device: StandIn) -> None:
    model, inner = Model(2), Counting()
    run = compiled(model, inner, sizes=[4])
    for count in (4, 3, 4, 3):
        x = rows(count)
        torch.testing.assert_close(run(x), model(x))
    assert inner.compiled == 2 * 3
    assert last_report().variants == ("x.size(0) = 4",)
    assert len(device.captures) == 3


@pytest.mark.parametrize("inner", [pytest.param("inductor", marks=pytest.mark.slow), "aot_eager"])
def test_compiled_pieces_can_be_recorded(device: StandIn, monkeypatch: pytest.MonkeyPatch, inner: str) -> None:
    def capture(run: Any, inputs: Sequence[Any], pool: Any) -> tuple[Callable[[], None], Sequence[Tensor]]:
        # Compiled code cannot run on fake tensors; this model writes none of its inputs.
        made = run(*inputs)
        outputs = [torch.empty_strided(t.shape, t.stride()).copy_(t) for t in made]

        def replay() -> None:
            for output, value in zip(outputs, run(*inputs), strict=True):
                output.copy_(value)

        return replay, outputs

    monkeypatch.setattr(device, "capture", capture)
    model = Model(2)
    run = compiled(model, inner, cudagraphs=[4])
    for count in (4, 3, 4, 2, 6):
        x = rows(count)
        torch.testing.assert_close(run(x), model(x))


def test_a_weight_that_moved_is_read_where_it_is_now(device: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    model = Model(3)
    run = compiled(model, cudagraphs=[4])
    for _ in range(3):
        run(rows(4))
    recorded = len(device.captures)
    with caplog.at_level(logging.WARNING, logger="opreg"):
        model.layers[1].o.weight.data = torch.randn(WIDTH, WIDTH)
        model.layers[2].qkv.bias.add_(1)  # in place: nothing moves
        for _ in range(2):
            x = rows(3)
            torch.testing.assert_close(run(x), model(x))
    assert len(device.captures) == recorded + 1
    assert device.pools == 2, "a capture out of order has memory of its own"
    (line,) = [r.getMessage() for r in caplog.records if r.name == "opreg"]
    assert line.startswith("piece 4 is recorded again for x.size(0) = 4: ")
    assert "weight" in line


def test_what_cannot_be_recorded_or_padded_runs_as_compiled(device: StandIn) -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        x = ops.core(ops.host(torch.relu(x)))  # never recorded
        x = ops.core(x - x.mean(0))  # recorded, not padded
        return torch.tanh(x) * weight

    inner = Counting()
    run, weight = compiled(fn, inner, cudagraphs=[4]), nn.Parameter(torch.randn(WIDTH))
    for count in (3, 4, 4, 4, 3):
        x = rows(count)
        inner.ran = 0
        torch.testing.assert_close(run(x, weight), fn(x, weight))
    # Replays of the stand-in run the piece too; unrecorded ones are seen in the number of replays.
    assert device.replays == 2 + 4
    assert last_report().recorded == (
        "1 not recorded: opreg_cudagraphs::host is tagged cudagraph_unsafe",
        "x.size(0) = 4: 2 of 3 pieces recorded, 1 padded from smaller sizes",
        "1 not padded: mean joins rows",
    )


def test_what_a_piece_writes_is_written_once_per_call(device: StandIn) -> None:
    device.keep_inputs = True  # they are read again after a replay

    def fn(x: Tensor, total: Tensor) -> Tensor:
        total.add_(1)
        return ops.core(x * 2) * total[0]

    run = compiled(fn, cudagraphs=[4])
    for static in (False, True):
        torch._dynamo.reset()
        mine, theirs = torch.zeros(3), torch.zeros(3)
        torch._dynamo.mark_static(mine)
        if static:
            torch._dynamo.mark_static_address(mine)
        for count in (4, 4, 3, 4, 4):
            x = rows(count)
            torch.testing.assert_close(run(x, mine), fn(x, theirs))
            torch.testing.assert_close(mine, theirs)


def test_pieces_on_another_device_or_of_other_sizes_are_left_out(device: StandIn) -> None:
    def fn(x: Tensor, chosen: Tensor) -> Tensor:
        some = torch.nonzero(chosen)[:, 0]
        return ops.core(x * 2).sum() + ops.core(torch.sin(x[some])).cos().sum()

    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    try:
        run = compiled(fn, cudagraphs={"x.size(0)": [5]})
        x, chosen = rows(5), torch.tensor([1, 0, 1, 1, 0])
        torch._dynamo.mark_static(chosen)
        for _ in range(3):
            torch.testing.assert_close(run(x, chosen), fn(x, chosen))
    finally:
        torch._dynamo.config.capture_dynamic_output_shape_ops = False
    assert any("waits for the device" in line for line in last_report().recorded)
    assert any("nothing fixes its size u0" in line for line in last_report().recorded), last_report().recorded


def test_a_recording_that_fails_says_how_to_leave_the_op_out(device: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(run: Any, inputs: Any, pool: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(device, "capture", capture)
    run = compiled(Model(1), cudagraphs=[4])
    run(rows(4))
    with pytest.raises(CaptureError, match=r"piece 0 \(.*linear.*\) cannot be recorded.*cudagraph_unsafe"):
        run(rows(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cudagraphs": True}, r'"cudagraphs" records pieces for sizes, and there are none for x\.size\(0\)'),
        ({"cudagraphs": {"y": [4]}}, r"names the size 'y'"),
        ({"cudagraphs": [0.5]}, "holds 0.5, which is not a size"),
    ],
)
def test_bad_sizes_are_refused(device: StandIn, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        compiled(Model(1), **options)(rows(4))
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, BackendError)


def test_gradients_are_refused(device: StandIn) -> None:
    with torch.enable_grad(), pytest.raises(Exception, match="is for inference, and gradients are wanted here"):
        compiled(Model(1), cudagraphs=[4])(rows(4))


def test_without_a_gpu_the_option_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match=r'"cudagraphs" needs a GPU, and torch.cuda.is_available\(\)'):
        compiled(Model(1), cudagraphs=[4])(rows(4))
    with torch.no_grad():
        compiled(Model(1), cudagraphs=False)(rows(4))


def test_the_calls_of_torch_cuda_exist() -> None:
    assert cudagraph_device.DEVICES["cuda"].available() == torch.cuda.is_available()
    inspect.signature(torch.cuda.graph).bind(None, pool=None, capture_error_mode="thread_local")
    assert all(callable(f) for f in (torch.cuda.graph_pool_handle, torch.cuda.CUDAGraph.replay))
    assert all(hasattr(torch.cuda.Stream, name) for name in ("wait_stream",))
    made = CudaDevice().zeros(torch.ones(2), (2, 3), (1, 2))
    assert made.stride() == (1, 2)
    assert not made.any()
