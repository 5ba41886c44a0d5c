"""Forward context: look-up, nesting, threads, tasks, and names inside graphs."""

import asyncio
import contextlib
import threading

import pytest
import torch

from opreg import ContextError, current_layer, forward_context
from opreg.context import layer_handle, layer_name


def test_finds_layer_and_metadata():
    with forward_context(layers={"a": "layer a", "b": "layer b"}, metadata="all"):
        assert current_layer("a") == ("layer a", "all")
        assert current_layer(layer_handle("b")) == ("layer b", "all")


def test_metadata_per_layer():
    with forward_context(layers={"a": 1, "b": 2}, metadata={"a": "for a"}):
        assert current_layer("a") == (1, "for a")
        with pytest.raises(ContextError, match=r"metadata has no entry for layer 'b'; it has a\."):
            current_layer("b")


def test_contexts_nest_and_restore_after_an_error():
    outer = forward_context(layers={"a": 1})
    with outer:
        with contextlib.suppress(ZeroDivisionError), forward_context(layers={"a": 2}):
            assert current_layer("a")[0] == 2
            raise ZeroDivisionError
        assert current_layer("a")[0] == 1
    with outer:
        assert current_layer("a")[0] == 1
    with pytest.raises(ContextError, match="outside any forward context"):
        current_layer("a")


def test_one_context_cannot_be_active_twice():
    context = forward_context(layers={})
    with context, pytest.raises(RuntimeError, match="already active"), context:
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.1.atn", r"no layer 'layers.1.atn' in the forward context; .*Did you mean 'layers.1.attn'\?"),
        ("zzz", "it has layers.0.attn, layers.1.attn, .* and 4 more"),
    ],
)
def test_unknown_layer_names_the_nearest(name, message):
    with forward_context(layers={f"layers.{i}.attn": i for i in range(12)}), pytest.raises(ContextError, match=message):
        current_layer(name)


def test_layers_must_be_a_mapping():
    with pytest.raises(TypeError, match="maps names to layer objects; got list"):
        forward_context(layers=["a"])


def test_threads_do_not_share():
    seen = {}
    ready = threading.Barrier(2)

    def work(value):
        with forward_context(layers={"a": value}):
            ready.wait()
            seen[value] = current_layer("a")[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {0: 0, 1: 1}


def test_asyncio_tasks_do_not_share():
    async def work(value):
        with forward_context(layers={"a": value}, metadata=value):
            await asyncio.sleep(0)
            return current_layer("a")

    async def both():
        return await asyncio.gather(*(work(i) for i in range(5)))

    assert asyncio.run(both()) == [(i, i) for i in range(5)]


def test_handles_are_stable_data():
    handle = layer_handle("layers.0")
    assert handle.shape == ()
    assert handle.dtype == torch.int64
    assert handle is layer_handle("layers.0")
    assert layer_name(handle.clone()) == "layers.0"
    # A hash of the name, not a counter: a graph saved in one process means the same layer in the next.
    assert handle.item() == 7943158925348621956


def test_handle_of_unknown_name_says_so():
    with pytest.raises(ContextError, match="12345 is not the handle of a layer name known in this process"):
        layer_name(torch.tensor(12345))


def test_a_layer_is_not_named_by_a_number():
    with pytest.raises(TypeError, match="named by a string"):
        layer_handle(3)
