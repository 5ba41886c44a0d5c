"""What the splitter must know about single nodes: does it allocate, view, mutate, carry state, or split the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from opreg.errors import UnknownOpError, listing, nearest

# Classes of nodes. COMPUTE is the only one worth compiling; the others are cheap enough to run wherever they fall.
COMPUTE, CHEAP, ITEM, SPLIT = 0, 1, 2, 3

FACTORIES = frozenset(
    "empty empty_like empty_strided empty_permuted new_empty new_empty_strided new_zeros new_ones new_full zeros "
    "zeros_like ones ones_like full full_like".split()
)
# May return an alias of their first argument. Where fake values are known the storage decides, not this list.
VIEWS = frozenset(
    "view view_as reshape reshape_as unsqueeze squeeze transpose permute t T mT H mH adjoint flatten unflatten expand "
    "expand_as narrow select slice chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind unsafe_chunk "
    "unsafe_split detach alias diagonal as_strided unfold movedim moveaxis swapaxes swapdims ravel real imag "
    "view_as_real view_as_complex broadcast_to data".split()
)
# The part of VIEWS that returns a tuple; used only for graphs without fake values.
TUPLE_VIEWS = frozenset("chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind".split())
SIZES = frozenset(
    "size stride storage_offset dim ndimension numel element_size shape ndim dtype device layout "
    "sym_size sym_stride sym_numel sym_storage_offset".split()
)
ARITHMETIC: frozenset[Any] = frozenset(
    [
        *(getattr(operator, n) for n in "add sub mul floordiv truediv mod pow neg pos abs lt le gt ge eq ne".split()),
        *(getattr(operator, n) for n in "and_ or_ xor not_ lshift rshift".split()),
        *(getattr(torch, n) for n in "sym_max sym_min sym_not sym_int sym_float sym_ite sym_sqrt sym_sum".split()),
        *(max, min, int, float, bool, round),
    ]
)
CHECKS = frozenset(
    "_check _check_is_size _check_value _assert _assert_async _assert_scalar sym_constrain_range".split()
)
INPLACE_OPERATORS: frozenset[Any] = frozenset(
    getattr(operator, n)
    for n in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul setitem".split()
)
# In-place on the metadata, not on the data: a view made again afterwards would be another view.
RESHAPING = frozenset(
    "resize_ resize_as_ set_ t_ transpose_ squeeze_ unsqueeze_ swapaxes_ swapdims_ as_strided_ detach_".split()
)
SET_GRAD: Any = torch._C._set_grad_enabled


def name_of(target: Any) -> str:
    """A target's short name: 'view' for a method, 'add' for operator.add, 'ns::op' for a torch op."""
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return str(target._name).removesuffix(".default")
    if isinstance(target, OpOverloadPacket):
        return target._qualified_op_name
    return str(getattr(target, "__name__", target))


class OpFacts:
    """Facts about one target, found once and kept: `for node in graph` must not ask torch for anything."""

    __slots__ = (
        "arith",
        "custom",
        "enter",
        "exit",
        "factory",
        "kind",
        "level",
        "mutates",
        "plain",
        "size",
        "split",
        "tuple_view",
    )

    def __init__(self, op: str, target: Any, split: bool = False) -> None:
        name = name_of(target).rpartition("::")[2].partition(".")[0] if op != "call_module" else ""
        torchish = True
        if isinstance(target, OpOverload | OpOverloadPacket):
            torchish = name_of(target).partition("::")[0] in ("aten", "prims", "prim")
        self.custom = not torchish
        self.factory = torchish and name in FACTORIES
        self.tuple_view = torchish and name in TUPLE_VIEWS
        self.size = torchish and name in SIZES
        self.arith = target in ARITHMETIC or getattr(target, "__module__", None) == "math"
        # Regions come as pairs `_enter_x(...)`, `_exit_x(entered)`; functorch levels may not be cut at all.
        self.enter = name.startswith("_enter_")
        self.exit = name.startswith("_exit_")
        self.level = (name.endswith("_increment_nesting")) - (name.endswith("_decrement_nesting"))
        self.mutates = mutation(op, target, name)
        cheap = (
            self.factory
            or (torchish and name in VIEWS)
            or self.size
            or self.enter
            or self.exit
            or target is SET_GRAD
            or name in CHECKS
        )
        self.kind = CHEAP if cheap and not self.mutates else COMPUTE
        # Whether the graph is split at calls of it.
        self.split = split
        # Most nodes: nothing of the above has to be looked at again for a single node, if a view that gives a tuple
        # has a tuple for its value.
        self.plain = not (
            split
            or self.arith
            or self.mutates
            or self.size
            or self.enter
            or self.exit
            or self.level
            or target is SET_GRAD
            or target is operator.getitem
            or target is getattr
        )


def schema_of(target: Any) -> torch._C.FunctionSchema | None:
    """The schema of an OpOverload, or of a packet's only (or default) overload."""
    if isinstance(target, OpOverloadPacket):
        names: list[str] = target.overloads()
        target = getattr(target, "default" if "default" in names else names[0]) if names else None
    return target._schema if isinstance(target, OpOverload) else None


def mutation(op: str, target: Any, name: str) -> Callable[[Any], list[Any]] | None:
    """A function from a node to the arguments it writes, or None for a target that writes nothing."""
    schema = schema_of(target)
    if schema is not None:
        written = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
        if not written:
            return None
        return lambda node: [
            node.args[i] if i < len(node.args) else node.kwargs[key]
            for i, key in written
            if i < len(node.args) or key in node.kwargs
        ]
    if target in INPLACE_OPERATORS or (op == "call_method" and name.endswith("_") and not name.endswith("__")):
        return lambda node: [node.args[0]] if node.args else []
    if isinstance(target, HigherOrderOperator):
        # A kernel wrapper says in its keywords what it gets, not what it writes: every tensor counts as written.
        return (lambda node: list(node.all_input_nodes)) if "mutation" in name else None
    if op == "call_function" and name.endswith("_") and not name.startswith("_") and not name.endswith("__"):
        return lambda node: [node.args[0]] if node.args else []
    return None


def keyword_mutation(node: Any) -> list[Any]:
    """What `out=` and `inplace=True` write, for any target."""
    kwargs = node._kwargs
    if not kwargs:
        return []
    written = kwargs.get("out")
    found = list(written) if isinstance(written, tuple | list) else [] if written is None else [written]
    if kwargs.get("inplace") is True and node.args:
        found.append(node.args[0])
    return found


def value_of(node: Any) -> Any:
    """The fake value Dynamo or make_fx left on a node, or None."""
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


_NONE: frozenset[int] = frozenset()


def storages(value: Any) -> frozenset[int]:
    """Identities of the storages of a fake value, a tuple's elements included."""
    if isinstance(value, torch.Tensor):
        # Sparse and opaque layouts have no storage; they have no views either.
        return frozenset((value.untyped_storage()._cdata,)) if value.layout == torch.strided else _NONE
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return _NONE.union(*(storages(v) for v in value))
    return _NONE


def _known_names() -> list[str]:
    return [n.removesuffix(".default") for n in torch._C._dispatch_get_all_op_names()]


def _by_name(name: str) -> list[Any]:
    """Every target a graph may hold for 'ns::op' or 'ns::op.overload'."""
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), base, None) if rest else None
    if packet is None or (overload and overload not in packet.overloads()):
        known = _known_names()
        raise UnknownOpError(
            f"split_graph: there is no operator '{name}' to split at.{nearest(name, known)} Names look like 'ns::op' "
            f"or 'ns::op.overload', and the module that registers the op must have been imported."
        )
    names = packet.overloads()
    targets: list[Any] = [getattr(packet, n) for n in names if not overload or n == overload]
    if not overload or overload == "default" or len(names) == 1:
        targets.append(packet)
    if namespace == "aten" and not overload:
        # Dynamo writes torch.mm, not aten::mm, into its graphs.
        owners = (torch, torch.nn.functional, torch._C._nn, operator)
        targets += [getattr(o, base) for o in owners if callable(getattr(o, base, None))] + [base]
    return targets


def targets_of(on: Any) -> dict[Any, str]:
    """{node target: the name the user gave} for names, OpOverloads, packets and opreg ops, one or several."""
    if isinstance(on, str | OpOverloadPacket) or not isinstance(on, Iterable):
        on = [on]  # a packet is an iterable, of its overloads' names
    found: dict[Any, str] = {}
    for item in on:
        if isinstance(item, OpOverload):
            found[item] = name_of(item)
            if item._overloadname == "default":
                found[item.overloadpacket] = name_of(item)
        elif isinstance(item, OpOverloadPacket):
            found.update(dict.fromkeys(_by_name(item._qualified_op_name), item._qualified_op_name))
        elif isinstance(item, HigherOrderOperator):
            found[item] = str(item._name)
        else:
            name = item if isinstance(item, str) else getattr(item, "name", None)
            if not isinstance(name, str):
                raise UnknownOpError(
                    f"split_graph: 'on' holds {item!r}, which is no operator. Give names ('ns::op'), OpOverloads or "
                    f"what register_op returned. Given: {listing(map(str, on))}."
                )
            found.update(dict.fromkeys(_by_name(name), name))
    return found
