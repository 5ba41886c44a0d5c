"""What compiling models of transformers costs: a 32-layer Llama and a 12-layer Qwen3-Next with opreg's ops, random.

Beside whole-graph Inductor: CPU seconds of the first call, the C++ compiler's included, each in a process of its own
with an empty cache ("cold"), and with the cache that such a process left ("warm": nothing is compiled).
Run: python tests/bench/models.py [llama] [qwen3_next]
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.compile_fx
from torch._dynamo.utils import counters

Call = Callable[[], list[Any]]
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
WAYS = ("whole graph", "opreg")


def compiled(fn: Any, way: str, **options: Any) -> Any:
    if way == "whole graph":
        return torch.compile(fn, fullgraph=True)
    return torch.compile(fn, backend="opreg", fullgraph=True, options=options)


class Named(torch.nn.Module):
    """The model under another name and with other names of variables: an edit that changes nothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.renamed = model

    def forward(self, *words: torch.Tensor) -> Any:
        return self.renamed(*words)


def llama(way: str, edit: str) -> tuple[Call, Call]:
    """(the compiled model, the model), as functions of no arguments; split at scaled_dot_product_attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 32}
    eps = 1e-3 if edit == "eps" else 1e-6
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False, rms_norm_eps=eps)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    tokens = torch.arange(9)[None]
    fn = compiled(Named(model) if edit == "names" else model, way, split_on=["aten::scaled_dot_product_attention"])
    return lambda: fn(tokens).logits.flatten().tolist(), lambda: model(tokens).logits.flatten().tolist()


def qwen3_next(way: str, edit: str) -> tuple[Call, Call]:
    """The step of examples/05_serve_qwen3_next.py on the prompts of its --quick."""
    sys.path.insert(0, str(EXAMPLES))
    from serving.engine import Engine
    from serving.model import Step, build_model, replace_cores
    from serving.prompts import QUICK, make_requests
    from serving.scheduler import Room

    model, room = build_model("GGGA" * 3), Room(slots=2, pages=9)
    layers = replace_cores(model, room)
    if edit == "eps":
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = 1e-3
    step = Step(model)
    fast, slow = (Engine(s, layers, room) for s in (compiled(Named(step) if edit == "names" else step, way), step))

    def tokens(engine: Any) -> list[Any]:
        engine.warm_up()
        return [r.generated for r in engine.serve(make_requests(QUICK)).requests]

    return lambda: tokens(fast), lambda: tokens(slow)


MODELS: dict[str, Callable[[str, str], tuple[Call, Call]]] = {"llama": llama, "qwen3_next": qwen3_next}


def cpu() -> float:
    own, kids = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + kids.ru_utime + kids.ru_stime


def one(name: str, way: str, edit: str) -> dict[str, Any]:
    """What the first call costs in this process, and whether it computes what the model computes."""
    from opreg.backend import reports

    torch.set_num_threads(1)
    with torch.no_grad():
        warm = torch.compile(lambda x: x + 1)
        warm(torch.ones(3))
        torch._dynamo.reset()
        run, model = MODELS[name](way, edit)
        counters.clear()
        start = cpu()
        got = run()
        seconds = cpu() - start
        want = model()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    found = counters["inductor"]
    report = reports()[-1] if way == "opreg" else None
    return {
        "seconds": seconds,
        "hits": found["fxgraph_cache_hit"],
        "misses": found["fxgraph_cache_miss"],
        "pieces": sum(not p.splitting for p in report.pieces) if report else 1,
        "distinct": len(report.distinct) if report else 1,
    }


def fresh(name: str, way: str, cache: str, edit: str = "") -> dict[str, Any]:
    """`one` in a process of its own, with the compiler's cache in a folder."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", name, way, edit]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    made: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return made


def main(names: list[str]) -> None:
    for name in names or list(MODELS):
        base: dict[str, float] = {}
        for way in WAYS:
            with tempfile.TemporaryDirectory() as cache:
                for when in ("cold", "warm"):
                    made = fresh(name, way, cache)
                    first = base.setdefault(when, made["seconds"])
                    print(
                        f"{name:11} {way:12} {when}  {made['seconds']:6.2f} s CPU  {made['seconds'] / first:5.2f} of "
                        f"whole graph  {made['pieces']} pieces, {made['distinct']} distinct, "
                        f"{made['misses']} compiled, {made['hits']} from the cache"
                    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
