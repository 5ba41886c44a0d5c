"""Pieces compiled again for exact sizes and ranges: the right variant runs, with one symbol and with several."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from opreg.backend import BackendError, last_report

LIB = torch.library.Library("opreg_sizes", "DEF")
LIB.define("core(Tensor x) -> Tensor")
LIB.impl("core", lambda x: x + 1, "CompositeExplicitAutograd")
torch.library.register_fake("opreg_sizes::core", torch.empty_like, lib=LIB)


class Recording:
    """An inner compiler that remembers the sizes it compiled for, and which of its results ran."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.ran: list[str] = []

    def __call__(self, gm: GraphModule, values: list[Any]) -> Callable[..., Any]:
        shapes = " ".join(str(list(v.shape)).replace(" ", "") for v in values if isinstance(v, Tensor))
        self.compiled.append(shapes)

        def run(*args: Any) -> Any:
            self.ran.append(shapes)
            return gm.forward(*args)

        return run


def net(x: Tensor) -> Tensor:
    y = torch.ops.opreg_sizes.core(x * 2)
    return y.view(y.size(0) * 3) + torch.ones(x.size(0)).sum()


def pair(x: Tensor, y: Tensor) -> Tensor:
    z = torch.ops.opreg_sizes.core(x.sum() + y)
    return z * x.size(0) + torch.zeros(y.size(0), x.size(0)).sum()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiled(fn: Any, inner: Any, *, dynamic: bool = True, **options: Any) -> Any:
    options = {"inner": inner, "split_on": ["opreg_sizes::core"], **options}
    return torch.compile(fn, backend="opreg", fullgraph=True, dynamic=dynamic, options=options)


def rows(n: int) -> Tensor:
    x = torch.arange(3.0 * n).reshape(n, 3)
    torch._dynamo.mark_static(x, 1)
    return x


def test_exact_sizes_and_ranges_of_one_symbol() -> None:
    inner = Recording()
    fn = compiled(net, inner, sizes=[4, 8], ranges=[(16, 32)])
    for n, expected in ((5, "s"), (4, "[4,3]"), (8, "[8,3]"), (20, "r"), (32, "r"), (33, "s"), (16, "r")):
        inner.ran.clear()
        torch.testing.assert_close(fn(rows(n)), net(rows(n)))
        general, *special = dict.fromkeys(inner.compiled[:2]), *inner.compiled[2:]
        ran = inner.ran[0]
        if expected == "s":
            assert ran in general
        else:
            assert ran in special
            assert ("s" in ran or "u" in ran or "z" in ran) == (expected == "r")
            assert expected == "r" or ran == expected
    assert last_report().variants == ("x.size(0) = 4", "x.size(0) = 8", "x.size(0) 16 to 32")
    assert len(inner.compiled) == 2 * 4


def test_several_symbols_are_told_apart_by_name() -> None:
    inner = Recording()
    fn = compiled(pair, inner, sizes={"x.size(0)": [4], "y.size(0)": [7]})

    def both(n: int, m: int) -> str:
        x, y = rows(n), torch.ones(m)
        inner.ran.clear()
        torch.testing.assert_close(fn(x, y), pair(x, y))
        return inner.ran[0]

    both(5, 6)
    assert both(4, 7) == "[4,3] [7]"
    assert both(4, 6).startswith("[4,3] [s")
    assert both(5, 7).endswith("[7]")
    assert both(7, 4).count("s") == 2
    assert len(last_report().variants) == 3


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_variants_compute_the_same(inner: str) -> None:
    fn = compiled(net, inner, sizes=[4], ranges=[(8, 64)])
    for n in (5, 4, 8, 31, 64, 65):
        torch.testing.assert_close(fn(rows(n)), net(rows(n)))
    assert not last_report().notes


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (pair, {"sizes": [4]}, r'"sizes" is a list, but this graph has 2 dynamic sizes: x\.size\(0\), y\.size\(0\)'),
        (pair, {"sizes": {"x.size(1)": [4]}}, r"names the size 'x\.size\(1\)'.*Did you mean 'x\.size\(0\)'"),
        (net, {"sizes": [-1]}, "holds -1, which is not a size"),
        (net, {"ranges": [(8, 4)]}, r"holds \(8, 4\), which is not a pair"),
        (net, {"ranges": [4]}, "holds 4, which is not a pair"),
        (net, {"sizes": 4}, '"sizes" holds 4 where a list of sizes belongs'),
        (net, {"sizes": {"x.size(0)": 4}}, '"sizes" holds 4 where a list of sizes belongs'),
        (net, {"ranges": "4"}, r"\"ranges\" holds '4' where a list of pairs \(first, last\) belongs"),
        (net, {"cudagraphs": 4}, '"cudagraphs" holds 4 where a list of sizes belongs'),
        (net, {"cudagraphs": [-4]}, '"cudagraphs" holds -4, which is not a size'),
    ],
)
def test_bad_sizes_are_refused(fn: Any, options: dict[str, Any], message: str) -> None:
    args = (rows(5),) if fn is net else (rows(5), torch.ones(6))
    for dynamic in (True, False) if fn is net else (True,):  # a static graph knows no names of sizes
        with pytest.raises(Exception, match=message) as caught:
            compiled(fn, "eager", dynamic=dynamic, **options)(*args)
        assert isinstance(caught.value.__cause__ or caught.value.inner_exception, BackendError)


def test_a_static_graph_has_no_variants() -> None:
    fn = torch.compile(net, backend="opreg", dynamic=False, options={"inner": "eager", "split_on": [], "sizes": [4]})
    torch.testing.assert_close(fn(rows(5)), net(rows(5)))
    assert last_report().variants == ()
