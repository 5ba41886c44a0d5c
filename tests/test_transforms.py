"""torch.func over operators with formulas: gradients, tangents, nested, with vmap, in a compiled graph."""

from __future__ import annotations

import jax
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import opreg
from opreg.errors import AutogradError

# torch's own decompositions for forward mode, compiled when a tangent is first asked for.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@opreg.register_jax_op("opregtransforms::cube")
def cube(x: jax.Array, w: jax.Array, power: int = 3, *, shift: float = 0.0) -> jax.Array:
    return x**power * w + shift


@opreg.register_jax_op("opregtransforms::spread")
def spread(parts: list[jax.Array], where: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    return sum(part**3 for part in parts), parts[0] * parts[-1], (parts[0] > 0).astype("int32")


@opreg.register_op("opregtransforms::square")
def square(x: torch.Tensor, n: int = 1) -> torch.Tensor:
    return x * x * n


square.register_autograd(
    lambda ctx, g: (2 * ctx.saved_tensors[0] * g * ctx.n, None),
    setup_context=lambda ctx, inputs, output: (ctx.save_for_backward(inputs[0]), setattr(ctx, "n", inputs[1])),
)


@opreg.register_op("opregtransforms::plain")
def plain(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def by_hand(x, w):
    return x**3 * w


WAYS = {
    "call_jax": lambda x, w: opreg.call_jax(lambda a, b: a**3 * b, (x, w)),
    "register_jax_op": cube,
    "torch.ops": torch.ops.opregtransforms.cube,
    "a list": lambda x, w: spread([x])[0] * w,
    "torch.ops, a list": lambda x, w: torch.ops.opregtransforms.spread([x])[0] * w,
}
TRANSFORMS = {
    "grad": lambda f, x, w: grad(lambda a: f(a, w).sum())(x),
    "vjp of both": lambda f, x, w: vjp(f, x, w)[1](w),
    "third derivative": lambda f, x, w: grad(lambda c: grad(lambda b: grad(lambda a: f(a, w).sum())(b).sum())(c).sum())(
        x
    ),
    "vmap(grad)": lambda f, x, w: vmap(grad(lambda a, b: f(a, b)))(x, w),
    "grad(vmap)": lambda f, x, w: grad(lambda a: vmap(f)(a, w).sum())(x),
    "vmap(vmap(grad))": lambda f, x, w: vmap(vmap(grad(lambda a, b: f(a, b)), in_dims=(0, None)), in_dims=(None, 0))(
        x, w
    ),
    "jacrev(jacrev)": lambda f, x, w: jacrev(jacrev(lambda a: f(a, w)))(x),
    "jvp": lambda f, x, w: jvp(f, (x, w), (w, x)),
    "jvp of one": lambda f, x, w: jvp(lambda a: f(a, w), (x,), (w,))[1],
    "vmap(jvp)": lambda f, x, w: vmap(lambda a, b: jvp(lambda c: f(c, w[0]), (a,), (b,))[1])(x, w),
    "hessian": lambda f, x, w: hessian(lambda a: f(a, w).sum())(x),
    "jacfwd(jacfwd)": lambda f, x, w: jacfwd(jacfwd(lambda a: f(a, w)))(x),
    "jacrev(jacfwd)": lambda f, x, w: jacrev(jacfwd(lambda a: f(a, w)))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("way", WAYS)
def test_transforms_equal_those_of_torch_s_own_operators(way, transform):
    x, w = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    run = TRANSFORMS[transform]
    torch.testing.assert_close(run(WAYS[way], x, w), run(by_hand, x, w))


def test_a_gradient_around_a_transform():
    x, w = torch.randn(3, requires_grad=True), torch.randn(3)
    for f in WAYS.values():
        (found,) = torch.autograd.grad(grad(lambda a, f=f: f(a, w).sum())(x).sum(), x)
        torch.testing.assert_close(found, 6 * x * w)


def test_lists_whole_numbers_and_missing_tensors():
    x, y = torch.randn(3), torch.randn(3)

    def total(a, b):
        cubes, product, where = spread([a, x, b], None)
        assert not where.is_floating_point()
        return cubes.sum() + product.sum()

    found = grad(total, argnums=(0, 1))(x, y)
    torch.testing.assert_close(found, (3 * x * x + y, 3 * y * y + x))
    found, tangent = jvp(total, (x, y), (y, x))
    torch.testing.assert_close(tangent, (3 * x * x * y + 3 * y * y * x + y * y + x * x).sum())


def test_dual_tensors_outside_of_torch_func():
    x, w = torch.randn(3), torch.randn(3)
    with torch.autograd.forward_ad.dual_level():
        for f in WAYS.values():
            out = f(torch.autograd.forward_ad.make_dual(x, w), w)
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, 3 * x * x * w * w)


@pytest.mark.parametrize("transform", ["grad", "hessian"])
def test_transforms_inside_a_compiled_graph(transform):
    x, w = torch.randn(3), torch.randn(3)
    run = TRANSFORMS[transform]
    for way in ("call_jax", "register_jax_op"):
        torch._dynamo.reset()
        compiled = torch.compile(lambda a, b, f=WAYS[way]: run(f, a, b), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, w), run(by_hand, x, w))


def test_formulas_of_operators_written_in_torch():
    x = torch.randn(3)
    torch.testing.assert_close(grad(lambda a: square(a, 3).sum())(x), 6 * x)
    torch.testing.assert_close(jacrev(jacrev(lambda a: square(a).sum()))(x), 2 * torch.eye(3))


def test_tangents_that_would_be_dropped_are_refused():
    for op in (square, torch.ops.opregtransforms.square):
        with pytest.raises(AutogradError, match=r"opregtransforms::square.*dual tensor.*torch\.func\.vjp"):
            jvp(op, (torch.ones(2),), (torch.ones(2),))
        with pytest.raises(AutogradError, match=r"opregtransforms::square.*dual tensor"):
            hessian(lambda a, op=op: op(a).sum())(torch.ones(2))


def test_a_formula_with_too_few_gradients_is_named():
    @opreg.register_op("opregtransforms::few")
    def few(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    few.register_autograd(lambda ctx, g: g)
    with pytest.raises(RuntimeError, match="opregtransforms::few: the backward formula returned 1 gradients for 2"):
        grad(lambda a: few(a, a).sum())(torch.ones(2))
