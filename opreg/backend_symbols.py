"""Names of dynamic sizes that do not depend on the model's names of variables, where Inductor's cache is asked.

Dynamo names the symbol of a dynamic size by a hash of where the size comes from, `L['tokens']` say, and Inductor keeps
compiled graphs under keys that hold those names. A renamed variable would compile a model with dynamic sizes again.
So keys and the strides kept with an entry, all that names symbols there, hold names by the order of the piece's inputs.
(Generated code binds its own names to its inputs, and an entry's guards speak of inputs by their position.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch


def symbols_of(inputs: Sequence[Any]) -> dict[sympy.Symbol, sympy.Symbol]:
    """The symbols of backed sizes among a graph's inputs, each with its name by order. Sizes given as inputs come
    first: an expression of several symbols says nothing of their order but by their names."""
    found: dict[sympy.Symbol, sympy.Symbol] = {}
    for expr in sorted(_expressions(inputs), key=lambda expr: not expr.is_Symbol):
        for symbol in sorted(expr.free_symbols, key=str):
            # A name that Dynamo never gives: entries of other compilers have other strides under other keys.
            if str(symbol).startswith("s") and symbol not in found:
                found[symbol] = sympy.Symbol(f"size{len(found)}", **symbol.assumptions0)
    return found


def _expressions(inputs: Sequence[Any]) -> Iterator[sympy.Expr]:
    for value in inputs:
        if isinstance(value, torch.SymInt):
            yield value.node.expr
        elif isinstance(value, torch.Tensor) and not value.is_nested:
            layout = value.stride() if value.layout == torch.strided else ()
            yield from (n.node.expr for n in (*value.shape, *layout) if isinstance(n, torch.SymInt))


@contextmanager
def sizes_named_by_order(inputs: Sequence[Any]) -> Iterator[None]:
    """Inside, Inductor's cache knows the sizes among a graph's inputs by their order."""
    from torch._inductor.codecache import FxGraphCache, FxGraphCachePickler
    from torch._inductor.output_code import CompiledFxGraph

    symbols = symbols_of(inputs)
    if not symbols:
        yield
        return
    kept = {str(own): str(by_order) for own, by_order in symbols.items()}
    back = {by_order: own for own, by_order in kept.items()}
    reduce, prepare = FxGraphCachePickler._reduce_symint, CompiledFxGraph.prepare_for_serialization
    entries, own = FxGraphCache.iterate_over_candidates, vars(FxGraphCache).get("iterate_over_candidates")

    def reduced(pickler: Any, size: torch.SymInt) -> Any:
        function, _ = reduce(pickler, size)
        return function, (str(size.node.expr.xreplace(symbols)),)

    def prepared(graph: Any) -> None:
        prepare(graph)
        graph.output_strides = _renamed(graph.output_strides, kept)

    def candidates(*args: Any) -> Iterator[Any]:
        for found in entries(*args):
            found[0].output_strides = _renamed(found[0].output_strides, back)
            yield found

    FxGraphCachePickler._reduce_symint = reduced  # type: ignore[method-assign,assignment]
    CompiledFxGraph.prepare_for_serialization = prepared  # type: ignore[method-assign,assignment]
    FxGraphCache.iterate_over_candidates = candidates  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        FxGraphCachePickler._reduce_symint = reduce  # type: ignore[method-assign]
        CompiledFxGraph.prepare_for_serialization = prepare  # type: ignore[method-assign]
        if own is None:  # it is inherited
            del FxGraphCache.iterate_over_candidates
        else:
            FxGraphCache.iterate_over_candidates = own  # type: ignore[method-assign]


def _renamed(strides: Any, names: dict[str, str]) -> Any:
    def one(expr: str) -> str:
        return re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), expr)

    return strides and [exprs and tuple(one(expr) for expr in exprs) for exprs in strides]
