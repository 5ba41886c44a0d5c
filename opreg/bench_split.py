"""`opreg bench --framework split`: split_graph per node, beside torch.fx's split_module as a splitter calls it."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from . import library
from .bench import Timing, summary
from .bench_by_torch_key import cut
from .bench_compile import NAME, ON, define_attention
from .bench_rows import Row, rows
from .graph import split_graph


def transformer(layers: int) -> GraphModule:
    """What Dynamo gives for a transformer of width 64: RMSNorm, qkv, opaque attention, gated MLP, weights as inputs."""
    define_attention()
    attention = library.overload(NAME)
    graph = Graph()
    mode = FakeTensorMode()
    with mode:
        hidden, weight, vector = torch.empty(16, 64), torch.empty(64, 64), torch.empty(64)
        wide, third = torch.empty(16, 192), torch.empty(16, 192).chunk(3, -1)

    def known(node: Node, value: object) -> Node:
        # Every value has a storage of its own, as after tracing.
        if isinstance(value, torch.Tensor):
            with mode:
                value = torch.empty(value.shape)
        node.meta["example_value"] = value
        return node

    def call(target: Callable[..., object], value: object, *args: Any) -> Node:
        return known(graph.call_function(target, args), value)

    def method(name: str, value: object, *args: Any) -> Node:
        return known(graph.call_method(name, args), value)

    x = known(graph.placeholder("x"), hidden)
    weights = [
        {
            n: known(graph.placeholder(f"{n}_{i}"), vector if n.startswith("norm") else weight)
            for n in ("norm1", "qkv", "o", "norm2", "gate", "up", "down", "bias1", "bias2")
        }
        for i in range(layers)
    ]

    def norm(x: Node, w: Node) -> Node:
        y = method("pow", hidden, x, 2)
        y = method("mean", hidden, y, -1, True)
        y = call(torch.add, hidden, y, 1e-6)
        y = call(torch.rsqrt, hidden, y)
        y = call(torch.mul, hidden, x, y)
        return call(torch.mul, hidden, y, w)

    for i, w in enumerate(weights):
        y = norm(x, w["norm1"])
        y = call(torch._C._nn.linear, wide, y, w["qkv"], w["bias1"])
        parts = method("chunk", third, y, 3, -1)
        q, k, v = (call(getitem, third[j], parts, j) for j in range(3))
        q = method("view", hidden, q, 16, 64)
        out = call(torch.empty_like, hidden, q)
        graph.call_function(attention, (q, k, v, out, f"layers.{i}")).meta["example_value"] = None
        y = method("view", hidden, out, 16, 64)
        y = call(torch._C._nn.linear, hidden, y, w["o"])
        x = call(torch.add, hidden, x, y)
        y = norm(x, w["norm2"])
        g = call(torch._C._nn.linear, hidden, y, w["gate"])
        u = call(torch._C._nn.linear, hidden, y, w["up"])
        g = call(torch.nn.functional.silu, hidden, g)
        y = call(torch.mul, hidden, g, u)
        y = call(torch._C._nn.linear, hidden, y, w["down"], w["bias2"])
        x = call(torch.add, hidden, x, y)
    graph.output((x,))
    return GraphModule(torch.nn.Module(), graph)


def splits(rounds: int = 3) -> Iterator[Row]:
    """Cutting the graph of 32, of 320 and of 3,080 layers: CPU time per node."""
    ways: dict[str, Callable[[GraphModule], object]] = {
        "split_module": lambda gm: cut(gm, [library.overload(NAME)]),
        "split_graph": lambda gm: split_graph(gm, on=ON),
        "split_graph, every piece built": lambda gm: split_graph(gm, on=ON).build_all(),
    }
    for layers, times in ((32, 5 * rounds), (320, rounds), (3080, rounds)):
        if layers == 3080:
            del ways["split_module"]  # which takes minutes: its time is quadratic
        gm = transformer(layers)
        nodes = len(gm.graph.nodes)
        samples: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(times):
            for way in random.sample(list(ways), len(ways)):
                gc.collect()
                start = time.thread_time()
                made = ways[way](gm)
                samples[way].append((time.thread_time() - start) / nodes)
                del made  # what it takes to free the pieces is not part of making them
        timings: dict[str, Timing] = {way: summary(found) for way, found in samples.items()}
        yield from rows(f"splitting a graph of {nodes} nodes, per node", timings, next(iter(ways)))
