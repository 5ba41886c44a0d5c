"""The paged-attention operators as users meet them: eager, compiled, in a layer, and their words on wrong input."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from opreg.kernels.reference import paged_attention as reference
from opreg.ops import (
    kv_cache_update,
    paged_attention_core,
    ragged_paged_attention,
    ragged_paged_attention_lse,
    ragged_paged_attention_update,
)
from opreg.ops.kv_cache_update import slots_from_slices
from opreg.ops.paged_attention_inputs import make_batch

import opreg
from opreg.context import layer_handle
from opreg.select import explain


@pytest.mark.parametrize(
    "op", [ragged_paged_attention, ragged_paged_attention_lse, kv_cache_update, ragged_paged_attention_update]
)
def test_opcheck(op: Any) -> None:
    for call in op.samples("cpu", torch.float32):
        torch.library.opcheck(op.overload, (), call)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
@pytest.mark.parametrize(
    "op", [ragged_paged_attention, ragged_paged_attention_lse, kv_cache_update, ragged_paged_attention_update]
)
def test_the_triton_kernel_is_first_on_gpus(op: Any, device: str) -> None:
    first = explain(op.op, device).decisions[0]
    assert first.kernel.name == f"triton/{op.op.name.removeprefix('opreg::')}"
    if importlib.util.find_spec("triton") is None:
        assert (first.state, first.why) == ("missing", "needs triton")
    else:
        assert first.state == "used"


def test_opcheck_of_the_layer() -> None:
    for call in paged_attention_core.samples("cpu", torch.float32):
        call["layer_name"] = layer_handle(call["layer_name"])
        torch.library.opcheck(paged_attention_core.overload, (), call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_samples_against_the_truth(dtype: torch.dtype) -> None:
    for call in ragged_paged_attention.samples("cpu", dtype):
        got, lse = ragged_paged_attention_lse(**call)
        want, want_lse = reference.attend("truth", **call, compute_dtype=torch.float64)
        error = (got.double() - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt()
        assert error <= ragged_paged_attention.op.tolerances[dtype][0]
        tokens = int(call["cu_q_lens"][call["num_seqs"]])
        assert torch.equal(lse.isinf(), want_lse.isinf())
        torch.testing.assert_close(lse[:tokens].double(), want_lse[:tokens], atol=2e-5, rtol=1e-5)
        assert (got[tokens:] == 0).all()


def test_one_graph_serves_many_sizes() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return ragged_paged_attention(q * 2, *rest, sm_scale=0.25, sliding_window=6) + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    # Sizes that differ from one another in the first call: the tracer takes equal ones for the same.
    for lengths in ([(5, 18), (2, 60)], [(3, 9), (4, 4), (2, 50)], [(7, 7)] * 5):
        batch = make_batch(lengths, heads=(6, 3), page_size=8, window=6)
        torch.testing.assert_close(compiled(*batch), step(*batch), equal_nan=True)
    assert len(graphs) == 1


def step_of(lengths: list[tuple[int, int]], **sizes: Any) -> tuple[SimpleNamespace, SimpleNamespace, torch.Tensor]:
    """A layer, the metadata of one step and its queries, padding rows last."""
    batch = make_batch(lengths, spare_rows=2, **sizes)
    slots = []
    for i, (q_len, kv_len) in enumerate(lengths):
        slots += [int(batch.page_indices[i, p // 4]) * 4 + p % 4 for p in range(kv_len - q_len, kv_len)]
    layer = SimpleNamespace(kv_cache=batch.kv_pages, sm_scale=0.25)
    metadata = SimpleNamespace(
        kv_lens=batch.kv_lens,
        page_indices=batch.page_indices,
        cu_q_lens=batch.cu_q_lens,
        num_seqs=batch.num_seqs,
        slot_mapping=torch.tensor(slots),
        num_actual_tokens=len(slots),
    )
    return layer, metadata, batch.q


def test_layer_writes_its_cache_and_attends() -> None:
    layer, metadata, q = step_of([(5, 18), (1, 29), (3, 3)])
    layer.soft_cap, layer.sinks = 5.0, torch.linspace(-1, 1, 4)
    key, value = torch.randn(11, 2, 16), torch.randn(11, 2, 16)
    output = torch.full_like(q, torch.nan)
    before = layer.kv_cache.clone()
    with opreg.forward_context(layers={"a": layer}, metadata=metadata):
        paged_attention_core(q, key, value, output, "a")
    written = metadata.slot_mapping
    flat = layer.kv_cache.view(-1, 4, 16)
    assert torch.equal(flat[written, 0::2], key[:9])
    assert torch.equal(flat[written, 1::2], value[:9])
    before.view(-1, 4, 16)[written] = flat[written]
    assert torch.equal(layer.kv_cache.nan_to_num(7.0), before.nan_to_num(7.0))
    arguments = (metadata.kv_lens, metadata.page_indices, metadata.cu_q_lens, metadata.num_seqs)
    want, _ = reference.attend("truth", q, layer.kv_cache, *arguments, sm_scale=0.25, soft_cap=5.0, sinks=layer.sinks)
    torch.testing.assert_close(output, want)
    assert (output[9:] == 0).all()


def test_profiling_run_gives_zeros_and_leaves_the_cache() -> None:
    layer, _, q = step_of([(5, 18)])
    before = layer.kv_cache.clone()
    output = torch.full_like(q, torch.nan)
    with opreg.forward_context(layers={"a": layer}, metadata=None):
        paged_attention_core(q, q[:, :2], q[:, :2], output, "a")
    assert (output == 0).all()
    assert torch.equal(layer.kv_cache.nan_to_num(7.0), before.nan_to_num(7.0))


def test_compiled_layers_share_one_graph_and_follow_their_names() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        for name in ("a", "b"):
            out = torch.empty_like(x)
            paged_attention_core(x, x[:, :2] * 1.0, x[:, :2] + 0.0, out, name)
            x = out
        return x

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        layer_a, metadata, q = step_of([(5, 18), (1, 29)])
        layer_b, _, _ = step_of([(5, 18), (1, 29)], generator=torch.Generator().manual_seed(5))
        layer_b.sm_scale = 0.5
        layer_b_table = step_of([(5, 18), (1, 29)], generator=torch.Generator().manual_seed(5))[1]
        x = q.nan_to_num(0.0)
        with opreg.forward_context(layers={"a": layer_a, "b": layer_b}, metadata={"a": metadata, "b": layer_b_table}):
            results.append(run(x))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("attribute", ["kv_cache", "sm_scale", "kv_lens", "slot_mapping", "num_seqs"])
def test_what_a_layer_lacks_is_named(attribute: str) -> None:
    layer, metadata, q = step_of([(5, 18)])
    owner = layer if hasattr(layer, attribute) else metadata
    delattr(owner, attribute)
    what = "layer" if owner is layer else "metadata"
    with (
        opreg.forward_context(layers={"model.3": layer}, metadata=metadata),
        pytest.raises(AttributeError, match=f"{what} of layer 'model.3' .* has no attribute '{attribute}'; it has"),
    ):
        paged_attention_core(q, q[:, :2], q[:, :2], torch.empty_like(q), "model.3")


def test_num_actual_tokens_out_of_range() -> None:
    layer, metadata, q = step_of([(5, 18)])
    metadata.num_actual_tokens = 8
    with (
        opreg.forward_context(layers={"a": layer}, metadata=metadata),
        pytest.raises(ValueError, match="num_actual_tokens is 8, but query has 7 rows"),
    ):
        paged_attention_core(q, q[:, :2], q[:, :2], torch.empty_like(q), "a")


def test_slices_of_the_tpu_operator() -> None:
    slices = torch.tensor([[7, 20, 0], [0, 4, 0], [3, 2, 5]], dtype=torch.int32)
    assert slots_from_slices(slices, 2, 7).tolist() == [7, 8, 9, -1, 20, 21, -1]
    with pytest.raises(ValueError, match=r"slice \(20, 4, 2\) covers rows 4 to 5, but there are 5"):
        slots_from_slices(slices, 2, 5)


def test_wrong_sizes_are_refused_by_the_compiler_too() -> None:
    batch = make_batch([(5, 18)])
    with pytest.raises(Exception, match=r"dim .{1,2}s\+1.{1,2} is 4 \(s=3\) but 3 in cu_q_lens"):
        torch.compile(ragged_paged_attention, backend="eager", fullgraph=True)(
            *batch._replace(cu_q_lens=batch.cu_q_lens[:-1])
        )
