"""What a call of a JAX function costs: opreg.call_jax against bare jax.jit and a DLPack round trip, interleaved.

8x8 float32, two arguments, one result, results awaited; medians of the CPU time of this thread, in us. Then 64 MiB
arguments. Run: python tests/bench/call_jax.py
"""

from __future__ import annotations

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
    with torch.no_grad():
        found = measure(cases)
    base = found["jax.jit, JAX arrays"]
    for name, seconds in found.items():
        print(f"{name:42} {seconds * 1e6:8.2f} us   {seconds / base:6.2f} x jax.jit")
    print(f"DLPack / call_jax: {found['DLPack round trip'] / found['opreg.call_jax']:.1f}")

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
        },
        calls=3,
        rounds=7,
    )
    for name, seconds in found.items():
        print(f"{name:42} {seconds * 1e6:10.1f} us")


if __name__ == "__main__":
    main()
