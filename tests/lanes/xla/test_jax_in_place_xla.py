"""Arguments that a JAX function writes, on torch_xla (PJRT_DEVICE=CPU): the new value lands in the old one's memory."""

from __future__ import annotations

import jax
import pytest
import torch
import torch_xla

import opreg

device = torch_xla.device()


@opreg.register_jax_op("opregjaxxla::append", mutates_args=("cache",))
def append(cache: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(cache, new, (at[0], 0)), new.sum()


def memory_of(tensor):
    torch_xla.sync(wait=True)
    return torch_xla._XLAC._unsafe_buffer_pointer(tensor)


def step(cache, new, at):
    return append(cache, new, at) + cache[0, 0]


def compiled(fn):
    torch._dynamo.reset()
    return torch.compile(fn, backend="openxla", fullgraph=True)


def on_xla(rows=64):
    tensors = torch.zeros(rows, 4), torch.ones(1, 4), torch.tensor([3], dtype=torch.int32)
    return [tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("run", [lambda fn: fn, compiled], ids=["eager", "openxla"])
def test_the_memory_is_donated(run):
    cache, new, at = on_xla()
    before, call = memory_of(cache), run(step)
    for value in (1, 2, 3):
        total = call(cache, new * value, at)
        assert memory_of(cache) == before
        assert cache.cpu().sum(1).nonzero().tolist() == [[3]]
        assert cache.cpu()[3].tolist() == [value] * 4
        assert total.item() == 4 * value


@pytest.mark.parametrize("run", [lambda fn: fn, compiled], ids=["eager", "openxla"])
def test_a_read_before_the_write_sees_the_old_value_and_later_graphs_may_read(run):
    def around(cache, new, at):
        old = cache * 2
        append(cache, new, at)
        return old, cache + 1

    cache, new, at = on_xla()
    old, after = run(around)(cache, new, at)
    assert old.cpu().eq(0).all()
    assert after.cpu().sum().item() == 64 * 4 + 4
    twice = run(lambda cache: cache * 2)
    for _ in range(2):
        assert twice(cache).cpu().sum().item() == 8
    assert cache.cpu().sum().item() == 4


@pytest.mark.parametrize("run", [lambda fn: fn, compiled], ids=["eager", "openxla"])
def test_views_and_values_made_in_the_graph(run):
    def inside(base, new, at):
        append(base[1], new, at)
        made = base[0] * 1
        append(made, new, at)
        return made

    _, new, at = on_xla()
    base = torch.zeros(2, 8, 4).to(device)
    made = run(inside)(base, new, at)
    assert base.cpu().sum((1, 2)).tolist() == [0, 4]
    assert made.cpu().sum().item() == 4


@pytest.mark.parametrize("call", [append, torch.ops.opregjaxxla.append], ids=["function", "operator"])
def test_one_tensor_as_both_arguments_keeps_its_meaning(call):
    same = torch.arange(8.0).view(2, 4).to(device)
    call(same, same, torch.zeros(1, dtype=torch.int32).to(device))
    assert torch.equal(same.cpu(), torch.arange(8.0).view(2, 4))


@opreg.register_jax_op("opregjaxxla::append_fresh", mutates_args=("cache",))
def append_fresh(cache: jax.Array, new: jax.Array, at: jax.Array) -> None:
    return jax.lax.dynamic_update_slice(cache, new, (at[0], 0))


def test_in_inference_mode():
    with torch.inference_mode():
        cache, new, at = on_xla()
        before = memory_of(cache)
        for value in (1, 2):  # the first call makes the runner
            append_fresh(cache, new * value, at)
        assert memory_of(cache) == before
        assert cache.cpu().sum().item() == 8
