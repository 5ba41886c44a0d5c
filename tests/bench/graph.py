"""Time of split_graph per node beside torch.fx's split_module as a splitter would call it. CPU time, interleaved.

python tests/bench/graph.py [layers ...]      default 32 320 3200 (1,160 / 11,500 / 115,000 nodes)"""

import functools
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from operator import getitem

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.split_module import split_module

from opreg.graph import SplitGraph, split_graph
from opreg.graph_key import Keys
from opreg.graph_plan import make_plan

LIB = torch.library.Library("opreg_bench", "DEF")
LIB.define("attn(Tensor q, Tensor k, Tensor v, Tensor(a!) out, str name) -> ()")
ATTN = torch.ops.opreg_bench.attn.default
ON = ["opreg_bench::attn"]


def transformer(layers: int) -> GraphModule:
    """What Dynamo gives for a transformer of width 64: RMSNorm, qkv, opaque attention, gated MLP, weights as inputs."""
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

    def call(target: Callable[..., object], value: object, *args: object) -> Node:
        return known(graph.call_function(target, args), value)

    def method(name: str, value: object, *args: object) -> Node:
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
        graph.call_function(ATTN, (q, k, v, out, f"layers.{i}")).meta["example_value"] = None
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


def with_split_module(gm: GraphModule) -> None:
    """The usual way: number the nodes, one number more before and after each splitting op."""
    number, numbers = 0, {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.target is ATTN:
            number += 1
            numbers[node] = number
            number += 1
        else:
            numbers[node] = number
    split_module(gm, gm, lambda node: numbers[node], keep_original_order=True)


def timed(fn: Callable[[], object]) -> float:
    gc.collect()
    start = time.thread_time_ns()
    fn()
    return (time.thread_time_ns() - start) / 1000


def every_piece(gm: GraphModule) -> None:
    """Split, and build a graph for every piece although most are the same."""
    split_graph(gm, on=ON).build_all()


def plan_only(gm: GraphModule) -> None:
    make_plan(gm.graph, {ATTN: "attn"})


def plan_and_keys(gm: GraphModule) -> None:
    Keys(make_plan(gm.graph, {ATTN: "attn"}), gm).run()


def with_function(gm: GraphModule) -> None:
    split: SplitGraph = split_graph(gm, on=ON)
    split.function()


def main(sizes: list[int]) -> None:
    ways = {
        "plan": plan_only,
        "plan + keys": plan_and_keys,
        "split_graph": lambda gm: split_graph(gm, on=ON),
        "... and the function": with_function,
        "every piece built": every_piece,
        "torch split_module": with_split_module,
    }
    print(f"{'us per node':24s}" + "".join(f"{n:>24s}" for n in ways))
    first: dict[str, float] = {}
    for layers in sizes:
        gm = transformer(layers)
        nodes = len(gm.graph.nodes)
        rounds = 9 if nodes < 5000 else 3 if nodes < 50000 else 2
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name in random.sample(list(ways), len(ways)):
                if name == "torch split_module" and nodes > 20000:
                    continue
                times[name].append(timed(functools.partial(ways[name], gm)) / nodes)
        cells = []
        for name in ways:
            if not times[name]:
                cells.append(f"{'not run':>24s}")
                continue
            best = statistics.median(times[name])
            first.setdefault(name, best)
            cells.append(f"{best:16.2f} {best / first[name]:6.2f}x")
        print(f"{layers:5d} layers {nodes:7d} nodes" + "".join(cells), flush=True)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [32, 320, 3200])
