"""May a piece run with more rows than it was given, the surplus cut off afterwards? Only if no row sees another.

Decided from the graph, never by trying: a piece is row-wise in a symbol when each of its calls is known to keep rows
apart. A call that is not known is reason enough to say no."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import map_arg

from opreg.graph_ops import ARITHMETIC, FACTORIES, SIZES, VIEWS, name_of, value_of

POINTWISE = frozenset(
    "add sub mul div truediv true_divide rsub pow neg abs exp exp2 expm1 log log2 log1p sqrt rsqrt sin cos tan tanh "
    "sigmoid relu relu6 gelu silu softplus mish elu leaky_relu hardtanh hardswish hardsigmoid erf square reciprocal "
    "sign floor ceil round clamp clip clamp_min clamp_max maximum minimum where masked_fill lerp addcmul addcdiv eq ne "
    "lt le gt ge and_ or_ xor logical_and logical_or logical_not isnan isinf nan_to_num to float half bfloat16 double "
    "int long bool type type_as contiguous clone detach positive pos threshold logsigmoid softsign atan2 fmod "
    "remainder floordiv floor_divide mod copysign".split()
)
REDUCTIONS = frozenset(
    "mean sum prod amax amin softmax log_softmax logsumexp var std cumsum cumprod argmax argmin any all".split()
)
NORMS = frozenset("layer_norm rms_norm".split())
PRODUCTS = frozenset("linear matmul mm".split())
JOINS = frozenset("cat concat stack".split())
# Views that may move elements from one row to another where the row is not a dim of its own.
_FOLDING = frozenset("view reshape flatten unflatten view_as reshape_as ravel".split())
_TAKES_SIZES = VIEWS | FACTORIES | {"arange"}


class NotRowWise(Exception):
    """The reason, as the report gives it."""


def why_not_row_wise(steps: Iterable[Any], inputs: Iterable[Any], symbol: Any) -> str | None:
    """Why surplus rows along `symbol` could change the others, or None."""
    try:
        for node in inputs:
            row_of(node, symbol)
        for step in steps:
            _check(step, symbol)
    except NotRowWise as reason:
        return str(reason)
    return None


def row_of(node: Any, symbol: Any) -> int | None:
    """The dim of a node's value that has the size `symbol`. Raises NotRowWise where the symbol is elsewhere too."""
    return _row(node.name, value_of(node), symbol)


def _row(name: str, value: Any, symbol: Any) -> int | None:
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        rows = {_row(name, v, symbol) for v in value if isinstance(v, torch.Tensor)}
        if len(rows) > 1:
            raise NotRowWise(f"the results of {name} have rows in different dims")
        return rows.pop() if rows else None
    if not isinstance(value, torch.Tensor):
        return None
    shape: Iterable[Any] = value.shape
    sizes = [s.node.expr if isinstance(s, torch.SymInt) else s for s in shape]
    found = [i for i, size in enumerate(sizes) if size == symbol]
    other = [s for s in sizes if s != symbol and symbol in getattr(s, "free_symbols", ())]
    if len(found) > 1 or other:
        raise NotRowWise(f"{name} has the size {other[0] if other else symbol} where rows cannot be told apart")
    return found[0] if found else None


def _check(step: Any, symbol: Any) -> None:
    value = value_of(step)
    if step.op == "get_attr":
        return
    name = _torch_name(step)
    tensor = isinstance(value, torch.Tensor) or (
        isinstance(value, tuple | list) and any(isinstance(v, torch.Tensor) for v in value)
    )
    if not tensor:
        if name in SIZES or step.target in ARITHMETIC or step.target in (getattr, operator.getitem):
            return  # sizes; where they go is checked there
        raise NotRowWise(f"{name} is not known to keep rows apart")
    given = _nodes(step)
    if name not in _TAKES_SIZES and step.target is not operator.getitem:
        for node in given:
            size = value_of(node)
            if isinstance(size, torch.SymInt) and symbol in size.node.expr.free_symbols:
                raise NotRowWise(f"{name} computes with the number of rows")
    rows = {node: row_of(node, symbol) for node in given if isinstance(value_of(node), torch.Tensor | tuple | list)}
    made = row_of(step, symbol)
    having = {node: row for node, row in rows.items() if row is not None}
    if not having:
        if made is not None and name not in _TAKES_SIZES:
            raise NotRowWise(f"{name} makes rows of what has none")
        return
    if made is None:
        raise NotRowWise(f"{name} joins rows")
    _rule(step, name, value, made, having)


def _torch_name(step: Any) -> str:
    """'linear' for a function or method of torch's own; other functions may bear the same names."""
    target, name = step.target, name_of(step.target)
    if isinstance(target, OpOverload | OpOverloadPacket):
        known = name.partition("::")[0] in ("aten", "prims")
    else:
        known = step.op != "call_module" and not (
            isinstance(target, FunctionType) and target.__module__.partition(".")[0] != "torch"
        )
    if not known:
        raise NotRowWise(f"{name} is not known to keep rows apart")
    return name.rpartition("::")[2].partition(".")[0]


def _nodes(step: Any) -> list[Any]:
    found: list[Any] = []
    map_arg((step.args, step.kwargs), found.append)
    return found


def _argument(step: Any, position: int, *names: str) -> Any:
    for name in names:
        if name in step.kwargs:
            return step.kwargs[name]
    return step.args[position] if len(step.args) > position else None


def _rule(step: Any, name: str, value: Any, made: int, having: dict[Any, int]) -> None:
    first = step.args[0] if step.args else None
    only_first = set(having) == {first}
    rank = len(value.shape) if isinstance(value, torch.Tensor) else 0
    if step.target is operator.getitem:
        _rule_of_getitem(step, having)
    elif name in POINTWISE:
        if any(len(value_of(node).shape) - row != rank - made for node, row in having.items()):
            raise NotRowWise(f"{name} pairs rows with another dim")
    elif name in PRODUCTS:
        if not only_first or having[first] == len(value_of(first).shape) - 1:
            raise NotRowWise(f"{name} sums over rows")
    elif name in NORMS:
        normalized = _argument(step, 1, "normalized_shape")
        if not only_first or not isinstance(normalized, tuple | list) or made >= rank - len(normalized):
            raise NotRowWise(f"{name} joins rows")
    elif name in REDUCTIONS:
        _rule_of_reduction(step, name, having, only_first)
    elif name == "embedding":
        if not only_first:
            raise NotRowWise("embedding looks rows up in rows")
    elif name in JOINS:
        dim = _argument(step, 1, "dim")
        if not isinstance(dim, int | None) or (dim or 0) % max(rank, 1) == made or len({*having.values()}) > 1:
            raise NotRowWise(f"{name} puts rows behind rows")
    elif name in FACTORIES:
        pass  # empty_like and its kind: only the shape is taken
    elif name in VIEWS:
        _rule_of_view(step, name, value, made, having, only_first)
    else:
        raise NotRowWise(f"{name} is not known to keep rows apart")


def _rule_of_reduction(step: Any, name: str, having: dict[Any, int], only_first: bool) -> None:
    dims = _argument(step, 1, "dim", "axis")
    dims = (dims,) if isinstance(dims, int) else dims
    if not only_first or not isinstance(dims, tuple | list):
        raise NotRowWise(f"{name} joins rows")
    rank = len(value_of(step.args[0]).shape)
    if any(not isinstance(d, int) or d % rank == having[step.args[0]] for d in dims):
        raise NotRowWise(f"{name} joins rows")


def _rule_of_view(step: Any, name: str, value: Any, made: int, having: dict[Any, int], only_first: bool) -> None:
    first = step.args[0]
    if name in _FOLDING:
        shape: Any = value_of(first).shape
        if first not in having or _count(shape[: having[first]]) != _count(value.shape[:made]):
            raise NotRowWise(f"{name} moves elements between rows")
        return
    if name in ("as_strided", "unfold", "diagonal", "select", "narrow", "slice") or (
        not only_first and name != "expand_as"
    ):
        raise NotRowWise(f"{name} is not known to keep rows apart")


def _count(sizes: Iterable[Any]) -> Any:
    number: Any = 1
    for size in sizes:
        number = number * (size.node.expr if isinstance(size, torch.SymInt) else size)
    return number


def _rule_of_getitem(step: Any, having: dict[Any, int]) -> None:
    source, index = step.args
    if isinstance(value_of(source), tuple | list):
        return  # an element of a tuple, whose elements have their rows in one dim
    if source not in having:
        return  # a table looked up by rows of numbers
    if set(having) != {source}:
        raise NotRowWise("getitem looks rows up in rows")
    parts = index if isinstance(index, tuple) else (index,)
    dims = len(value_of(source).shape)
    used = sum(p is not None and p is not Ellipsis for p in parts)
    at = 0
    for part in parts:
        if part is None:
            continue
        if part is Ellipsis:
            at += dims - used
            continue
        if at == having[source] and part != slice(None):
            raise NotRowWise("getitem takes some of the rows")
        if not isinstance(part, int | slice):
            raise NotRowWise("getitem is not known to keep rows apart")
        at += 1
