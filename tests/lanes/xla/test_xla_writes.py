"""Ops that write their arguments on tensors of torch_xla (PJRT_DEVICE=CPU): views, graphs, and how they are called."""

from __future__ import annotations

from typing import Annotated

import pytest
import torch
import torch_xla
from opreg.ops import paged_attention_core
from torch import Tensor

import opreg
from opreg.errors import KernelError

device = torch_xla.device()


@opreg.register_op("xla_writes::accumulate", mutates_args=("total",))
def accumulate(x: Annotated[Tensor, "n"], total: Annotated[Tensor, "n"]) -> Annotated[Tensor, "n"]:
    """Add x to a running total and return the sum of squares so far."""
    total.add_(x)
    return total * total


def call_with_named_arguments(x, total):
    return torch.ops.xla_writes.accumulate(x=x, total=total)


CALLS = {"function": accumulate, "torch.ops": torch.ops.xla_writes.accumulate, "by name": call_with_named_arguments}


@pytest.mark.parametrize("how", CALLS)
def test_the_argument_is_written_and_views_of_it_see_that(how):
    total = torch.arange(6.0).to(device)
    tail, x = total[4:], torch.ones(6).to(device)
    out = CALLS[how](x, total)
    assert tail.cpu().tolist() == [5, 6]
    assert out.cpu().tolist() == [1, 4, 9, 16, 25, 36]


def test_a_view_can_be_the_argument():
    total = torch.zeros(2, 3).to(device)
    accumulate(torch.ones(3).to(device), total[1])
    assert total.cpu().tolist() == [[0, 0, 0], [1, 1, 1]]


def test_it_is_one_node_of_an_openxla_graph():
    def step(x, total):
        return accumulate(x * 2, total) + total.sum()

    compiled = torch.compile(step, backend="openxla", fullgraph=True)
    total, x = torch.zeros(3).to(device), torch.ones(3).to(device)
    expected_total, expected = torch.zeros(3), None
    for _ in range(3):
        out = compiled(x, total)
        expected = step(torch.ones(3), expected_total)
        torch.testing.assert_close(out.cpu(), expected)
        torch.testing.assert_close(total.cpu(), expected_total)


@opreg.register_op("xla_writes::doubled_tail")
def doubled_tail(x: Annotated[Tensor, "n"]) -> Annotated[Tensor, "n"]:
    """Twice x from the second element on, and 5 before, written into a tensor of its own."""
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    out[1:] = x[1:] * 2
    out[0].add_(5)
    return out


@pytest.mark.parametrize("how", ["function", "torch.ops", "inference", "openxla"])
def test_what_a_kernel_writes_into_its_own_tensors_is_kept(how):
    op = torch.ops.xla_writes.doubled_tail if how == "torch.ops" else doubled_tail
    if how == "openxla":
        op = torch.compile(lambda x: doubled_tail(x) + 0, backend="openxla", fullgraph=True)
    with torch.inference_mode(how == "inference"):
        out = op(torch.ones(3).to(device))
        assert out.cpu().tolist() == [5, 2, 2]
        out.add_(1)
        assert out.cpu().tolist() == [6, 3, 3]


@opreg.register_op("xla_writes::double", mutates_args=("x",))
def double(x: Annotated[Tensor, "n"]) -> None:
    """Double in place."""
    x.mul_(2)


def test_the_first_call_may_be_in_inference_mode():
    with torch.inference_mode():
        x = torch.ones(2).to(device)
        double(x)
        assert x.tolist() == [2, 2]


def test_inside_no_grad_and_with_a_parameter():
    total = torch.nn.Parameter(torch.zeros(2).to(device))
    with torch.no_grad():
        accumulate(torch.ones(2).to(device), total)
    assert total.tolist() == [1, 1]


def test_an_op_with_a_layer_is_not_frozen_into_a_graph():
    samples = paged_attention_core.samples("xla")  # its forward context ends with it
    call = next(samples)
    name = call.pop("layer_name")

    def step(query, key, value, output):
        paged_attention_core(query, key, value, output, name)
        return output + 1

    compiled = torch.compile(step, backend="openxla", fullgraph=True, dynamic=False)
    # The bridge of torch_xla may be first, with the layer's handle, which is on the CPU.
    refusals = "a graph of backend='openxla' would keep the layer|move all tensors to xla device"
    with torch.no_grad(), pytest.raises(Exception, match=refusals):
        compiled(**call)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
    bare = [torch._from_functional_tensor(value) for value in call.values()]
    cure = "compile with backend='opreg', options={'inner': 'openxla'}"
    with torch._C._ExcludeDispatchKeyGuard(keys), pytest.raises(KernelError, match=cure):
        torch.ops.opreg.paged_attention_core.named(*bare, name)

    expected = step(**call)
    around = torch.compile(step, backend="opreg", options={"inner": "openxla"}, fullgraph=True, dynamic=False)
    call["output"].zero_()
    with torch.no_grad():
        assert torch.equal(around(**call), expected)
    assert expected.ne(1).any()


@opreg.register_op("xla_writes::rows", mutates_args=("total",))
def rows(x: Annotated[Tensor, "n"], total: Annotated[Tensor, "n"]) -> None:
    """x into the total, in two pieces."""
    half = total.shape[0] // 2
    total.zero_()
    total[:half].copy_(x[:half])
    total[half:].add_(x[half:])


def test_a_kernel_in_a_graph_may_write_through_views():
    compiled = torch.compile(lambda x, total: (rows(x, total), total + 1)[1], backend="openxla", fullgraph=True)
    x, total = torch.arange(1.0, 6.0).to(device), torch.zeros(5).to(device)
    for _ in range(2):
        assert compiled(x, total).cpu().tolist() == [2, 3, 4, 5, 6]
        assert total.cpu().tolist() == [1, 2, 3, 4, 5]
