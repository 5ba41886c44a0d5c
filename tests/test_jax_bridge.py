"""call_jax in eager mode: values, structures, kinds of arguments, errors."""

from __future__ import annotations

import collections
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import opreg
from opreg import jax_bridge_executors
from opreg.jax_bridge import JaxArgumentError, jax_cache_info

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


def first(a):
    return a[0]


def test_jitted_functions_and_library_functions():
    x = torch.tensor([4.0, 9.0])
    assert opreg.call_jax(jnp.sqrt, (x,)).tolist() == [2, 3]
    assert opreg.call_jax(jax.jit(scaled, static_argnums=1), (x, 2)).tolist() == [8, 18]
    torch.testing.assert_close(opreg.call_jax(jax.nn.softmax, (x,), {"axis": -1}), x.softmax(-1))
    assert opreg.call_jax(jnp.linalg.cholesky, (torch.eye(3) * 4,)).diagonal().tolist() == [2, 2, 2]


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


@pytest.mark.parametrize("compiled", [False, True])
def test_one_tensor_is_no_list_of_arguments(compiled):
    def call(x):
        return opreg.call_jax(jnp.add, x)  # its two rows would be added

    torch._dynamo.reset()
    run = torch.compile(call, backend="eager") if compiled else call
    with pytest.raises(JaxArgumentError, match=r"args is a torch.Tensor.*write \(x,\) for one"):
        run(torch.ones(2, 3))


def test_an_ellipsis_is_a_static_value():
    assert opreg.call_jax(lambda a, index: a[index], (torch.ones(2, 3), ...)).shape == (2, 3)
