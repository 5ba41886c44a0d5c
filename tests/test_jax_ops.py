"""register_jax_op and from_jax: JAX functions as named operators and as kernels of operators."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import Tensor

import opreg
from opreg import digest, jax_bridge, jax_bridge_ops, library
from opreg.jax_bridge import from_jax, register_jax_op


@register_jax_op("opregjaxtest::affine")
def affine(
    x: Annotated[jax.Array, "*n d"], w: jax.Array, bias: jax.Array | None = None, scale: float = 1.0
) -> Annotated[jax.Array, "*n d"]:
    """An affine map."""
    y = x * w * scale
    return y if bias is None else y + bias


@register_jax_op("opregjaxtest::many")
def many(
    parts: list[jax.Array], mode: Literal["sum", "mean"] = "sum", *, times: int = 2
) -> tuple[jax.Array, jax.Array]:
    total = sum(parts) * times
    return (total, total.argmax()) if mode == "sum" else (total / len(parts), total.argmin())


@register_jax_op("opregjaxtest::append", mutates_args=("cache", "length"))
def append(cache: jax.Array, length: jax.Array, new: jax.Array) -> jax.Array:
    start = (length[0],) + (0,) * (cache.ndim - 1)
    return jax.lax.dynamic_update_slice(cache, new, start), length + new.shape[0], new.sum()


@opreg.register_op("opregjaxtest::norm")
def norm(x: Annotated[Tensor, "*n d"], eps: float = 1e-6) -> Annotated[Tensor, "*n d"]:
    """Root-mean-square norm."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def norm_in_jax(x, eps=1e-6):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


norm.register_kernel("cpu", from_jax(norm_in_jax), requires="jax")


def compiled(fn, **options):
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, **options)


def test_schemas_come_from_the_annotations():
    assert str(affine.overload._schema) == (
        "opregjaxtest::affine(Tensor x, Tensor w, Tensor? bias=None, float scale=1.) -> Tensor"
    )
    assert str(many.overload._schema) == (
        'opregjaxtest::many(Tensor[] parts, str mode="sum", *, SymInt times=2) -> (Tensor, Tensor)'
    )
    assert str(append.overload._schema) == (
        "opregjaxtest::append(Tensor(a0!) cache, Tensor(a1!) length, Tensor new) -> Tensor"
    )
    assert affine.__doc__ == "An affine map."


def test_eager_compiled_and_dynamic_agree():
    x, w, b = torch.randn(3, 4), torch.randn(4), torch.randn(4)
    torch.testing.assert_close(affine(x, w, b, 2.0), x * w * 2 + b)
    torch.testing.assert_close(affine(x, w), x * w)
    call = compiled(lambda x: affine(x, w, b, scale=3.0) + 1, dynamic=True)
    for n in (3, 8):
        x = torch.randn(n, 4)
        torch.testing.assert_close(call(x), x * w * 3 + b + 1)
    total, where = many([x, x + 1], times=3)
    torch.testing.assert_close(total, (2 * x + 1) * 3)
    assert where.item() == total.argmax().item()


def test_a_symbolic_integer_is_a_static_value():
    parts = [torch.ones(3)]
    call = compiled(lambda x: many([x], times=x.shape[0])[0], dynamic=True, backend="eager")
    assert [call(torch.ones(n)).tolist() for n in (2, 3)] == [[2, 2], [3, 3, 3]]
    assert many(parts, times=3)[0].tolist() == [3, 3, 3]


def test_opcheck_every_kind():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    results = [
        library.opcheck(affine.overload, (x, w, None, 2.0), {}),
        library.opcheck(affine.overload, (x, w, torch.randn(4, requires_grad=True)), {}),
        library.opcheck(many.overload, ([torch.randn(3, requires_grad=True), torch.randn(3)],), {}),
        library.opcheck(append.overload, (torch.zeros(8, 2), torch.tensor([1]), torch.randn(3, 2)), {}),
        library.opcheck(norm.overload, (torch.randn(3, 4),), {}),
    ]
    for result in results:
        assert set(result.values()) == {"SUCCESS"}, result


def test_gradients_and_vmap():
    args = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: affine(x, w, b, 1.5), (*args, bias))
    assert torch.autograd.gradgradcheck(lambda x, w, b: affine(x, w, b, 1.5), (*args, bias))
    assert torch.autograd.gradcheck(lambda a, b: many([a, b], times=3)[0], args)
    x, w = torch.randn(5, 3), torch.randn(3)
    torch.testing.assert_close(torch.vmap(affine, in_dims=(0, None))(x, w), x * w)
    stacked = torch.vmap(lambda a: many([a, w], mode="mean")[0])(x)
    torch.testing.assert_close(stacked, (x + w))


@pytest.mark.parametrize("run", [lambda fn: fn, compiled], ids=["eager", "compiled"])
def test_written_arguments_are_updated_in_place(run):
    def step(cache, length, new):
        total = append(cache, length, new)
        return total + cache.sum(), cache * 1

    cache, length = torch.zeros(8, 2), torch.tensor([2], dtype=torch.int32)
    pointer = cache.data_ptr()
    call = run(step)
    total, copy = call(cache, length, torch.ones(3, 2))
    assert cache.data_ptr() == pointer
    assert cache.sum(1).tolist() == copy.sum(1).tolist() == [0, 0, 2, 2, 2, 0, 0, 0]
    assert length.item() == 5
    assert total.item() == 12
    call(cache[:, :], length, torch.ones(2, 2))
    assert cache.sum(1).tolist() == [0, 0, 2, 2, 2, 2, 2, 0]


def test_a_written_view_writes_its_base():
    base, length = torch.zeros(2, 8, 2), torch.tensor([0], dtype=torch.int32)

    def step(base, length):
        append(base[1], length, torch.ones(1, 2))
        return base.clone()

    compiled(step)(base, length)
    step(base, length)
    assert base.sum((1, 2)).tolist() == [0, 4]


def test_a_jax_kernel_serves_an_op_and_is_listed():
    x = torch.randn(3, 4)
    expected = norm.op.body(x)
    assert norm.explain(x).selected.name.endswith("norm_in_jax")
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(compiled(norm)(x), expected)
    with opreg.use_kernel("opregjaxtest::norm", "reference"):
        torch.testing.assert_close(norm(x), expected)


def test_a_kernel_named_by_a_string_is_imported_at_first_use(tmp_path, monkeypatch):
    (tmp_path / "lately.py").write_text("import jax.numpy as jnp\ndef double(x):\n    return jnp.multiply(x, 2)\n")
    monkeypatch.syspath_prepend(tmp_path)

    @opreg.register_op("opregjaxtest::double_late")
    def double_late(x: Annotated[Tensor, "*n"]) -> Annotated[Tensor, "*n"]: ...

    double_late.register_kernel("cpu", from_jax("lately:double"), requires="jax")
    assert "lately" not in sys.modules
    assert double_late(torch.ones(2)).tolist() == [2, 2]
    assert "lately" in sys.modules
    with pytest.raises(opreg.KernelError, match=r"module 'lately' has no 'triple'"):
        from_jax("lately:triple")(torch.ones(1))
    with pytest.raises(opreg.SignatureError, match="not of the form"):
        from_jax("lately.double")


def test_an_example_replaces_annotations():
    @register_jax_op("opregjaxtest::by_example", example=(torch.ones(2, 3), [torch.ones(3)], 2, "a"))
    def by_example(x, ys, n, text):
        return x * n + sum(ys), len(text) * x

    assert str(by_example.overload._schema).startswith(
        "opregjaxtest::by_example(Tensor x, Tensor[] ys, SymInt n, str text) -> (Tensor, Tensor)"
    )
    assert by_example(torch.ones(2), [torch.ones(2)], 3, "ab")[0].tolist() == [4, 4]
    with pytest.raises(opreg.SignatureError, match=r"has 2 parameters \(a, b\) and the example 1"):
        register_jax_op("opregjaxtest::bad", example=(torch.ones(1),))(lambda a, b: a)


def test_mistakes_are_named():
    with pytest.raises(opreg.SignatureError, match="parameter 'x' of unknown has no annotation"):

        @register_jax_op("opregjaxtest::unknown")
        def unknown(x) -> jax.Array:
            return x

    with pytest.raises(opreg.DuplicateOpError, match="already registered"):

        @register_jax_op("opregjaxtest::affine")
        def affine(
            x: Annotated[jax.Array, "*n d"], w: jax.Array, bias: jax.Array | None = None, scale: float = 1.0
        ) -> Annotated[jax.Array, "*n d"]:
            """An affine map."""
            return x

    @register_jax_op("opregjaxtest::forgetful", mutates_args="cache")
    def forgetful(cache: jax.Array) -> None:
        return cache[:1]

    with pytest.raises(opreg.KernelError, match=r"new value of 'cache' is torch.float32 \[1\].*return the whole"):
        forgetful(torch.ones(3))


def test_the_direct_operator_is_reachable_by_name():
    x = torch.ones(2, 2)
    assert torch.ops.opregjaxtest.affine(x, x).tolist() == x.tolist()
    assert library.is_defined("opregjaxtest::affine")
    assert jax_bridge.register_jax_op is register_jax_op


FACTOR = 2


@jax.jit
def repeated(x):
    return jnp.tile(x, FACTOR)


def test_the_contract_digest_covers_the_jax_function_and_what_it_calls(monkeypatch):
    @register_jax_op("opregjaxtest::tiled")
    def tiled(x: jax.Array) -> jax.Array:
        return repeated(x)

    before = digest.of_op(tiled.op)
    assert digest.of_op(tiled.op) == before
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert digest.of_op(tiled.op) != before
    monkeypatch.undo()
    assert digest.of_op(tiled.op) == before
    codes = [digest.of_code(jax_bridge_ops.JaxKernel(fn, ())) for fn in (lambda x: x * 2, lambda x: x * 3)]
    assert codes[0] != codes[1]


CHANGED = """
import torch, jax, jax.numpy as jnp
from opreg import register_jax_op

@jax.jit
def widen(x):
    return jnp.tile(x, TIMES)

@register_jax_op("opregjaxdisk::op")
def op(x: jax.Array) -> jax.Array:
    return widen(x)

from torch._dynamo.utils import counters
out = torch.compile(lambda x: op(x), fullgraph=True)(torch.ones(2))
print(out.shape[0], counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_a_changed_jax_function_misses_the_disk_cache(tmp_path):
    settings = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = []
    for times in (2, 2, 3):
        command = [sys.executable, "-c", CHANGED.replace("TIMES", str(times))]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True, timeout=300)
        found.append(done.stdout.split())
    assert found == [["4", "0", "1"], ["4", "1", "0"], ["6", "0", "1"]]
