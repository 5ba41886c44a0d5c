"""Random calls of every CPU kernel of the paged-attention operators against float64; see rpa_fuzz.py."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from opreg.kernels.cpu import rpa_cpp, rpa_cpp_update, rpa_torch
from opreg.kernels.reference import paged_attention as reference

spec = importlib.util.spec_from_file_location("rpa_fuzz", Path(__file__).with_name("rpa_fuzz.py"))
assert spec is not None
assert spec.loader is not None
fuzz = importlib.util.module_from_spec(spec)
sys.modules["rpa_fuzz"] = fuzz  # dataclasses look their module up
spec.loader.exec_module(fuzz)

# Seeds in blocks, one test each: a block takes about a second.
BLOCK = 25
BLOCKS = [pytest.param(b, marks=[] if b < 4 else [pytest.mark.slow], id=f"seed{b * BLOCK}") for b in range(160)]
SMALL = 2000  # query rows x positions; the reference loops over them in Python


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cpp(call: "fuzz.Call", use_level: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The C++ kernel through the operator's own entry, or at a level, which goes through Python."""
    if use_level is None:
        return rpa_cpp.rpa_cpp_lse(*call.arguments, **call.options)
    lse = torch.empty(call.arguments[0].shape[:2])
    return rpa_cpp.attend("fuzz", *call.arguments, rpa_cpp.Options(**call.options), lse, use_level=use_level), lse


def size(call: "fuzz.Call") -> int:
    return sum(q_len * kv_len for q_len, kv_len in call.lengths)


@pytest.mark.parametrize("block", BLOCKS)
def test_attention(block: int) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        call = fuzz.make(seed)
        want = fuzz.expected(call)
        kernels: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
            "rpa_torch_lse": lambda call=call: rpa_torch.rpa_torch_lse(*call.arguments, **call.options)
        }
        for level in {1, rpa_cpp.level()}:
            kernels[f"level {level}"] = lambda call=call, level=level: cpp(call, level)
        if size(call) <= SMALL:
            kernels["reference"] = lambda call=call: reference.ragged_paged_attention_lse(
                *call.arguments, **call.options
            )
        for count in (1, 2):
            torch.set_num_threads(count)
            out, lse = cpp(call)
            assert fuzz.wrong(call, out, lse, want) is None, f"{count} threads, {call}"
            again = rpa_cpp.rpa_cpp(*call.arguments, **call.options)
            assert torch.equal(out, again), f"without log-sum-exp, {count} threads: {call}"
            assert all(map(torch.equal, cpp(call), (out, lse))), f"second run, {count} threads: {call}"
        torch.set_num_threads(1)
        for name, run in kernels.items():
            assert fuzz.wrong(call, *run(), want) is None, f"{name}: {call}"


def test_threads_do_not_matter_where_nothing_is_split() -> None:
    """Sequences of at most one part are added up in one order, whichever thread has them."""
    limits = fuzz.Limits(most_tokens=250, most_rows=8, far=0)
    for seed in range(200):
        call = fuzz.make(seed, limits)
        torch.set_num_threads(1)
        alone = cpp(call)
        torch.set_num_threads(2)
        assert all(map(torch.equal, cpp(call), alone)), str(call)


@pytest.mark.parametrize("block", BLOCKS)
def test_update(block: int) -> None:
    fused = {"rpa_cpp_fused": rpa_cpp_update.rpa_cpp_fused, "rpa_torch_update": rpa_torch.rpa_torch_update}
    write = {"rpa_cpp_write": rpa_cpp_update.rpa_cpp_write, "kv_cache_update": rpa_torch.kv_cache_update}
    torch.set_num_threads(2)
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        call = fuzz.make(seed)
        slots, after, keys, values = fuzz.step(call)
        want = fuzz.expected(call, keys, values)
        mapping = torch.tensor(slots, dtype=torch.int64 if seed % 2 else torch.int32)
        small = size(call) <= SMALL
        attended = {**fused, **({"reference": reference.ragged_paged_attention_update} if small else {})}
        written = {**write, **({"reference": reference.kv_cache_update} if small else {})}
        for name, run in attended.items():
            q, kv, *index = (own := fuzz.make(seed)).arguments  # a fresh cache
            out = run(q, own.new_keys, own.new_values, kv, *index, **own.options)
            assert fuzz.wrong(call, out, None, want) is None, f"{name}: {call}"
            check_cache(kv, after, f"{name}: {call}")
        for name, write_rows in written.items():
            own = fuzz.make(seed)
            options = {key: own.options[key] for key in ("kv_layout", "k_scale", "v_scale")}
            write_rows(own.new_keys, own.new_values, own.arguments[1], mapping, **options)
            check_cache(own.arguments[1], after, f"{name}: {call}")


def check_cache(kv: torch.Tensor, after: torch.Tensor, what: str) -> None:
    """Bit for bit the step's slots and nothing else, neither in this layer's pages nor in another's."""
    assert torch.equal(fuzz.bits(kv), fuzz.bits(after)), f"cache after {what}"
    if kv._base is not None and kv._base.dim() == 5:
        assert (kv._base[:, 0::2].float() == 0).all(), f"another layer after {what}"
