"""Sharding rules for DTensor: which dims of an op's tensors are split together, over one dimension of a device mesh.

The rule is handed to torch when a fake runs with torch.distributed.tensor loaded, which DTensor does before it looks a
rule up; so registering one imports no torch.distributed.tensor (1 s).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from . import _compat
from .errors import OpregError, RegistrationError, listing, nearest
from .shapes import Shape

if TYPE_CHECKING:
    from .op import Op

_installed: set[torch._ops.OpOverload] = set()
Others = Mapping[str, int] | Callable[..., Mapping[str, int]] | None


class ShardingError(OpregError, RuntimeError):
    """DTensors are placed so that the op cannot run on them as they are."""


class Rule:
    """The tensors of one op whose dims are split together; the others are whole on every rank."""

    def __init__(self, op: Op, dims: Iterable[str], others: Others) -> None:
        self.op = op
        self.others = others
        spec, wanted = op.spec, tuple(dims)
        shapes = [arg.shape for arg in spec.args if arg.is_tensor] + [result.shape for result in spec.returns]
        known = {name for shape in shapes if shape for dim in shape.dims if dim.kind == "name" for name in dim.names}
        for name in wanted:
            if name not in known:
                raise RegistrationError(
                    f"{op.name}: register_sharding names the dim '{name}', which no contract has as a dim of its own; "
                    f"they have {listing(sorted(known))}.{nearest(name, known)}"
                )
        self.results = [_place(op, "its result", result.shape, wanted) for result in spec.returns]
        self.args = {arg.name: _place(op, arg.name, arg.shape, wanted) for arg in spec.args if arg.is_tensor}
        if isinstance(others, Mapping):
            self._check(others)
        self.facts = f"{self.args} {self.results} {dict(others) if isinstance(others, Mapping) else None}"

    def _check(self, others: Mapping[str, int]) -> None:
        for name in others:
            if name not in self.args:
                raise RegistrationError(
                    f"{self.op.name}: register_sharding places '{name}', which is no tensor argument; there are "
                    f"{listing(self.args)}.{nearest(name, self.args)}"
                )

    def strategies(self, *given: Any, **named: Any) -> list[tuple[list[Any], list[Any]]]:
        """What torch wants to know: acceptable (placements of outputs, placements of inputs), without keywords."""
        from torch.distributed.tensor import Replicate, Shard

        if not self.results and _compat.dtensor_needs_a_result():
            raise ShardingError(
                f"{self.op.name}: returns nothing, and DTensor before torch 2.13 cannot run such an op; call "
                "it on the local tensors, DTensor.to_local()"
            )
        values = self.op.gather(lambda everything: everything)(*given, **named)
        others = self.others(*given, **named) if callable(self.others) else self.others or {}
        self._check(others)
        whole: list[Any] = []
        split: list[Any] = []
        for arg, value in zip(self.op.spec.args, values, strict=True):
            if arg.keyword_only:
                continue
            tensor = hasattr(value, "placements")
            at = others.get(arg.name, self.args.get(arg.name))
            whole.append(Replicate() if tensor else None)
            split.append((Replicate() if at is None else Shard(at)) if tensor else None)
        outs: list[Any] = [Replicate() if at is None else Shard(at) for at in self.results]
        found = [([Replicate() for _ in outs], whole), (outs, split)]
        positional = [a for a in self.op.spec.args if not a.keyword_only]
        written = {i for i, arg in enumerate(positional) if arg.mutated and not arg.layer}
        # torch combines these per dimension of the mesh; what is written must be placed alike over all of them.
        fitting = [s for s in found if all(p == s[1][i] for i in written for p in getattr(values[i], "placements", ()))]
        if not fitting:
            shown = ", ".join(
                f"{positional[i].name} is {tuple(values[i].placements)}, not {split[i]!r}" for i in written
            )
            # torch would write to a redistributed copy, and the caller's tensor would keep its old values.
            raise ShardingError(
                f"{self.op.name}: {shown}; what the op writes cannot be redistributed on the way, so distribute it so "
                "before the call, over every dimension of the mesh"
            )
        return fitting


def _place(op: Op, what: str, shape: Shape | None, wanted: tuple[str, ...]) -> int | None:
    """The dim of a tensor that is split; None for a tensor that is whole."""
    dims = shape.dims if shape is not None else ()
    found = [i for i, dim in enumerate(dims) if dim.kind == "name" and dim.names[0] in wanted]
    if len(found) > 1:
        raise RegistrationError(f"{op.name}: register_sharding would split {what} along {len(found)} dims; name one")
    if found and any(dim.kind == "star" for dim in dims[: found[0]]):
        raise RegistrationError(
            f"{op.name}: register_sharding cannot split {what}: its contract has '*' before '{dims[found[0]].text}'"
        )
    return found[0] if found else None


def install_if_distributed(op: Op) -> None:
    """Hand the op's rule to DTensor, once, if DTensor is loaded at all."""
    if op.sharding is not None and op.overload not in _installed and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.experimental import register_sharding

        _installed.add(op.overload)
        register_sharding(op.overload)(op.sharding.strategies)
