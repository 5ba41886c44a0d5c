"""Graphs that Inductor compiles copy nothing for an op that writes: 17 ways in which a written tensor comes about."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from opreg import register_op


@register_op("t_no_copies::fill", mutates_args=("out",))
def fill(x: Tensor, out: Tensor, by: float = 1.0) -> None:
    out.copy_(x * by)


@register_op("t_no_copies::fill_two", mutates_args=("k", "v"))
def fill_two(x: Tensor, k: Tensor, v: Tensor) -> None:
    k.copy_(x)
    v.copy_(-x)


def empty(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    out = torch.empty(4, 4)
    fill(x, out)
    return out


def empty_like(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    out = torch.empty_like(x)
    fill(x, out)
    return out


def graph_input(x: Tensor, w: Tensor, kv: Tensor) -> None:
    fill(x, w)


def input_returned(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    fill(x, w)
    return w


def slice_of_empty(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    out = torch.empty(8, 4)
    fill(x, out[:4])
    fill(x, out[4:])
    return out


def view_of_empty(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    out = torch.empty(16)
    fill(x, out.view(4, 4))
    return out


def transposed_empty(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    out = torch.empty(4, 4)
    fill(x, out.t())
    return out


def indexed_input(x: Tensor, w: Tensor, kv: Tensor) -> None:
    fill_two(x, kv[0], kv[1])


def unbound_input(x: Tensor, w: Tensor, kv: Tensor) -> None:
    k, v = kv.unbind(0)
    fill_two(x, k, v)


def split_input(x: Tensor, w: Tensor, kv: Tensor) -> None:
    k, v = kv.split(1)
    fill_two(x, k[0], v[0])


def rows_of_input(x: Tensor, w: Tensor, kv: Tensor) -> None:
    fill(x[1:3], w[1:3])


def split_product_read(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    q, k = (x @ w).split(2, 1)
    out = torch.empty(4, 2)
    fill(q, out)
    fill(k, out)
    return out


def split_product_written(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    product = x @ w
    q, k = product.split(2, 1)
    fill_two(x[:, :2], q, k)
    return product


def product_written(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    product = x @ w
    fill(x, product)
    return product


def chained(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    out = torch.empty_like(x)
    fill(x, out)
    fill(x, out, 2.0)
    fill(x, out, 3.0)
    return out


def chained_through_two(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    first, second = torch.empty_like(x), torch.empty_like(x)
    fill(x, first)
    fill(first, second, 2.0)
    return second


def zeros(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
    out = torch.zeros(4, 4)
    fill(x, out)
    return out


QUICK = [empty, slice_of_empty, indexed_input, split_product_written, chained]  # 0.5 s each
SLOW = [
    *(empty_like, graph_input, input_returned, view_of_empty, transposed_empty, unbound_input, split_input),
    *(rows_of_input, split_product_read, product_written, chained_through_two, zeros),
]


def copies(program: Callable[..., Tensor | None]) -> int:
    """Kernels and copies that Inductor makes beside the op's calls and the products; the results must be eager's."""
    x, w, kv = torch.randn(4, 4), torch.randn(4, 4), torch.randn(2, 4, 4)
    expected = [t.clone() for t in (x, w, kv)]
    wanted = program(*expected)
    with torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(program, fullgraph=True), x, w, kv)
    for got, right in zip((x, w, kv, result), (*expected, wanted), strict=True):
        assert got is right is None or torch.equal(got, right)
    body = code.split("def call(", 1)[1]
    assert "t_no_copies_fill" in body
    return sum(body.count(word) for word in ("cpp_fused_", "copy_", "clone", "reinterpret_tensor_copy"))


@pytest.mark.parametrize("program", QUICK)
def test_a_written_tensor_is_not_copied(program: Callable[..., Tensor | None]) -> None:
    assert copies(program) == 0


@pytest.mark.slow
@pytest.mark.parametrize("program", SLOW)
def test_no_more_than_it_must_be(program: Callable[..., Tensor | None]) -> None:
    assert len({*QUICK, *SLOW}) == 17
    assert copies(program) == (program is zeros)  # the zeros themselves


def test_a_copy_would_be_seen() -> None:
    def half_of_a_copy(x: Tensor, w: Tensor, kv: Tensor) -> Tensor:
        out = w.clone()
        fill(x[:2], out[:2])
        return out

    assert copies(half_of_a_copy) > 0
