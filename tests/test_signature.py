"""The front end: schemas that come out, and refusals that name the parameter and the cure."""

import collections
import enum
from typing import Annotated, Literal, NamedTuple, Optional

import pytest
import torch
from torch import Tensor

from opreg import LayerName, RegistrationError, SignatureError, like
from opreg.signature import read_op


def read(fn, mutates_args=(), kind=None, schema=None):
    return read_op("t::f", fn, mutates_args=mutates_args, kind=kind, tags=(), schema=schema)


class Layout(str, enum.Enum):
    nhd = "NHD"
    hnd = "HND"


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Worded(NamedTuple):
    a: Tensor
    how: str


class Unit(enum.Enum):
    a = object()


def plain(x: Tensor, y: Tensor | None, n: int, eps: float = 1e-6, flag: bool = True, s: str = "a") -> Tensor: ...
def old_optional(x: Optional[Tensor] = None, n: Optional[int] = None) -> Tensor: ...  # noqa: UP045
def annotated(x: Annotated[Tensor, "t d"], w: Annotated[Tensor | None, "d"] = None) -> Annotated[Tensor, "t d"]: ...
def outside(x: Annotated[Tensor, "t d"], w: Annotated[Tensor, "d"] | None = None) -> Tensor: ...
def lists(xs: list[Tensor], ns: list[int]) -> list[Tensor]: ...
def many(x: Tensor) -> tuple[Tensor, Annotated[Tensor, ""]]: ...
def literal(x: Tensor, layout: Literal["NHD", "HND"] = "NHD") -> Tensor: ...
def enumeration(x: Tensor, layout: Layout = Layout.nhd) -> Tensor: ...
def keyword(x: Tensor, *, sinks: Tensor | None = None, scale: float) -> Tensor: ...
def dtypes(x: Tensor, d: torch.dtype, v: torch.device | None = None) -> Tensor: ...
def tuples(x: Tensor, s: tuple[int, int] = (1, 2), w: tuple[float, ...] = (0.5, 1)) -> Pair: ...
def optionals(xs: list[Tensor] | None = None, s: tuple[int, int] | None = None) -> tuple[Tensor, Tensor | None]: ...
def optional_result(x: Tensor, flags: tuple[bool, bool] = (True, False)) -> Tensor | None: ...
def layer(x: Tensor, out: Tensor, layer_name: LayerName) -> None: ...


@pytest.mark.parametrize(
    ("fn", "mutates", "schema"),
    [
        (plain, (), '(Tensor x, Tensor? y, SymInt n, float eps=1e-06, bool flag=True, str s="a") -> Tensor'),
        (old_optional, (), "(Tensor? x=None, SymInt? n=None) -> Tensor"),
        (annotated, (), "(Tensor x, Tensor? w=None) -> Tensor"),
        (outside, (), "(Tensor x, Tensor? w=None) -> Tensor"),
        (lists, (), "(Tensor[] xs, SymInt[] ns) -> Tensor[]"),
        (lists, "xs", "(Tensor(a0!)[] xs, SymInt[] ns) -> Tensor[]"),
        (many, (), "(Tensor x) -> (Tensor, Tensor)"),
        (literal, (), '(Tensor x, str layout="NHD") -> Tensor'),
        (enumeration, (), '(Tensor x, str layout="NHD") -> Tensor'),
        (keyword, (), "(Tensor x, *, Tensor? sinks=None, float scale) -> Tensor"),
        (dtypes, (), "(Tensor x, ScalarType d, Device? v=None) -> Tensor"),
        (tuples, (), "(Tensor x, SymInt[2] s=[1, 2], float[] w=[0.5, 1.0]) -> (Tensor a, Tensor b)"),
        (optionals, (), "(Tensor[]? xs=None, SymInt[2]? s=None) -> (Tensor, Tensor?)"),
        (optionals, "xs", "(Tensor(a0!)[]? xs=None, SymInt[2]? s=None) -> (Tensor, Tensor?)"),
        (optional_result, (), "(Tensor x, bool[2] flags=[True, False]) -> Tensor?"),
        (layer, ("out",), "(Tensor x, Tensor(a1!) out, Tensor(a2!) layer_name) -> ()"),
    ],
)
def test_schema(fn, mutates, schema):
    spec = read(fn, mutates)
    assert spec.schema == schema
    parsed = torch._C.parse_schema(f"t::f{schema}")
    assert [argument.name for argument in parsed.arguments] == [arg.name for arg in spec.args]


def test_reads_contract_and_roles():
    def f(
        q: Annotated[Tensor, "t h d"], cu: Annotated[Tensor, "s+1", torch.int32], s: int, out: Tensor
    ) -> Annotated[Tensor, "t h", torch.float32]:
        """One line.

        More.
        """
        ...

    spec = read(f, "out")
    assert [str(arg.shape) for arg in spec.args] == ["t h d", "s+1", "None", "None"]
    assert spec.args[1].dtype is torch.int32
    assert spec.mutates == ("out",)
    assert spec.returns[0].dtype is torch.float32
    assert spec.summary == "One line."
    assert not spec.has_body


def test_a_body_is_a_body():
    def f(x: Tensor) -> Tensor:
        """Doc."""
        return x + 1

    assert read(f).has_body


def test_postponed_annotations_of_enclosing_names():
    size = "t d"

    def f(x: "Annotated[Tensor, size]") -> "Tensor":
        return x + len(size)

    assert str(read(f).args[0].shape) == "t d"


class FakeJaxtyping:
    """What jaxtyping's Float[Tensor, 't d'] looks like from outside: three public attributes of a class."""

    array_type, dtypes, dim_str = Tensor, ["float32"], "t #d"


def test_understands_jaxtyping_annotations():
    def f(x) -> Tensor: ...

    f.__annotations__["x"] = FakeJaxtyping
    spec = read(f)
    assert spec.args[0].type == "Tensor"
    assert str(spec.args[0].shape) == "t d"


def untyped(x) -> Tensor: ...
def no_return(x: Tensor): ...
def star(*xs: Tensor) -> Tensor: ...
def stars(**xs: Tensor) -> Tensor: ...
def positional(x: Tensor, /) -> Tensor: ...
def mixed_tuple(x: Tensor, size: tuple[int, float]) -> Tensor: ...
def bare_tuple(x: Tensor, size: tuple) -> Tensor: ...  # type: ignore[type-arg]
def tuple_default(x: Tensor, size: tuple[int, int] = (1, 2, 3)) -> Tensor: ...  # type: ignore[assignment]
def float_default(x: Tensor, size: tuple[int, int] = (1, 0.5)) -> Tensor: ...  # type: ignore[assignment]
def list_of_choices(x: Tensor, how: list[Literal["a", "b"]]) -> Tensor: ...
def dictionary(x: Tensor, d: dict) -> Tensor: ...
def union(x: Tensor | int) -> Tensor: ...
def nested(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
def strange_enum(x: Tensor, u: Unit) -> Tensor: ...
def mixed_literal(x: Tensor, u: Literal["a", 1]) -> Tensor: ...
def untyped_fields(x: Tensor) -> collections.namedtuple("Two", "a b"): ...  # type: ignore[name-defined]
def text_field(x: Tensor) -> Worded: ...
def any_tuple(x: Tensor) -> tuple[Tensor, ...]: ...
def returns_str(x: Tensor) -> str: ...
def bad_contract(x: Annotated[Tensor, "t h?"]) -> Tensor: ...
def contract_on_int(x: Tensor, n: Annotated[int, "t"]) -> Tensor: ...
def layer_as_str(x: Tensor, layer_name: str) -> Tensor: ...
def layer_as_int(x: Tensor, layer_idx: int) -> Tensor: ...
def prefix(x: Tensor, prefix: str) -> Tensor: ...
def bad_default(x: Tensor, layout: Literal["a", "b"] = "c") -> Tensor: ...  # type: ignore[assignment]
def wrong_default(x: Tensor, n: int = "a") -> Tensor: ...  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (untyped, "parameter 'x' has no annotation; write x: Tensor"),
        (no_return, "no return annotation; write '-> Tensor'"),
        (star, "parameter 'xs' is .args"),
        (stars, "parameter 'xs' is .args or"),
        (positional, "'x' is positional-only; remove the '/'"),
        (mixed_tuple, "'size' is a tuple of several types, which torch schemas lack; write one parameter for each"),
        (bare_tuple, r"'size' is a tuple of nobody knows what; write tuple\[int, int\]"),
        (tuple_default, r"'size' has default \(1, 2, 3\); give a tuple of 2 x int"),
        (float_default, r"'size' has default \(1, 0.5\); give a tuple of 2 x int"),
        (list_of_choices, r"'how' is a list of choices; write one str, split it and look at the values inside"),
        (dictionary, "'d' has type dict, which torch schemas lack; write one parameter per entry"),
        (union, "'x' is a union"),
        (nested, r"returns list\[torch.Tensor\] in place 1, which torch schemas lack"),
        (strange_enum, r"derive it from str or int, as in class Unit\(str, Enum\)"),
        (mixed_literal, "all str or all int"),
        (untyped_fields, r"returns Two, whose field 'a' has no type; write class Two\(NamedTuple\) with 'a: Tensor'"),
        (text_field, "returns str in field 'how' of Worded, which torch schemas lack"),
        (any_tuple, r"unknown length; write '-> list\[Tensor\]'"),
        (returns_str, "returns str, which torch schemas lack"),
        (bad_contract, "contract of 'x': 'h\\?'"),
        (contract_on_int, "'n' has a shape contract but is not a tensor"),
        (layer_as_str, "'layer_name' names a layer as str.*write layer_name: LayerName"),
        (layer_as_int, "'layer_idx' names a layer as int"),
        (prefix, "'prefix' names a layer as str"),
        (bad_default, r"'layout' has default 'c'; choose one of \['a', 'b'\]"),
        (wrong_default, "'n' has type int and default 'a'"),
    ],
)
def test_refuses_signatures(fn, message):
    with pytest.raises(SignatureError, match=message) as caught:
        read(fn)
    assert str(caught.value).startswith("t::f: ")


def test_undefined_annotation_names_the_module():
    def f(x: "Tensr") -> Tensor: ...  # noqa: F821

    with pytest.raises(SignatureError, match="names 'Tensr', which is not defined in module"):
        read(f)


def nothing(x: Tensor) -> None: ...
def two_layers(x: Tensor, a: LayerName, b: LayerName) -> Tensor: ...
def unknown_dim(x: Annotated[Tensor, "t head"]) -> Annotated[Tensor, "t haed"]: ...
def unsized(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t _"]: ...
def early(x: Annotated[Tensor, "s+1"], y: Annotated[Tensor, "s"]) -> Tensor: ...
def like_nothing(x: Annotated[Tensor, "t"]) -> Annotated[Tensor, "t", like("q")]: ...


@pytest.mark.parametrize(
    ("fn", "arguments", "message"),
    [
        (nothing, {}, "returns nothing and mutates nothing, so every compiler removes it"),
        (two_layers, {}, "more than one LayerName"),
        (unknown_dim, {}, r"dim 'haed' is defined by no input; inputs define \['head', 't'\]. Did you mean 'head'\?"),
        (unsized, {}, "'_' in the output's contract has no size"),
        (early, {}, "computes with 's' before any earlier argument defines it"),
        (like_nothing, {}, r"like\('q'\) names no tensor argument; there are \['x'\]"),
        (plain, {"mutates_args": "z"}, "mutates_args names 'z', which is no parameter; parameters are x, y"),
        (plain, {"mutates_args": "n"}, "'n' is in mutates_args but is"),
        (plain, {"kind": "atention"}, "kind='atention' is unknown; kinds are 'attention'"),
    ],
)
def test_refuses_declarations(fn, arguments, message):
    with pytest.raises(RegistrationError, match=message):
        read(fn, **arguments)
