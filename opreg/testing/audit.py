"""The write audit: what a kernel wrote, by three witnesses, and where in the source.

1. A TorchDispatchMode sees every ATen call below the kernel; what its schema marks as written is a write, also where
   the new value equals the old one (which torch's opcheck, comparing values, lets pass).
2. The bytes of every storage, before and after: writes of kernels that do not go through ATen, and writes beyond the
   elements of a strided argument.
3. Version counters: ATen writes that the mode cannot see, such as those under a disabled dispatcher.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .samples import tensors_of

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)


def user_line(stack: traceback.StackSummary | None = None) -> str:
    """'file.py:12 (the line)' of the innermost frame that belongs neither to torch nor to opreg's own machinery."""
    frames = traceback.extract_stack() if stack is None else stack
    for frame in reversed(frames):
        if not is_machinery(frame.filename):
            return f"{Path(frame.filename).name}:{frame.lineno} ({(frame.line or '').strip()})"
    return "no Python line"


def is_machinery(filename: str) -> bool:
    """Whether a frame of this file is torch's or opreg's own, not the author's."""
    if filename.startswith(("<opreg", _TORCH)):
        return True
    if not filename.startswith(_HERE):
        return False
    # opreg/kernels and opreg/ops of an installed package are authors' code like anyone's.
    return not {"kernels", "ops"} & set(Path(filename).relative_to(_HERE).parts[:-1])


@dataclass
class Write:
    """One write to memory that was there before the call: its storage, what wrote, and the author's line."""

    storage: int
    by: str
    where: str
    keep: Any = None  # holds a storage alive that nobody else may hold, so that its identity is not used again


class WriteMode(TorchDispatchMode):
    """Records writes to and reads from the storages in `known`, and writes to others that the call did not make."""

    def __init__(self, known: set[int], allowed: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self.allowed = allowed
        self.fresh: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is used twice
        self.writes: list[Write] = []
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        given: set[int] = set()
        for index, parameter in enumerate(schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(parameter.name)
            held = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors_of(value)}
            found = set(held)
            if func is torch.ops.aten.lift_fresh.default:
                continue  # torch.tensor(...): what goes in was made just now
            given |= found
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                for storage in found - self.fresh.keys():
                    keep = None if storage in self.known else held[storage]
                    # Finding the line costs 1 ms; nobody asks for that of a write that is declared.
                    where = "" if storage in self.allowed else user_line()
                    self.writes.append(Write(storage, str(func), where, keep))
                if not _overwrites(func, parameter.name):
                    self.read |= found
            elif parameter.alias_info is None:
                self.read |= found
        result = func(*args, **kwargs)
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.known:
                self.fresh[storage._cdata] = storage
        return result


_OVERWRITE = {
    "copy_",
    "fill_",
    "zero_",
    "normal_",
    "uniform_",
    "random_",
    "index_put_",
    "index_copy_",
    "scatter_",
    "set_",
}


def _overwrites(func: Any, parameter: str) -> bool:
    """Whether the op's result does not depend on what the written argument held (where it writes at all)."""
    name = func._schema.name.partition("::")[2]
    return name in _OVERWRITE or parameter == "out" or parameter.startswith("out")


@dataclass
class Audit:
    """What one run wrote: argument or state name -> how (by, where); foreign: writes to tensors nobody handed in."""

    written: dict[str, Write] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    foreign: list[Write] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    result: Any = None


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """Mask over the bytes of the tensor's storage: True where the tensor has an element."""
    storage = tensor.untyped_storage()
    size = tensor.element_size()
    mask = torch.zeros(storage.nbytes(), dtype=torch.bool, device=tensor.device)
    if tensor.numel():
        shape, strides = (*tensor.shape, size), (*(stride * size for stride in tensor.stride()), 1)
        mask.as_strided(shape, strides, tensor.storage_offset() * size).fill_(True)
    return mask


def audit(
    run: Callable[[], Any], tensors: Mapping[str, torch.Tensor], may_write: set[str], watch: bool = True
) -> Audit:
    """Run once and tell what became of `tensors` (name -> tensor); names in `may_write` are judged element by element.

    watch False leaves the dispatch mode out (bytes and version counters only), for runs of which much else is known.
    Names that share a storage with one in `may_write` are only charged with bytes outside of that one's elements.
    """
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    storages = {name: tensor.untyped_storage() for name, tensor in plain.items()}
    names_of: dict[int, list[str]] = {}
    for name, storage in storages.items():
        names_of.setdefault(storage._cdata, []).append(name)
    before = {
        key: _bytes(plain[names[0]].untyped_storage(), plain[names[0]].device).clone()
        for key, names in names_of.items()
    }
    versions = {name: tensor._version for name, tensor in plain.items()}
    shapes = {name: (tensor.data_ptr(), tensor.size(), tensor.stride()) for name, tensor in plain.items()}
    leaves = {name: tensor.requires_grad for name, tensor in tensors.items()}
    found = Audit()
    mode = WriteMode(set(names_of), {storages[name]._cdata for name in may_write})
    with mode if watch else nullcontext():
        found.result = run()
    for name, tensor in tensors.items():
        now = tensor.detach()
        if (now.data_ptr(), now.size(), now.stride()) != shapes[name]:
            found.moved[name] = (
                f"{list(shapes[name][1])} became {list(now.size())}, or other memory: an argument must stay where it "
                "is and as large as it is (resize_, set_, t_, .data =)"
            )
        elif tensor.requires_grad != leaves[name]:
            found.moved[name] = f"requires_grad became {tensor.requires_grad}; work on x.detach()"
    for key, names in names_of.items():
        allowed = [name for name in names if name in may_write]
        seen = [write for write in mode.writes if write.storage == key]
        bumped = any(plain[name]._version != versions[name] for name in names)
        changed = _changed(before[key], plain[names[0]], storages[names[0]])
        if allowed:
            if seen or changed.any():
                for name in allowed:
                    found.written[name] = seen[0] if seen else Write(key, "the kernel", "seen in the values")
            whole = storages[names[0]].nbytes() == before[key].numel()  # else it was resized, which is told above
            for name in allowed:
                if whole and changed.any():
                    changed &= ~_elements(plain[name])
            if whole and changed.any():
                found.outside[", ".join(names)] = int(changed.sum())
        elif seen or bumped or changed.any():
            how = (
                seen[0]
                if seen
                else Write(key, "the kernel", "seen in the values" if changed.any() else "seen in its version counter")
            )
            found.written[names[0]] = how
        if mode.read & {key}:
            found.read.update(names)
    found.foreign = [write for write in mode.writes if write.storage not in names_of]
    return found


def _changed(before: torch.Tensor, tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    after = _bytes(storage, tensor.device)
    if after.numel() != before.numel():
        return torch.ones(before.numel(), dtype=torch.bool, device=tensor.device)
    return after != before
