"""The shape contract language: "t h d", "*n d", "_ 128", "t 2*h" parsed, bound to sizes, and turned into output sizes.

Pure Python on purpose: sizes may be ints or torch.SymInt, and nothing here forces a symbolic size to a number.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, Literal

from .facts import Fact

Kind = Literal["name", "size", "any", "star", "expr"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_OPERATIONS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv)


class ShapeSyntaxError(ValueError):
    """A contract string that cannot be read; the caller adds op and argument."""


class Mismatch(Exception):
    """Sizes that disagree with a contract: one short cause, without op or call context."""


class Dim(Fact):
    """One token of a contract."""

    text: str
    kind: Kind
    names: tuple[str, ...] = ()  # names read by an expression, the name bound by "name" and "star"
    code: CodeType | None = None

    def size(self, sizes: Mapping[str, Any]) -> Any:
        """The size this token stands for, given the sizes of its names."""
        if self.kind == "size":
            return int(self.text)
        if self.kind == "name":
            return sizes[self.text]
        if self.code is None:
            raise ShapeSyntaxError(f"'{self.text}' has no size of its own")
        # The tree was checked token by token in _expression: names, integers and + - * // only.
        return eval(self.code, {"__builtins__": {}}, dict(sizes))


class Shape(Fact):
    """A parsed contract, e.g. Shape of "*n d"."""

    text: str
    dims: tuple[Dim, ...]
    star: int | None  # index of the "*name" token

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for dim in self.dims for name in dim.names)

    def __str__(self) -> str:
        return self.text


def _expression(token: str, text: str) -> Dim:
    try:
        tree = ast.parse(token, mode="eval")
    except SyntaxError:
        raise ShapeSyntaxError(
            f"'{token}' in '{text}' is neither a name, an integer, '*name', '_' nor arithmetic"
        ) from None
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.append(node.id)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            continue
        elif not isinstance(node, (ast.Expression, ast.BinOp, ast.Load, *_OPERATIONS)):
            raise ShapeSyntaxError(f"'{token}' in '{text}': only names, integers and + - * // may be combined")
    return Dim(token, "expr", tuple(dict.fromkeys(names)), compile(tree, f"<contract {token}>", "eval"))


def _dim(token: str, text: str) -> Dim:
    if token == "_":
        return Dim(token, "any")
    if token == "...":
        return Dim(token, "star", ("...",))
    if token.startswith("*"):
        name = token[1:]
        if not _NAME.match(name):
            raise ShapeSyntaxError(f"'{token}' in '{text}': '*' must be followed by a name, as in '*batch'")
        return Dim(token, "star", () if name == "_" else (name,))
    if token.isdigit():
        return Dim(token, "size")
    if _NAME.match(token):
        return Dim(token, "name", (token,))
    return _expression(token, text)


def parse(text: str) -> Shape:
    """Read a contract. '' is the contract of a 0-d tensor."""
    dims = tuple(_dim(token, text) for token in text.split())
    stars = [i for i, dim in enumerate(dims) if dim.kind == "star"]
    if len(stars) > 1:
        raise ShapeSyntaxError(f"'{text}' has more than one '*name'; sizes could not be told apart")
    return Shape(text, dims, stars[0] if stars else None)


def _require_equal(
    known: Any, size: Any, cause: Callable[[], str], check: Callable[[Any, Callable[[], str]], None]
) -> None:
    if isinstance(known, int) and isinstance(size, int):
        if known != size:
            raise Mismatch(cause())
    else:
        check(known == size, cause)


def _number(size: Any) -> str:
    """A size for a message: of a symbolic one, the number it has in this call where that is known."""
    hint = None if isinstance(size, int) else getattr(getattr(size, "node", None), "hint", None)
    return str(size if hint is None else hint)


def no_check(condition: Any, cause: Callable[[], str]) -> None:
    """Stand-in for torch._check where all sizes are plain ints."""
    if not condition:
        raise Mismatch(cause())


class Binding:
    """Sizes of the names of one call, and which argument each was first seen in."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self.sizes: dict[str, Any] = dict(values or {})
        self.seen_in: dict[str, str] = dict.fromkeys(self.sizes, "the arguments")

    def bind(
        self,
        arg: str,
        shape: Shape,
        sizes: Sequence[Any],
        check: Callable[[Any, Callable[[], str]], None] = no_check,
    ) -> None:
        """Match the sizes of `arg` with its contract, or raise Mismatch; `check` gets the symbolic conditions."""
        rank = len(shape.dims)
        if shape.star is None:
            if len(sizes) != rank:
                raise Mismatch(f"{arg} has {len(sizes)} dims but '{shape}' has {rank}")
            pairs = list(zip(shape.dims, sizes, strict=True))
        else:
            if len(sizes) < rank - 1:
                raise Mismatch(f"{arg} has {len(sizes)} dims but '{shape}' needs at least {rank - 1}")
            after = rank - 1 - shape.star
            end = len(sizes) - after
            pairs = [*zip(shape.dims[: shape.star], sizes, strict=False)]
            pairs += [(shape.dims[shape.star], tuple(sizes[shape.star : end]))]
            pairs += [*zip(shape.dims[shape.star + 1 :], sizes[end:], strict=True)]
        for dim, size in pairs:
            self._bind_dim(arg, shape, dim, size, check)

    def _bind_dim(
        self, arg: str, shape: Shape, dim: Dim, size: Any, check: Callable[[Any, Callable[[], str]], None]
    ) -> None:
        if dim.kind == "any" or (dim.kind == "star" and not dim.names):
            return
        if dim.kind == "star":
            self._bind_star(arg, dim, size, check)
        elif dim.kind == "size":
            _require_equal(
                int(dim.text), size, lambda: f"'{shape}' wants {dim.text} but {arg} has {_number(size)}", check
            )
        elif dim.kind == "expr":
            known = dim.size(self.sizes)
            values = ", ".join(f"{n}={self.sizes[n]}" for n in dim.names)
            _require_equal(known, size, lambda: f"dim '{dim.text}' is {known} ({values}) but {size} in {arg}", check)
        elif dim.text in self.sizes:
            known, where = self.sizes[dim.text], self.seen_in[dim.text]
            _require_equal(
                known,
                size,
                lambda: f"dim '{dim.text}' is {_number(size)} in {arg} but {_number(known)} in {where}",
                check,
            )
        else:
            self.sizes[dim.text], self.seen_in[dim.text] = size, arg

    def _bind_star(
        self, arg: str, dim: Dim, sizes: tuple[Any, ...], check: Callable[[Any, Callable[[], str]], None]
    ) -> None:
        name = dim.names[0]
        if name not in self.sizes:
            self.sizes[name], self.seen_in[name] = sizes, arg
            return
        known, where = self.sizes[name], self.seen_in[name]

        def cause() -> str:
            return f"dims '{dim.text}' are {list(sizes)} in {arg} but {list(known)} in {where}"

        if len(known) != len(sizes):
            raise Mismatch(cause())
        for a, b in zip(known, sizes, strict=True):
            _require_equal(a, b, cause, check)

    def output(self, shape: Shape) -> list[Any]:
        """Sizes of an output with this contract."""
        sizes: list[Any] = []
        for dim in shape.dims:
            if dim.kind == "star":
                sizes.extend(self.sizes[dim.names[0]])
            else:
                sizes.append(dim.size(self.sizes))
        return sizes
