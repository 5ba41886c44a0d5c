"""What the Triton attention launches: from shapes alone, without waiting for the device, and what it refuses."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from opreg.kernels.triton import kv_cache_update as cache_update
from opreg.kernels.triton import rpa, rpa_launch
from opreg.kernels.triton.rpa_launch import Device
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

H100 = Device(132, 227 * 1024)


class Recorder:
    """Stands for a kernel: keeps the grid and the arguments of every launch, and computes nothing."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append((grid, args, options))


class Operations(TorchDispatchMode):
    """The names of all torch operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    recorders = {name: Recorder() for name in ("attend_blocks", "merge_splits", "write_step", "write_slots")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(rpa_launch if name in ("attend_blocks", "merge_splits") else cache_update, name, recorder)
    return recorders


def batch(
    tokens: int,
    seqs: int,
    device: str,
    *,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Any]:
    def index(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    q = torch.empty((tokens, heads[0], head_dim), dtype=dtype, device=device)
    pages = torch.empty((64, 16, 2 * heads[1], head_dim), dtype=dtype, device=device)
    return [q, pages, index(seqs), index(seqs, 512), index(seqs + 1), index(1)]


@pytest.mark.parametrize(
    ("tokens", "seqs", "attentions", "merges"), [(16, 16, 1, 1), (256, 256, 1, 0), (2048, 16, 2, 1), (2048, 256, 2, 0)]
)
def test_nothing_on_the_host_reads_a_tensor(recorded, monkeypatch, tokens, seqs, attentions, merges):
    """Tensors without values (device meta) are enough, and memory is all that torch is asked for."""
    monkeypatch.setattr(rpa_launch, "device_facts", lambda device: H100)
    arguments = batch(tokens, seqs, "meta", head_dim=128)
    new = torch.empty((tokens, 8, 128), dtype=torch.bfloat16, device="meta")
    slots = torch.empty(tokens, dtype=torch.int64, device="meta")
    with Operations() as ran:
        rpa.ragged_paged_attention(*arguments)
        rpa.ragged_paged_attention_lse(*arguments, sliding_window=4000, soft_cap=5.0)
        rpa.ragged_paged_attention_update(arguments[0], new, new, *arguments[1:])
        cache_update.kv_cache_update(new, new, arguments[1], slots)
    assert ran.names == {"aten::empty.memory_format"}
    count = {name: len(recorder.launches) for name, recorder in recorded.items()}
    assert count == {"attend_blocks": 3 * attentions, "merge_splits": 3 * merges, "write_step": 1, "write_slots": 1}


def test_the_cache_is_written_before_it_is_read(recorded):
    order: list[str] = []
    for name in ("write_step", "attend_blocks"):
        recorded[name].launches = type("", (), {"append": lambda self, launch, name=name: order.append(name)})()
    arguments = batch(1, 1, "meta")
    new = torch.empty((1, 8, 128), dtype=torch.bfloat16, device="meta")
    rpa.ragged_paged_attention_update(arguments[0], new, new, *arguments[1:])
    assert order == ["write_step", "attend_blocks"]


def plans(tokens, seqs, capacity=8192, window=None, heads=8, group=4, head_dim=128, itemsize=2, device=H100):
    return rpa_launch.plans(tokens, seqs, capacity, window, heads, group, head_dim, itemsize, device)


def test_a_decode_step_is_one_launch_of_small_blocks():
    (plan,) = plans(64, 64)
    assert (plan.any_sequence, plan.skip, plan.block_q, plan.tiles.rows) == (True, 0, 4, 16)
    # Padding of the sequence axis changes nothing: no more than `tokens` of them have rows.
    assert plans(2, 1024) == plans(2, 2)


def test_few_sequences_are_split_more_than_many():
    assert [plans(n, n)[0].splits for n in (1, 4, 16, 64, 256)] == [64, 24, 6, 1, 1]
    # No more splits than a window, or the longest sequence, has tiles for.
    assert plans(1, 1, window=256)[0].splits == 3
    assert plans(1, 1, capacity=100)[0].splits == 1


def test_a_mixed_batch_is_two_launches_and_every_sequence_belongs_to_one():
    short, long = plans(2048, 64)
    assert (short.any_sequence, short.blocks, short.block_q) == (False, 64, 4)
    assert (long.any_sequence, long.skip, long.splits) == (True, short.block_q, 1)
    # Drafts of a few tokens are decoded with their KV split whatever the group.
    for group in (1, 5, 8, 16):
        assert plans(64, 16, group=group)[0].block_q >= 4
    # A group is never cut.
    for group in (71, 128):
        assert all(plan.block_q >= 1 for plan in plans(64, 16, group=group))


@pytest.mark.parametrize("lengths", [[2048], [1] * 63, [33] * 62, [31, 1] * 32, [0, 5] * 32, [0] * 64, [1, 0, 0, 2047]])
def test_every_sequence_has_room_for_its_blocks(lengths):
    """Wherever the rows are cut into sequences: partial blocks, sequences without rows, and padding after them."""
    plan = plans(2048, 64)[1]
    starts = [*accumulate(lengths, initial=0)]
    rooms = [start // plan.block_q + min(i, start) for i, start in enumerate(starts)]
    blocks = [-(-n // plan.block_q) for n in lengths]
    assert all(after - before >= n for before, after, n in zip(rooms, rooms[1:], blocks, strict=False))
    assert rooms[-1] - (-(2048 - starts[-1]) // plan.block_q) <= plan.blocks


def test_tiles_fit_the_shared_memory_of_every_card():
    """q, and two tiles of K and V: about what Triton 3.7 keeps, which compile_rpa.py reads off."""
    for shared in (99 * 1024, 163 * 1024, 227 * 1024):
        for head_dim in (64, 128, 256):
            for plan in plans(2048, 64, head_dim=head_dim, device=Device(80, shared)):
                assert 2 * head_dim * (plan.tiles.rows + 4 * plan.tiles.positions) <= shared


REFUSED = [
    ({"head_dim": 512}, {}, "head_dim is 512; at most 256"),
    ({"heads": (129, 1)}, {}, "129 query heads share a kv head; at most 128 where products are torch.bfloat16"),
    ({"heads": (33, 1), "dtype": torch.float32}, {}, "33 query heads share a kv head; at most 32 where products are"),
    ({}, {"sm_scale": -1.0}, "sm_scale is -1.0"),
]


@pytest.mark.parametrize(("sizes", "options", "reason"), REFUSED)
def test_refusals(sizes, options, reason):
    arguments = batch(4, 2, "meta", **sizes)
    new = torch.empty((4, *arguments[1].shape[2:]), device="meta")
    assert reason in rpa.why_not(*arguments, **options)
    assert reason in rpa.why_not_update(arguments[0], new, new, *arguments[1:], **options)


def test_a_cache_with_gaps_between_elements_is_refused():
    arguments = batch(4, 2, "meta")
    new, slots = torch.empty((4, 8, 64), device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    arguments[1] = arguments[1][..., ::2]
    assert "not contiguous (stride 2)" in rpa.why_not(*arguments)
    assert "not contiguous (stride 2)" in cache_update.why_not(new, new, arguments[1], slots)


@pytest.mark.parametrize(
    ("version", "dtype", "reason"),
    [
        ((7, 5), torch.float16, "compute capability 7.5; the kernels are for 8.0"),
        ((8, 6), torch.float8_e4m3fn, "compute capability 8.6; Triton has float8_e4m3fn from 8.9"),
        ((8, 6), torch.float8_e5m2, None),
        ((8, 9), torch.float8_e4m3fn, None),
        ((9, 0), torch.int8, None),
    ],
)
def test_refusals_by_compute_capability(monkeypatch, version, dtype, reason):
    monkeypatch.setattr(cache_update, "capability", lambda device: version)
    with FakeTensorMode():
        arguments = batch(4, 2, "cuda")
        arguments[1] = arguments[1].to(dtype)
        said = rpa.why_not(*arguments)
    assert said is None if reason is None else reason in said


def test_a_mistake_is_left_to_the_kernel_to_explain():
    arguments = batch(4, 2, "meta")
    assert rpa.why_not(arguments[0].double(), *arguments[1:]) is None
    with pytest.raises(ValueError, match=r"q is torch.float64; use one of"):
        rpa.ragged_paged_attention(arguments[0].double(), *arguments[1:])
