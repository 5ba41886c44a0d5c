"""What a user reads after a mistake: the op, the argument, the values and the cure. One table, one row per mistake."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import torch
from opreg.ops import (
    gdn_attention,
    gdn_attention_core,
    kv_cache_update,
    paged_attention_core,
    ragged_paged_attention,
    rms_norm,
)
from opreg.ops.gdn_attention_inputs import make_call
from opreg.ops.paged_attention_inputs import make_batch
from torch import Tensor

import opreg
from opreg import cli, errors, forward_context, register_op, registry, splitting_ops, use_kernel

X, W = torch.ones(3, 8), torch.ones(8)


@dataclass(frozen=True)
class Mistake:
    """A call that must fail, the error's type, and what its message must hold, in this order."""

    id: str
    make: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]


ALL: list[Mistake] = []


def mistake(error: type[Exception], *says: str) -> Callable[[Callable[[], Any]], None]:
    return lambda make: ALL.append(Mistake(make.__name__, make, error, says))


# Names


@mistake(errors.UnknownOpError, "'rms_nrom'", "registered are", "Did you mean 'opreg::rms_norm'?")
def unknown_op() -> None:
    registry.get("rms_nrom")


@mistake(errors.UnknownOpError, "no op 'oprge::rms_norm'", "Did you mean 'opreg::rms_norm'?")
def unknown_namespace() -> None:
    use_kernel("oprge::rms_norm", "reference").__enter__()


@mistake(
    errors.UnknownOpError, "opreg::rms_norm has no kernel 'cpu/rmsnorm'", "reference", "Did you mean 'cpu/rms_norm'?"
)
def unknown_kernel() -> None:
    use_kernel("opreg::rms_norm", "cpu/rmsnorm").__enter__()


@mistake(errors.UnknownOpError, "opreg::rms_norm", "'gpu'", "known are cpu, cuda, xpu")
def unknown_device_type() -> None:
    rms_norm.register_kernel("gpu", "a.b:c")


@mistake(AttributeError, "module 'opreg' has no attribute 'register_opp'")
def unknown_public_name() -> None:
    opreg.register_opp  # noqa: B018


# Registration


@mistake(errors.DuplicateOpError, "opreg::rms_norm is already registered at", "rms_norm.py:", "Choose another name")
def duplicate_op() -> None:
    @register_op("opreg::rms_norm")
    def rms_norm(x: Tensor) -> Tensor:
        return x


@mistake(errors.DuplicateOpError, "aten::relu", "defined outside opreg", "choose another name")
def somebody_elses_op() -> None:
    @register_op("aten::relu")
    def relu(x: Tensor) -> Tensor:
        return x


@mistake(errors.SignatureError, "t_messages::layer_as_str", "'layer_name'", "LayerName")
def layer_as_str() -> None:
    @register_op("t_messages::layer_as_str", mutates_args=("out",), kind="attention")
    def layer_as_str(x: Tensor, out: Tensor, layer_name: str) -> None: ...


@mistake(errors.SignatureError, "t_messages::no_annotation", "'n'", "annotat")
def no_annotation() -> None:
    @register_op("t_messages::no_annotation")
    def no_annotation(x: Tensor, n) -> Tensor:
        return x


@mistake(errors.RegistrationError, "t_messages::misspelt", "mutates_args", "'outt'", "x, out")
def misspelt_mutation() -> None:
    @register_op("t_messages::misspelt", mutates_args=("outt",))
    def misspelt(x: Tensor, out: Tensor) -> None: ...


@mistake(errors.RegistrationError, "t_messages::kinds", "kind='atention'", "'attention'")
def misspelt_kind() -> None:
    @register_op("t_messages::kinds", kind="atention")
    def kinds(x: Tensor) -> Tensor:
        return x


@mistake(errors.RegistrationError, "t_messages::contract", "'x'", "'(h' in 't (h'", "integer")
def contract_that_cannot_be_read() -> None:
    @register_op("t_messages::contract")
    def contract(x: Annotated[Tensor, "t (h"]) -> Tensor:
        return x


@mistake(errors.RegistrationError, "'no name'", "namespace::name")
def no_operator_name() -> None:
    register_op("no name")(lambda x: x)


@mistake(
    errors.SignatureError, "opreg::rms_norm", "test_messages/kernel", "(x, w, eps)", "(x, weight, eps)", "same order"
)
def kernel_of_another_signature() -> None:
    def kernel(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return x

    rms_norm.register_kernel("mps", kernel)


@mistake(errors.RegistrationError, "opreg::rms_norm", "'kernels.fast'", "package.module:function")
def target_without_function() -> None:
    rms_norm.register_kernel("mps", "kernels.fast")


@mistake(errors.RegistrationError, "opreg::rms_norm", "'cpu/rms_norm'", "'cpu/other'", "priority 0", "larger priority")
def two_kernels_of_one_priority() -> None:
    rms_norm.register_kernel("cpu", "acme.kernels.cpu.norm:other")


@mistake(errors.RegistrationError, "opreg::gdn_attention", "mutates core_attn_out, z", "functional op")
def backward_of_a_mutating_op() -> None:
    gdn_attention.register_autograd(lambda ctx, grad: grad)


# Calls


@mistake(errors.ContractError, "opreg::rms_norm", "dim 'd'", "7", "weight", "8", "x: f32[3, 8]", "weight: f32[7]")
def sizes_that_disagree() -> None:
    torch.ops.opreg.rms_norm(X, torch.ones(7))


@mistake(errors.ContractError, "opreg::rms_norm", "weight", "2", "f32[1, 8]")
def wrong_number_of_dims() -> None:
    rms_norm(X, torch.ones(1, 8))


@mistake(
    errors.ContractError, "opreg::ragged_paged_attention", "kv_lens", "torch.int64", "torch.int32", ".to(torch.int32)"
)
def wrong_dtype() -> None:
    batch = make_batch([(5, 18)])
    ragged_paged_attention(*batch._replace(kv_lens=batch.kv_lens.long()))


@mistake(TypeError, "rms_norm", "missing 1 required positional argument: 'weight'")
def missing_argument() -> None:
    rms_norm(X)


@mistake(ValueError, "opreg::gdn_attention", "non_spec_state_indices_tensor", "[0]", "99", "outside 0..")
def state_slot_out_of_range() -> None:
    call = make_call([3])
    gdn_attention(**{**call, "non_spec_state_indices_tensor": torch.tensor([99], dtype=torch.int32)})


@mistake(ValueError, "opreg::ragged_paged_attention", "page_indices", "999")
def page_index_out_of_range() -> None:
    batch = make_batch([(5, 18)])
    ragged_paged_attention(*batch._replace(page_indices=torch.full_like(batch.page_indices, 999)))


@mistake(ValueError, "opreg::ragged_paged_attention", "kv_lens", "500")
def length_that_exceeds_the_cache() -> None:
    batch = make_batch([(5, 18)])
    ragged_paged_attention(*batch._replace(kv_lens=torch.full_like(batch.kv_lens, 500)))


@mistake(ValueError, "opreg::kv_cache_update", "slot_mapping", "24", "23")
def cache_slot_out_of_range() -> None:
    kv_cache_update(torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.zeros(6, 4, 4, 16), torch.tensor([24]))


@mistake(ValueError, "opreg::gdn_attention", "activation", "'gelu'", "'silu'")
def unknown_activation() -> None:
    gdn_attention(**{**make_call([3]), "activation": "gelu"})


# Forced kernels


@mistake(errors.KernelError, "opreg::rms_norm", "use_kernel", "'acme/absent'", "cannot run here", "acme_rt")
def forced_kernel_that_is_not_installed() -> None:
    op = rms_norm.op
    before = op.kernels
    rms_norm.register_kernel("cpu", "acme.norm.acme:absent", requires="acme_rt", priority=9)
    try:
        with use_kernel("opreg::rms_norm", "acme/absent"):
            rms_norm(X, W)
    finally:
        op.kernels = before
        op.calls.reset()


@mistake(
    errors.KernelError, "t_messages::xpu_only on cpu", "no kernel takes this call", "xpu", "Register a kernel for 'cpu'"
)
def no_kernel_for_the_device() -> None:
    @register_op("t_messages::xpu_only", device_types="xpu")
    def xpu_only(x: Tensor) -> Tensor:
        return x + 1

    xpu_only(X)


# Layers and forward contexts


def layer_call(name: str) -> None:
    qkvz, ba = torch.ones(1, 12), torch.ones(1, 2)
    gdn_attention_core(torch.empty(1, 1, 4), torch.empty(1, 1, 4), qkvz, ba, name)


@mistake(errors.ContextError, "layer 'layers.0.gdn'", "outside any forward context", "with opreg.forward_context(")
def no_context() -> None:
    layer_call("layers.0.gdn")


@mistake(errors.ContextError, "no layer 'layers.0.gnd'", "it has layers.0.gdn", "Did you mean 'layers.0.gdn'?")
def unknown_layer() -> None:
    with forward_context(layers={"layers.0.gdn": object()}, metadata=object()):
        layer_call("layers.0.gnd")


@mistake(errors.ContextError, "metadata has no entry for layer 'layers.1.gdn'", "layers.0.gdn", "metadata=None")
def layer_without_metadata() -> None:
    layers = {"layers.0.gdn": object(), "layers.1.gdn": object()}
    with forward_context(layers=layers, metadata={"layers.0.gdn": object()}):
        layer_call("layers.1.gdn")


@mistake(TypeError, "forward_context", "layers", "list")
def layers_in_a_list() -> None:
    with forward_context(layers=[object()]):
        pass


@mistake(AttributeError, "opreg::paged_attention_core", "layer 'a'", "kv_cache", "it has heads")
def layer_that_lacks_its_cache() -> None:
    class Layer:
        heads = 2

    with forward_context(layers={"a": Layer()}, metadata=object()):
        q = torch.ones(1, 2, 16)
        paged_attention_core(q, q, q, torch.empty_like(q), "a")


# Graphs


@mistake(errors.UnknownOpError, "'opreg::gdn_atention_core'", "Did you mean 'opreg::gdn_attention_core'?")
def unknown_op_to_split_at() -> None:
    graph = torch.fx.symbolic_trace(torch.nn.ReLU())
    opreg.split_graph(graph, on=["opreg::gdn_atention_core"])


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.id)
def test_message(row: Mistake) -> None:
    with pytest.raises(row.error) as caught:
        row.make()
    text = str(caught.value)
    assert re.search(".*".join(map(re.escape, row.says)), text, re.DOTALL), text


@pytest.mark.parametrize("compiled", [False, True])
def test_sizes_that_disagree_are_refused_at_trace_time_too(compiled: bool) -> None:
    call = torch.compile(rms_norm, backend="eager", fullgraph=True) if compiled else rms_norm
    with pytest.raises(Exception, match=r"opreg::rms_norm: dim .{1,2}d.{1,2} is 7 in weight but 8 in x"):
        call(X, torch.ones(7))


def test_a_failed_registration_leaves_nothing_behind() -> None:
    for row in ALL:
        if row.make.__name__ in ("layer_as_str", "misspelt_mutation", "misspelt_kind", "contract_that_cannot_be_read"):
            with pytest.raises(row.error):
                row.make()
    left = [op.name for op in registry.all_ops() if op.name.startswith("t_messages::")]
    assert set(left) <= {"t_messages::xpu_only"}
    assert not any(name.startswith("t_messages::") for name in splitting_ops())


def test_the_command_line_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "rms_nrom"]) == 2
    with pytest.raises(errors.UnknownOpError) as caught:
        registry.get("rms_nrom")
    assert capsys.readouterr().err == f"opreg: {caught.value}\n"
