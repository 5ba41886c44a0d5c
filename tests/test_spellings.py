"""What no schema can say is refused with the parameter's name and a spelling that works."""

import enum
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from opreg import register_op
from opreg.errors import SignatureError
from opreg.signature import read_op


class Opaque(enum.Enum):
    ONE = object()


class Pair(NamedTuple):
    first: Tensor
    second: str


def read(annotation: Any, default: Any = ..., returns: Any = Tensor) -> Any:
    def fn(x, value): ...
    def optional(x, value=default): ...

    chosen = fn if default is ... else optional
    chosen.__annotations__ = {"x": Tensor, "value": annotation, "return": returns}
    return read_op("t::fn", chosen, mutates_args=(), kind=None, tags=(), schema=None)


# (annotation, default, what the message says to write, an annotation and default so written)
REFUSED: list[tuple[Any, Any, str, Any, Any]] = [
    (tuple[int, Tensor], ..., "write one parameter for each", tuple[int, int], ...),
    (tuple, ..., "write tuple[int, int] or tuple[int, ...]", tuple[Tensor, ...], ...),
    (tuple[int, int], (1,), "give a tuple of 2 x int", tuple[int, int], (1, 2)),
    (tuple[int, ...], (1, 0.5), "give a tuple of any number x int", tuple[int, ...], (1, 2, 3)),
    (tuple[Tensor, Tensor], (1, 2), "leave the default out, or write '... | None'", tuple[Tensor, Tensor] | None, None),
    (list[Literal["a", "b"]], ..., "write one str, split it and look at the values inside", str, ...),
    (Literal["a", 1], "a", "use literals that are all str or all int", Literal["a", "b"], "a"),
    (Opaque, ..., "derive it from str or int", Literal["one"], ...),
    (int | float, 1, "write float, which takes integers, too", float, 1),
    (int | Sequence[int], ..., "write list[int] and pass a list of one", list[int], ...),
    (Tensor | float, ..., "write Tensor and pass torch.tensor(number)", Tensor, ...),
    (str | Tensor, ..., "write one parameter for each type, '... | None' each", str | None, None),
    (torch.nn.Parameter, ..., "write Tensor; a Parameter may be passed", Tensor, ...),
    (torch.SymInt, ..., "write int, which also takes a symbolic size", int, ...),
    (torch.Size, ..., "write tuple[int, ...], and pass x.shape", tuple[int, ...], ...),
    (complex, 1j, "write two floats, or a complex Tensor", float, 1.0),
    (bytes, b"", "write Tensor, of dtype torch.uint8", Tensor, ...),
    (list, ..., "list[int], list[float], list[Tensor]", list[float], ...),
    (list[int], [1, 2], "write tuple[int, ...] = (1, 2)", tuple[int, ...], (1, 2)),
    (list[str], ..., "write one str, and split it inside", str, ...),
    (dict[str, int], ..., "write one parameter per entry", int, ...),
    (Callable[[], int], ..., "write Literal[...] of the functions' names", Literal["f", "g"], ...),
    (typing.TypeVar("T"), ..., "write the one type that it stands for", Tensor, ...),
    (int, "a", "with a default of that type", int, 3),
]


@pytest.mark.parametrize(("annotation", "default", "cure", "better", "its_default"), REFUSED)
def test_a_refused_parameter_is_named_with_a_spelling_that_works(
    annotation: Any, default: Any, cure: str, better: Any, its_default: Any
) -> None:
    with pytest.raises(SignatureError, match=re.escape(cure)) as caught:
        read(annotation, default)
    assert str(caught.value).startswith("t::fn: parameter 'value' ")
    assert " value" in read(better, its_default).schema


@pytest.mark.parametrize(
    ("returns", "cure", "better"),
    [
        (
            Pair,
            "in field 'second' of Pair, which torch schemas lack; return Tensor, Tensor | None",
            tuple[Tensor, Tensor],
        ),
        (list[Tensor] | None, "None for a list is an empty one", list[Tensor]),
        (tuple[Tensor, int | None], "in place 1, which torch schemas lack; return a Tensor or None", Tensor | None),
        (tuple[Tensor, tuple[int, int]], "in place 1, which torch schemas lack", tuple[Tensor, int, int]),
        (list[int], "return a Tensor that holds them", Tensor),
        (torch.SymInt, "write int", int),
        (str, "int, float, bool, or a tuple or NamedTuple of these", bool),
    ],
)
def test_a_refused_result_says_what_to_return(returns: Any, cure: str, better: Any) -> None:
    with pytest.raises(SignatureError, match=re.escape(cure)):
        read(int, returns=returns)
    assert read(int, returns=better).schema


def test_a_generator_is_a_generator() -> None:
    assert "Generator value)" in read(torch.Generator).schema
    assert "Generator? value=None)" in read(torch.Generator | None, None).schema

    @register_op("t_spellings::noise", tags=torch.Tag.nondeterministic_seeded)
    def noise(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x + torch.rand(x.shape, generator=generator)

    x = torch.zeros(3)
    drawn = [noise(x, torch.Generator().manual_seed(1)), noise.overload(x, torch.Generator().manual_seed(1))]
    assert torch.equal(*drawn)
    torch.manual_seed(1)
    assert torch.equal(noise(x), drawn[0])
    torch.manual_seed(1)
    compiled = torch.compile(lambda x: noise(x), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), drawn[0])
