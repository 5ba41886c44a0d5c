"""The adapter to torch_tpu against a stand-in for jax_op that keeps its rules and poisons what is donated.

The tpu_aot lane registers the same functions with the real jax_op.
"""

import importlib.machinery
import inspect
import sys
import types

import jax
import pytest
import torch
from opreg.kernels.pallas import rpa_torch_tpu, rpa_xla
from opreg.kernels.pallas.rpa_torch_tpu import TorchTpuKernel
from opreg.ops import kv_cache_update, ragged_paged_attention, ragged_paged_attention_lse, ragged_paged_attention_update

import opreg

OPS = {
    ragged_paged_attention: rpa_torch_tpu.torch_tpu_rpa,
    ragged_paged_attention_lse: rpa_torch_tpu.torch_tpu_rpa_lse,
    ragged_paged_attention_update: rpa_torch_tpu.torch_tpu_rpa_update,
    kv_cache_update: rpa_torch_tpu.torch_tpu_kv_cache_update,
}


def jax_op(
    name, fn=None, /, *, donate_argnums=None, mesh=None, input_partition_specs=None, output_partition_specs=None
):
    """As torch_tpu 0.2.0 does it, on CPU tensors."""
    namespace, _, op = name.partition("::")
    if not (namespace and op):
        raise ValueError(f"Op name {name} does not contain a namespace.")
    for parameter in inspect.signature(inspect.unwrap(fn), eval_str=True).parameters.values():
        if parameter.annotation is parameter.empty:
            raise ValueError("Missing argument type annotation for JAX function")
        is_array = parameter.annotation in (jax.Array, jax.Array | None)
        if is_array and parameter.kind is parameter.KEYWORD_ONLY:
            raise NotImplementedError("custom_op with kwarg-only Tensor args")

    def run(*args):
        if any(isinstance(arg, torch.Tensor) and arg.dtype is torch.int64 for arg in args):
            raise TypeError("jax would take int64 for int32")
        results = opreg.call_jax(fn, args)
        for index in donate_argnums or ():
            args[index].fill_(77)
        return results

    return run


@pytest.fixture
def stand_in(monkeypatch):
    for name in ("torch_tpu", "torch.tpu", "torch.tpu.pallas"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["torch.tpu.pallas"].jax_op = jax_op


def test_results_and_the_cache(stand_in):
    """NHD with every option but the default; the cache is donated, and holds its new content afterwards."""
    call = list(ragged_paged_attention_update.samples())[2]
    reference = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in call.items()}
    want = ragged_paged_attention_update(**reference)
    found = TorchTpuKernel(rpa_xla.rpa_update, written="kv_pages")(**call)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(call["kv_pages"], reference["kv_pages"])


def test_an_op_without_results_and_with_64_bit_slots(stand_in):
    call, reference = (next(iter(kv_cache_update.samples())) for _ in range(2))
    kv_cache_update(**reference)
    assert call["slot_mapping"].dtype is torch.int64
    assert TorchTpuKernel(rpa_xla.kv_cache_update, written="kv_pages")(**call) is None
    assert torch.equal(call["kv_pages"], reference["kv_pages"])


def test_what_is_said_where_torch_tpu_is_not_installed():
    for op in OPS:
        told = [str(d) for d in opreg.select.explain(op.op, "tpu").decisions if "rpa_torch_tpu" in str(d.kernel.target)]
        assert len(told) == 1
        assert "missing" in told[0]
        assert "torch_tpu" in told[0]


def test_the_kernels_have_the_ops_parameters(stand_in):
    for op, kernel in OPS.items():
        opreg.select.check_signature(op.op, "kernel", kernel)
        chosen = opreg.select.explain(op.op, "tpu").selected
        assert opreg.select.load(op.op, chosen) is kernel
