"""Calls to check an op with: the registered ones, each with a fresh copy of everything it may write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..context import current_context, layer_handle
from ..op import Op

_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Call:
    """One call: every argument in the op's order, and the tensors of the layer it may change.

    registered: made by register_inputs. certain: the op must take it; False where only its sizes were made up.
    """

    label: str
    args: tuple[Any, ...]
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    registered: bool = True
    certain: bool = True

    def fresh(self) -> tuple[Any, ...]:
        """The arguments with copies of all tensors; strides, offsets and shared storage stay as they are."""
        return copy_arguments(self.args)

    def save_state(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of the layer's tensors, to be given to `restore_state`."""
        return [(tensor, tensor.detach().clone()) for tensor in self.state.values()]


def restore_state(saved: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put the layer's tensors back to what they held at save_state."""
    with torch.no_grad():
        for tensor, before in saved:
            tensor.copy_(before)


def copy_arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of all tensors of `args`, storage by storage, so that views of one storage stay views of one storage; and
    of generators, so that each call draws the same numbers."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(copy(item) for item in value)
        if isinstance(value, torch.Generator):
            return torch.Generator(value.device).set_state(value.get_state())
        if not isinstance(value, torch.Tensor):
            return value
        plain = value.detach()
        storage = plain.untyped_storage()
        key = storage._cdata
        if key not in storages:
            storages[key] = storage.clone()
        new = torch.empty(0, dtype=plain.dtype, device=plain.device)
        new.set_(storages[key], plain.storage_offset(), plain.size(), plain.stride())
        return new.requires_grad_(value.requires_grad)

    copies = tuple(copy(value) for value in args)
    storages.clear()  # `copy` names itself, so it lives until the next garbage collection, and what it names with it
    return copies


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of an argument or result: itself, or those in a list or tuple."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def named_tensors(op: Op[Any, Any], args: tuple[Any, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """('x', tensor), ('xs[1]', tensor), ... of all tensor arguments but the layer handle."""
    for arg, value in zip(op.spec.args, args, strict=True):
        if arg.layer:
            continue
        if isinstance(value, torch.Tensor):
            yield arg.name, value
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, torch.Tensor):
                    yield f"{arg.name}[{index}]", item


def arguments(op: Op[Any, Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """All arguments in order, defaults filled in, the layer as a handle."""
    args: tuple[Any, ...] = op.gather(lambda values: values)(**kwargs)
    return tuple(layer_handle(value) if arg.layer else value for arg, value in zip(op.spec.args, args, strict=True))


def registered_calls(
    op: Op[Any, Any], device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Iterator[Call]:
    """The calls of register_inputs. Each is valid until the next is asked for: the context of a layer op is open."""
    for index, kwargs in enumerate(op.samples(device, dtype, seed)):
        yield Call(f"input {index}", arguments(op, kwargs), _state_tensors(op))


def _state_tensors(op: Op[Any, Any]) -> dict[str, torch.Tensor]:
    """Tensors reachable from the open forward context, by path: 'layers.0.kv_cache[1]'."""
    if op.spec.layer_arg is None:
        return {}
    context = current_context()
    found: dict[str, torch.Tensor] = {}
    if context is None:
        return found
    seen: set[int] = set()
    for name, layer in context.layers.items():
        _walk(layer, name, found, seen, 0)
    _walk(context.metadata, "metadata", found, seen, 0)
    return found


def layer_tensors(name: str, layer: Any) -> dict[str, torch.Tensor]:
    """Tensors reachable from one layer, by the paths that they have in Call.state."""
    found: dict[str, torch.Tensor] = {}
    _walk(layer, name, found, set(), 0)
    return found


def _walk(value: Any, path: str, found: dict[str, torch.Tensor], seen: set[int], depth: int) -> None:
    if isinstance(value, _SCALARS) or id(value) in seen or depth > 6:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found[path] = value
    elif isinstance(value, torch.nn.Module):
        for name, tensor in (*value.named_parameters(), *value.named_buffers()):
            _walk(tensor, f"{path}.{name}", found, seen, depth)
        _walk_attributes(value, path, found, seen, depth)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _walk(item, f"{path}[{index}]", found, seen, depth + 1)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _walk(item, f"{path}[{key!r}]", found, seen, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        _walk_attributes(value, path, found, seen, depth)


def _walk_attributes(value: Any, path: str, found: dict[str, torch.Tensor], seen: set[int], depth: int) -> None:
    for name, item in list(vars(value).items()):
        _walk(item, f"{path}.{name}", found, seen, depth + 1)
