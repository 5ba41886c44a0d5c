"""HAZARDS 1, 5 and 6 under compilers: state survives, order holds, outputs are defined, arguments stay apart."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from opreg import LayerName, RegistrationError, alias, current_layer, forward_context, register_op
from opreg.alias import _disjoint

BACKENDS = ["aot_eager", "inductor", "opreg"]


@register_op("t_effects::attend", mutates_args=("out",), kind="attention")
def attend(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"], layer_name: LayerName) -> None:
    """cache <- 2 cache + sum(x): two calls in the wrong order give another cache."""
    layer, _ = current_layer(layer_name)
    layer.cache.mul_(2).add_(x.sum())
    out.copy_(x + layer.cache)


@register_op("t_effects::store", mutates_args=("layer_name",))
def store(x: Annotated[Tensor, "t d"], layer_name: LayerName) -> None:
    """Only writes its layer's state."""
    current_layer(layer_name)[0].cache.mul_(2).add_(x.sum())


def two_dead_calls(x: Tensor) -> Tensor:
    attend(x, torch.empty_like(x), "a")
    attend(x * 3, torch.empty_like(x), "a")
    store(x * 5, "a")
    return x + 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inference", [False, True])
def test_dead_calls_still_update_the_cache_in_order(backend: str, inference: bool) -> None:
    torch._dynamo.reset()
    x = torch.ones(2, 3)
    caches = []
    for fn in (two_dead_calls, torch.compile(two_dead_calls, backend=backend, fullgraph=True)):
        layer = SimpleNamespace(cache=torch.ones(1))
        with forward_context(layers={"a": layer}, metadata=1), torch.inference_mode(inference):
            fn(x)
            fn(x)
        caches.append(layer.cache.clone())
    assert torch.equal(*caches)
    once = ((1 * 2 + 6) * 2 + 18) * 2 + 30
    assert caches[1].item() == ((once * 2 + 6) * 2 + 18) * 2 + 30


def test_a_string_for_torch_ops_is_refused_where_the_call_would_vanish() -> None:
    def step(x: Tensor) -> Tensor:
        torch.ops.t_effects.store(x, "a")
        return x + 1

    layer = SimpleNamespace(cache=torch.ones(1))
    with forward_context(layers={"a": layer}, metadata=1):
        step(torch.ones(2, 3))
        assert layer.cache.item() == 8
        with pytest.raises(RuntimeError, match=r"t_effects::store: .* a compiler, which would remove the call"):
            torch.compile(step, backend="aot_eager", fullgraph=True)(torch.ones(2, 3))


def test_an_op_that_could_vanish_is_refused_with_the_cures() -> None:
    with pytest.raises(RegistrationError, match="every compiler removes it") as caught:

        @register_op("t_effects::gone")
        def gone(x: Tensor, layer_name: LayerName) -> None:
            current_layer(layer_name)[0].cache.add_(1)

    assert "mutates_args=('layer_name',) if it writes its layer's state" in str(caught.value)
    assert "return a tensor that the caller uses" in str(caught.value)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (
            {"out": "tial"},
            "'out' starts as 'tial'; it may be 'written', 'tail', 'zeros', 'state'. Did you mean 'tail'?",
        ),
        ({"out": "tail"}, "nothing says where the tail begins"),
        ({"other": "zeros"}, "mutates_args names 'other', which is no parameter"),
    ],
)
def test_a_start_that_cannot_be(starts: dict[str, str], message: str) -> None:
    with pytest.raises(RegistrationError, match=re.escape(message)):

        @register_op("t_effects::bad_start", mutates_args=starts)
        def bad_start(x: Tensor, out: Tensor) -> None:
            out.copy_(x)


@register_op("t_effects::starts", mutates_args={"a": "written", "b": "tail", "c": "zeros", "d": "state"})
def starts(
    x: Annotated[Tensor, "t"],
    a: Annotated[Tensor, "t"],
    b: Annotated[Tensor, "t"],
    c: Annotated[Tensor, "t"],
    d: Annotated[Tensor, "t"],
    layer_name: LayerName,
) -> None:
    n = current_layer(layer_name)[1].num_actual_tokens
    a.copy_(x)
    b[:n] = x[:n]
    c[:1] = x[:1]
    d[:1] = x[:1]


def run_starts(fn: Any, metadata: Any) -> list[list[float]]:
    x = torch.tensor([1.0, 2.0, 3.0])
    given = [torch.full((3,), 7.0) for _ in range(4)]
    with forward_context(layers={"s": None}, metadata=metadata):
        fn(x, *given, "s")
    return [tensor.tolist() for tensor in given]


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_arguments_start_as_declared(backend: str | None) -> None:
    torch._dynamo.reset()

    def call(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, name: str) -> None:
        starts(x, a, b, c, d, name)

    fn = call if backend is None else torch.compile(call, backend=backend, fullgraph=True)
    found = run_starts(fn, SimpleNamespace(num_actual_tokens=2))
    assert found == [[1, 2, 3], [1, 2, 0], [1, 0, 0], [1, 7, 7]]
    # A profiling run defines outputs and leaves state alone.
    assert run_starts(fn, None) == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [7, 7, 7]]


@register_op("t_effects::whole", mutates_args=("out",))
def whole(x: Annotated[Tensor, "t d"], out: Annotated[Tensor, "t d"]) -> None:
    out.copy_(x * 2)


@register_op("t_effects::mix", mutates_args=("out",))
def mix(out: Annotated[Tensor, "t d"], x: Annotated[Tensor, "t d"]) -> None:
    """Writes out before it has read all of x."""
    out += 1
    out.add_(x.flip(0))


@contextmanager
def _no_disk_caches() -> Iterator[None]:
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def test_an_op_that_writes_everything_pays_no_fill_and_no_copy() -> None:
    def f(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        whole(x, out)
        return out

    torch._dynamo.reset()
    with _no_disk_caches():
        result, codes = run_and_get_code(torch.compile(f, fullgraph=True), torch.ones(4, 4))
    assert torch.equal(result, torch.full((4, 4), 2.0))
    code = "\n".join(codes)
    assert code.count("= empty_strided") == 1
    assert "cpp_fused" not in code
    assert "zero" not in code


def merged(x: Tensor) -> Tensor:
    x = x.sort(0)[0]
    y = x.clone()
    mix(y, x)
    return y


def test_a_removed_clone_does_not_merge_what_is_read_and_written() -> None:
    torch._dynamo.reset()
    x = torch.arange(6.0).reshape(3, 2)
    with _no_disk_caches():
        assert torch.equal(torch.compile(merged, fullgraph=True)(x), merged(x))


def test_the_guard_copies_only_where_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it costs when the graph runs: nothing, unless two arguments are one tensor. `opreg bench
    --framework alias` has the cost of compiling."""

    def apart(x: Tensor) -> Tensor:
        x = x.sort(0)[0]
        y = torch.empty_like(x)
        whole(x, y)
        return y

    def allocations(fn: Any, guard: str) -> int:
        monkeypatch.setenv("OPREG_ALIAS_GUARD", guard)
        torch._dynamo.reset()
        with _no_disk_caches():
            _, codes = run_and_get_code(torch.compile(fn, fullgraph=True), torch.arange(6.0).reshape(3, 2))
        return "\n".join(codes).count("= empty_strided")

    assert allocations(apart, "1") == allocations(apart, "0")
    assert allocations(merged, "1") == allocations(merged, "0") + 1


def test_the_alias_guard_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert alias.enabled()
    monkeypatch.setenv("OPREG_ALIAS_GUARD", "0")
    assert not alias.enabled()
    args = (torch.ones(1), torch.ones(1))
    assert alias.separate(mix.op, args, {}) == (args, {})


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        (([4, 4], [8, 1], 0), ([4, 4], [8, 1], 4), True),  # column blocks of one matrix
        (([4, 4], [8, 1], 0), ([4, 4], [8, 1], 3), False),
        (([4, 4], [4, 1], 0), ([4, 4], [4, 1], 16), True),  # one after the other
        (([4, 4], [4, 1], 0), ([4, 4], [4, 1], 0), False),
        (([4, 4], [1, 4], 0), ([4, 4], [4, 1], 0), False),
        (([0, 4], [4, 1], 0), ([4, 4], [4, 1], 0), True),
        (([4], [2], 0), ([4], [2], 1), True),  # every second element
    ],
)
def test_disjoint(one: Any, other: Any, apart: bool) -> None:
    assert _disjoint(*one, *other) is apart
