"""Specialised variants of a split graph: the same pieces compiled again for exact sizes or for ranges of sizes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_aggregate
from torch.utils._sympy.value_ranges import ValueRanges

from opreg.errors import listing, nearest
from opreg.graph import SplitGraph
from opreg.graph_ops import value_of

Bound = tuple[int, int]


@dataclass(frozen=True)
class Variant:
    """Sizes a variant is for: {symbol: (first, last)}, both included; equal for an exact size."""

    bounds: tuple[tuple[Any, Bound], ...]
    text: str

    @property
    def exact(self) -> bool:
        return all(low == high for _, (low, high) in self.bounds)


class SizeError(ValueError):
    """What is wrong with "sizes" or "ranges"; the backend says where."""


def names_of_symbols(split: SplitGraph) -> dict[str, Any]:
    """{'x.size(0)': symbol} for every dynamic size of the graph's inputs, each name a user may know it by."""
    found: dict[str, Any] = {}
    for node in split.plan.placeholders:
        value = value_of(node)
        name = _readable(node)
        if isinstance(value, torch.Tensor):
            shape: Iterable[Any] = value.shape
            for i, size in enumerate(shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    found.setdefault(f"{name}.size({i})", size.node.expr)
        elif isinstance(value, torch.SymInt) and value.node.expr.is_symbol and not re.search(r"\.size\(", name):
            found.setdefault(name, value.node.expr)
    return found


def _readable(node: Any) -> str:
    """What the user calls a placeholder: Dynamo's source without its frame, else the node's name."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    name = getattr(source, "name", None)
    text = name() if callable(name) else name
    if not isinstance(text, str):
        return str(node.name)
    return re.sub(r"\.size\(\)\[(\d+)\]", r".size(\1)", re.sub(r"^L\['(\w+)'\]", r"\1", text))


def plan_variants(split: SplitGraph, sizes: Any, ranges: Any) -> list[Variant]:
    """The variants asked for, most specific first. Raises SizeError."""
    names = names_of_symbols(split)
    symbols = list(dict.fromkeys(names.values()))
    choices: dict[Any, list[Bound]] = {}
    for option, asked in (("sizes", sizes), ("ranges", ranges)):
        for symbol, entries in _by_symbol(option, asked, names, symbols).items():
            choices.setdefault(symbol, []).extend(_bound(option, e) for e in entries)
    said = {symbol: name for name, symbol in reversed(names.items())}
    variants: list[Variant] = []
    for picked in itertools.product(*([None, *bounds] for bounds in choices.values())):
        bounds = tuple((s, b) for s, b in zip(choices, picked, strict=True) if b is not None)
        if bounds:
            text = ", ".join(f"{said[s]} = {lo}" if lo == hi else f"{said[s]} {lo} to {hi}" for s, (lo, hi) in bounds)
            variants.append(Variant(bounds, text))
    # More conditions first, then the narrower ones, so that the first that fits is the most special.
    return sorted(variants, key=lambda v: (-len(v.bounds), sum(hi - lo for _, (lo, hi) in v.bounds)))


def plan_points(split: SplitGraph, asked: Any, sizes: Any) -> list[Variant]:
    """Sizes to record compiled pieces for: a variant for all sizes that are padded to its largest. Raises SizeError.

    asked: True for those of the option "sizes", else what that option would hold."""
    entries = sizes if asked is True else asked
    _check("cudagraphs", entries)
    used = set().union(*(_symbols(value_of(n)) for p in split.pieces if not p.split for n in p.inputs))
    names = {name: symbol for name, symbol in names_of_symbols(split).items() if symbol in used}
    if not names:
        return [Variant((), "")]
    choices = {
        symbol: sorted({_bound("cudagraphs", e)[0] for e in found})
        for symbol, found in _by_symbol("cudagraphs", entries, names, list(dict.fromkeys(names.values()))).items()
    }
    missing = [name for name, symbol in names.items() if not choices.get(symbol)]
    if missing:
        raise SizeError(
            f'option "cudagraphs" records pieces for sizes, and there are none for {listing(missing)}. '
            f'Give them: {{"cudagraphs": {{"{missing[0]}": [1, 2, 4, 8]}}}}.'
        )
    said = {symbol: name for name, symbol in reversed(names.items())}
    points: list[Variant] = []
    for picked in itertools.product(*(range(len(found)) for found in choices.values())):
        bounds = tuple(
            (symbol, (found[i - 1] + 1 if i else 0, found[i]))
            for (symbol, found), i in zip(choices.items(), picked, strict=True)
        )
        points.append(Variant(bounds, ", ".join(f"{said[s]} = {high}" for s, (_, high) in bounds)))
    return points


def _check(option: str, asked: Any) -> None:
    """Refuse what no graph could use, also where this one has no dynamic sizes. Raises SizeError."""
    for entries in asked.values() if isinstance(asked, Mapping) else [asked] if asked else []:
        if isinstance(entries, str) or not isinstance(entries, Collection):
            what = "pairs (first, last)" if option == "ranges" else "sizes"
            raise SizeError(
                f'option "{option}" holds {entries!r} where a list of {what} belongs; a mapping has such a list '
                "for each size's name."
            )
        for entry in entries:
            _bound(option, entry)


def _by_symbol(option: str, asked: Any, names: dict[str, Any], symbols: list[Any]) -> dict[Any, Sequence[Any]]:
    if not asked:
        return {}
    _check(option, asked)
    if not isinstance(asked, Mapping):
        if len(symbols) > 1:
            raise SizeError(
                f'option "{option}" is a list, but this graph has {len(symbols)} dynamic sizes: {listing(names)}. '
                f'Say which one is meant, as in {{"{next(iter(names))}": {list(asked)!r}}}.'
            )
        return {symbols[0]: list(asked)} if symbols else {}
    found: dict[Any, Sequence[Any]] = {}
    for name, entries in asked.items():
        if name not in names:
            if not names:
                continue
            raise SizeError(
                f'option "{option}" names the size {name!r}, which this graph does not have.'
                f"{nearest(str(name), names)} Its dynamic sizes: {listing(names)}."
            )
        found[names[name]] = list(entries)
    return found


def _bound(option: str, entry: Any) -> Bound:
    if option != "ranges" and isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0:
        return entry, entry
    if option == "ranges" and isinstance(entry, tuple | list) and len(entry) == 2:
        low, high = entry
        if isinstance(low, int) and isinstance(high, int) and 0 <= low <= high:
            return low, high
    what = "a pair (first, last) of sizes, both included" if option == "ranges" else "a size, a number from 0"
    raise SizeError(f'option "{option}" holds {entry!r}, which is not {what}.')


Compile = Callable[[int, GraphModule, list[Any]], Callable[..., Any]]


def compile_variant(split: SplitGraph, variant: Variant, compile_one: Compile) -> tuple[dict[int, Any], list[str]]:
    """({distinct piece: what runs it in this variant}, notes), without pieces whose sizes do not depend on it."""
    runs: dict[int, Any] = {}
    notes: list[str] = []
    bounds = dict(variant.bounds)
    for index in split.modules:
        module = split.build(index)
        nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
        values = [value_of(n) for n in nodes]
        if not any(_symbols(v) & set(bounds) for v in values):
            continue
        if variant.exact:
            known = {symbol: low for symbol, (low, _) in bounds.items()}
            for node, value in zip(nodes, values, strict=True):
                if isinstance(value, torch.SymInt) and not _replaced(value, known).free_symbols:
                    _replace_uses(node, int(_replaced(value, known)))
            runs[index] = compile_one(index, module, [_with_sizes(v, known) for v in values])
            continue
        env = ShapeEnv()
        mode = FakeTensorMode(shape_env=env)
        fresh = _Fresh(env, mode, bounds)
        with tracing(TracingContext(mode)):
            run = compile_one(index, module, [fresh.value(v) for v in values])
        if env.guards:
            # Such a guard would have to be checked at every call; the general piece serves instead.
            reasons = listing([str(g.expr) for g in env.guards], 3)
            notes.append(f"piece {index} is not specialised for {variant.text}: it would also need {reasons}")
            continue
        runs[index] = run
    return runs, notes


def _symbols(value: Any) -> set[Any]:
    if isinstance(value, torch.SymInt):
        return set(value.node.expr.free_symbols)
    if isinstance(value, torch.Tensor):
        sizes: Iterable[Any] = (*value.shape, *value.stride(), value.storage_offset())
        return set().union(*(s.node.expr.free_symbols for s in sizes if isinstance(s, torch.SymInt)))
    return set()


def _replaced(size: Any, known: Mapping[Any, int]) -> Any:
    return size.node.expr.xreplace({symbol: sympy.Integer(n) for symbol, n in known.items()})


def _with_sizes(value: Any, known: Mapping[Any, int]) -> Any:
    """A fake value like `value` in the same fake mode, with known sizes instead of symbols."""

    def size(s: Any) -> Any:
        if not isinstance(s, torch.SymInt):
            return s
        expr = _replaced(s, known)
        if expr.is_number:
            return int(expr)
        return s if expr == s.node.expr else s.node.shape_env.create_symintnode(expr, hint=int(expr.subs(_hints(s))))

    if not isinstance(value, torch.Tensor) or not _symbols(value) & set(known):
        return value
    fake: Any = value
    return _like(value, fake.fake_mode, size)


def _hints(s: Any) -> dict[Any, Any]:
    env = s.node.shape_env
    return {symbol: env.size_hint(symbol) for symbol in s.node.expr.free_symbols}


def _like(value: torch.Tensor, mode: FakeTensorMode, size: Callable[[Any], Any]) -> torch.Tensor:
    with mode:
        shape, stride, offset = (
            [size(s) for s in value.shape],
            [size(s) for s in value.stride()],
            value.storage_offset(),
        )
        made = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        if offset:
            room = torch.empty(made.numel() * 2 + size(offset), dtype=value.dtype, device=value.device)
            made = room.as_strided(shape, stride, size(offset))
        return made.requires_grad_(value.requires_grad)


def _replace_uses(node: Any, number: int) -> None:
    for user in list(node.users):
        user.args = map_aggregate(user.args, lambda a: number if a is node else a)
        user.kwargs = map_aggregate(user.kwargs, lambda a: number if a is node else a)


class _Fresh:
    """Values again in a shape environment of their own, where symbols have the bounds of a variant."""

    def __init__(self, env: ShapeEnv, mode: FakeTensorMode, bounds: Mapping[Any, Bound]) -> None:
        self.env = env
        self.mode = mode
        self.bounds = bounds
        self.symbols: dict[Any, Any] = {}

    def symbol(self, old: Any, old_env: Any) -> Any:
        from torch._dynamo.source import ConstantSource

        if old not in self.symbols:
            low, high = self.bounds.get(old, (None, None))
            hint = high if high is not None else int(old_env.size_hint(old))
            new = self.env.create_unspecified_symbol(hint, ConstantSource(str(old)), DimDynamic.DYNAMIC)
            self.env.var_to_range[new] = ValueRanges(low, high) if high is not None else old_env.var_to_range[old]
            self.symbols[old] = (new, hint)
        return self.symbols[old]

    def size(self, s: Any) -> Any:
        if not isinstance(s, torch.SymInt):
            return s
        expr = s.node.expr
        pairs = {old: self.symbol(old, s.node.shape_env) for old in expr.free_symbols}
        hint = int(expr.xreplace({old: sympy.Integer(h) for old, (_, h) in pairs.items()}))
        return self.env.create_symintnode(expr.xreplace({old: new for old, (new, _) in pairs.items()}), hint=hint)

    def value(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self.size(value)
        return _like(value, self.mode, self.size) if isinstance(value, torch.Tensor) else value


def dispatch(split: SplitGraph, variants: list[tuple[Variant, Callable[..., Any]]]) -> Callable[..., Any]:
    """One function that takes the first variant whose sizes fit, and the general one otherwise."""
    where = _where(split)
    scope: dict[str, Any] = {"general": split.function()}
    if variants and not variants[0][0].bounds:
        return variants[0][1]
    lines = ["def forward(*args):"]
    for i, (variant, run) in enumerate(variants):
        scope[f"variant{i}"] = run
        tests = [f"{lo} <= {where[s]} <= {hi}" if lo != hi else f"{where[s]} == {lo}" for s, (lo, hi) in variant.bounds]
        lines.append(f"    if {' and '.join(tests)}: return variant{i}(*args)")
    lines.append("    return general(*args)")
    exec(compile("\n".join(lines), "<opreg sizes>", "exec"), scope)
    made: Callable[..., Any] = scope["forward"]
    return made


def _where(split: SplitGraph) -> dict[Any, str]:
    """How the generated function reads each symbol: an argument, or a size of one."""
    found: dict[Any, str] = {}
    for i, node in enumerate(split.plan.placeholders):
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            shape: Iterable[Any] = value.shape
            for j, size in enumerate(shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    found.setdefault(size.node.expr, f"args[{i}].shape[{j}]")
        elif isinstance(value, torch.SymInt) and value.node.expr.is_symbol:
            # Cheaper than asking a tensor, so it wins over one seen before.
            found[value.node.expr] = f"args[{i}]"
    return found
