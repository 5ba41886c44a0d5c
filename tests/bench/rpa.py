"""Ragged paged attention on the CPU against what people would write instead, interleaved in one process.

python tests/bench/rpa.py [--rounds N] [--threads N] [--dtype bfloat16|float32|float16] [--cases decode16,mixed16,...]
Prints, per case, the best and the median milliseconds of every alternative (CPU time with one thread, wall with more)
and the ratios of medians; the bytes of cache per second against a copy, the arithmetic rate against a matrix product.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from opreg.kernels.cpu import rpa_cpp, rpa_torch
from opreg.ops.paged_attention_inputs import DECODE16, MIXED16, PREFILL16, Batch, make_batch
from torch import Tensor

CASES = {
    "decode16": DECODE16,
    "mixed16": MIXED16,
    "prefill16": PREFILL16,
    "three": [(1, 1328), (5, 18), (500, 563)],
    "prefill512": [(512, 512)],
    "long_decode": [(1, 16384)],
}
SCALE = 128**-0.5


def loop_sdpa(batch: Batch) -> Tensor:
    """One scaled_dot_product_attention per sequence over its gathered pages."""
    q, kv_pages, kv_lens, pages, cu, num_seqs = batch
    out = torch.zeros_like(q)
    size = kv_pages.shape[1]
    starts, lengths = cu.tolist(), kv_lens.tolist()
    for i in range(int(num_seqs)):
        q_len, kv_len = starts[i + 1] - starts[i], lengths[i]
        kv = kv_pages[pages[i, : -(-kv_len // size)].long()].flatten(0, 1)[:kv_len]
        k, v = kv[:, 0::2].transpose(0, 1)[None], kv[:, 1::2].transpose(0, 1)[None]
        query = q[starts[i] : starts[i + 1]].transpose(0, 1)[None]
        mask = None if q_len == 1 else torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        got = torch.nn.functional.scaled_dot_product_attention(
            query, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True
        )
        out[starts[i] : starts[i + 1]] = got[0].transpose(0, 1)
    return out


def padded_dense(batch: Batch) -> Tensor:
    """All sequences padded to the longest, one masked scaled_dot_product_attention."""
    q, kv_pages, kv_lens, pages, cu, num_seqs = batch
    n, size = int(num_seqs), kv_pages.shape[1]
    starts, lengths = cu.tolist(), kv_lens.tolist()
    q_lens = [starts[i + 1] - starts[i] for i in range(n)]
    most_q, most_kv = max(q_lens), -(-max(lengths[:n]) // size) * size
    query = q.new_zeros(n, most_q, *q.shape[1:])
    table = pages[:n, : most_kv // size].clamp(0, kv_pages.shape[0] - 1).long()
    kv = kv_pages[table].view(n, most_kv, *kv_pages.shape[2:])
    mask = torch.zeros(n, 1, most_q, most_kv, dtype=torch.bool)
    mask[..., 0] = True  # padding rows see something, so that nothing is NaN
    for i in range(n):
        query[i, : q_lens[i]] = q[starts[i] : starts[i + 1]]
        mask[i, 0, : q_lens[i], : lengths[i]] = torch.ones(q_lens[i], lengths[i], dtype=torch.bool).tril(
            lengths[i] - q_lens[i]
        )
    k, v = kv[:, :, 0::2].transpose(1, 2), kv[:, :, 1::2].transpose(1, 2)
    got = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), k, v, attn_mask=mask, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)
    out = torch.zeros_like(q)
    for i in range(n):
        out[starts[i] : starts[i + 1]] = got[i, : q_lens[i]]
    return out


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every alternative, one run of each per round in random order.

    With one thread the clock is that thread's CPU time, which neighbours on the machine do not stop.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            start = clock()
            runs[name]()
            times[name].append((clock() - start) * 1e3)
    return times


def alternatives(batch: Batch, layout: str, kernels_only: bool) -> dict[str, Callable[[], object]]:
    """What is measured; the alternatives are held against the C++ kernel first."""
    cpp = partial(rpa_cpp.rpa_cpp, *batch, sm_scale=SCALE, kv_layout=layout)
    if kernels_only:
        return {"opreg C++": cpp}
    others: dict[str, Callable[[], Tensor]] = {
        "opreg torch": partial(rpa_torch.rpa_torch, *batch, sm_scale=SCALE, kv_layout=layout)
    }
    if layout == "NHD":
        others |= {"loop of sdpa": partial(loop_sdpa, batch), "padded dense": partial(padded_dense, batch)}
    tokens = int(batch.cu_q_lens[batch.num_seqs[0]])
    for run in others.values():
        torch.testing.assert_close(run()[:tokens], cpp()[:tokens], atol=3e-2, rtol=3e-2)
    return {"opreg C++": cpp, **others}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cases", default="decode16,mixed16")
    parser.add_argument("--layout", default="NHD")
    parser.add_argument("--kernels-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    source, target = torch.empty(1 << 26, dtype=torch.uint8), torch.empty(1 << 26, dtype=torch.uint8)
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    for case in options.cases.split(","):
        lengths = CASES[case]
        layout = options.layout
        batch = make_batch(lengths, heads=(32, 8), head_dim=128, page_size=16, dtype=dtype, kv_layout=layout)
        batch = batch._replace(kv_pages=batch.kv_pages.nan_to_num(0.0))
        runs = alternatives(batch, layout, options.kernels_only)
        runs["copy"] = partial(target.copy_, source)
        runs["matmul"] = partial(torch.mm, a, b)
        times = interleaved(runs, options.rounds)
        middle = {name: statistics.median(values) for name, values in times.items()}
        cache_bytes = sum(kv for _, kv in lengths) * 2 * 8 * 128 * dtype.itemsize
        flops = sum(4 * 32 * 128 * (q * kv - q * (q - 1) / 2) for q, kv in lengths)
        print(f"{case} {options.dtype} {layout}: {cache_bytes / 1e6:.1f} MB of cache, {flops / 1e9:.2f} GFLOP")
        for name, values in times.items():
            ratio = middle[name] / middle["opreg C++"]
            print(f"  {name:14} best {min(values):9.3f} ms  median {middle[name]:9.3f} ms  {ratio:7.2f}x")
        best = {name: min(values) for name, values in times.items()}
        copy, matmul = 2 * (1 << 26) / best["copy"] / 1e6, 2 * 1024**3 / best["matmul"] / 1e6
        rate, speed = cache_bytes / best["opreg C++"] / 1e6, flops / best["opreg C++"] / 1e6
        print(f"  cache {rate:.1f} GB/s, copy {copy:.1f} GB/s (read and write): {100 * rate / copy:.0f}%")
        print(f"  {speed:.0f} GFLOP/s, matrix product {matmul:.0f} GFLOP/s: {100 * speed / matmul:.0f}%")


if __name__ == "__main__":
    main()
