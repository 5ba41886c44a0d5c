"""Drafts, checkpoints and impossible metadata in the Triton gdn_attention (interpreter): nothing is ever corrupted."""

import random
from typing import Any

import pytest
import torch
from opreg.kernels.reference import gdn as reference
from opreg.kernels.triton import gdn, gdn_launch, gdn_mixed
from opreg.ops.gdn_attention_inputs import Heads, clone_call, make_call

HEADS = Heads(1, 1, 16, 16)
PACKED = ("projected_states_qkvz", "projected_states_ba")
WRITTEN = ("core_attn_out", "z", "conv_state", "ssm_state")


class Server:
    """Serves sequences whose true tokens are known, with a row of slots each, and keeps what the op put out."""

    def __init__(self, lengths: list[int], drafts: int, spare_conv_rows: int = 0) -> None:
        fresh = [False] * len(lengths)
        self.truth = make_call(lengths, HEADS, initial=fresh, spare_slots=0, spare_conv_rows=spare_conv_rows)
        self.starts = self.truth["non_spec_query_start_loc"].tolist()
        slots = len(lengths) * (drafts + 1)
        order = torch.randperm(slots, generator=torch.Generator().manual_seed(7))
        self.table = order.view(len(lengths), drafts + 1)
        self.states = {n: torch.full((slots, *self.truth[n].shape[1:]), float("nan")) for n in WRITTEN[2:]}
        self.done, self.accepted = [0] * len(lengths), [0] * len(lengths)
        self.out = torch.full_like(self.truth["core_attn_out"], float("nan"))

    def step(self, plain: dict[int, int], spec: dict[int, tuple[int, int]], seed: int) -> None:
        """One step: `plain[i]` tokens of sequence i; or (drafts, how many of them are right) of it."""
        rows = [(i, self.done[i] + t, True) for i, n in plain.items() for t in range(n)]
        rows += [(i, self.done[i] + t, t <= right) for i, (n, right) in spec.items() for t in range(n + 1)]
        generator = torch.Generator().manual_seed(seed)
        place = torch.randperm(len(rows), generator=generator)
        call = dict(self.truth, **self.states)
        for name in PACKED:
            call[name] = torch.randn(len(rows), self.truth[name].shape[1], generator=generator)
        for name in WRITTEN[:2]:
            call[name] = torch.full((len(rows), *self.out.shape[1:]), float("nan"))
        for at, (i, t, right) in zip(place.tolist(), rows, strict=True):
            for name in PACKED if right else ():
                call[name][at] = self.truth[name][self.starts[i] + t]
        count = sum(plain.values())
        call.update(
            num_prefills=len(plain),
            num_decodes=0,
            num_spec_decodes=len(spec),
            has_initial_state=torch.tensor([self.done[i] > 0 for i in plain], dtype=torch.bool),
            non_spec_query_start_loc=torch.tensor([0, *plain.values()]).cumsum(0),
            non_spec_state_indices_tensor=self.table[list(plain), 0],
            source_state_indices=torch.tensor([int(self.table[i, max(self.accepted[i] - 1, 0)]) for i in plain]),
            non_spec_token_indx=place[:count],
            spec_query_start_loc=torch.tensor([0, *(n + 1 for n, _ in spec.values())]).cumsum(0),
            spec_token_indx=place[count:],
            spec_state_indices_tensor=self.table[list(spec)],
            num_accepted_tokens=torch.tensor([self.accepted[i] for i in spec], dtype=torch.int32),
        )
        gdn.gdn_attention(**call)
        for at, (i, t, right) in zip(place.tolist(), rows, strict=True):
            assert not call["core_attn_out"][at].isnan().any()
            assert torch.equal(call["z"][at].flatten(), call[PACKED[0]][at, -16:])
            if right:
                self.out[self.starts[i] + t] = call["core_attn_out"][at]
        for i, n in plain.items():
            self.done[i], self.accepted[i] = self.done[i] + n, 1
        for i, (_, right) in spec.items():
            self.done[i], self.accepted[i] = self.done[i] + right + 1, right + 1


def test_any_trajectory_equals_one_plain_call() -> None:
    drafts, lengths = 3, [16, 12, 10]
    server = Server(lengths, drafts)
    rng = random.Random(43)
    seen = set()
    while any(d < n for d, n in zip(server.done, lengths, strict=True)):
        plain: dict[int, int] = {}
        spec: dict[int, tuple[int, int]] = {}
        for i, n in enumerate(lengths):
            left = n - server.done[i]
            if not left:
                continue
            if server.done[i] == 0:
                plain[i] = [drafts + 1, 1, 2][i]  # a prompt of exactly drafts + 1 tokens is still a prompt
            elif rng.random() < 0.4:
                plain[i] = min(left, rng.choice([1, 1, 2]))
                seen.add(("plain after", server.accepted[i]))
            else:
                some = min(rng.randint(0, drafts), left - 1)
                spec[i] = (some, rng.randint(0, some))
                seen.add(("drafts", some))
        server.step(plain, spec, sum(server.done))
    assert {("drafts", 0), ("drafts", 3), ("plain after", 2), ("plain after", 3), ("plain after", 4)} <= seen
    want = clone_call(server.truth)
    reference._gdn_attention(torch.float64, **want)
    torch.testing.assert_close(server.out, want["core_attn_out"], rtol=1e-4, atol=1e-6)


def test_nothing_accepted_goes_on_from_the_first_column() -> None:
    first, second = (Server([8], 2) for _ in range(2))
    for server, accepted in ((first, 0), (second, 1)):
        server.step({0: 3}, {}, 0)
        server.accepted[0] = accepted
        server.step({}, {0: (2, 2)}, 1)
    assert torch.equal(first.out.nan_to_num(), second.out.nan_to_num())


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_cache_of_another_convention_is_an_error(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    """One rolling buffer in column 0, as vLLM's kernels keep it, never wrote the slots of the other columns."""
    if on_gpu:
        unchecked(monkeypatch)
    server = Server([12, 12], 2, spare_conv_rows=2)
    server.step({0: 3, 1: 3}, {}, 0)
    server.step({}, {0: (2, 2), 1: (2, 2)}, 1)
    others = server.table[0, 1:]
    written = {name: server.states[name][others].clone() for name in server.states}
    server.states["conv_state"][others] = 0
    before = {name: state.clone() for name, state in server.states.items()}
    with pytest.raises(ValueError, match="hold windows one token apart, so another kind of kernel wrote"):
        server.step({}, {0: (1, 1), 1: (1, 1)}, 2)
    for name, state in server.states.items():
        mine = server.table[0]
        assert torch.equal(state[mine].nan_to_num(7.0), before[name][mine].nan_to_num(7.0))
        state.copy_(before[name])
        state[others] = written[name]
    server.step({}, {0: (1, 1), 1: (1, 1)}, 2)


def test_a_cache_without_room_for_another_convention_may_hold_any_windows() -> None:
    server = Server([12, 12], 2, spare_conv_rows=1)
    server.step({0: 3, 1: 3}, {}, 0)
    server.step({}, {0: (2, 2), 1: (2, 2)}, 1)
    conv = server.states["conv_state"]
    conv[server.table[0]] = torch.randn_like(conv[server.table[0]])
    oldest = conv[server.table[0, 2], 2].clone()
    server.step({}, {0: (1, 1), 1: (1, 1)}, 2)
    assert torch.equal(conv[server.table[0, 1], 0], oldest)  # two tokens on, in column 1


def test_rows_of_another_convention_are_nan_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    unchecked(monkeypatch)
    reports = gdn_mixed.Windows()
    for module in (gdn, gdn_launch):
        monkeypatch.setattr(module, "windows", reports)
    monkeypatch.setattr(reports, "check", lambda _: None)  # as on a GPU, where the report arrives later
    call = make_call([2, 2], HEADS, spare_slots=2, spare_conv_rows=1)
    call.update(
        num_prefills=0,
        num_spec_decodes=2,
        spec_query_start_loc=torch.tensor([0, 2, 4]),
        spec_state_indices_tensor=torch.tensor([[0, 1], [2, 3]]),
        num_accepted_tokens=torch.tensor([2, 2]),
    )
    call["conv_state"][1, :-1] = call["conv_state"][0, 1:]
    got = clone_call(call)
    gdn.gdn_attention(**got)
    assert got["core_attn_out"][2:].isnan().all()
    assert got["z"][2:].isnan().all()
    assert not got["core_attn_out"][:2].isnan().any()
    for state in WRITTEN[2:]:
        assert torch.equal(got[state][2:], call[state][2:])
        assert not torch.equal(got[state][0], call[state][0])
    assert reports.report(call["z"].device).item() == 1


class Module:
    """A device whose events come when told to, and which may be recording a graph."""

    def __init__(self) -> None:
        self.done, self.recording, self.events = False, False, 0

    def Event(self) -> "Module":
        return self

    def record(self) -> None:
        self.events += 1

    def query(self) -> bool:
        return self.done

    def is_current_stream_capturing(self) -> bool:
        return self.recording


def test_a_report_is_fetched_without_waiting_and_raised_once() -> None:
    module, reports = Module(), gdn_mixed.Windows()
    here = torch.device("cpu")
    reports.report(here)
    device = reports._devices[here]
    device.module = module
    reports.check(here)  # starts the first copy
    device.report.fill_(1)
    reports.check(here)  # not there yet: no second copy, no wait
    assert module.events == 1
    module.done = True
    reports.check(here)  # the first copy came before the report
    assert module.events == 2
    module.recording = True
    reports.check(here)
    module.recording = False
    with pytest.raises(ValueError, match="another kind of kernel wrote this cache"):
        reports.check(here)
    reports.check(here)
    assert not device.report.any()


def with_checkpoints(call: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints in both forms, at both ends of a chunk and inside, out of order."""
    used = set(call["non_spec_state_indices_tensor"].tolist())
    spare = [s for s in range(9) if s not in used]
    own = int(call["non_spec_state_indices_tensor"][1])
    # Two to one slot, where the later token's state stays, in each form; one to a null slot, one to the sequence's own.
    pairs = [(5 + 99, spare[0]), (1, spare[1]), (5 + 1, spare[2]), (5 + 63, spare[3]), (4, spare[4]), (3, spare[4])]
    pairs += [(5 + 50, spare[5]), (5 + 40, spare[5]), (5 + 20, -1), (5 + 30, own)]
    tokens, slots = zip(*pairs, strict=True)
    return {"checkpoint_token_indx": torch.tensor(tokens), "checkpoint_state_indices": torch.tensor(slots)}


@pytest.mark.parametrize("known", [True, False])
def test_checkpoints_hold_what_the_reference_puts_there(known: bool) -> None:
    call = make_call([5, 100], HEADS, initial=[known, known], spare_slots=7)
    more = with_checkpoints(call)
    got, want = clone_call(call), clone_call(call)
    gdn.gdn_attention(**got, **more)
    reference.gdn_attention(**want, **more)
    torch.testing.assert_close(got["core_attn_out"], want["core_attn_out"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got["ssm_state"], want["ssm_state"], rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(got["conv_state"], want["conv_state"], rtol=0, atol=0, equal_nan=True)


def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the values of index tensors are not known on the host."""
    monkeypatch.setattr(gdn, "sequences", lambda *_: [])


WRONG: list[tuple[str, list[int]]] = [
    ("non_spec_state_indices_tensor", [1, 77, 0]),
    ("non_spec_state_indices_tensor", [1, -2, 0]),
    ("source_state_indices", [1, 6, 0]),
    ("source_state_indices", [1, -1, 0]),
]


@pytest.mark.parametrize(("name", "values"), WRONG)
@pytest.mark.parametrize("count", [2, 18])
def test_slots_that_cannot_be_give_nan_and_touch_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, values: list[int], count: int
) -> None:
    unchecked(monkeypatch)
    call = make_call([1, count, 1], HEADS)
    call["non_spec_state_indices_tensor"] = torch.tensor([1, 2, 0])
    good = clone_call(call)
    gdn.gdn_attention(**good)
    got = {**clone_call(call), name: torch.tensor(values)}
    gdn.gdn_attention(**got)
    assert got["core_attn_out"][1:-1].isnan().all()
    assert got["z"][1:-1].isnan().all()
    assert torch.equal(got["core_attn_out"][[0, -1]], good["core_attn_out"][[0, -1]])
    for state in WRITTEN[2:]:
        assert torch.equal(got[state][:2], good[state][:2])
        assert torch.equal(got[state][2:], call[state][2:])


@pytest.mark.parametrize("change", [{"num_accepted_tokens": [1, 4]}, {"spec_state_indices_tensor": [[0, 1], [2, 9]]}])
def test_drafts_that_cannot_be_give_nan_and_touch_nothing(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, list[int]]
) -> None:
    unchecked(monkeypatch)
    call = make_call([2, 2], HEADS)
    call.update(
        num_prefills=0,
        num_spec_decodes=2,
        spec_query_start_loc=torch.tensor([0, 2, 4]),
        spec_state_indices_tensor=torch.tensor([[0, 1], [2, 3]]),
        num_accepted_tokens=torch.tensor([1, 2]),
    )
    got = {**clone_call(call), **{name: torch.tensor(values) for name, values in change.items()}}
    gdn.gdn_attention(**got)
    assert got["core_attn_out"][2:].isnan().all()
    assert not got["core_attn_out"][:2].isnan().any()
    for state in WRITTEN[2:]:
        assert torch.equal(got[state][2:], call[state][2:])


def test_starts_and_rows_that_cannot_be_touch_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    unchecked(monkeypatch)
    call = make_call([1, 20, 30], HEADS)
    for starts, lost in (([0, 1, 21, 99], range(21, 51)), ([0, -5, 21, 51], range(21)), ([0, 30, 20, 51], ())):
        got = {**clone_call(call), "non_spec_query_start_loc": torch.tensor(starts)}
        gdn.gdn_attention(**got)
        assert got["core_attn_out"].isnan().all(-1).flatten().tolist() == [r in lost for r in range(51)]
    rows = torch.arange(51)
    rows[25] = 1_000_000
    got = {**clone_call(call), "non_spec_token_indx": rows}
    gdn.gdn_attention(**got)
    assert not got["core_attn_out"][25].any()
    got = {**clone_call(call), "non_spec_token_indx": torch.arange(40)}
    gdn.gdn_attention(**got)
    assert got["core_attn_out"][21:40].isnan().all()
    assert not got["core_attn_out"][40:].any()


VALUES = [
    ({"non_spec_state_indices_tensor": torch.tensor([0, 77])}, r"non_spec_state_indices_tensor\[1\] is slot 77"),
    ({"non_spec_state_indices_tensor": torch.tensor([1, 1])}, "which another sequence of this call writes too"),
    ({"non_spec_query_start_loc": torch.tensor([0, 1, 9])}, "outside 0..3"),
]
SHAPES = [
    ({"num_prefills": -1}, "num_prefills is -1"),
    ({"has_initial_state": torch.zeros(2)}, "has_initial_state is torch.float32, expected torch.bool"),
    ({"non_spec_state_indices_tensor": None}, "non_spec_state_indices_tensor is None"),
    ({"non_spec_query_start_loc": torch.tensor([0, 3])}, r"non_spec_query_start_loc has shape \(2,\)"),
    ({"non_spec_token_indx": torch.zeros(3)}, "non_spec_token_indx is torch.float32"),
    ({"checkpoint_token_indx": torch.tensor([1])}, "must be given together"),
    ({"num_spec_decodes": 1}, "spec_token_indx is None, but a batch of both kinds"),
    ({"num_prefills": 0, "num_decodes": 0, "num_spec_decodes": 1}, "needs spec_query_start_loc"),
]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_wrong_metadata_is_named(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    """Its values where it is on the CPU, its shapes and types everywhere."""
    if on_gpu:
        unchecked(monkeypatch)
    call = make_call([1, 2], HEADS)
    for change, message in SHAPES if on_gpu else [*VALUES, *SHAPES]:
        with pytest.raises(ValueError, match=f"opreg::gdn_attention: .*{message}"):
            gdn.gdn_attention(**{**call, **change})
