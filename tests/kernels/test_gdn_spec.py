"""Speculative decoding, checkpoints and null slots: every trajectory equals plain decoding of the same tokens."""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from opreg.kernels.cpu import gdn, gdn_torch
from opreg.kernels.reference import gdn as reference
from opreg.ops.gdn_attention_inputs import Heads, clone_call, make_call

Kernel = Callable[..., None]
KERNELS: dict[str, Kernel] = {
    "reference": reference.gdn_attention,
    "torch": gdn_torch.gdn_attention_torch,
    "c++": gdn.gdn_attention,
}
PACKED = ("projected_states_qkvz", "projected_states_ba")


@pytest.fixture(params=list(KERNELS))
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Each kernel in turn."""
    return KERNELS[request.param]


class Server:
    """Serves sequences whose true tokens are known, with one row of slots each, and keeps what the op put out."""

    def __init__(
        self,
        kernel: Kernel,
        lengths: list[int],
        drafts: int,
        dtype: torch.dtype,
        heads: Heads | None = None,
        spare_conv_rows: int = 0,
    ) -> None:
        self.kernel, self.drafts = kernel, drafts
        heads, fresh = heads or Heads(1, 2), [False] * len(lengths)
        self.truth = make_call(
            lengths, heads, dtype=dtype, initial=fresh, spare_conv_rows=spare_conv_rows, spare_slots=0
        )
        self.starts = self.truth["non_spec_query_start_loc"].tolist()
        slots = len(lengths) * (drafts + 1)
        order = torch.randperm(slots, generator=torch.Generator().manual_seed(7))
        self.table = order.view(len(lengths), drafts + 1).to(torch.int32)
        self.states = {n: torch.full((slots, *self.truth[n].shape[1:]), float("nan"), dtype=self.truth[n].dtype)
                       for n in ("conv_state", "ssm_state")}  # fmt: skip
        self.done, self.accepted = [0] * len(lengths), [0] * len(lengths)
        self.out = torch.full_like(self.truth["core_attn_out"], float("nan"))

    def step(self, plain: dict[int, int], spec: dict[int, tuple[int, int]], seed: int) -> None:
        """One step: `plain[i]` tokens of sequence i; or (drafts, how many of them are right) of it."""
        rng = random.Random(seed)
        rows: list[tuple[int, int, bool]] = []
        for i, n in plain.items():
            rows += [(i, self.done[i] + t, True) for t in range(n)]
        for i, (n, right) in spec.items():
            rows += [(i, self.done[i] + t, t <= right) for t in range(n + 1)]
        shuffled = list(range(len(rows)))
        rng.shuffle(shuffled)
        place = torch.tensor(shuffled, dtype=torch.int64)
        qkvz, ba = (torch.empty(len(rows), self.truth[n].shape[1], dtype=self.truth[n].dtype) for n in PACKED)
        noise = torch.Generator().manual_seed(seed)
        for at, (i, t, right) in zip(shuffled, rows, strict=True):
            for tensor, name in ((qkvz, PACKED[0]), (ba, PACKED[1])):
                if right:
                    tensor[at] = self.truth[name][self.starts[i] + t]
                else:
                    tensor[at] = torch.randn(tensor.shape[1], generator=noise).to(tensor.dtype)
        count = sum(plain.values())
        call = dict(self.truth, **self.states)
        call.update(
            projected_states_qkvz=qkvz,
            projected_states_ba=ba,
            core_attn_out=torch.full((len(rows), *self.out.shape[1:]), float("nan"), dtype=qkvz.dtype),
            z=torch.full((len(rows), *self.out.shape[1:]), float("nan"), dtype=qkvz.dtype),
            num_prefills=len(plain),
            num_decodes=0,
            num_spec_decodes=len(spec),
            has_initial_state=torch.tensor([self.done[i] > 0 for i in plain], dtype=torch.bool),
            non_spec_query_start_loc=torch.tensor([0, *plain.values()]).cumsum(0),
            non_spec_state_indices_tensor=self.table[list(plain), 0],
            source_state_indices=torch.tensor([self.table[i, max(self.accepted[i] - 1, 0)] for i in plain]),
            non_spec_token_indx=place[:count],
            spec_query_start_loc=torch.tensor([0, *(n + 1 for n, _ in spec.values())]).cumsum(0),
            spec_token_indx=place[count:],
            spec_state_indices_tensor=self.table[list(spec)],
            num_accepted_tokens=torch.tensor([self.accepted[i] for i in spec], dtype=torch.int32),
        )
        self.kernel(**call)
        for at, (i, t, right) in zip(shuffled, rows, strict=True):
            assert not call["core_attn_out"][at].isnan().any()
            if right:
                self.out[self.starts[i] + t] = call["core_attn_out"][at]
        for i, n in plain.items():
            self.done[i], self.accepted[i] = self.done[i] + n, 1
        for i, (_, right) in spec.items():
            self.done[i], self.accepted[i] = self.done[i] + right + 1, right + 1


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_any_trajectory_equals_one_plain_call(kernel: Kernel, dtype: torch.dtype, limit: float) -> None:
    check_trajectory(Server(kernel, [40, 33, 29], 3, dtype), limit)


def check_trajectory(server: Server, limit: float) -> None:
    """Serve three sequences by a random mixture of plain and speculative steps; compare with one plain call."""
    drafts, lengths = server.drafts, [b - a for a, b in pairwise(server.starts)]
    rng = random.Random(3)
    seed = 0
    while any(d < n for d, n in zip(server.done, lengths, strict=True)):
        plain: dict[int, int] = {}
        spec: dict[int, tuple[int, int]] = {}
        for i, n in enumerate(lengths):
            left = n - server.done[i]
            if not left or (rng.random() < 0.2 and seed):
                continue  # a sequence may sit out
            if server.done[i] == 0:
                plain[i] = [drafts + 1, 1, 17][i]  # a prompt of exactly drafts + 1 tokens is still a prompt
            elif rng.random() < 0.4:
                plain[i] = min(left, rng.choice([1, 1, 2]))
            else:
                some = min(rng.randint(0, drafts), left - 1)
                spec[i] = (some, rng.randint(0, some))
        if plain or spec:
            server.step(plain, spec, seed)
        seed += 1
    want = clone_call(server.truth)
    reference._gdn_attention(torch.float64, **want)
    error = (server.out.double() - want["core_attn_out"].double()).pow(2).mean().sqrt()
    assert error / want["core_attn_out"].double().pow(2).mean().sqrt() < limit


def test_nothing_accepted_goes_on_from_the_first_column(kernel: Kernel) -> None:
    first, second = (Server(kernel, [12], 2, torch.float32) for _ in range(2))
    for server, accepted in ((first, 0), (second, 1)):
        server.step({0: 5}, {}, 0)
        server.accepted[0] = accepted
        server.step({}, {0: (2, 2)}, 1)
    assert torch.equal(first.out.nan_to_num(), second.out.nan_to_num())


def test_a_cache_of_another_convention_is_an_error(kernel: Kernel) -> None:
    """One rolling buffer in column 0, as vLLM's kernels keep it, never wrote the slots of the other columns."""
    server = Server(kernel, [20], 2, torch.bfloat16, spare_conv_rows=2)
    server.step({0: 5}, {}, 0)
    server.step({}, {0: (2, 2)}, 1)
    others = server.table[0, 1:].long()
    written = {name: server.states[name][others].clone() for name in server.states}
    server.states["conv_state"][others] = 0
    before = {name: state.clone() for name, state in server.states.items()}
    with pytest.raises(ValueError, match="do not hold windows one token apart, so another kind of kernel wrote"):
        server.step({}, {0: (1, 1)}, 2)
    for name, state in server.states.items():
        assert torch.equal(state.nan_to_num(7.0), before[name].nan_to_num(7.0))
        state[others] = written[name]
    server.step({}, {0: (1, 1)}, 2)


def test_a_cache_without_room_for_another_convention_may_hold_any_windows(kernel: Kernel) -> None:
    """Of width - 1 rows to a slot, or one short of a rolling buffer: as Intel's own tests draw."""
    for spare in (0, 1):
        server = Server(kernel, [20], 2, torch.float32, spare_conv_rows=spare)
        server.step({0: 5}, {}, 0)
        server.step({}, {0: (2, 2)}, 1)
        slots = server.table[0].long()
        server.states["conv_state"][slots] = torch.randn_like(server.states["conv_state"][slots])
        wanted = {name: state.clone() for name, state in server.states.items()}
        server.step({}, {0: (1, 1)}, 2)
        assert not server.out[5:10].isnan().any()
        # Two tokens were fed from the window of column 2, and the last of it is the first of the newest one.
        oldest = wanted["conv_state"][slots[2], 2]
        assert torch.equal(server.states["conv_state"][slots[1], 0], oldest)


def test_checkpoints_hold_the_state_after_their_token(kernel: Kernel) -> None:
    call = make_call([9, 150], Heads(1, 2), initial=[True, False], spare_slots=6)
    used = set(call["non_spec_state_indices_tensor"].tolist())
    spare = [s for s in range(8) if s not in used]
    offsets = [3, 8, 9 + 0, 9 + 63, 9 + 100, 9 + 149]
    whole = clone_call(call)
    kernel(
        **whole,
        checkpoint_token_indx=torch.tensor([offsets[k] for k in (5, 0, 3, 1, 4, 2)]),
        checkpoint_state_indices=torch.tensor([spare[k] for k in (5, 0, 3, 1, 4, 2)], dtype=torch.int32),
    )
    plain = clone_call(call)
    kernel(**plain)
    torch.testing.assert_close(whole["core_attn_out"], plain["core_attn_out"], rtol=1e-4, atol=1e-6)
    for offset, slot in zip(offsets, spare, strict=True):
        which, begin = (0, 0) if offset < 9 else (1, 9)
        part = clone_call(call)
        rows = slice(begin, offset + 1)
        for name in ("core_attn_out", "z", *PACKED):
            part[name] = part[name][rows]
        part.update(num_prefills=1, num_decodes=0, non_spec_query_start_loc=torch.tensor([0, offset + 1 - begin]))
        for name in ("has_initial_state", "non_spec_state_indices_tensor"):
            part[name] = part[name][which : which + 1]
        kernel(**part)
        own = int(part["non_spec_state_indices_tensor"])
        torch.testing.assert_close(whole["ssm_state"][slot], part["ssm_state"][own], rtol=1e-4, atol=1e-5)
        assert torch.equal(whole["conv_state"][slot], part["conv_state"][own])
    # Another sequence with the same prompt goes on from the checkpoint after token 100 without touching it.
    again = dict(clone_call(call), **{n: whole[n].clone() for n in ("conv_state", "ssm_state")})
    for name in ("core_attn_out", "z", *PACKED):
        again[name] = call[name][110:].clone()
    again.update(
        num_prefills=1,
        num_decodes=0,
        has_initial_state=None,
        non_spec_query_start_loc=torch.tensor([0, 49]),
        non_spec_state_indices_tensor=torch.tensor([spare[0]]),
        source_state_indices=torch.tensor([spare[4]]),
    )
    kernel(**again)
    torch.testing.assert_close(again["core_attn_out"], plain["core_attn_out"][110:], rtol=1e-4, atol=1e-6)
    assert torch.equal(again["ssm_state"][spare[4]], whole["ssm_state"][spare[4]])


def test_null_slot_zero_is_skipped_where_the_caller_says_so(kernel: Kernel) -> None:
    call = make_call([1, 1, 4], initial=None)
    call["non_spec_state_indices_tensor"] = torch.tensor([0, 3, 0], dtype=torch.int32)
    before = clone_call(call)
    kernel(**call, null_slot=0)
    assert torch.equal(call["ssm_state"][:3], before["ssm_state"][:3])
    assert not torch.equal(call["ssm_state"][3], before["ssm_state"][3])
    assert not call["core_attn_out"][2:].any()
    assert not call["z"][[0, 2, 3, 4, 5]].any()
    assert call["z"][1].all()


def spec_call() -> dict[str, Any]:
    server = Server(reference.gdn_attention, [6, 6], 2, torch.float32)
    call = dict(server.truth, **server.states)
    call.update(
        num_prefills=0,
        num_decodes=0,
        num_spec_decodes=2,
        has_initial_state=None,
        spec_query_start_loc=torch.tensor([0, 3, 6]),
        spec_state_indices_tensor=torch.tensor([[0, 1, 2], [3, 4, 5]]),
        num_accepted_tokens=torch.tensor([1, 3]),
    )
    return call


BAD = [
    ({"num_accepted_tokens": torch.tensor([1, 4])}, r"num_accepted_tokens\[1\] is 4, outside 0..3"),
    ({"num_accepted_tokens": None}, "num_spec_decodes = 2 needs spec_query_start_loc"),
    ({"spec_query_start_loc": torch.tensor([0, 4, 6])}, "gives row 0 4 tokens, but spec_state_indices_tensor has 3"),
    ({"spec_state_indices_tensor": torch.tensor([0, 1])}, r"has shape \(2,\), expected at least \(2, drafts \+ 1\)"),
    ({"spec_state_indices_tensor": torch.tensor([[0, 1, 2], [3, 4, 2]])}, r"\[1, 2\] is slot 2, which another"),
    ({"spec_state_indices_tensor": torch.tensor([[0, 1, 2], [3, 4, -1]])}, r"\[1, 2\] is the null slot -1"),
    ({"num_prefills": 1}, "spec_token_indx is None, but a batch of both kinds"),
    ({"spec_token_indx": torch.tensor([0, 1, 2, 3, 4, 4])}, "row 4 is given to two tokens"),
    ({"checkpoint_token_indx": torch.tensor([0])}, "checkpoint_token_indx is given, but there is no sequence"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_wrong_speculative_input_is_named(kernel: Kernel, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"opreg::gdn_attention: .*{message}"):
        kernel(**{**spec_call(), **change})


def test_wrong_checkpoints_are_named(kernel: Kernel) -> None:
    call = make_call([5, 3])
    for tokens, slots, message in (
        ([8], [0], r"checkpoint_token_indx\[0\] is token 8, outside 0..7"),
        ([1, 2], [0], "must be given together and have one shape"),
        ([1], [77], r"checkpoint_state_indices\[0\] is slot 77"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel(
                **clone_call(call),
                checkpoint_token_indx=torch.tensor(tokens),
                checkpoint_state_indices=torch.tensor(slots),
            )
