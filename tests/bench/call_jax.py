"""What a call of a JAX function costs: opreg.call_jax against bare jax.jit and a DLPack round trip, interleaved.

8x8 float32, two arguments, one result, results awaited; medians of the CPU time of this thread, in us. Then 64 MiB
arguments beside a copy of them. In the environment of lane-xla also torchax, and what recording a call costs in a lazy
graph beside torch_xla's own call_jax. Run: python tests/bench/call_jax.py
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time

import jax
import jax.numpy as jnp
import torch

import opreg

CALLS, ROUNDS = 300, 40


def sin_add(a, b):
    return jnp.sin(a) + b


def measure(cases, calls=CALLS, rounds=ROUNDS, clock=time.thread_time):
    """{name: seconds per call}: the median over rounds, every round running every case."""
    taken = {name: [] for name in cases}
    for call in cases.values():
        for _ in range(5):
            call()
    for _ in range(rounds):
        for name, call in cases.items():
            start = clock()
            for _ in range(calls):
                call()
            taken[name].append((clock() - start) / calls)
    return {name: statistics.median(times) for name, times in taken.items()}


def main():
    torch.set_num_threads(1)
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    jitted = jax.jit(sin_add)
    ja, jb = jnp.asarray(a.numpy()), jnp.asarray(b.numpy())
    op = torch.compile(lambda x, y: opreg.call_jax(sin_add, (x, y)), fullgraph=True)
    op(a, b)
    sine = torch.compile(lambda x, y: x.sin() + y, fullgraph=True)
    sine(a, b)
    tree = {"a": a, "b": b}
    as_tree = lambda t, n: jnp.sin(t["a"]) * n + t["b"]  # noqa: E731
    cases = {
        "jax.jit, JAX arrays": lambda: jitted(ja, jb).block_until_ready(),
        "opreg.call_jax": lambda: opreg.call_jax(sin_add, (a, b)),
        "opreg.call_jax, dict and static argument": lambda: opreg.call_jax(as_tree, (tree, 2)),
        "opreg.call_jax under torch.compile": lambda: op(a, b),
        "torch ops under torch.compile": lambda: sine(a, b),
        "DLPack round trip": lambda: torch.from_dlpack(jitted(jax.dlpack.from_dlpack(a), jax.dlpack.from_dlpack(b))),
        "torch eager": lambda: torch.sin(a) + b,
    }
    if importlib.util.find_spec("torchax"):
        cases |= torchax_cases(jitted, a, b)
    with torch.no_grad():
        found = measure(cases)
    base = found["jax.jit, JAX arrays"]
    for name, seconds in found.items():
        print(f"{name:42} {seconds * 1e6:8.2f} us   {seconds / base:6.2f} x jax.jit")
    for name in found:
        if name.startswith(("DLPack", "torchax")):
            print(f"{name} / call_jax: {found[name] / found['opreg.call_jax']:.1f}")

    big = torch.randn(16 << 20)
    plus = lambda x: x[:8] + 1  # noqa: E731
    twice = lambda x: x * 2  # noqa: E731
    jbig, jplus, jtwice = jnp.asarray(big.numpy()), jax.jit(plus), jax.jit(twice)
    found = measure(
        {
            "64 MiB in, little out: jax.jit": lambda: jplus(jbig).block_until_ready(),
            "64 MiB in, little out: call_jax": lambda: opreg.call_jax(plus, (big,)),
            "64 MiB in and out: jax.jit": lambda: jtwice(jbig).block_until_ready(),
            "64 MiB in and out: call_jax": lambda: opreg.call_jax(twice, (big,)),
            "64 MiB: a copy, by torch": lambda: big.clone(),
        },
        calls=3,
        rounds=7,
    )
    for name, seconds in found.items():
        print(f"{name:42} {seconds * 1e6:10.1f} us")
    if importlib.util.find_spec("torch_xla"):
        record()


def torchax_cases(jitted, a, b):
    """torchax's call_jax, of a jitted function, as it wants its tensors: made in its own environment."""
    import torchax
    from torchax import interop

    environment = torchax.default_env()
    with environment:
        ta, tb = a.to("jax"), b.to("jax")

    def call():
        with environment:
            jax.block_until_ready(interop.call_jax(jitted, ta, tb).jax())

    return {"torchax's call_jax": call}


def record():
    """What recording a call in a lazy graph costs; nothing runs between the syncs, which are left out."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    import torch_xla
    import torch_xla.core.xla_builder as builder

    a, b = (torch.randn(8, 8).to("xla") for _ in range(2))
    cases = {
        "XLA record: opreg.call_jax": lambda: opreg.call_jax(sin_add, (a, b)),
        "XLA record: torch_xla's call_jax": lambda: builder.call_jax(sin_add, (a, b)),
        "XLA record: torch ops": lambda: torch.sin(a) + b,
    }
    taken = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, call in cases.items():
            call()
            start = time.thread_time()
            for _ in range(50):
                call()
            taken[name].append((time.thread_time() - start) / 50)
        torch_xla.sync()
    found = {name: statistics.median(times) for name, times in taken.items()}
    base = found["XLA record: torch_xla's call_jax"]
    for name, seconds in found.items():
        print(f"{name:42} {seconds * 1e6:8.2f} us   {seconds / base:6.2f} x torch_xla's")


if __name__ == "__main__":
    main()
