"""call_jax in eager mode: values, structures, dtypes, layouts, cache keys, lifetimes, errors."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import gc
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import opreg
from opreg import jax_bridge_executors
from opreg.jax_bridge import JaxArgumentError, JaxTraceLimitError, jax_cache_clear, jax_cache_info, jax_cache_limits

Pair = collections.namedtuple("Pair", "left right")


def sin_add(a, b):
    return jnp.sin(a) + b


def scaled(x, factor):
    return x * factor


def test_the_values_are_those_of_the_function():
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    for _ in range(3):  # first call, second call, fast path
        torch.testing.assert_close(opreg.call_jax(sin_add, (a, b)), a.sin() + b)


def test_pytrees_in_and_out_belong_to_the_call():
    def f(tree, flag, *, scale):
        total = sum(jax.tree.leaves(tree))
        return {"total": total * scale, "parts": [total, (None,)]} if flag else Pair(total, None)

    x = torch.ones(2)
    tree = {"b": x, "a": [x, Pair(x, None)], "none": None}
    first = opreg.call_jax(f, (tree, True), {"scale": 2.0})
    second = opreg.call_jax(f, (tree, False), {"scale": 2.0})
    third = opreg.call_jax(f, (tree, True), {"scale": 2.0})
    assert list(first) == list(third) == ["parts", "total"]
    torch.testing.assert_close(first["total"], torch.full((2,), 6.0))
    torch.testing.assert_close(third["parts"][0], torch.full((2,), 3.0))
    assert first["parts"][1] == (None,)
    assert type(second) is Pair
    assert second.right is None
    torch.testing.assert_close(second.left, torch.full((2,), 3.0))


def test_static_values_are_told_apart_by_type():
    def f(x, value):
        return x.sum() * 0 + jnp.asarray(value), jnp.asarray(value)

    x = torch.ones(2, dtype=torch.int32)
    kinds = [opreg.call_jax(f, (x, value))[1].dtype for value in (1, 1.0, True, 1, 1.0, True)]
    assert kinds == [torch.int32, torch.float32, torch.bool] * 2
    signs = [opreg.call_jax(lambda x, v: jnp.copysign(1.0, v) + 0 * x.sum(), (x, v)).item() for v in (0.0, -0.0)]
    assert signs == [1.0, -1.0]


def test_nan_as_a_static_value_is_found_again():
    x = torch.ones(2)
    opreg.call_jax(scaled, (x, float("nan")))
    before = jax_cache_info().traces
    assert opreg.call_jax(scaled, (x, float("nan"))).isnan().all()
    assert jax_cache_info().traces == before


@dataclasses.dataclass(frozen=True)
class Config:
    factor: object
    name: str = "c"


class Mode(enum.Enum):
    DOUBLE = 2
    TRIPLE = 3


@pytest.mark.parametrize(
    ("value", "take", "expected"),
    [
        (Config(3), lambda v: v.factor, 3.0),
        (Config(2.5), lambda v: v.factor, 2.5),
        (Mode.TRIPLE, lambda v: v.value, 3.0),
        ("four", lambda v: len(v), 4.0),
        (slice(0, 2, 1), lambda v: v.stop, 2.0),
        (b"abc", lambda v: len(v), 3.0),
        (np.dtype("float16"), lambda v: v.itemsize, 2.0),
        (torch.float32, lambda v: 1, 1.0),
        (abs, lambda v: v(-2), 2.0),
    ],
)
def test_static_values_of_many_kinds(value, take, expected):
    result = opreg.call_jax(lambda x, v: x * take(v), (torch.ones(2), value))
    assert result.tolist() == [expected] * 2


def test_frozen_dataclasses_with_equal_but_different_fields_are_different():
    kinds = [
        opreg.call_jax(lambda x, c: jnp.asarray(c.factor), (torch.ones(1), Config(v))).dtype for v in (1, 1.0, True)
    ]
    f = lambda x, c: jnp.asarray(c.factor)  # noqa: E731
    again = [opreg.call_jax(f, (torch.ones(1), Config(v))).dtype for v in (1, 1.0, True)]
    assert kinds == again == [torch.int32, torch.float32, torch.bool]


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


def test_numpy_and_jax_arrays_and_random_keys_are_operands():
    def f(a, b, c, key):
        return a + b + c + 0 * jax.random.uniform(key, a.shape)

    a = torch.ones(3)
    frozen = np.full(3, 2.0, np.float32)
    frozen.flags.writeable = False
    key = jax.random.key(0)
    before = None
    for scale in (1, 2):
        out = opreg.call_jax(f, (a, frozen * scale if scale > 1 else frozen, jnp.full(3, 3.0), key))
        torch.testing.assert_close(out, torch.full((3,), 4.0 + 2 * scale))
        before = before or jax_cache_info().traces
    assert jax_cache_info().traces == before  # values are data, not keys
    drawn = opreg.call_jax(lambda k: jax.random.uniform(k, (4,)), (jax.random.key(7),))
    raw = opreg.call_jax(
        lambda k: jax.random.uniform(jax.random.wrap_key_data(k), (4,)),
        (torch.tensor([0, 7], dtype=torch.uint32),),
    )
    assert torch.equal(drawn, raw)
    np.testing.assert_array_equal(drawn.numpy(), np.asarray(jax.random.uniform(jax.random.key(7), (4,))))
    assert opreg.call_jax(lambda a: a * 2, (np.float32(3),)).item() == 6


def test_no_arguments_no_results_and_scalars():
    assert opreg.call_jax(lambda: jnp.arange(3)).tolist() == [0, 1, 2]
    assert opreg.call_jax(lambda a: None, (torch.ones(2),)) is None
    assert opreg.call_jax(lambda a: (3, 2.5, True), (torch.ones(2),)) == (3, 2.5, True)


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


def test_large_arguments_are_not_copied():
    x = torch.randn(4 << 20)  # 16 MiB: a copy takes about 2 ms
    seen = []
    opreg.call_jax(lambda a: a[0], (x,))
    import time

    for _ in range(20):
        start = time.thread_time()
        opreg.call_jax(first, (x,))
        seen.append(time.thread_time() - start)
    assert sorted(seen)[5] < 1e-3


def first(a):
    return a[0]


def test_a_function_is_forgotten_when_it_dies():
    before = jax_cache_info()
    held = []
    for _ in range(5):
        f = lambda a: a + 1  # noqa: E731
        held.append(weakref.ref(f))
        opreg.call_jax(f, (torch.ones(2),))
    del f
    gc.collect()
    after = jax_cache_info()
    assert [ref() for ref in held] == [None] * 5
    assert after.functions <= before.functions
    assert after.programs <= before.programs
    assert after.entries <= before.entries
    assert "same code" in after.reasons[-1]


def test_ids_that_are_used_again_do_not_confuse():
    for i in range(30):
        f = eval(f"lambda a: a + {i}")
        assert opreg.call_jax(f, (torch.zeros(1),)).item() == i
        del f


def test_partials_and_methods_are_known_by_what_they_call():
    class Layer:
        def __init__(self, factor):
            self.factor = factor

        def apply(self, x):
            return x * self.factor

        def __call__(self, x):
            return x + self.factor

    two, three = Layer(2), Layer(3)
    x = torch.ones(1)
    jax_cache_clear()
    for _ in range(2):
        assert opreg.call_jax(two.apply, (x,)).item() == 2
        assert opreg.call_jax(three.apply, (x,)).item() == 3
        assert opreg.call_jax(two, (x,)).item() == 3
        assert opreg.call_jax(functools.partial(scaled, factor=4), (x,)).item() == 4
        assert opreg.call_jax(functools.partial(scaled, x), (5,)).item() == 5
    assert jax_cache_info().traces == 5
    alive = weakref.ref(two)
    del two
    gc.collect()
    assert alive() is None


def test_jitted_functions_and_library_functions():
    x = torch.tensor([4.0, 9.0])
    assert opreg.call_jax(jnp.sqrt, (x,)).tolist() == [2, 3]
    assert opreg.call_jax(jax.jit(scaled, static_argnums=1), (x, 2)).tolist() == [8, 18]
    torch.testing.assert_close(opreg.call_jax(jax.nn.softmax, (x,), {"axis": -1}), x.softmax(-1))
    assert opreg.call_jax(jnp.linalg.cholesky, (torch.eye(3) * 4,)).diagonal().tolist() == [2, 2, 2]


def test_counters_reasons_and_limits():
    jax_cache_clear()

    def f(x, n=1):
        return x * n

    for size in (1, 2, 2, 3):
        opreg.call_jax(f, (torch.ones(size),))
    opreg.call_jax(f, (torch.ones(3), 2))
    info = jax_cache_info()
    assert (info.calls, info.traces, info.entries) == (5, 4, 4)
    assert "first call" in info.reasons[0]
    assert "new shapes or dtypes float32[2]; had float32[1]" in info.reasons[1]
    assert "new structure or static values" in info.reasons[3]
    try:
        jax_cache_limits(entries=2)
        for size in range(4, 9):
            assert opreg.call_jax(f, (torch.ones(size),)).shape == (size,)
        opreg.call_jax(f, (torch.ones(3), 2))
        opreg.call_jax(f, (torch.ones(3), 3))
        info = jax_cache_info()
        assert info.entries <= 2
        assert info.evictions >= 6
        jax_cache_limits(entries=512, max_traces=info.traces)
        with pytest.raises(JaxTraceLimitError, match=r"max_traces=\d+.*Latest reasons.*Pass values that change"):
            opreg.call_jax(f, (torch.ones(99),))
        jax_cache_limits(max_traces=None)
        assert opreg.call_jax(f, (torch.ones(99),)).shape == (99,)
    finally:
        jax_cache_limits(entries=512, max_traces=None)
    with pytest.raises(ValueError, match="entries is 0"):
        jax_cache_limits(entries=0)


def test_a_change_of_jax_configuration_is_a_new_trace():
    jax_cache_clear()
    f = lambda a: jnp.dot(a, a)  # noqa: E731
    x = torch.ones(2, 2)
    opreg.call_jax(f, (x,))
    with jax.default_matmul_precision("highest"):
        opreg.call_jax(f, (x,))
    assert jax_cache_info().traces == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((torch.ones(2).to_sparse(),), "args\\[0\\] is a sparse_coo tensor.*to_dense"),
        ((torch.empty(2, dtype=torch.bits8),), "args\\[0\\] has dtype torch.bits8"),
        ((torch.ones(2), torch.ones(2, device="meta")), "different devices: args\\[0\\] on cpu, args\\[1\\] on meta"),
        ((torch.ones(2), {"k": object()}), "args\\[1\\]\\['k'\\] is a builtins.object.*a function of your own"),
        ((np.array(["a"]),), "numpy argument has dtype"),
    ],
)
def test_arguments_that_cannot_cross_are_named(args, words):
    with pytest.raises(JaxArgumentError, match=words):
        opreg.call_jax(lambda *a: a[0], args)


def test_what_is_not_a_function_and_results_torch_lacks():
    with pytest.raises(JaxArgumentError, match="must be a JAX function; got int: 3"):
        opreg.call_jax(3, ())
    with pytest.raises(JaxArgumentError, match=r"int4.*convert it in the function"):
        opreg.call_jax(lambda a: a.astype(jnp.int4), (torch.ones(2),))
    with pytest.raises(JaxArgumentError, match="key_data"):
        opreg.call_jax(lambda a: jax.random.key(0), (torch.ones(2),))


def test_devices_without_an_executor_are_told_and_meta_tensors_give_meta_tensors(monkeypatch):
    assert opreg.call_jax(first, (torch.ones(3, 2, device="meta"),)).shape == (2,)
    monkeypatch.delitem(jax_bridge_executors.EXECUTORS, "cpu")
    with pytest.raises(opreg.KernelError, match="no executor for tensors on 'cpu'; JAX functions run on"):
        opreg.call_jax(first, (torch.ones(3, dtype=torch.float64),))


def test_errors_of_the_function_pass_through_and_harm_nothing():
    def f(a, ok):
        if not ok:
            raise RuntimeError("mine")
        return a

    with pytest.raises(RuntimeError, match="mine"):
        opreg.call_jax(f, (torch.ones(1), False))
    assert opreg.call_jax(f, (torch.ones(1), True)).item() == 1


def test_without_jax_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['jax'] = None; import torch, opreg\n"
        "try: opreg.call_jax(lambda a: a, (torch.ones(1),))\n"
        "except opreg.KernelError as e: assert \"pip install 'opreg[jax]'\" in str(e), e\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_bridge_does_not_import_jax():
    code = (
        "import sys, opreg; assert 'torch' not in sys.modules and 'jax' not in sys.modules\n"
        "import opreg.jax_bridge; assert 'jax' not in sys.modules, 'jax'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
