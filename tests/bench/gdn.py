"""Time gdn_attention beside the functions of transformers' Qwen3-Next, interleaved in one process.

    python tests/bench/gdn.py [--heads 16 32 128 128] [--tokens 1 64 512 2048] [--rounds 20] [--threads 1] [--decode 64]

Figures are process CPU time for one thread and wall time for more, minimum and median. Both sides do the whole
op: unpacking, convolution with its state, gates, delta rule, state written back to the cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from opreg.kernels.cpu import gdn, gdn_torch
from opreg.ops.gdn_attention_inputs import Heads, make_call
from transformers.models.qwen3_next import modeling_qwen3_next as qwen


def by_transformers(call: dict[str, Any], conv_state: torch.Tensor, state: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The core of Qwen3NextGatedDeltaNet.forward for one sequence, with its cache updates, from packed projections."""
    hk, hv, k, v = (call[n] for n in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"))
    ratio, tokens = hv // hk, call["projected_states_qkvz"].shape[0]
    weights, width = call["conv_weights"], call["conv_weights"].shape[1]

    def step() -> torch.Tensor:
        qkvz, ba = call["projected_states_qkvz"][None], call["projected_states_ba"][None]
        q, key, value, z = qkvz.view(1, tokens, hk, -1).split([k, k, ratio * v, ratio * v], dim=3)
        b, a = ba.view(1, tokens, hk, -1).split([ratio, ratio], dim=3)
        b, a = b.reshape(1, tokens, hv), a.reshape(1, tokens, hv)
        call["z"].copy_(z.reshape(tokens, hv, v))
        x = torch.cat([t.reshape(1, tokens, -1) for t in (q, key, value)], dim=-1).transpose(1, 2)
        if tokens == 1:
            y = qwen.causal_conv1d_update(x, conv_state, weights, None, "silu")
        else:
            conv_state.copy_(torch.nn.functional.pad(x, (width - tokens, 0))[..., -width:])
            y = qwen.causal_conv1d_fn(x, weights, None, activation="silu")
        q, key, value = y.transpose(1, 2).split([hk * k, hk * k, hv * v], dim=-1)
        beta = b.sigmoid()
        g = -call["A_log"].float().exp() * torch.nn.functional.softplus(a.float() + call["dt_bias"])
        rule = qwen.torch_recurrent_gated_delta_rule if tokens == 1 else qwen.torch_chunk_gated_delta_rule
        out, new = rule(
            q.reshape(1, tokens, hk, k),
            key.reshape(1, tokens, hk, k),
            value.reshape(1, tokens, hv, v),
            g=g,
            beta=beta,
            initial_state=state if tokens == 1 else None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        state.copy_(new)
        return out

    return step


def measure(sides: dict[str, Callable[[], object]], rounds: int, threads: int) -> dict[str, tuple[float, float]]:
    """{name: (minimum, median)} in milliseconds, the sides taken in turn in every round."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in sides}
    for step in sides.values():
        step()
    for _ in range(rounds):
        for name, step in sides.items():
            start = clock()
            step()
            times[name].append(1e3 * (clock() - start))
    return {name: (min(t), statistics.median(t)) for name, t in times.items()}


def main() -> None:
    """Print one line per number of tokens, then decoding against the copy bandwidth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, nargs=4, default=[16, 32, 128, 128])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 64, 512, 2048])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decode", type=int, default=64, help="sequences in the decode step; 0: leave it out")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--with-torch", action="store_true", help="time the vectorised torch kernel too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    dtype, heads = getattr(torch, args.dtype), Heads(*args.heads, 4)
    kind = "CPU" if args.threads == 1 else "wall"
    print(
        f"{gdn.instruction_set()}, heads {args.heads}, {args.dtype}, {args.threads} thread(s), {kind} ms: min / median"
    )
    for tokens in args.tokens:
        call = make_call([tokens], heads, dtype=dtype, bias=False, initial=[tokens == 1], spare_slots=0)
        call["dt_bias"] = call["dt_bias"].float()
        conv_state = torch.zeros(1, heads.conv_dim, 4, dtype=dtype)
        state = torch.zeros(1, heads.v_heads, heads.k_dim, heads.v_dim)
        call["conv_state"].nan_to_num_()
        call["ssm_state"].nan_to_num_()
        sides: dict[str, Callable[[], object]] = {
            "transformers": by_transformers(call, conv_state, state),
            "opreg": lambda call=call: gdn.gdn_attention(**call),
        }
        if args.with_torch:
            sides["torch"] = lambda call=call: gdn_torch.gdn_attention_torch(**call)
        rounds = args.rounds * 20 if tokens < 8 else args.rounds
        found = measure(sides, rounds, args.threads)
        base = found["transformers"]
        print(
            f"T={tokens:<5d}"
            + "".join(f" {name} {low:.3f} / {mid:.3f}" for name, (low, mid) in found.items())
            + "".join(
                f"  {base[0] / t[0]:.1f}x / {base[1] / t[1]:.1f}x" for n, t in found.items() if n != "transformers"
            ),
            flush=True,
        )
    if args.decode:
        decode(args, heads, dtype)


def decode(args: argparse.Namespace, heads: Heads, dtype: torch.dtype) -> None:
    """One decode step of many sequences beside a copy of as many bytes as it must move."""
    call = make_call([1] * args.decode, heads, dtype=dtype, bias=False, spare_slots=0)
    state = call["ssm_state"]
    # Half of the states copied over the other half moves (reads plus writes) as many bytes as half a step.
    half = state.shape[0] // 2
    found = measure(
        {"copy": lambda: state[:half].copy_(state[half : 2 * half]), "opreg": lambda: gdn.gdn_attention(**call)},
        args.rounds,
        args.threads,
    )
    moved = 2 * state.numel() * state.element_size() / 1e6
    copied = moved / 2
    (copy_low, copy_mid), (low, mid) = found["copy"], found["opreg"]
    print(
        f"decode {args.decode}: {low:.2f} / {mid:.2f} ms, {moved / low:.1f} / {moved / mid:.1f} GB/s; "
        f"copy {copied / copy_low:.1f} / {copied / copy_mid:.1f} GB/s; "
        f"{moved / low / (copied / copy_low):.0%} / {moved / mid / (copied / copy_mid):.0%} of it"
    )


if __name__ == "__main__":
    main()
