"""From a plan to things that run: one GraphModule per distinct piece, and one generated function that strings them."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from opreg import registry
from opreg.graph_gradients import kept, renew
from opreg.graph_key import Keys
from opreg.graph_lift import Lifted, overload_of
from opreg.graph_nodes import NO_KWARGS, adder
from opreg.graph_ops import value_of
from opreg.graph_pieces import Piece, Plan, Step


def build_piece(keys: Keys, piece: Piece, root: Any, shared: bool) -> GraphModule:
    """The piece as a GraphModule: inputs in the order of `piece.inputs`, a tuple of `piece.exports` out.

    shared: several pieces will run this module."""
    graph = Graph()
    add = adder(graph)
    made: dict[Any, Any] = {}
    owned: dict[str, Any] = {}
    for node in piece.inputs:
        name = _identifier(node.name) if type(node) is not Lifted else f"lifted_{len(made)}"
        made[node] = new = add("placeholder", name, (), NO_KWARGS, name)
        new.meta.update(node.meta)
        if shared:
            # It says that an input's address never changes; a piece that several layers share gets the weights of each.
            new.meta.pop("tensor_dict", None)
        if node.op == "get_attr":
            new.meta["example_value"] = keys.attribute(node.target)
        elif node in piece.detached:
            new.meta["example_value"] = value_of(node).detach()

    for node in piece.renewed:
        made[node] = graph.call_method("clone", (made[node],))

    find, lifts = made.get, piece.lifts
    for step in piece.steps:
        op, target, args, kwargs = step.op, step.target, step._args, step._kwargs
        if lifts and step in lifts:
            target, lifted = lifts[step]
            args = tuple(lifted.get(i, a) for i, a in enumerate(args))
            kwargs = {k: lifted.get(k, a) for k, a in kwargs.items()}
        # What _argument() would do, for what almost all arguments are: values of this piece, and numbers.
        args = tuple(
            [a if type(a) is int else (find(a) if type(a) is Node else None) or _argument(a, made, keys) for a in args]
        )
        made[step] = new = add(op, target, args, _argument(kwargs, made, keys) if kwargs else NO_KWARGS, step.name)
        new.meta.update(step.meta)
        if op == "call_module" or op == "get_attr":
            owned[str(target)] = keys.attribute(target)
    results = (*piece.exports, *piece.renewed)
    graph.output(tuple(graph.call_method("detach", (made[n],)) if n in piece.cut else made[n] for n in results))
    # Its Python code is written when it is first called; Inductor needs none, and writing it takes the longest.
    module = _LazyGraphModule(_Owner(owned) if owned else {}, graph, class_name=f"Piece{piece.index}")
    module.meta.update(getattr(root, "meta", {}))
    return module


def _argument(value: Any, made: dict[Any, Any], keys: Keys) -> Any:
    """An argument with the new nodes for the old ones."""
    if isinstance(value, Node | Step | Lifted):
        found = made.get(value)
        return found if found is not None else _argument(keys.cross(value), made, keys)
    if isinstance(value, tuple | list):
        items = [_argument(v, made, keys) for v in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {k: _argument(v, made, keys) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(
            _argument(value.start, made, keys), _argument(value.stop, made, keys), _argument(value.step, made, keys)
        )
    return value


class _Owner(torch.nn.Module):
    """Gives GraphModule the attributes a piece names, dotted names included."""

    def __init__(self, owned: dict[str, Any]) -> None:
        super().__init__()
        for path, value in owned.items():
            *parents, last = path.split(".")
            owner: Any = self
            for part in parents:
                if not hasattr(owner, part):
                    setattr(owner, part, torch.nn.Module())
                owner = getattr(owner, part)
            setattr(owner, last, value)


def _identifier(name: str) -> str:
    return name if name.isidentifier() and not keyword.iskeyword(name) else "in_" + re.sub(r"\W", "_", name)


_OPERATORS = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//"}


class Stitcher:
    """Writes the function that calls the pieces in order; splitting pieces are written out as plain calls."""

    def __init__(self, plan: Plan, keys: Keys, root: Any) -> None:
        self.plan = plan
        self.keys = keys
        self.scope: dict[str, Any] = {"_root": root}
        self.names: dict[Any, str] = {}
        self.lines: list[str] = []
        self.used: list[list[str]] = []
        self.functions = {op.overload: op.calls.public for op in registry.defined_ops()}
        self._bound: dict[int, str] = {}

    def name(self, node: Any) -> str:
        found = self.names.get(node)
        if found is None:
            if node.op == "get_attr":
                # Read at every call: an owner may put another parameter there.
                return f"_root.{node.target}" if _plain(node.target) else self.bind(self.keys.attribute(node.target))
            found = self.names[node] = f"v{len(self.names)}"
        return found

    def bind(self, value: Any, prefix: str = "c") -> str:
        """A global of the generated function that holds `value`."""
        key = id(value)
        if key not in self._bound:
            self._bound[key] = name = f"_{prefix}{len(self._bound)}"
            self.scope[name] = value
        return self._bound[key]

    def arg(self, value: Any, used: list[str], local: dict[Any, Any]) -> str:
        if isinstance(value, Node | Step | Lifted):
            if isinstance(value, Lifted):
                return self.bind(value.tensor, "n")
            if value not in local:
                other = self.keys.cross(value)
                if other is not value:
                    return self.arg(other, used, local)
            name = self.name(value)
            if value.op != "get_attr":
                used.append(name)
            return name
        kind = type(value)
        if value is None or kind in (int, str, bool):
            return repr(value)
        if isinstance(value, tuple | list):
            items = [self.arg(v, used, local) for v in value]
            if hasattr(value, "_fields"):
                return f"{self.bind(kind)}({', '.join(items)})"
            if isinstance(value, list):
                return f"[{', '.join(items)}]"
            return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.arg(v, used, local)}" for k, v in value.items()) + "}"
        if kind is slice:
            return f"slice({', '.join(self.arg(v, used, local) for v in (value.start, value.stop, value.step))})"
        return self.bind(value)

    def direct(self, target: Any) -> Any:
        """What to call for an op: the function register_op returned (it may skip the dispatcher), else the overload."""
        if isinstance(target, OpOverloadPacket):
            target = overload_of(target) or target
        return self.functions.get(target, target) if isinstance(target, OpOverload) else target

    def call(self, step: Any, local: dict[Any, Any]) -> None:
        """One line that runs one node as it is."""
        used: list[str] = []
        args = [self.arg(a, used, local) for a in step.args]
        kwargs = []
        for k, a in step.kwargs.items():
            text = self.arg(a, used, local)
            kwargs.append(f"{k}={text}" if k.isidentifier() and not keyword.iskeyword(k) else f"**{{{k!r}: {text}}}")
        if step.op == "get_attr":
            text = f"_root.{step.target}"
        elif step.op == "call_method":
            text = f"{args[0]}.{step.target}({', '.join(args[1:] + kwargs)})"
        elif step.op == "call_module":
            text = f"_root.{step.target}({', '.join(args + kwargs)})" if _plain(step.target) else ""
            text = text or f"{self.bind(self.keys.attribute(step.target))}({', '.join(args + kwargs)})"
        elif step.target is operator.getitem:
            text = f"{args[0]}[{args[1]}]"
        elif step.target in _OPERATORS and not kwargs:
            text = f"{args[0]} {_OPERATORS[step.target]} {args[1]}"
        else:
            text = f"{self.bind(self.direct(step.target), 'f')}({', '.join(args + kwargs)})"
        local[step] = None
        if step.users or step in self.keys.needed:
            name = self.name(step)
            text = f"{name} = {text}"
            used.append(name)
        self.lines.append(text)
        self.used.append(used)

    def piece(self, piece: Piece, run: Any) -> None:
        """One line that runs one compiled piece."""
        used: list[str] = []
        args = [self.arg(n, used, {}) for n in piece.inputs]
        outs = [self.name(n) for n in piece.exports]
        renewed: list[tuple[str, str]] = []
        for i, node in enumerate(piece.inputs if piece.detached or piece.copied or piece.renewed else ()):
            if node in piece.detached and not self._comes_detached(node):
                args[i] = f"{args[i]}.detach()"
            if node in piece.renewed:
                renewed.append((args[i], f"n{len(renewed)}"))
            if node in piece.copied or node in piece.renewed:
                args[i] = f"{self.bind(kept)}({args[i]})"
        boxed = getattr(run, "boxed", None)
        call = (
            f"{self.bind(run, 'p')}({', '.join(args)})"
            if boxed is None
            else f"{self.bind(boxed, 'p')}([{', '.join(args)}])"
        )
        names = outs + [new for _, new in renewed]
        self.lines.append(f"{', '.join(names)}, = {call}" if names else call)
        self.used.append(used + outs)
        for old, new in renewed:
            self.lines.append(f"{self.bind(renew)}({old}, {new})")
            self.used.append([*used, new])
        for node, name in zip(piece.exports, outs, strict=True):
            if node in piece.copied:
                self.lines.append(f"{name} = {self.bind(kept)}({name})")
                self.used.append([name])

    def _comes_detached(self, node: Any) -> bool:
        home, gradients = self.plan.piece_of.get(node), self.keys.gradients
        if home is None or gradients is None or gradients.is_written(node):
            return False
        return node in self.plan.pieces[home].cut

    def function(self, runs: dict[int, Callable[..., Any]]) -> Callable[..., Any]:
        """Generate and compile the function; `runs` maps the index of a compiled piece to its callable."""
        parameters = [self.name(n) for n in self.plan.placeholders]
        for piece in self.plan.pieces:
            if piece.split:
                local: dict[Any, Any] = {}
                for step in piece.steps:
                    self.call(step, local)
            else:
                self.piece(piece, runs[piece.index])
        local = {}
        for step in self.plan.tail:
            self.call(step, local)
        result: list[str] = []
        value = self.plan.output.args[0] if self.plan.output is not None else None
        text = self.arg(value, result, local)
        last: dict[str, int] = {}
        for i, used in enumerate(self.used):
            for name in used:
                last[name] = i
        kept = set(result) | set(parameters)
        dead: dict[int, list[str]] = {}
        for name, i in last.items():
            if name not in kept:
                dead.setdefault(i, []).append(name)
        body: list[str] = []
        for i, line in enumerate(self.lines):
            body.append(line)
            if i in dead:
                # A value's memory is free for the next piece as soon as nobody needs it.
                body.append(f"del {', '.join(dead[i])}")
        defaults = [
            f"{p}={self.bind(n.args[0])}" if n.args else p
            for p, n in zip(parameters, self.plan.placeholders, strict=True)
        ]
        source = "\n    ".join([f"def forward({', '.join(defaults)}):", *body, f"return {text}"])
        exec(compile(source, "<opreg split graph>", "exec"), self.scope)
        made: Callable[..., Any] = self.scope["forward"]
        made.__doc__ = source
        return made


def _plain(path: Any) -> bool:
    return all(part.isidentifier() for part in str(path).split("."))


def shape_text(node: Any) -> str:
    """'float32[s0, 8]' for a node with a fake value, else ''."""
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(s) for s in value.shape)}]"
    return "" if value is None else str(value) if isinstance(value, torch.SymInt) else type(value).__name__
