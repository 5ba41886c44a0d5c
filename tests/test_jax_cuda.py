"""The CUDA executor on CPU tensors with torch.cuda's streams and jax's list of GPUs replaced (there is no GPU here).

What is seen: which device is current and which stream is asked for while tensors cross, dtypes, ownership, errors. What
is not: that CUDA orders the two streams, which DLPack promises.
"""

from __future__ import annotations

import contextlib
import types

import jax
import jax.numpy as jnp
import pytest
import torch

import opreg
from opreg import jax_bridge_cuda, jax_bridge_executors
from opreg.jax_bridge_executors import execute
from opreg.jax_bridge_keys import OPERAND
from opreg.jax_bridge_programs import find_function, find_program

GPU = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch):
    """Everything on the CPU goes the CUDA way; a list of what happened, in order."""
    seen = []

    @contextlib.contextmanager
    def current(device):
        seen.append(f"enter {device}")
        yield
        seen.append(f"leave {device}")

    def import_array(tensor):
        seen.append(f"import {tensor.dtype}")
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        return real_import(tensor)

    def export_array(array):
        seen.append(f"export {array.dtype}")
        return real_export(array)

    real_import, real_export = jax.dlpack.from_dlpack, jax_bridge_cuda.from_dlpack
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(jax.dlpack, "from_dlpack", import_array)
    monkeypatch.setattr(jax_bridge_cuda, "from_dlpack", export_array)
    monkeypatch.setattr(jax_bridge_cuda, "_check_device", lambda label, device: None)
    monkeypatch.setitem(jax_bridge_executors.EXECUTORS, "cpu", jax_bridge_executors.EXECUTORS["cuda"])
    return seen


def call(fn, *tensors):
    # Not call_jax, whose shortest way for CPU tensors would be taken.
    function = find_function(fn)
    treedef = jax.tree.structure(((OPERAND,) * len(tensors), {}))
    results, tree = execute(find_program(function, treedef, list(tensors))[0], tensors)
    return jax.tree.unflatten(tree, results)


def test_tensors_cross_while_their_device_is_current(cuda):
    x, y = torch.randn(4, 3).t().requires_grad_(), torch.arange(3)[:, None] + 2**40
    out = call(lambda a, b: {"sum": a + 1, "wide": b + 1}, x, y)
    torch.testing.assert_close(out["sum"], x.detach() + 1)
    assert out["wide"][:, 0].tolist() == [2**40 + 1, 2**40 + 2, 2**40 + 3]
    crossed = ["import torch.float32", "import torch.int64", "export float32", "export int64"]
    assert cuda == ["enter cpu", *crossed, "leave cpu"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64])
def test_dtypes(cuda, dtype):
    x = torch.arange(6).to(dtype)
    out = call(lambda a: jnp.concatenate([a, a]), x)
    assert out.dtype is dtype
    assert torch.equal(out.view(torch.uint8), torch.cat([x, x]).view(torch.uint8))


def test_results_share_no_memory(cuda):
    x = torch.ones(1 << 12)
    outs = call(lambda a: (a, a * 2, a), x)
    assert len({x.data_ptr(), *(out.data_ptr() for out in outs)}) == 4
    assert call(lambda a: (a, a), torch.ones(0))[1].shape == (0,)


def test_gradients_come_through_it(cuda):
    x = torch.randn(3, requires_grad=True)
    opreg.call_jax(lambda a: jnp.sin(a).sum(), (x,)).backward()
    torch.testing.assert_close(x.grad, x.detach().cos())
    assert cuda.count("enter cpu") == 2


def test_torch_hands_over_its_current_stream_of_the_array_s_device(monkeypatch):
    asked = []

    class OnGpu:
        """A JAX array on GPU 1, as far as torch's from_dlpack looks."""

        dtype = jnp.dtype("float32")

        def __dlpack_device__(self):
            return torch.utils.dlpack.DLDeviceType.kDLCUDA, 1

        def __dlpack__(self, *, stream, **options):
            asked.append(stream)
            return torch.ones(2).__dlpack__()

    def current_stream(device):
        return types.SimpleNamespace(cuda_stream={"cuda:1": 4242}[device])

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    assert jax_bridge_cuda._tensor(OnGpu(), "f").tolist() == [1, 1]
    assert asked == [4242]


def test_without_a_cuda_build_of_jax_the_error_says_what_to_install():
    words = (
        r"call_jax\(f\): its tensors are on cuda:1, and this jax was built without CUDA.*'jax\[cuda12\]'.*to the CPU"
    )
    with pytest.raises(opreg.KernelError, match=words):
        jax_bridge_cuda._check_device("f", GPU)


def test_a_gpu_that_jax_does_not_see_is_named(monkeypatch):
    gpus = [types.SimpleNamespace(local_hardware_id=number) for number in (0, 1)]
    monkeypatch.setattr(jax, "devices", lambda kind: gpus if kind == "gpu" else [])
    jax_bridge_cuda._check_device("f", GPU)
    with pytest.raises(opreg.KernelError, match=r"on cuda:3, but jax sees the GPUs \[0, 1\] only"):
        jax_bridge_cuda._check_device("f", torch.device("cuda", 3))
