"""Sharding rules: two gloo processes under tensor parallelism give what one process gives."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor, nn

from opreg import RegistrationError, _compat, forward_context, ops, register_op
from opreg.backend import last_report

HIDDEN, HEADS, KV_HEADS, DIM, TOKENS, PAGE = 32, 4, 2, 8, 6, 4


class Attention(nn.Module):
    """Projections, paged attention and output projection; `ranks` share its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, HEADS * DIM, bias=False)
        self.k = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=False)
        self.v = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=False)
        self.o = nn.Linear(HEADS * DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(1, (-1, DIM)) for f in (self.q, self.k, self.v))
        out = torch.zeros_like(q)
        ops.paged_attention_core(q, k, v, out, "attn")
        return self.o(out.flatten(1))


def context(ranks: int) -> forward_context:
    """A prompt of TOKENS tokens for a cache of this rank's heads."""
    pages = -(-TOKENS // PAGE)
    layer = SimpleNamespace(kv_cache=torch.zeros(pages, PAGE, 2 * KV_HEADS // ranks, DIM), sm_scale=DIM**-0.5)
    metadata = SimpleNamespace(
        kv_lens=torch.tensor([TOKENS], dtype=torch.int32),
        page_indices=torch.arange(pages, dtype=torch.int32)[None],
        cu_q_lens=torch.tensor([0, TOKENS], dtype=torch.int32),
        num_seqs=torch.tensor([1], dtype=torch.int32),
        slot_mapping=torch.arange(TOKENS),
    )
    return forward_context(layers={"attn": layer}, metadata=metadata)


K_HEADS, V_HEADS = 2, 4


class Linear(nn.Module):
    """Projections, Gated DeltaNet and output projection; `ranks` share its heads, key head by key head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkvz = nn.Linear(HIDDEN, (2 * K_HEADS + 2 * V_HEADS) * DIM, bias=False)
        self.ba = nn.Linear(HIDDEN, 2 * V_HEADS, bias=False)
        self.o = nn.Linear(V_HEADS * DIM, HIDDEN, bias=False)
        generator = torch.Generator().manual_seed(1)
        self.conv = torch.randn((2 * K_HEADS + V_HEADS) * DIM, 4, generator=generator)
        self.gates = torch.randn(2, V_HEADS, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        qkvz, ba = self.qkvz(x), self.ba(x)
        heads = qkvz.unflatten(1, (-1, qkvz.shape[1] // K_HEADS))[..., : V_HEADS // K_HEADS * DIM]
        like = heads.unflatten(2, (-1, DIM)).flatten(1, 2)
        out, z = torch.zeros_like(like), torch.zeros_like(like)
        ops.gdn_attention_core(out, z, qkvz, ba, "gdn")
        return self.o((out * torch.sigmoid(z)).flatten(1))

    def layer(self, rank: int, ranks: int) -> SimpleNamespace:
        """The weights and fresh states of one rank's heads."""
        keys, values = K_HEADS // ranks * DIM, V_HEADS // ranks * DIM
        q, k, v = self.conv.split([K_HEADS * DIM, K_HEADS * DIM, V_HEADS * DIM])
        mine = [part[rank * size : (rank + 1) * size] for part, size in ((q, keys), (k, keys), (v, values))]
        a_log, dt_bias = self.gates.chunk(ranks, 1)[rank].contiguous()
        return SimpleNamespace(
            num_k_heads=K_HEADS,
            num_v_heads=V_HEADS,
            head_k_dim=DIM,
            head_v_dim=DIM,
            kv_cache=(torch.zeros(2, 3, 2 * keys + values), torch.zeros(2, V_HEADS // ranks, DIM, DIM)),
            conv1d=SimpleNamespace(weight=torch.cat(mine)[:, None], bias=None),
            activation="silu",
            A_log=a_log,
            dt_bias=dt_bias,
            gqa_interleaved_layout=True,
            tp_size=ranks,
        )


def gdn_context(layer: SimpleNamespace) -> forward_context:
    metadata = SimpleNamespace(
        num_prefills=1,
        num_decodes=1,
        has_initial_state=torch.tensor([False, False]),
        non_spec_query_start_loc=torch.tensor([0, TOKENS - 1, TOKENS], dtype=torch.int32),
        non_spec_state_indices_tensor=torch.tensor([1, 0], dtype=torch.int32),
    )
    return forward_context(layers={"gdn": layer}, metadata=metadata)


@contextmanager
def refused(why: str) -> Iterator[None]:
    """ShardingError, which some versions of torch wrap."""
    with pytest.raises((RuntimeError, torch._dynamo.exc.BackendCompilerFailed)) as found:
        yield
    assert why in f"{found.value} {found.value.__cause__}"


def backends(which: str) -> list[dict[str, Any]]:
    """How a test compiles: with the pieces lowered by `which`, whole and split."""
    return [{"backend": which}, {"backend": "opreg", "options": {"inner": which}}]


def worker(rank: int, store: str, which: str) -> None:
    """What each of the two processes runs."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{store}")
    mesh = init_device_mesh("cpu", (2,))
    for model in (paged, gdn, functional, placed):
        torch.manual_seed(0)
        with torch.no_grad():
            model(rank, mesh, which)
    dist.destroy_process_group()


def paged(rank: int, mesh: Any, which: str) -> None:
    """Paged attention: a prompt, eager and compiled."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, x = Attention(), torch.randn(TOKENS, HIDDEN)
    with context(1):
        want = model(x)
    split = ColwiseParallel(use_local_output=False)
    plan = {"q": split, "k": split, "v": split, "o": RowwiseParallel(input_layouts=Shard(1))}
    parallelize_module(model, mesh, plan)
    if _compat.dtensor_needs_a_result():
        with refused("returns nothing, and DTensor before torch 2.13 cannot run such an op"), context(2):
            model(x)
        return
    with context(2):
        torch.testing.assert_close(model(x), want)
    for options in backends(which):
        torch._dynamo.reset()
        with context(2):
            torch.testing.assert_close(torch.compile(model, fullgraph=True, **options)(x), want)
    k = distribute_tensor(torch.ones(4, 2, 16), mesh, [Replicate()])
    pages = distribute_tensor(torch.zeros(2, 4, 4, 16), mesh, [Shard(0)])
    slots = distribute_tensor(torch.arange(4), mesh, [Replicate()])
    with refused("kv_pages is (Shard(dim=0),), not Shard(dim=2); what the op writes cannot be redistributed"):
        ops.kv_cache_update(k, k, pages, slots)


def gdn(rank: int, mesh: Any, which: str) -> None:
    """Gated DeltaNet: two prompts, eager and compiled; every rank has its heads' states afterwards."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, x = Linear(), torch.randn(TOKENS, HIDDEN)
    whole = model.layer(0, 1)
    with gdn_context(whole):
        want = model(x)
    split = ColwiseParallel(use_local_output=False)
    parallelize_module(model, mesh, {"qkvz": split, "ba": split, "o": RowwiseParallel(input_layouts=Shard(1))})
    if _compat.dtensor_needs_a_result():
        with refused("cannot run such an op"), gdn_context(model.layer(rank, 2)):
            model(x)
        return
    for options in (None, *backends(which)):
        torch._dynamo.reset()
        mine = model.layer(rank, 2)
        with gdn_context(mine):
            run = model if options is None else torch.compile(model, fullgraph=True, **options)
            torch.testing.assert_close(run(x), want)
        torch.testing.assert_close(mine.kv_cache[1], whole.kv_cache[1].chunk(2, 1)[rank])


def functional(rank: int, mesh: Any, which: str) -> None:
    """A functional op, whose cache is a DTensor too."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    call = next(ops.ragged_paged_attention.samples())
    want = ops.ragged_paged_attention(**call)
    q, kv_pages, *rest = (v for v in call.values() if isinstance(v, Tensor))
    options = {k: v for k, v in call.items() if not isinstance(v, Tensor)}
    parts = [distribute_tensor(q, mesh, [Shard(1)]), distribute_tensor(kv_pages, mesh, [Shard(2)])]
    parts += [distribute_tensor(t, mesh, [Replicate()]) for t in rest]

    def run(*parts: Any) -> Any:
        return torch.ops.opreg.ragged_paged_attention(*parts, **options)

    whole, split = (torch.compile(run, fullgraph=True, **how) for how in backends(which))
    if not _compat.compiles_pieces_of_dtensors():
        with refused("a piece takes a DTensor, which torch before 2.10 cannot compile"):
            split(*parts)
        split = torch.compile(run, fullgraph=True, backend="opreg", options={"inner": "eager"})
    for fn in (run, whole, split):
        torch._dynamo.reset()
        got = fn(*parts)
        assert isinstance(got, DTensor)
        assert got.placements == (Shard(1),)
        torch.testing.assert_close(got.full_tensor(), want)


def placed(rank: int, mesh: Any, which: str) -> None:
    """Pieces that differ in nothing but how a weight is placed are not the same piece."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    weight = torch.randn(8, 8)
    x = distribute_tensor(torch.randn(8, 8), mesh, [Replicate()])
    rows, columns = (distribute_tensor(weight, mesh, [Shard(dim)]) for dim in (0, 1))

    def run(*weights: Any) -> Any:
        y = x
        for w in weights:
            y = torch.sin(torch.tanh(y @ w))
        return y

    inner = which if _compat.compiles_pieces_of_dtensors() else "eager"
    torch._dynamo.reset()
    split = torch.compile(run, fullgraph=True, backend="opreg", options={"inner": inner, "split_on": ["aten::sin"]})
    want = run(columns, rows, columns, rows)
    got = split(columns, rows, columns, rows)
    assert got.placements == want.placements
    torch.testing.assert_close(got.full_tensor(), want.full_tensor())
    assert any("input 0 is DTensor (" in piece.why_distinct for piece in last_report().pieces)


@pytest.mark.parametrize("which", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_processes_give_what_one_gives(tmp_path: Path, which: str) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store"), which],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)


def test_names_that_no_contract_has_are_refused() -> None:
    @register_op("t_sharding::heads")
    def heads(x: Annotated[Tensor, "t h"], y: Annotated[Tensor, "*n h"]) -> Annotated[Tensor, "t h"]:
        return x + y

    with pytest.raises(RegistrationError, match=r"names the dim 'hh', which no contract has.*Did you mean 'h'"):
        heads.register_sharding("hh")
    with pytest.raises(RegistrationError, match="places 'z', which is no tensor argument; there are x, y"):
        heads.register_sharding("t", others={"z": 0})
    with pytest.raises(RegistrationError, match="would split its result along 2 dims"):
        heads.register_sharding("t", "h")
    with pytest.raises(RegistrationError, match=r"cannot split y: its contract has '\*' before 'h'"):
        heads.register_sharding("h")


if __name__ == "__main__":
    worker(int(sys.argv[1]), *sys.argv[2:])
