"""Random calls of gdn_attention, and what they must give in float64.

The oracle knows no packing, no batch and no cache: a sequence is drawn as its own inputs, window and state, and run
token by token in numpy; then all are laid into rows and slots of one call. What may not be read is NaN (padding rows,
states of sequences that start anew, spare rows of a slot) and what may not be written must keep its bits.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

MODEL = (torch.float32, torch.bfloat16, torch.float16)
# Relative RMS of the output, and of a state kept in float32; a state in 16 bits adds one rounding.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@dataclass
class Sequence:
    """One sequence of a call. Tokens are rows of x (the convolution's channels), z, b and a, as float64 numbers."""

    x: np.ndarray
    z: np.ndarray
    b: np.ndarray
    a: np.ndarray
    window: np.ndarray | None  # the width - 1 inputs before; None: it starts from nothing
    state: np.ndarray | None
    slots: dict[int, list[int]] = field(default_factory=dict)  # token -> where the states after it go
    spec: bool = False
    live: bool = True


@dataclass
class Call:
    """Keyword arguments of the op, and the sequences they are made from."""

    seed: int
    arguments: dict[str, Any]
    sequences: list[Sequence]
    rows: list[list[int]]  # of each sequence's tokens

    def __str__(self) -> str:
        a = self.arguments
        heads = [a[n] for n in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "tp_size")]
        kinds = [f"{'spec ' * s.spec}{'dead ' * (not s.live)}{len(s.x)}" for s in self.sequences]
        return (
            f"seed {self.seed}: heads {heads} width {a['conv_weights'].shape[1]} {a['z'].dtype} state "
            f"{a['ssm_state'].dtype} flat {a['reorder_input']}, tokens {kinds}, null {a['null_slot']}"
        )


@dataclass
class Limits:
    """What a kernel takes, or what makes it slow to run."""

    model: tuple[torch.dtype, ...] = MODEL
    state: tuple[torch.dtype, ...] = MODEL
    dims: tuple[int, ...] = (1, 3, 8, 16, 17, 24, 32, 48, 64, 96, 128)
    widths: tuple[int, ...] = (1, 2, 3, 4, 4, 5)
    ratios: tuple[int, ...] = (1, 2, 2, 3, 4)
    lengths: tuple[int, ...] = (0, 1, 1, 1, 2, 3, 5, 15, 16, 17, 29, 30, 31, 32, 33, 47, 63, 64, 65, 66, 97, 129)
    most_seqs: int = 6
    most_tokens: int = 200  # of a call


@dataclass
class _Draw:
    rng: np.random.Generator

    def one_of(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def maybe(self, chance: float) -> bool:
        return self.rng.random() < chance

    def normal(self, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Normal numbers as this dtype holds them, in float64."""
        return as_held(self.rng.standard_normal(shape) * scale, dtype)


def as_held(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(x).to(dtype).double().numpy()


def make(seed: int, limits: Limits | None = None) -> Call:
    """The call of this seed."""
    has, d = limits or Limits(), _Draw(np.random.default_rng(seed))
    io, kept = d.one_of(has.model), d.one_of(has.state)
    hk, ratio, width, tp = d.one_of((1, 1, 2, 3)), d.one_of(has.ratios), d.one_of(has.widths), d.one_of((1, 1, 2))
    hv, k, v = hk * ratio, d.one_of(has.dims), d.one_of(has.dims)
    channels, drafts = 2 * hk * k + hv * v, int(d.rng.integers(0, 5))
    null = 0 if d.maybe(0.3) else -1
    counts = _lengths(d, has)
    plain = int(d.rng.integers(0, len(counts) + 1)) if d.maybe(0.5) else len(counts)
    counts[plain:] = [min(n, drafts + 1) for n in counts[plain:]]
    loud = d.one_of((1.0, 1.0, 0.01, 20.0))  # the size of the projections
    same = d.maybe(0.1)  # tokens that are all alike: parallel keys

    sequences = []
    for i, n in enumerate(counts):
        new = i < plain and d.maybe(0.4)
        x = d.normal(io, n, channels, scale=loud)
        sequences.append(
            Sequence(
                x[:1].repeat(n, 0) if same and n else x,
                d.normal(io, n, hv, v),
                d.normal(io, n, hv, scale=2.0),
                d.normal(io, n, hv, scale=2.0),
                None if new else d.normal(io, width - 1, channels, scale=loud),
                None if new else d.normal(kept, hv, v, k, scale=0.3),
                spec=i >= plain,
                live=not d.maybe(0.1),
            )
        )
    pool = len(counts) * (drafts + 4) + int(d.rng.integers(1, 4))
    free = [s for s in d.rng.permutation(pool).tolist() if s != null]
    rolling = d.one_of((0, 0, 1, 3)) if plain == len(counts) else 0
    conv = np.full((pool, width - 1 + rolling, channels), np.nan)
    ssm = np.full((pool, hv, v, k), np.nan)
    for slot in range(pool):
        if d.maybe(0.5):
            conv[slot], ssm[slot] = d.normal(io, *conv.shape[1:]), d.normal(kept, *ssm.shape[1:])
    given = _metadata(d, sequences, plain, drafts, null, free, conv, ssm, width)
    rows, total = _rows(d, sequences, plain, given)
    flat = d.maybe(0.5)
    qkvz, ba = _packed(sequences, rows, total, hk, hv, k, v, flat)
    alone = d.one_of((io, torch.float32))
    decays = d.one_of(((1e-2, 16.0), (1e-2, 16.0), (1e-6, 1e-4), (50.0, 300.0)))
    arguments: dict[str, Any] = {
        "core_attn_out": _spread(d, np.full((total, hv, v), np.nan), io),
        "z": _spread(d, np.full((total, hv, v), np.nan), io),
        "projected_states_qkvz": _spread(d, qkvz, io),
        "projected_states_ba": _spread(d, ba, io),
        "num_k_heads": hk * tp,
        "num_v_heads": hv * tp,
        "head_k_dim": k,
        "head_v_dim": v,
        "conv_state": _spread(d, conv, io),
        "ssm_state": _spread(d, ssm, kept),
        "conv_weights": torch.from_numpy(d.normal(alone, channels, width, scale=width**-0.5)).to(alone),
        "conv_bias": torch.from_numpy(d.normal(alone, channels, scale=0.1)).to(alone) if d.maybe(0.5) else None,
        "activation": d.one_of(("silu", "swish")),
        "A_log": torch.from_numpy(np.log(d.rng.uniform(*decays, hv))).to(d.one_of((io, torch.float32))),
        "dt_bias": torch.from_numpy(d.normal(alone, hv) - d.one_of((4.0, 0.0))).to(alone),
        "tp_size": tp,
        "reorder_input": flat,
        "null_slot": null,
        **given,
    }
    return Call(seed, arguments, sequences, rows)


def _lengths(d: _Draw, has: Limits) -> list[int]:
    found = [d.one_of(has.lengths) for _ in range(int(d.rng.integers(0, has.most_seqs + 1)))]
    return [min(n, max(0, has.most_tokens - sum(found[:i]))) for i, n in enumerate(found)]


def _metadata(
    d: _Draw,
    sequences: list[Sequence],
    plain: int,
    drafts: int,
    null: int,
    free: list[int],
    conv: np.ndarray,
    ssm: np.ndarray,
    width: int,
) -> dict[str, Any]:
    """Counts and index tensors. Puts each sequence's window and state into the slot it starts from, and notes in the
    sequences where their states go."""

    def dead() -> int:
        return null if d.maybe(0.5) else -1

    def put(slot: int, s: Sequence) -> None:
        conv[slot], ssm[slot] = np.nan, np.nan
        if s.window is not None:
            conv[slot, : width - 1], ssm[slot] = s.window, s.state

    first, spec = sequences[:plain], sequences[plain:]
    index, sources, checkpoints = [], [], []
    apart = d.maybe(0.3)  # each starts from a slot of its own, which is only read
    start = 0
    for s in first:
        slot = free.pop() if s.live else dead()
        source = free.pop() if apart and s.live else slot
        if s.live:
            put(slot, Sequence(s.x, s.z, s.b, s.a, None, None))
            put(source, s)
            if len(s.x):
                s.slots.setdefault(len(s.x) - 1, []).append(slot)
        index.append(slot)
        sources.append(source)
        for _ in range(d.one_of((0, 0, 0, 1, 2)) if len(s.x) else 0):
            token = int(d.rng.integers(len(s.x)))
            to = free.pop() if free and d.maybe(0.8) else -1
            checkpoints.append((start + token, to))
            if s.live and to >= 0:
                s.slots.setdefault(token, []).append(to)
        start += len(s.x)
    table = np.full((len(spec), drafts + 1), -1)
    accepted = []
    for i, s in enumerate(spec):
        accepted.append(int(d.rng.integers(0, drafts + 2)))
        if not s.live:
            table[i] = dead()
            continue
        table[i] = [free.pop() for _ in range(drafts + 1)]
        put(int(table[i, max(accepted[-1] - 1, 0)]), s)
        for t in range(len(s.x)):
            s.slots[t] = [int(table[i, t])]
    prefills = sum(len(s.x) != 1 for s in first)
    ones = not prefills and d.maybe(0.5)
    known = None if all(s.state is not None for s in first) else [s.state is not None for s in first]
    long = d.maybe(0.3)  # index tensors with room for more sequences
    return {
        "num_prefills": prefills,
        "num_decodes": plain - prefills,
        "num_spec_decodes": len(spec),
        "has_initial_state": None if known is None else torch.tensor([*known, *[True] * (2 * long)]),
        "non_spec_query_start_loc": None if ones or not first else _index(d, _ends(first), long),
        "non_spec_state_indices_tensor": _index(d, index, long) if first else None,
        "source_state_indices": _index(d, sources, long) if apart and first else None,
        "checkpoint_token_indx": _index(d, [t for t, _ in checkpoints]) if checkpoints else None,
        "checkpoint_state_indices": _index(d, [to for _, to in checkpoints]) if checkpoints else None,
        "spec_query_start_loc": _index(d, _ends(spec), long) if spec else None,
        "spec_state_indices_tensor": torch.from_numpy(table).to(d.one_of((torch.int32, torch.int64))) if spec else None,
        "num_accepted_tokens": _index(d, accepted, long) if spec else None,
    }


def _ends(sequences: list[Sequence]) -> list[int]:
    return np.cumsum([0, *(len(s.x) for s in sequences)]).tolist()


def _index(d: _Draw, values: list[int], long: bool = False) -> Tensor:
    return torch.tensor([*values, *[10**6] * (3 * long)], dtype=d.one_of((torch.int32, torch.int64)))


def _rows(d: _Draw, sequences: list[Sequence], plain: int, given: dict[str, Any]) -> tuple[list[list[int]], int]:
    """The row of every token, and how many rows there are; adds token indices and num_actual_tokens to `given`."""
    ends = _ends(sequences)
    tokens, padding = ends[-1], d.one_of((0, 0, 1, 5))
    mixed = 0 < plain < len(sequences)
    places = list(range(tokens))
    if mixed or d.maybe(0.3):
        places = d.rng.permutation(tokens).tolist()
        kind = d.one_of((torch.int32, torch.int64))
        given["non_spec_token_indx"] = torch.tensor(places[: ends[plain]], dtype=kind) if plain else None
        given["spec_token_indx"] = torch.tensor(places[ends[plain] :], dtype=kind) if plain < len(sequences) else None
    given["num_actual_tokens"] = tokens if padding or d.maybe(0.5) else None
    return [places[a:b] for a, b in pairwise(ends)], tokens + padding


def _packed(
    sequences: list[Sequence], rows: list[list[int]], total: int, hk: int, hv: int, k: int, v: int, flat: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of [q | k | v | z] and of [b | a], whole or by key head."""
    g = hv // hk
    qkvz, ba = np.full((total, 2 * hk * k + 2 * hv * v), np.nan), np.full((total, 2 * hv), np.nan)
    for s, places in zip(sequences, rows, strict=True):
        for t, row in enumerate(places):
            if flat:
                qkvz[row] = np.concatenate([s.x[t], s.z[t].ravel()])
                ba[row] = np.concatenate([s.b[t], s.a[t]])
                continue
            q, keys, values = np.split(s.x[t], [hk * k, 2 * hk * k])
            groups = [
                (q[h * k : (h + 1) * k], keys[h * k : (h + 1) * k], values[h * g * v : (h + 1) * g * v],
                 s.z[t, h * g : (h + 1) * g].ravel()) for h in range(hk)
            ]  # fmt: skip
            qkvz[row] = np.concatenate([part for group in groups for part in group])
            ba[row] = np.concatenate([x[t, h * g : (h + 1) * g] for h in range(hk) for x in (s.b, s.a)])
    return qkvz, ba


def _spread(d: _Draw, x: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The rows now and then as the ends of longer ones, the slots as one layer of a cache that holds those of two."""
    tensor = torch.from_numpy(x).to(dtype)
    if d.maybe(0.7) or not tensor.shape[0]:
        return tensor
    whole = torch.full((tensor.shape[0], 2, *tensor.shape[1:]), 7.0, dtype=dtype)
    whole[:, 1] = tensor
    return whole[:, 1]


@dataclass
class Expected:
    """Of every sequence its output, and the window and state after each token. `out_terms` and `state_terms` are the
    roots of the sums of squares of what these are the sums of: where terms cancel, their roundings stay."""

    out: list[np.ndarray]
    out_terms: list[np.ndarray]
    windows: list[list[np.ndarray]]
    states: list[list[np.ndarray]]
    state_terms: list[list[np.ndarray]]


def expected(call: Call) -> Expected:
    """What the call must give, in float64 but for the one rounding of q, k and v to the model's dtype."""
    a = call.arguments
    io, k, v = a["z"].dtype, a["head_k_dim"], a["head_v_dim"]
    hk, hv = a["num_k_heads"] // a["tp_size"], a["num_v_heads"] // a["tp_size"]
    taps = a["conv_weights"].double().numpy()
    bias = 0.0 if a["conv_bias"] is None else a["conv_bias"].double().numpy()
    rate, shift = np.exp(a["A_log"].double().numpy()), a["dt_bias"].double().numpy()
    found = Expected([], [], [], [], [])
    for s in call.sequences:
        window = np.zeros((taps.shape[1] - 1, taps.shape[0])) if s.window is None else s.window
        state = np.zeros((hv, v, k)) if s.state is None else s.state.copy()
        squares = state**2
        outs, out_terms, windows, states, state_terms = [], [], [], [], []
        for t in range(len(s.x)):
            inputs = np.concatenate([window, s.x[t : t + 1]])
            window = inputs[1:]
            y = (inputs * taps.T).sum(0) + bias
            y = as_held(y / (1 + np.exp(-y)), io)
            q, key, value = np.split(y, [hk * k, 2 * hk * k])
            q, key, value = q.reshape(hk, k), key.reshape(hk, k), value.reshape(hv, v)
            q = (q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6)).repeat(hv // hk, 0) / np.sqrt(k)
            key = (key / np.sqrt((key * key).sum(-1, keepdims=True) + 1e-6)).repeat(hv // hk, 0)
            alpha = np.exp(-rate * np.logaddexp(0, s.a[t] + shift))
            beta = 1 / (1 + np.exp(-s.b[t]))
            state = alpha[:, None, None] * state
            delta = beta[:, None] * (value - np.einsum("hvk,hk->hv", state, key))
            state = state + delta[:, :, None] * key[:, None, :]
            outs.append(np.einsum("hvk,hk->hv", state, q))
            squares = alpha[:, None, None] ** 2 * squares + (delta[:, :, None] * key[:, None, :]) ** 2
            out_terms.append(np.sqrt(np.einsum("hvk,hk->hv", squares, q**2)))
            state_terms.append(np.sqrt(squares))
            windows.append(window)
            states.append(state)
        found.out.append(np.array(outs).reshape(len(s.x), hv, v))
        found.out_terms.append(np.array(out_terms).reshape(len(s.x), hv, v))
        found.windows.append(windows)
        found.states.append(states)
        found.state_terms.append(state_terms)
    return found


def wrong(call: Call, after: dict[str, Tensor], want: Expected, slack: float = 1.0) -> str | None:
    """What is wrong with what a call wrote, or None. after: the op's four written tensors; slack multiplies limits."""
    out, z, conv, ssm = (after[n] for n in ("core_attn_out", "z", "conv_state", "ssm_state"))
    limit, keep = LIMITS[z.dtype] * slack, call.arguments["conv_weights"].shape[1] - 1
    if min(call.arguments["head_k_dim"], call.arguments["head_v_dim"]) < 16:
        limit *= 2  # roundings of so few numbers do not average out
    live, written = set(), set()
    for i, (s, rows) in enumerate(zip(call.sequences, call.rows, strict=True)):
        if not s.live or not rows:
            continue
        live |= set(rows)
        error = _distance(out[rows], want.out[i], want.out_terms[i])
        if not error <= limit:
            return f"output of sequence {i} is off by {error:.3g}, limit {limit}"
        if not torch.equal(z[rows].double(), torch.from_numpy(s.z)):
            return f"z of sequence {i}"
        for t, slots in s.slots.items():
            for slot in slots:
                written.add(slot)
                if not torch.equal(conv[slot, :keep].double(), torch.from_numpy(want.windows[i][t])):
                    return f"conv_state[{slot}], after token {t} of sequence {i}"
                error = _distance(ssm[slot], want.states[i][t], want.state_terms[i][t])
                if not error <= limit + ROUNDED[ssm.dtype]:
                    return f"ssm_state[{slot}] after token {t} of sequence {i} is off by {error:.3g}"
    rest = [row for row in range(len(z)) if row not in live]
    if not bool((out[rest] == 0).all() and (z[rest] == 0).all()):
        return "rows that no live sequence owns are not zero"
    for name, now in (("conv_state", conv), ("ssm_state", ssm)):
        for slot in range(len(now)):
            if slot not in written and not torch.equal(_bits(now[slot]), _bits(call.arguments[name][slot])):
                return f"{name}[{slot}] was written"
    for tensor in after.values():
        if tensor._base is not None and not bool((tensor._base[:, 0] == 7).all()):
            return "memory beside a tensor was written"
    return None


def _distance(got: Tensor, want: np.ndarray, terms: np.ndarray) -> float:
    """RMS error in units of the truth's or its terms'; of what float16 can tell apart where all is tiny."""
    least = 2.0**-24 * 1e3 if got.dtype == torch.float16 else 1e-30
    unit = max(np.sqrt((x**2).mean()) for x in (want, terms))
    return float(np.sqrt(((got.double().numpy() - want) ** 2).mean()) / max(unit, least))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])


def own(call: Call) -> dict[str, Any]:
    """The arguments with fresh copies, of the same strides, of what the op writes."""
    made = dict(call.arguments)
    for name in ("core_attn_out", "z", "conv_state", "ssm_state"):
        x = made[name]
        made[name] = x.clone() if x._base is None else x._base.clone()[:, 1]
    return made
