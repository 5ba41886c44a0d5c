"""The C++ entry of gdn_attention refuses what the reference refuses, in its words, and takes what it takes."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opreg.kernels.cpu import gdn
from opreg.kernels.reference import gdn as reference
from opreg.ops.gdn_attention_inputs import Heads, clone_call, make_call

Call = dict[str, Any]
WRITTEN = ("core_attn_out", "z", "conv_state", "ssm_state")


def negative(x: torch.Tensor) -> torch.Tensor:
    """The same values, seen through a negative view of other memory."""
    return torch._neg_view(-x)


def valid() -> Call:
    return make_call([1, 14, 0, 2], Heads(2, 4, 32, 32, 4), initial=[True, False, True, True], padding=2)


def _set(**values: Any) -> Callable[[Call], None]:
    return lambda call: call.update(values)


def _with(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Call], None]:
    def apply(call: Call) -> None:
        call[name] = change(call[name])

    return apply


def _entries(name: str, *values: int) -> Callable[[Call], None]:
    return _with(name, lambda t: torch.tensor(values, dtype=t.dtype))


TENSORS = [name for name, value in valid().items() if isinstance(value, torch.Tensor)]
INDICES = ("non_spec_query_start_loc", "non_spec_state_indices_tensor", "has_initial_state")
WRONG: dict[str, Callable[[Call], None]] = {
    **{f"{name} of another dtype": _with(name, lambda t: t.to(torch.float64)) for name in TENSORS},
    **{f"{name} on another device": _with(name, lambda t: t.to("meta")) for name in TENSORS if name not in INDICES},
    **{f"{name} with a dimension more": _with(name, lambda t: t[None]) for name in TENSORS},
    **{f"{name} without its last entry": _with(name, lambda t: t[..., :-1]) for name in TENSORS},
    **{f"{name} without its first entry": _with(name, lambda t: t[1:]) for name in TENSORS},
    "activation": _set(activation="gelu"),
    "tp_size 3": _set(tp_size=3),
    "tp_size 0": _set(tp_size=0),
    "no heads": _set(num_k_heads=0),
    "a ratio that is no integer": _set(num_k_heads=3),
    "heads beyond 64 bits": _set(num_k_heads=1 << 70),
    "head size 0": _set(head_k_dim=0),
    "negative counts": _set(num_prefills=-1),
    "more sequences than entries": _set(num_prefills=7),
    "too many actual tokens": _set(num_actual_tokens=99),
    "negative actual tokens": _set(num_actual_tokens=-1),
    "actual tokens below the last": _set(num_actual_tokens=3),
    "no starts": _set(non_spec_query_start_loc=None),
    "no slots": _set(non_spec_state_indices_tensor=None),
    "starts that decrease": _entries("non_spec_query_start_loc", 0, 5, 3, 9, 17),
    "starts below 0": _entries("non_spec_query_start_loc", -1, 1, 15, 15, 17),
    "starts past the end": _entries("non_spec_query_start_loc", 0, 1, 15, 15, 18),
    "a slot twice": _entries("non_spec_state_indices_tensor", 2, 2, 1, 0),
    "a slot past the end": _entries("non_spec_state_indices_tensor", 2, 7, 1, 0),
    "a slot below -1": _entries("non_spec_state_indices_tensor", 2, -2, 1, 0),
    "a row twice": _set(non_spec_token_indx=torch.tensor([*range(16), 3])),
    "a padding row": _set(non_spec_token_indx=torch.tensor([*range(16), 18])),
    "too few rows": _set(non_spec_token_indx=torch.arange(16)),
    "qkvz transposed": _with("projected_states_qkvz", lambda t: t.T.contiguous().T),
    "weights transposed": _with("conv_weights", lambda t: t.T.contiguous().T),
    "a strided gate": _with("A_log", lambda t: torch.stack([t, t], 1)[:, 0]),
    "a strided slot": _with("ssm_state", lambda t: t.mT.contiguous().mT),
    "checkpoints without slots": _set(checkpoint_token_indx=torch.tensor([3])),
    "a checkpoint past the end": _set(
        checkpoint_token_indx=torch.tensor([17]), checkpoint_state_indices=torch.tensor([5])
    ),
    "a source that another sequence writes": lambda call: call.update(
        source_state_indices=call["non_spec_state_indices_tensor"].roll(1)
    ),
    "drafts without metadata": _set(num_spec_decodes=1),
}
# What looks as odd and is right.
RIGHT: dict[str, Callable[[Call], None]] = {
    "as it is": _set(),
    "a slot twice, once for nothing": lambda call: call["non_spec_state_indices_tensor"].__setitem__(
        2, call["non_spec_state_indices_tensor"][0]
    ),
    "a row twice, once for a skipped sequence": lambda call: (
        call["non_spec_state_indices_tensor"].__setitem__(0, -1),
        call.update(non_spec_token_indx=torch.tensor([3, *range(16)])),
    )[1],
    "parameters": _with("A_log", lambda t: torch.nn.Parameter(t)),
    "a column of slots": _with("non_spec_state_indices_tensor", lambda t: torch.stack([t + 90, t, t + 90], 1)[:, 1]),
    "every other truth": _with("has_initial_state", lambda t: torch.stack([t, ~t], 1)[:, 0]),
    "64 bits": _with("non_spec_query_start_loc", lambda t: t.long()),
    "swish": _set(activation="swish"),
}


def outcome(kernel: Callable[..., None], call: Call) -> tuple[str | None, Call]:
    call = {
        k: v.clone() if k in WRITTEN and v.device.type == "cpu" and v.is_contiguous() else v for k, v in call.items()
    }
    try:
        kernel(**call)
    except ValueError as error:
        return str(error), call
    return None, call


@pytest.mark.parametrize("change", [*WRONG, *RIGHT])
def test_the_entry_and_the_reference_agree(change: str) -> None:
    call = valid()
    {**WRONG, **RIGHT}[change](call)
    want, expected = outcome(reference.gdn_attention, call)
    got, found = outcome(gdn.gdn_attention, call)
    assert got == want
    assert (want is None) == (change in RIGHT)
    for name in WRITTEN:
        if want is None:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, equal_nan=True)
        elif call[name].device.type == "cpu":
            assert torch.equal(found[name].nan_to_num(), call[name].nan_to_num())


def test_the_plain_way_asks_nothing_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    call = valid()
    monkeypatch.setattr(gdn, "_prepared", None)
    for change in RIGHT.values():
        changed = clone_call(call)
        change(changed)
        gdn.gdn_attention(**changed)


def test_an_entry_that_cannot_be_made_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from opreg.kernels.cpu import host

    monkeypatch.setattr(host, "_TORCH", ("aoti_torch_get_nothing",))
    host._table.cache_clear()
    gdn._native.cache_clear()
    try:
        assert "cannot read the arguments" in (gdn.why_not() or "")
    finally:
        monkeypatch.undo()
        host._table.cache_clear()
        gdn._native.cache_clear()
    assert gdn.why_not() is None


def test_every_argument_stands_where_the_entry_looks() -> None:
    names = [*inspect.signature(gdn.gdn_attention).parameters]
    source = (gdn.build.CSRC / "gdn.cpp").read_text(encoding="utf-8")
    listed = source[source.index("enum Argument {") : source.index("ARGUMENTS\n")].partition("{")[2]
    assert len([name for name in listed.replace("\n", " ").split(",") if name.strip()]) == len(names) + 3


@pytest.mark.parametrize("name", [n for n in TENSORS if valid()[n].is_floating_point()])
def test_a_negative_view_is_read_and_written_as_what_it_shows(name: str) -> None:
    want, got = valid(), valid()
    gdn.gdn_attention(**want)
    got[name] = shown = negative(got[name])
    gdn.gdn_attention(**got)
    assert shown.is_neg()
    for written in WRITTEN:
        assert torch.equal(got[written].resolve_neg().nan_to_num(), want[written].nan_to_num())
