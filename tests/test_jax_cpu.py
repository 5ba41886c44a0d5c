"""The CPU executor: dtypes, layouts and memory, and its quick ways (buffers for small arguments, views for others)."""

from __future__ import annotations

import functools
import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import opreg
from opreg import jax_bridge, jax_bridge_cpu, jax_bridge_programs
from opreg.jax_bridge import jax_cache_info
from opreg.jax_bridge_buffers import LIMIT

BIG = LIMIT // 4 + 1


def sub(a, b):
    return a - b * 2


def program_of(fn):
    (program,) = jax_bridge_programs.find_function(fn).programs.values()
    return program


@pytest.fixture
def quickly(monkeypatch):
    """How many calls took a quick way so far, by whether arguments went through buffers."""
    found = {"buffers": 0, "views": 0}
    quick = jax_bridge_cpu.run_quick

    def counted(program, tensors):
        out = quick(program, tensors)
        if out is not None:
            found["views" if program.recipe.idle is None else "buffers"] += 1
        return out

    for module in (jax_bridge, jax_bridge_cpu):
        monkeypatch.setattr(module, "run_quick", counted)
    return found


@pytest.mark.parametrize(
    ("dtype", "size", "way"),
    [
        (torch.float32, 5, "buffers"),
        (torch.bfloat16, 5, "buffers"),
        (torch.float8_e5m2, 5, "buffers"),
        (torch.complex64, 5, "buffers"),
        (torch.bool, 5, "buffers"),
        (torch.int64, 5, "views"),
        (torch.float32, BIG, "views"),
        (torch.bfloat16, 2 * BIG, "views"),
    ],
)
def test_values_and_the_way_taken(quickly, dtype, size, way):
    fn = lambda a, b: jnp.where(b, a, a)  # noqa: E731
    for seed in range(4):
        x = (torch.arange(size) % 3 + seed).to(dtype)
        y = torch.zeros(size, dtype=torch.bool)
        got = opreg.call_jax(fn, (x, y))
        assert got.dtype is dtype
        assert torch.equal(got.view(torch.uint8), x.view(torch.uint8))
    assert quickly == {"buffers": 0, "views": 0} | {way: 3}


def test_whatever_changes_about_the_arguments_is_seen(quickly):
    fn = lambda a, b: a - b * 2  # noqa: E731
    x = torch.arange(4.0).view(2, 2)
    variants = [x, x.t(), x.double(), x[:1], torch._neg_view(x), x.to(torch.bfloat16), torch.nn.Parameter(x), x.int()]
    for _ in range(3):
        for value in variants:
            got = opreg.call_jax(fn, (value, value))
            torch.testing.assert_close(got, value - value * 2)
            assert got.requires_grad == value.requires_grad
    with torch.no_grad():
        for _ in range(3):
            assert not opreg.call_jax(fn, (variants[6], x)).requires_grad
    assert opreg.call_jax(fn, (variants[6], x)).requires_grad
    with pytest.raises(opreg.jax_bridge.JaxArgumentError, match="sparse"):
        opreg.call_jax(fn, (x.to_sparse(), x))
    assert opreg.call_jax(fn, (x.to("meta"), x.to("meta"))).is_meta
    assert quickly["buffers"] > 5
    assert quickly["views"] > 5


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), func.name()]
        return func(*args, **(kwargs or {}))


def test_who_looks_on_sees_the_operator():
    x = torch.ones(3)
    for _ in range(3):
        opreg.call_jax(sub, (x, x))
    with Watch() as seen:
        opreg.call_jax(sub, (x, x))
    assert seen.names == ["opreg::jax_call"]
    with torch.profiler.profile() as profile:
        opreg.call_jax(sub, (x, x))
    assert "opreg::jax_call" in {event.name for event in profile.events()}
    torch.testing.assert_close(torch.vmap(lambda a: opreg.call_jax(sub, (a, x[0])))(x), -x)
    with torch.device("meta"):  # a mode that makes every new tensor a meta tensor
        assert opreg.call_jax(lambda a: a + 1, (x,)).tolist() == [2, 2, 2]
        assert opreg.call_jax(sub, (x, x)).tolist() == [-1, -1, -1]


def test_threads_do_not_meet_in_a_buffer():
    fn = lambda a, b: jnp.cumsum(a - b * 2)  # noqa: E731
    opreg.call_jax(fn, (torch.zeros(300), torch.zeros(300)))
    wrong = []

    def work(number):
        x = torch.full((300,), float(number))
        expected = (x - x * 2).cumsum(0)
        for _ in range(300):
            if not torch.allclose(opreg.call_jax(fn, (x, x)), expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= len(program_of(fn).recipe.idle) <= 4


def test_a_call_inside_a_call_has_buffers_of_its_own():
    x = torch.arange(3.0)

    def outer(a):
        def inside(host):
            if depth:
                depth.pop()
                seen.append(opreg.call_jax(outer, (x + 10,)).tolist())
            return host + 1

        return jax.pure_callback(inside, jax.ShapeDtypeStruct(a.shape, a.dtype), a) + a

    depth, seen = [], []
    for _ in range(2):
        assert opreg.call_jax(outer, (x,)).tolist() == [1, 3, 5]
    depth.append(1)
    assert opreg.call_jax(outer, (x,)).tolist() == [1, 3, 5]
    assert seen == [[21, 23, 25]]


def test_results_stay_as_they_are_when_the_buffers_are_used_again():
    fn = lambda a: (a, {"same": a, "more": a + 1})  # noqa: E731
    kept = [opreg.call_jax(fn, (torch.full((4,), float(i)),)) for i in range(5)]
    for i, (first, rest) in enumerate(kept):
        assert first.tolist() == rest["same"].tolist() == [i] * 4
        assert rest["more"].tolist() == [i + 1] * 4
    same = [opreg.call_jax(lambda a: a, (torch.full((4,), float(i)),)) for i in range(3)]
    assert [x[0].item() for x in same] == [0, 1, 2]


def test_jax_s_wide_mode_may_be_switched_between_calls():
    fn = lambda a: a.astype(jnp.result_type(float))  # noqa: E731
    x = torch.ones(3)
    for _ in range(3):
        assert opreg.call_jax(fn, (x,)).dtype is torch.float32
    previous = jax.config.jax_enable_x64
    try:
        jax.config.update("jax_enable_x64", True)
        for _ in range(3):
            assert opreg.call_jax(fn, (x,)).tolist() == [1.0] * 3
            assert opreg.call_jax(fn, (x,)).dtype is torch.float64
    finally:
        jax.config.update("jax_enable_x64", previous)
    assert opreg.call_jax(fn, (x,)).dtype is torch.float32


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own rules use it
def test_forward_mode_derivatives():
    x = torch.ones(3)
    for _ in range(3):
        opreg.call_jax(sub, (x, x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.full((3,), 2.0))
        tangent = forward_ad.unpack_dual(opreg.call_jax(sub, (dual, x))).tangent
    assert tangent.tolist() == [2, 2, 2]
    _, tangent = torch.func.jvp(lambda a: opreg.call_jax(sub, (a, a)), (x,), (x,))
    assert tangent.tolist() == [-1, -1, -1]


def peak_growth(call):
    """By how many bytes the memory of the process was larger during the call than before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is used now
    status = lambda field: int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # noqa: E731
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux' /proc")
def test_large_arguments_are_not_copied():
    size = 64 << 20
    x = torch.ones(size // 4)
    fn = lambda a: a[:2] + 1  # noqa: E731
    for _ in range(2):
        opreg.call_jax(fn, (x,))
    assert peak_growth(x.clone) > 0.9 * size  # a copy would be seen
    assert peak_growth(lambda: opreg.call_jax(fn, (x,))) < 0.1 * size


def test_counters_count_quick_calls():
    before = jax_cache_info().calls
    for size in (3, BIG):
        for _ in range(4):
            opreg.call_jax(sub, (torch.ones(size), torch.ones(size)))
    assert jax_cache_info().calls - before == 8


def test_a_recipe_goes_with_what_was_compiled():
    x = torch.ones(3)
    for _ in range(2):
        opreg.call_jax(sub, (x, x))
    program = program_of(sub)
    assert program.recipe is not None
    jax_bridge.jax_cache_clear()
    assert program.recipe is None
    assert not program.recipes
    assert opreg.call_jax(sub, (x, x)).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.bool,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
@pytest.mark.parametrize("size", [8, pytest.param(40_000, marks=pytest.mark.slow)])  # copied out, taken over
def test_every_dtype_comes_back_exactly(dtype, size):
    x = (torch.arange(size) % 5).to(dtype)
    out = opreg.call_jax(lambda a, b: (a, jnp.stack([b, b])), (x, x))
    for _ in range(2):
        assert out[0].dtype == out[1].dtype == dtype
        assert torch.equal(out[0].view(torch.uint8), x.view(torch.uint8))
        assert torch.equal(out[1][1].view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float8_e5m2])
def test_large_results_come_back_exactly(dtype):
    test_every_dtype_comes_back_exactly(dtype, 40_000)


def test_64_bit_values_are_exact_and_the_mode_stays_inside_the_call():
    big = torch.tensor([2**40 + 1, -(2**50)])
    assert opreg.call_jax(lambda a: a + 1, (big,)).tolist() == [2**40 + 2, 1 - 2**50]
    tiny = torch.tensor([1e-300, 1 + 2**-40], dtype=torch.float64)
    assert torch.equal(opreg.call_jax(lambda a: a * 2, (tiny,)), tiny * 2)
    assert not jax.config.jax_enable_x64
    assert opreg.call_jax(lambda a: a * jnp.zeros(2), (torch.ones(2),)).dtype == torch.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(6, 4).t(),
        lambda: torch.randn(200, 300).t(),
        lambda: torch.randn(12, 4)[::2],
        lambda: torch.randn(13)[1:],  # not aligned
        lambda: torch.randn(1, 4).expand(5, 4),
        lambda: torch.randn(0, 4),
        lambda: torch.randn(()),
        lambda: torch.randn(3, 4, requires_grad=True).detach(),
        lambda: torch.randn(4, dtype=torch.complex64).conj(),
        lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
        lambda: torch.randn(4, 6).to(torch.bfloat16).t(),
    ],
)
def test_any_layout(make):
    x = make()
    out = opreg.call_jax(lambda a: a + a, (x,))
    torch.testing.assert_close(out, x + x)
    assert out.is_contiguous()


def test_results_share_no_memory():
    constant = jnp.ones(20_000)
    x = torch.ones(20_000)
    before = x.clone()

    def f(a):
        b = a + 1
        return a, b, b, constant, a.reshape(100, 200)

    for _ in range(3):
        outs = opreg.call_jax(f, (x,))
        pointers = {out.data_ptr() for out in outs}
        assert len(pointers) == len(outs)
        assert x.data_ptr() not in pointers
        for out in outs:
            out.fill_(-7)
        assert torch.equal(x, before)
        assert float(constant.sum()) == 20_000


def test_the_arguments_may_be_overwritten_at_once():
    f = lambda a: functools.reduce(lambda acc, _: jnp.cos(acc), range(8), a)  # noqa: E731
    expected = opreg.call_jax(f, (torch.full((1 << 20,), 0.5),))
    for _ in range(6):
        x = torch.full((1 << 20,), 0.5)
        out = opreg.call_jax(f, (x,))
        x.fill_(100.0)
        assert torch.equal(out, expected)
