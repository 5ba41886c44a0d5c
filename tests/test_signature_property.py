"""Every prototype that torch's infer_schema accepts is accepted here, with an equal schema."""

# ruff: noqa: UP045 - the spellings under test are those of torch.library's table
import inspect
from collections.abc import Sequence
from typing import Any, Literal, Optional, Union

import hypothesis
import hypothesis.strategies as st
import torch
from torch import Tensor

from opreg.signature import read_op

# (annotation, defaults that infer_schema takes for it); the spellings are those of torch.library's own table of types.
TYPES: list[tuple[Any, tuple[Any, ...]]] = [
    (Tensor, ()),
    (Optional[Tensor], (None,)),
    (list[Tensor], ()),
    (Sequence[Tensor], ()),
    (list[Tensor | None], ()),
    (int, (0, 3, -1)),
    (Optional[int], (None, 2)),
    (list[int], ()),
    (Sequence[int], ()),
    (Optional[list[int]], (None,)),
    (float, (0.5, 1e-6, 2.0)),
    (Optional[float], (None, 0.25)),
    (list[float], ()),
    (bool, (True, False)),
    (Optional[bool], (None,)),
    (list[bool], ()),
    (str, ("silu", "")),
    (Optional[str], (None,)),
    (torch.dtype, (torch.float32, torch.bfloat16)),
    (Optional[torch.dtype], (None, torch.int8)),
    (torch.device, (torch.device("cpu"),)),
    (Optional[torch.device], (None,)),
    (Union[int, float, bool], (1, 0.5)),
    (Optional[Union[int, float, bool]], (None,)),
]
RETURNS: list[Any] = [None, Tensor, list[Tensor], int, float, bool, tuple[Tensor, Tensor], tuple[Tensor, int]]


@st.composite
def prototypes(draw: st.DrawFn) -> tuple[inspect.Signature, tuple[str, ...]]:
    chosen = draw(st.lists(st.sampled_from(TYPES), min_size=1, max_size=6))
    parameters, mutable = [], []
    defaulted = False
    for index, (annotation, defaults) in enumerate(chosen):
        name = f"a{index}"
        default: Any = inspect.Parameter.empty
        if defaults and (defaulted or draw(st.booleans())):
            default, defaulted = draw(st.sampled_from(defaults)), True
        elif defaulted:
            continue  # Python has no required parameter after an optional one
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation, default=default)
        )
        if annotation in (Tensor, Optional[Tensor], list[Tensor]):
            mutable.append(name)
    mutated = tuple(name for name in mutable if draw(st.booleans()))
    returns = draw(st.sampled_from(RETURNS))
    if returns is None and not mutated:
        returns = Tensor  # refused on purpose: it would vanish
    return inspect.Signature(parameters, return_annotation=returns), mutated


@hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)
@hypothesis.given(prototypes())
def test_schema_equals_that_of_infer_schema(prototype: tuple[inspect.Signature, tuple[str, ...]]) -> None:
    signature, mutated = prototype
    names = ", ".join(
        name if p.default is p.empty else f"{name}=_defaults[{name!r}]" for name, p in signature.parameters.items()
    )
    scope: dict[str, Any] = {"_defaults": {n: p.default for n, p in signature.parameters.items()}}
    exec(f"def fn({names}):\n    raise NotImplementedError", scope)
    fn = scope["fn"]
    fn.__annotations__ = {n: p.annotation for n, p in signature.parameters.items()}
    fn.__annotations__["return"] = signature.return_annotation
    fn.__module__ = __name__
    try:
        expected = torch.library.infer_schema(fn, mutates_args=mutated)
    except (ValueError, TypeError):
        hypothesis.reject()
    found = read_op("t::fn", fn, mutates_args=mutated, kind=None, tags=(), schema=None).schema
    assert _parsed(found) == _parsed(expected)


def _parsed(schema: str) -> Any:
    """What torch's own parser reads, so that names of alias sets do not matter."""
    parsed = torch._C.parse_schema("t::fn" + schema)
    return (
        [
            (a.name, str(a.type), a.default_value, bool(a.alias_info and a.alias_info.is_write))
            for a in parsed.arguments
        ],
        [str(r.type) for r in parsed.returns],
    )


def test_the_spellings_are_those_of_torch() -> None:
    """The list above lacks no kind of type that infer_schema knows."""
    known = {str(t) for t, _ in TYPES}
    supported = torch._library.infer_schema.SUPPORTED_PARAM_TYPES
    plain = [t for t in supported if t in (int, float, bool, str, Tensor, torch.dtype, torch.device)]
    assert {str(t) for t in plain} <= known
    assert Literal["a"]  # read by opreg, refused by infer_schema
