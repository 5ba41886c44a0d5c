"""Results and arguments beyond single tensors, in every way of calling: named, optional, tuples, optional lists."""

from typing import Annotated, Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from opreg import ContractError, LayerName, RegistrationError, forward_context, register_op
from opreg.errors import AutogradError
from opreg.spec import OpSpec


class Attended(NamedTuple):
    out: Annotated[Tensor, "t d"]
    lse: Annotated[Tensor, "t", torch.float32]


@register_op("t_returns::softmax")
def softmax(x: Annotated[Tensor, "t d"], scale: float = 1.0) -> Attended:
    lse = (x * scale).float().logsumexp(-1)
    return Attended((x * scale - lse[:, None]).exp(), lse)


@register_op("t_returns::pool")
def pool(
    x: Annotated[Tensor, "t d"],
    size: tuple[int, int] = (1, 2),
    weights: tuple[float, ...] | None = None,
    gates: Annotated[tuple[Tensor, Tensor] | None, "t d"] = None,
) -> Annotated[Tensor, "t d"]:
    # Hashed and compared: a list would not do.
    total = x * {size: size[0]}[size] + size[1]
    if weights is not None:
        total = total * (2 if weights == (0.5, 4.0) else 3)
    return total if gates is None else total * gates[0] + gates[1]


@register_op("t_returns::route")
def route(x: Annotated[Tensor, "t d"], wanted: bool = False) -> tuple[Tensor, Tensor | None]:
    return x * 2, x.softmax(-1) if wanted else None


@register_op("t_returns::add_all")
def add_all(
    x: Annotated[Tensor, "t d"], more: Annotated[list[Tensor], "t d"] | None = None
) -> Annotated[Tensor, "t d"]:
    return x.clone() if more is None else x + sum(more)


@register_op("t_returns::keep_all", mutates_args={"keep": "state"})
def keep_all(x: Annotated[Tensor, "t d"], keep: Annotated[list[Tensor] | None, "t d"] = None) -> None:
    for buffer in keep or ():
        buffer.copy_(x)


X = torch.arange(12.0).reshape(3, 4) / 7

WAYS = {
    "direct": lambda op: op,
    "overload": lambda op: op.overload,
    "aot_eager": lambda op: torch.compile(lambda *a: op(*a), backend="aot_eager", fullgraph=True),
    "inductor": lambda op: torch.compile(lambda *a: op(*a), fullgraph=True),
}
every_way = pytest.mark.parametrize("way", WAYS)


def called(op: Any, way: str, *args: Any) -> Any:
    torch._dynamo.reset()
    return WAYS[way](op)(*args)


@every_way
def test_a_named_tuple_comes_back_as_such(way: str) -> None:
    found = called(softmax, way, X, 2.0)
    assert type(found) is (Attended if way != "overload" else tuple)  # torch.ops knows no Python classes
    torch.testing.assert_close(found[0], (X * 2).softmax(-1))
    torch.testing.assert_close(found[1], (X * 2).logsumexp(-1))


def test_fields_are_names_in_the_schema_and_have_contracts() -> None:
    assert softmax.spec.schema == "(Tensor x, float scale=1.0) -> (Tensor out, Tensor lse)"
    assert [value.name for value in softmax.overload._schema.returns] == ["out", "lse"]
    assert [str(value.shape) for value in softmax.spec.returns] == ["t d", "t"]


def test_a_kernel_may_return_a_plain_tuple_and_the_caller_gets_the_names() -> None:
    @register_op("t_returns::pair")
    def pair(x: Annotated[Tensor, "t d"]) -> Attended: ...

    @pair.register_kernel("cpu")
    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 1, x.sum(-1)

    assert pair(X).lse.tolist() == X.sum(-1).tolist()
    exported = torch.export.export(_Module(pair), (X,)).module()(X)
    torch.testing.assert_close(exported.out, X)


class _Module(torch.nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Any:
        return self.fn(x)


@every_way
@pytest.mark.parametrize("kind", [tuple, list])
def test_tuples_are_tuples_in_the_body_whatever_is_passed(way: str, kind: type) -> None:
    gates = kind((X, X + 1))
    expected = (X * 3 + 4) * 2 * X + (X + 1)
    torch.testing.assert_close(called(pool, way, X, kind((3, 4)), kind((0.5, 4.0)), gates), expected)


@every_way
def test_defaults_that_are_tuples(way: str) -> None:
    torch.testing.assert_close(called(pool, way, X), X + 2)


def test_a_size_in_a_tuple_stays_symbolic() -> None:
    compiled = torch.compile(lambda x: pool(x, (x.shape[0], 1)), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (3, 5, 9):
            torch.testing.assert_close(compiled(torch.ones(rows, 4)), torch.full((rows, 4), rows + 1.0))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((3,), r"size has 1 elements, \(3,\); it must have 2"),
        ((1, 2, 3), r"size has 3 elements, \(1, 2, 3\); it must have 2"),
        (4, "size is 4; it must be a tuple or a list"),
    ],
)
def test_another_number_of_elements_is_refused(size: Any, message: str) -> None:
    with pytest.raises(ContractError, match=f"t_returns::pool: {message}"):
        pool(X, size)


@every_way
@pytest.mark.parametrize("wanted", [False, True])
def test_an_optional_result(way: str, wanted: bool) -> None:
    first, second = called(route, way, X, wanted)
    torch.testing.assert_close(first, X * 2)
    assert (second is None) is not wanted
    if wanted:
        torch.testing.assert_close(second, X.softmax(-1))


@every_way
def test_lists_that_need_not_be_there(way: str) -> None:
    torch.testing.assert_close(called(add_all, way, X), X)
    torch.testing.assert_close(called(add_all, way, X, [X, X]), 3 * X)
    keep = [torch.zeros(3, 4), torch.zeros(3, 4)]
    called(keep_all, way, X, keep)
    assert all(torch.equal(buffer, X) for buffer in keep)
    assert called(keep_all, way, X) is None


def test_gradients_of_every_kind_of_result_meet_the_error() -> None:
    x = X.clone().requires_grad_()
    for result in (softmax(x).lse, route(x)[0], route(x, True)[1]):
        assert result is not None
        with pytest.warns(UserWarning, match="autograd kernel was not registered"), pytest.raises(AutogradError):
            result.sum().backward()


def test_a_formula_sees_an_optional_result() -> None:
    @register_op("t_returns::scaled")
    def scaled(x: Annotated[Tensor, "t d"], wanted: bool = False) -> tuple[Tensor, Tensor | None]:
        return x * 2, x.detach() * 1 if wanted else None

    scaled.register_autograd(lambda ctx, grad, other: (grad * 2, None))
    for wanted in (False, True):
        x = X.clone().requires_grad_()
        scaled(x, wanted)[0].sum().backward()
        assert x.grad is not None
        assert x.grad.unique().tolist() == [2]


def test_a_profiling_run_gives_zeros_in_the_form_of_the_results() -> None:
    @register_op("t_returns::attend", kind="attention")
    def attend(x: Annotated[Tensor, "t d"], layer: LayerName) -> Attended:
        raise RuntimeError("a profiling run calls no kernel")

    with forward_context(layers={"a": object()}, metadata=None):
        found = attend(X, "a")
    assert type(found) is Attended
    assert (found.out.shape, found.lse.shape) == ((3, 4), (3,))
    assert not found.out.any()
    assert not found.lse.any()


def test_without_a_body_only_a_fake_knows_whether_there_is_a_result() -> None:
    @register_op("t_returns::undecided")
    def undecided(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"] | None: ...

    with (
        FakeTensorMode() as mode,
        pytest.raises(RegistrationError, match=r"t_returns::undecided: no fake: .*register_fake"),
    ):
        undecided(mode.from_tensor(X))


def test_spec_says_what_holds_the_results() -> None:
    spec: OpSpec = softmax.spec
    assert spec.named is Attended
    assert spec.returns_tuple
    assert route.spec.named is None
