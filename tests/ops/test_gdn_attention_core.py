"""opreg::gdn_attention_core: the layer and its metadata come from the forward context."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from opreg.ops import gdn_attention_core as package_op
from opreg.ops.gdn_attention import gdn_attention
from opreg.ops.gdn_attention_core import gdn_attention_core, layer_of, metadata_of
from opreg.ops.gdn_attention_core_xpu import gdn_attention_core_xpu
from opreg.ops.gdn_attention_inputs import clone_call, make_call

import opreg

PACKED = ("core_attn_out", "z", "projected_states_qkvz", "projected_states_ba")


def call_of(flat: bool = False) -> dict[str, Any]:
    return make_call([1, 33, 2], initial=[True, False, True], padding=3, flat=flat)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("op", [gdn_attention_core, gdn_attention_core_xpu])
def test_equals_the_operator_on_the_layers_tensors(op: Any, flat: bool) -> None:
    call = call_of(flat)
    want = clone_call(call)
    gdn_attention(**want)
    with opreg.forward_context(layers={"layers.0": layer_of(call)}, metadata=metadata_of(call)):
        op(*(call[name] for name in PACKED), "layers.0")
    for name in ("core_attn_out", "z", "conv_state", "ssm_state"):
        torch.testing.assert_close(call[name], want[name], rtol=0, atol=0, equal_nan=True)


def test_without_metadata_outputs_are_zero_and_the_cache_stays() -> None:
    call = call_of()
    before = clone_call(call)
    with opreg.forward_context(layers={"layers.0": layer_of(call)}, metadata=None):
        gdn_attention_core(*(call[name] for name in PACKED), "layers.0")
    assert not call["core_attn_out"].any()
    assert not call["z"].any()
    for name in ("conv_state", "ssm_state"):
        torch.testing.assert_close(call[name], before[name], rtol=0, atol=0, equal_nan=True)


def test_it_is_an_attention_op_and_splits_graphs() -> None:
    assert "opreg::gdn_attention_core" in opreg.splitting_ops()
    assert "opreg::gdn_attention_core_xpu" in opreg.splitting_ops()
    assert package_op is gdn_attention_core


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [("layer", "kv_cache"), ("layer", "A_log"), ("layer", "gqa_interleaved_layout"), ("metadata", "num_prefills")],
)
def test_what_is_missing_is_named(owner: str, attribute: str) -> None:
    call = call_of()
    parts = {"layer": layer_of(call), "metadata": metadata_of(call)}
    delattr(parts[owner], attribute)
    with (
        opreg.forward_context(layers={"layers.7": parts["layer"]}, metadata=parts["metadata"]),
        pytest.raises(AttributeError, match=rf"{owner} of layer 'layers.7' .* no attribute '{attribute}'; it has "),
    ):
        gdn_attention_core(*(call[name] for name in PACKED), "layers.7")


def test_a_cache_that_is_no_pair_is_named() -> None:
    call = call_of()
    layer = layer_of(call)
    layer.kv_cache = (call["conv_state"],)
    with (
        opreg.forward_context(layers={"layers.7": layer}, metadata=metadata_of(call)),
        pytest.raises(ValueError, match=r"kv_cache of layer 'layers.7' is a tuple of 1, expected \(conv_state"),
    ):
        gdn_attention_core(*(call[name] for name in PACKED), "layers.7")


def test_compiled_layers_share_one_graph() -> None:
    calls = [call_of(), call_of(), call_of()]
    layers = {f"layers.{i}": layer_of(c) for i, c in enumerate(calls)}

    def model(x: torch.Tensor, ba: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
        for i in range(3):
            out, z = torch.empty_like(shape), torch.empty_like(shape)
            gdn_attention_core(out, z, x, ba, f"layers.{i}")
            x = torch.tanh(x + (out * torch.sigmoid(z)).mean())
        return x

    call = calls[0]
    given = (call["projected_states_qkvz"].nan_to_num(), call["projected_states_ba"].nan_to_num(), call["z"])
    with opreg.forward_context(layers=layers, metadata=metadata_of(call)):
        saved = [clone_call(c) for c in calls]
        want = model(*given)
        for c, s in zip(calls, saved, strict=True):
            for name in ("conv_state", "ssm_state"):
                c[name].copy_(s[name])
        torch._dynamo.reset()
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(got, want)


def test_vllm_style_metadata_of_all_layers(capsys: pytest.CaptureFixture[str]) -> None:
    call = call_of()
    want = clone_call(call)
    gdn_attention(**want)
    whole = SimpleNamespace(
        **vars(metadata_of(call)), num_spec_decodes=0, num_spec_decode_tokens=0, spec_token_indx=None
    )
    with opreg.forward_context(layers={"a": layer_of(call)}, metadata={"a": whole, "b": None}):
        gdn_attention_core(*(call[name] for name in PACKED), "a")
    torch.testing.assert_close(call["core_attn_out"], want["core_attn_out"])


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager", "opreg"])
def test_torch_ops_takes_the_layers_name_as_a_string(backend: str | None) -> None:
    # As vLLM's callers on XPU do (PR #39466), several layers in one graph.
    calls = {f"layers.{i}": call_of() for i in range(2)}
    layers = {name: layer_of(call) for name, call in calls.items()}
    packed = [next(iter(calls.values()))[name] for name in PACKED[2:]]

    def model(qkvz: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(qkvz.shape[0], 4, 32)
        for name in layers:
            core = torch.zeros_like(total)
            z = torch.empty_like(total)
            torch.ops.opreg.gdn_attention_core_xpu(core, z, qkvz, ba, name)
            total = total + core * z
        return total

    run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    with opreg.forward_context(layers=layers, metadata=metadata_of(calls["layers.0"])):
        got = run(*packed)
    want = torch.zeros_like(got)
    for call in calls.values():
        direct = {**call_of(), **dict(zip(PACKED[2:], packed, strict=True))}
        gdn_attention(**direct)
        want += direct["core_attn_out"] * direct["z"]
        torch.testing.assert_close(call["ssm_state"], direct["ssm_state"], equal_nan=True)
    torch.testing.assert_close(got, want)
