"""Random Python programs through torch.compile: split, they compute what they compute eagerly; sizes dynamic, gradients
too, and with the worst compiler that is still right."""

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

LIB = torch.library.Library("opreg_dynamic", "DEF")
LIB.define("mix(Tensor q, Tensor k, Tensor(a!) out, str name) -> ()")
LIB.define("pair(Tensor x, str name) -> (Tensor, Tensor)")
LIB.define("blend(Tensor q, Tensor k, str name) -> Tensor")
ON = ["opreg_dynamic::mix", "opreg_dynamic::pair", "opreg_dynamic::blend"]
COLUMNS = 6


def mix(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, name: str) -> None:
    out.copy_(out + q - 0.5 * k + len(name))


def pair(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x + len(name), x * 2


def blend(q: torch.Tensor, k: torch.Tensor, name: str) -> torch.Tensor:
    return q * 0.25 + k.sin() * len(name)


for name, fn in (("mix", mix), ("pair", pair), ("blend", blend)):
    LIB.impl(name, fn, "CompositeExplicitAutograd")
torch.library.register_fake("opreg_dynamic::mix", lambda q, k, out, name: None, lib=LIB)
torch.library.register_fake("opreg_dynamic::pair", lambda x, name: (torch.empty_like(x), torch.empty_like(x)), lib=LIB)
torch.library.register_fake("opreg_dynamic::blend", lambda q, k, name: torch.empty_like(q), lib=LIB)
torch.library.register_autograd("opreg_dynamic::pair", lambda ctx, a, b: (a + 2 * b, None), lib=LIB)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.length = len(inputs[2])


torch.library.register_autograd(
    "opreg_dynamic::blend",
    lambda ctx, g: (g * 0.25, g * ctx.saved_tensors[0].cos() * ctx.length, None),
    setup_context=_keep,
    lib=LIB,
)

# name: (kinds of its arguments, kinds of its results, function). Kinds: F is n x 6, H is n x 3, V is 6 n numbers.
OPS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "add": ("FF", "F", lambda a, b: a + b),
    "relu": ("F", "F", torch.relu),
    "half": ("F", "F", lambda a: a * 0.5),
    "wave": ("F", "F", lambda a: (a + 1).sin()),
    "gated": ("FF", "F", lambda a, b: (a + 1) * (b * 2)),
    "cold": ("F", "F", lambda a: a.detach() * 1),
    "frozen": ("FF", "F", lambda a, b: a + (b > 1).float() * b.detach().sum()),
    "mean": ("F", "F", lambda a: a - a.mean(-1, keepdim=True)),
    "flat": ("F", "V", lambda a: a.reshape(-1)),
    "rows": ("V", "F", lambda a: a.view(-1, COLUMNS)),
    "turned": ("F", "F", lambda a: a.t().contiguous().t()),
    "chunk": ("F", "HH", lambda a: a.chunk(2, -1)),
    "left": ("F", "H", lambda a: a[:, :3]),
    "join": ("HH", "F", lambda a, b: torch.cat((a, b), -1)),
    "sized": ("FH", "F", lambda a, b: torch.zeros(a.size()) + torch.ones((b.size(0), 1)) * a.shape[0]),
    "double": ("H", "H", lambda a: torch.full((a.shape[0] * 2, 3), 0.5)[a.size(0) :] + a),
    "parts": ("F", "F", lambda a: torch.cat((a[: a.shape[0] // 2] * 2, a[a.shape[0] // 2 :]), 0)),
    "split": ("F", "FF", lambda a: (a.split([a.shape[0] - 1, 1])[0].sum() + a, a.unbind(1)[0][:, None] * a)),
    "add_": ("F", "", lambda a: a.add_(1)),
    "mul_": ("H", "", lambda a: a.mul_(0.5)),
    "scale_": ("FF", "", lambda a, b: a.mul_(b.sin())),
    "flat_": ("V", "", lambda a: a.sub_(0.25)),
    "set_": ("F", "", lambda a: a.__setitem__((slice(0, 2), slice(None)), 3.0)),
    "copy_": ("FF", "", lambda a, b: a.copy_(b)),
    "out": ("FFF", "", lambda a, b, c: torch.add(a, b, out=c) if c.is_contiguous() else None),
    "mix": ("FFF", "", lambda a, b, c: torch.ops.opreg_dynamic.mix(a, b, c, "layers.12")),
    "mix new": ("FF", "F", lambda a, b: _mixed(torch.empty_like(a).zero_(), a, b)),
    "mix view": ("FF", "F", lambda a, b: _mixed(torch.zeros(a.shape).view(-1).view(-1, COLUMNS), a, b)),
    "mix base": ("FF", "F", lambda a, b: _mixed_base(torch.zeros(a.shape), a, b)),
    "pair": ("F", "FF", lambda a: torch.ops.opreg_dynamic.pair(a, "pair")),
    "blend": ("FF", "F", lambda a, b: torch.ops.opreg_dynamic.blend(a, b, "layers.3")),
}
# What writes without autograd knowing how, and what writes what autograd keeps.
NO_GRADIENT = ("out", "mix", "mix new", "mix view", "mix base")


def _mixed(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    torch.ops.opreg_dynamic.mix(a, b, out, "layers.7")
    return out


def _mixed_base(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    torch.ops.opreg_dynamic.mix(a, b, out.view(-1).view(out.shape), "layers.8")
    return out


Written = list[tuple[str, list[int]]]


def program(seed: int, training: bool) -> Written:
    """(op, numbers of the values it takes) for 6 to 28 calls."""
    choose = random.Random(seed)
    kinds = ["F", "F", "F"]
    written: Written = []
    names = [n for n in OPS if not (training and n in NO_GRADIENT)]
    names += ["blend" if training else "mix", "pair", "mix new" if not training else "blend"]
    while len(written) < 6 + seed % 23:
        name = choose.choice(names)
        takes, gives, _ = OPS[name]
        if all(k in kinds for k in takes):
            written.append((name, [choose.choice([i for i, kind in enumerate(kinds) if kind == k]) for k in takes]))
            kinds += gives
    return written


def runner(written: Written, seed: int, training: bool) -> Callable[..., Any]:
    choose = random.Random(seed)
    picks = [choose.random() for _ in range(4)]

    def run(*inputs: torch.Tensor) -> Any:
        # A leaf that wants a gradient cannot be written.
        values = [x * 1 for x in inputs] if training else list(inputs)
        for name, at in written:
            made = OPS[name][2](*[values[i] for i in at])
            if OPS[name][1]:
                values += made if type(made) in (tuple, list) else [made]
        return values[-1], [values[int(p * len(values))] for p in picks], {"a": values[-2]}

    return run


def copying(module: Any, values: Any) -> Callable[..., Any]:
    """The worst compiler that is still right: what aliases no input is returned as a copy of its own."""

    def compiled(*args: Any) -> Any:
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        return tuple(
            r.clone() if isinstance(r, torch.Tensor) and r.untyped_storage().data_ptr() not in given else r
            for r in module(*args)
        )

    return compiled


def tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = torch.utils._pytree.tree_leaves(value)
    return found


def given(rows: int, training: bool) -> list[torch.Tensor]:
    return [
        (torch.arange(rows * COLUMNS, dtype=torch.float32).reshape(rows, COLUMNS) / (i + 3)).requires_grad_(training)
        for i in range(3)
    ]


def outcome(run: Callable[..., Any], rows: int, training: bool) -> list[torch.Tensor]:
    """Results, inputs afterwards and gradients."""
    inputs = given(rows, training)
    results = tensors(run(*inputs))
    if not training:
        return [*results, *inputs]
    loss = sum(((i + 1) * r.square().sum() for i, r in enumerate(results)), torch.zeros(()))
    return [*results, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]


REFUSED_BY_AUTOGRAD = ("modified by an inplace operation", "is a view and", "A view was created", "not require grad")


def check(seed: int, inner: Any) -> bool:
    """Whether the program could be checked; a program that autograd itself refuses cannot."""
    training = bool(seed % 2)
    run = runner(program(seed, training), seed, training)
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        try:
            want = {rows: outcome(run, rows, training) for rows in (4, 7, 5)}
        except RuntimeError as error:
            if any(reason in str(error) for reason in REFUSED_BY_AUTOGRAD):
                return False
            raise
        options = {"split_on": ON, "inner": inner}
        split = torch.compile(run, backend="opreg", fullgraph=True, dynamic=bool(seed % 3) or None, options=options)
        for rows, expected in want.items():
            got = outcome(split, rows, training)
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-4, msg=lambda m: f"{rows} rows: {m}")  # noqa: B023
    return True


INNER: list[Any] = ["eager", "aot_eager", copying]


@pytest.mark.parametrize("first", range(0, 12, 6))
def test_random_programs(first: int) -> None:
    checked = [check(seed, INNER[seed // 2 % 3]) for seed in range(first, first + 6)]
    assert sum(checked) >= 3, "autograd itself refuses some"


@pytest.mark.parametrize("seed", [1251, 1953, 3219, 4251, 9963, 9987])
def test_programs_that_were_refused_once(seed: int) -> None:
    assert check(seed, "aot_eager")


if __name__ == "__main__":
    bad: list[int] = []
    counts = [0, 0]
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            counts[check(number, INNER[number // 2 % 3])] += 1
        except Exception as error:
            bad.append(number)
            print(
                number, INNER[number // 2 % 3], type(error).__name__, str(error)[:600].replace("\n", " | "), flush=True
            )
    print(f"refused by autograd {counts[0]}, right {counts[1]}, wrong {len(bad)}: {bad}")
