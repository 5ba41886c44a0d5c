"""The splitter that opreg is compared with: split_module, and pieces told apart by the key of torch's own cache.

It is how vLLM compiles a model (vllm/compilation: split_graph, CompilerManager.compile), less what only a server needs:
artifacts are not written to files, and the pieces' inputs are taken from the graph instead of from another run of it.
Both favour this baseline. Each piece goes to standalone_compile; once AOTAutograd has computed the key of its cache, a
piece whose key was seen before stops there and is run by the artifact of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule
from torch.fx.passes.split_module import split_module


class _Seen(Exception):
    """A piece's key was seen before."""


def cut(gm: GraphModule, attention: Sequence[Any]) -> GraphModule:
    """Number the nodes, one number more before and after each splitting op, and have torch cut between the numbers."""
    number, numbers = 0, {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.target in attention:
            number += 1
            numbers[node] = number
            number += 1
        else:
            numbers[node] = number
    made: GraphModule = split_module(gm, gm, lambda node: numbers[node], keep_original_order=True)
    return made


class ByTorchKey:
    """A Dynamo backend; `artifacts` holds what was compiled, by key, over all graphs."""

    def __init__(self, attention: Sequence[Any]) -> None:
        self.attention = attention
        self.artifacts: dict[str, Any] = {}

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        split = cut(gm, self.attention)
        for name, piece in list(split.named_children()):
            if isinstance(piece, GraphModule) and not any(n.target in self.attention for n in piece.graph.nodes):
                inputs = [n for n in piece.graph.nodes if n.op == "placeholder"]
                values = [n.meta["example_value"] for n in inputs]
                for node in inputs:
                    # Part of the key: it would tell the layer that gets the model's input from those like it.
                    node.type = None
                (output,) = piece.graph.find_nodes(op="output")
                alone = not isinstance(output.args[0], (tuple, list))
                if alone:  # Inductor wants a list
                    output.args = ((output.args[0],),)
                    piece.recompile()
                artifact = self.compile(piece, values)
                run = partial(_first, artifact) if alone else artifact
                delattr(split, name)
                # A plain attribute: the artifact is no module.
                split.__dict__[name] = run
        forward: Callable[..., Any] = split.forward
        return forward

    def compile(self, piece: GraphModule, values: list[Any]) -> Any:
        """The artifact for one piece, compiled now or before."""
        from torch._functorch._aot_autograd import autograd_cache
        from torch._inductor import standalone_compile

        original = autograd_cache.autograd_cache_key
        key = ""

        def computed(*args: Any, **kwargs: Any) -> Any:
            nonlocal key
            found = original(*args, **kwargs)
            key = found[0]
            if key in self.artifacts:
                raise _Seen
            return found

        with mock.patch.object(autograd_cache, "autograd_cache_key", computed):
            try:
                made = standalone_compile(piece, values, dynamic_shapes="from_graph")
            except _Seen:
                return self.artifacts[key]
        self.artifacts[key] = made
        return made


def _first(artifact: Callable[..., Any], *args: Any) -> Any:
    return artifact(*args)[0]


def by_torch_key(name: str) -> ByTorchKey:
    """The backend that splits at the operator of this name."""
    namespace, _, op = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), op)
    return ByTorchKey([packet, packet.default])
