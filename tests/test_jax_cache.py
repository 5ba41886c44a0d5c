"""The cache behind call_jax: what is one program and what are two, lifetimes, counters, limits."""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import opreg
from opreg.jax_bridge import JaxTraceLimitError, jax_cache_clear, jax_cache_info, jax_cache_limits


def scaled(x, factor):
    return x * factor


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
