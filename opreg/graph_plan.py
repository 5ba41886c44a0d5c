"""Where a graph is cut: every node gets a piece, and every value that crosses a border gets a way to cross it."""

from __future__ import annotations

from collections.abc import Mapping
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from opreg.graph_alias import replay_views
from opreg.graph_ops import CHEAP, COMPUTE, ITEM, SET_GRAD, SPLIT, OpFacts, keyword_mutation, value_of
from opreg.graph_pieces import Piece, Plan, Step

_TUPLES = frozenset([tuple, list])


def make_plan(graph: Graph, targets: Mapping[Any, str]) -> Plan:
    """Cut `graph` at `targets` ({node target: name for reports})."""
    plan = Plan(graph)
    _assign(plan, targets)
    for piece in plan.pieces:
        piece.steps = piece.nodes
    if plan.mutations and len(plan.pieces) > 1:
        replay_views(plan)
    # After the views, because a view made again may be the only one to use a size elsewhere.
    _cross_sizes(plan)
    _cross_tuples(plan)
    for node in plan.modules:
        _replay(plan, node)
        _note_inner_splits(plan, node, targets)
    order = {node: position for position, node in enumerate(graph.nodes)} if plan.replays else {}
    for index, nodes in plan.replays.items():
        first = sorted(nodes, key=order.__getitem__)
        if index < len(plan.pieces):
            plan.pieces[index].steps = first + plan.pieces[index].steps
        else:
            plan.tail = first
    if plan.regions:
        _carry_regions(plan)
    return plan


def _assign(plan: Plan, targets: Mapping[Any, str]) -> None:
    """Give every node a piece, in one pass, keeping the order of the graph."""
    facts_of: dict[Any, OpFacts] = {}
    pieces, piece_of, tuples = plan.pieces, plan.piece_of, plan.tuples
    pending: list[Any] = []
    waiting: set[Any] = set()
    scalars: set[Any] = set()
    current: Piece | None = None
    nodes: list[Any] = []
    index = level = 0
    computing = False  # whether the current piece is one that is compiled
    for node in plan.graph.nodes:
        op = node.op
        value = (meta := node.meta).get("example_value")
        if value is None:
            value = meta.get("val")
        if op == "call_function" or op == "call_method":
            target = node.target
            facts = facts_of.get(target)
            if facts is None:
                facts = facts_of[target] = OpFacts(op, target, target in targets)
                if facts.split:
                    plan.matched.add(targets[target])
            kind_of_value = type(value)
            if kind_of_value is tuple or kind_of_value is list:
                tuples[node] = True
            # Almost every node is an ordinary one, for which these lines are all.
            kwargs = node._kwargs
            if facts.plain and not level and not (kwargs and ("out" in kwargs or "inplace" in kwargs)):
                if facts.tuple_view:
                    tuples.setdefault(node, False)
                if computing:
                    nodes.append(node)
                    piece_of[node] = index
                    continue
                kind = facts.kind
            elif target is getitem and not level and type(node._args[0]) is Node and tuples.get(node._args[0]):
                # An element stays with what made the tuple.
                kind = ITEM
            else:
                kind = _kind(plan, node, value, facts, waiting, scalars, facts_of, level)
                level += facts.level
            if kind == ITEM:
                home = piece_of.get(node.args[0])
                if home is not None:
                    piece_of[node] = home
                    pieces[home].nodes.append(node)
                    continue
                kind = CHEAP
            if kind == CHEAP and not computing:
                # Between two splitting ops it goes with them, else with what follows.
                pending.append(node)
                waiting.add(node)
                continue
            split = kind == SPLIT
        elif op == "placeholder":
            plan.placeholders.append(node)
            if type(value) is torch.SymInt and value.node.expr.is_symbol:
                plan.symbols.setdefault(value.node.expr, node)
            continue
        elif op == "get_attr":
            plan.attributes.append(node)
            if isinstance(value, torch.nn.Module) or isinstance(_attribute(plan.graph, node), torch.nn.Module):
                plan.modules.append(node)
            continue
        elif op == "output":
            plan.output = node
            continue
        else:
            split = False
            if type(value) in _TUPLES:
                tuples[node] = True
            if node.args and getattr(_attribute(plan.graph, node), "inplace", False) is True:
                plan.mutations.append((node, [node.args[0]]))
        if current is None or current.split != split:
            current = Piece(len(pieces), split)
            pieces.append(current)
            nodes, index, computing = current.nodes, current.index, not split
        if pending:
            _settle(pending, waiting, current, piece_of)
        nodes.append(node)
        piece_of[node] = index
    if pending:
        if current is None:
            # Nothing but cheap nodes: they run as they are, in one piece that is not compiled.
            current = Piece(0, True)
            pieces.append(current)
        _settle(pending, waiting, current, piece_of)


def _kind(
    plan: Plan,
    node: Any,
    value: Any,
    facts: OpFacts,
    waiting: set[Any],
    scalars: set[Any],
    facts_of: dict[Any, OpFacts],
    level: int,
) -> int:
    """The class of a call that is not an ordinary one; what else the plan must know of it is noted there."""
    target = node.target
    kind = SPLIT if facts.split else facts.kind
    tuple_view = facts.tuple_view
    if facts.split:
        pass
    elif target is getitem:
        kind = _kind_of_getitem(plan, node, waiting)
        if kind == CHEAP and node.args[0] in scalars:
            scalars.add(node)
    elif target is getattr:
        name = node.args[1]
        facts = facts_of.get((getattr, name)) or facts_of.setdefault((getattr, name), OpFacts("call_method", name))
        kind, tuple_view = facts.kind, facts.tuple_view
    elif facts.arith and (
        not isinstance(value, torch.Tensor) if value is not None else all(n in scalars for n in node.all_input_nodes)
    ):
        kind = CHEAP
        scalars.add(node)
    if kind == CHEAP and facts.size:
        scalars.add(node)
        plan.sizes.append(node)
    if tuple_view and type(value) not in _TUPLES:
        plan.tuples[node] = False
    written = facts.mutates(node) if facts.mutates is not None else keyword_mutation(node)
    if facts.mutates is not None or written:
        plan.mutations.append((node, written))
        kind = COMPUTE if kind == CHEAP else kind
    if facts.enter or facts.exit or target is SET_GRAD:
        plan.regions.append(node)
    if level or facts.level:
        if kind == SPLIT:
            plan.notes.append(f"{node.name}: not split at, because it runs inside a torch.func transform")
        kind = COMPUTE
    return kind


def _settle(pending: list[Any], waiting: set[Any], piece: Piece, piece_of: dict[Any, int]) -> None:
    for node in pending:
        piece.nodes.append(node)
        piece_of[node] = piece.index
    pending.clear()
    waiting.clear()


def _attribute(graph: Graph, node: Node) -> Any:
    """What a get_attr or call_module node names, or None."""
    owner: Any = graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part, None)
    return owner


def _note_inner_splits(plan: Plan, node: Node, targets: Mapping[Any, str]) -> None:
    """A sub-graph (a checkpointed layer, a branch of cond) is one call: what is inside runs where the call runs."""
    owner = _attribute(plan.graph, node)
    if not isinstance(owner, GraphModule):
        return
    inside = {targets[n.target] for n in owner.graph.nodes if n.op == "call_function" and n.target in targets}
    for name in sorted(inside):
        plan.notes.append(f"not split at {name} inside of {node.name}, which is a single call")


def _kind_of_getitem(plan: Plan, node: Node, waiting: set[Any]) -> int:
    producer, index = node.args[0], node.args[1]
    if not isinstance(producer, Node):
        return COMPUTE
    value = value_of(producer)
    if isinstance(value, torch.Size):
        return CHEAP
    if value is None:
        # Without fake values an integer index is an element of a tuple or a view: both may stay with the producer.
        return ITEM if isinstance(index, int) and (producer in plan.piece_of or producer in waiting) else COMPUTE
    if not isinstance(value, torch.Tensor):
        return ITEM if producer in plan.piece_of or producer in waiting else CHEAP
    parts = index if isinstance(index, tuple) else (index,)
    basic = all(p is None or p is Ellipsis or isinstance(p, int | slice) for p in parts)
    return CHEAP if basic else COMPUTE


def _replay(plan: Plan, node: Any) -> None:
    """Compute a node that reads no data again in each other piece that uses it."""
    for index in plan.elsewhere(node):
        plan.make_again([node], index)
        plan.instead[node] = node


def _cross_sizes(plan: Plan) -> None:
    """A torch.Size used whole in another piece crosses as literals, symbols and single elements."""
    for node in plan.sizes:
        value = value_of(node)
        if value is None:
            # `x.size()` and `x.shape` of a graph without fake values: read again from x, which crosses instead.
            whole = node.target in ("size", "stride") and len(node.args) == 1 and not node.kwargs
            if whole or node.target is getattr:
                _replay(plan, node)
        elif isinstance(value, tuple) and plan.crosses(node):
            known = [plan.scalar(v) for v in value]
            plan.instead[node] = tuple(
                _element(plan, node, i, v) if known[i] is None else known[i] for i, v in enumerate(value)
            )


def _element(plan: Plan, node: Any, i: int, value: Any) -> Any:
    """Element i of a tuple-valued node, as a node of the same piece."""
    for user in node.users:
        if user.target is getitem and user.args[1] == i:
            return user
    part = Step(f"{node.name}_{i}", getitem, (node, i))
    part.meta["example_value"] = value
    home = plan.piece_of[node]
    plan.piece_of[part] = home
    plan.pieces[home].nodes.append(part)
    return part


def _cross_tuples(plan: Plan) -> None:
    """A tuple used whole in another piece crosses as its elements and is put together again there."""
    for node in plan.tuples:
        if plan.crosses(node):
            value = value_of(node)
            if value is None:
                _replay(plan, node)
                continue
            elements = [_element(plan, node, i, v) for i, v in enumerate(value)]
            plan.instead[node] = elements if isinstance(value, list) else tuple(elements)


def _carry_regions(plan: Plan) -> None:
    """Close autocast, inference-mode and no_grad regions at a border and open them again in the next piece."""
    grads = [node for node in plan.regions if node.target is SET_GRAD]
    # Dynamo restores the mode at the end of every region, so the last value set is the mode outside of all regions.
    outside = grads[-1].args[0] if grads else None
    grad = outside
    regions = set(plan.regions)
    opened: list[Any] = []
    for piece in plan.pieces:
        before: list[Any] = list(opened)
        if grad != outside:
            before.append(Step(f"set_grad_{piece.index}", SET_GRAD, (grad,)))
        for node in piece.nodes:
            if node not in regions:
                continue
            if node.target is SET_GRAD:
                grad = node.args[0]
            elif node.args and node.args[0] in opened:
                opened.remove(node.args[0])
            else:
                opened.append(node)
        after: list[Any] = []
        for entered in reversed(opened):
            after += [user for user in entered.users if user in regions][:1]
        if grad != outside:
            after.append(Step(f"reset_grad_{piece.index}", SET_GRAD, (outside,)))
        if before or after:
            made = plan.replays.get(piece.index, {})
            piece.steps = piece.steps[: len(made)] + before + piece.nodes + after
