"""Frozen facts about an op and its kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from .facts import Fact
from .requires import lacking
from .shapes import Shape

KINDS = ("attention",)
"""What `kind=` may say. Graphs are split at "attention" ops."""

STARTS = ("written", "tail", "zeros", "state")
"""What `mutates_args={"out": ...}` may say of an argument before the kernel runs: "written": undefined, and the kernel
writes all of it; "tail": the same up to row num_actual_tokens, from where on the framework writes zeros; "zeros": the
framework has zeroed it; "state": what earlier calls left, and the kernel may leave any of it alone."""

REFERENCE = "reference"
"""Name of the kernel that defines an op's meaning: its body, or the kernel registered for every device at -100."""

REFERENCE_PRIORITY = -100


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


class Like(Fact):
    """Output metadata: 'dtype and device of this argument'. Made by `like("q")`."""

    name: str


def like(name: str) -> Like:
    """For an output, `Annotated[Tensor, "t h", like("q")]`: dtype and device follow `q`, not the first tensor."""
    return Like(name)


class ArgSpec(Fact):
    """One parameter: schema type ("Tensor", "Tensor?", "SymInt", ...), contract and role."""

    name: str
    type: str
    shape: Shape | None = None
    dtype: torch.dtype | None = None
    default: Any = REQUIRED
    keyword_only: bool = False
    mutated: bool = False
    start: str | None = None
    layer: bool = False
    choices: tuple[Any, ...] | None = None
    as_tuple: bool = False  # a list to torch, a tuple to the body and the kernels
    length: int | None = None  # of such a tuple, where it is fixed

    @property
    def is_tensor(self) -> bool:
        """A single tensor (possibly optional) that is not a layer handle."""
        return self.type in ("Tensor", "Tensor?") and not self.layer

    @property
    def optional(self) -> bool:
        return self.type.endswith("?")

    @property
    def is_list(self) -> bool:
        """A list or tuple to torch: "Tensor[]", "SymInt[2]?"."""
        return self.type.rstrip("?").endswith("]")


class ReturnSpec(Fact):
    """One returned value; `shape` None means that no contract was given."""

    type: str
    shape: Shape | None = None
    dtype: torch.dtype | Like | None = None
    name: str = ""


class KernelSpec(Fact, apart=("source",)):
    """One way to compute an op. device_types None: every device. target: callable or "module:function"."""

    name: str
    device_types: tuple[str, ...] | None
    target: str | Callable[..., Any]
    requires: tuple[str, ...] = ()
    why_not: str | Callable[..., str | None] | None = None
    priority: int = 0
    source: str = ""

    def takes(self, device_type: str) -> bool:
        return self.device_types is None or device_type in self.device_types

    @property
    def devices(self) -> str:
        return "any" if self.device_types is None else " ".join(self.device_types)

    def missing(self) -> str | None:
        """'needs triton' for a required module that is not installed, or too old; looked up, never imported."""
        absent = [reason for requirement in self.requires if (reason := lacking(requirement)) is not None]
        return f"needs {', '.join(absent)}" if absent else None


def kernel_name(target: str | Callable[..., Any]) -> str:
    """'xpu/fused' of "pkg.kernels.xpu.gdn:fused": the folder below `kernels` (or the module) and the function."""
    module, function = target.split(":") if isinstance(target, str) else (target.__module__, target.__name__)
    parts = module.split(".")
    folder = parts[parts.index("kernels") + 1] if "kernels" in parts[:-1] else parts[-1]
    return f"{folder}/{function}"


def same_kernel(known: KernelSpec, new: KernelSpec) -> bool:
    def place(target: Any) -> Any:
        return (target.__module__, target.__qualname__) if callable(target) else target

    same = (known.device_types, known.requires, known.priority) == (new.device_types, new.requires, new.priority)
    return same and place(known.target) == place(new.target) and place(known.why_not) == place(new.why_not)


class Fusion(Fact):
    """Where Inductor may see through an op (device types; None: every one), and with what priority among kernels."""

    device_types: tuple[str, ...] | None
    priority: int


class OpSpec(Fact):
    """What an op is: name, parameters, returns, schema, kind, tags, where it was declared."""

    name: str
    args: tuple[ArgSpec, ...]
    returns: tuple[ReturnSpec, ...]
    returns_tuple: bool
    schema: str
    kind: str | None
    tags: tuple[torch.Tag, ...]
    doc: str
    source: str
    has_body: bool
    named: type | None = None  # the NamedTuple class that holds the results

    @property
    def namespace(self) -> str:
        return self.name.partition("::")[0]

    @property
    def mutates(self) -> tuple[str, ...]:
        """Names of the tensors that callers hand in to be written; the layer's handle is none of them."""
        return tuple([arg.name for arg in self.args if arg.mutated and not arg.layer])

    @property
    def keeps_state(self) -> bool:
        """Whether the op writes its layer's state: to compilers it then writes the layer's handle, a graph input. So a
        call whose outputs nobody reads stays, and two calls for one layer keep their order (HAZARDS 6)."""
        return any(arg.layer and arg.mutated for arg in self.args)

    @property
    def layer_arg(self) -> ArgSpec | None:
        for arg in self.args:
            if arg.layer:
                return arg
        return None

    @property
    def first_tensor(self) -> ArgSpec | None:
        """The argument whose device chooses the kernel: the first tensor that is always there."""
        return next((arg for arg in self.args if arg.is_tensor and not arg.optional), None)

    @property
    def has_contract(self) -> bool:
        return any(arg.shape is not None or arg.dtype is not None for arg in self.args)

    @property
    def summary(self) -> str:
        """First sentence of the docstring."""
        return self.doc.strip().split("\n", 1)[0].strip()

    def digest(self, fake_source: str = "") -> str:
        """Hash of what a compiled graph may rely on: schema, contract, kind, tags and where the fake comes from."""
        facts = [
            self.name,
            self.schema,
            str(self.kind),
            *sorted(str(tag) for tag in self.tags),
            *(f"{a.name}:{a.shape}:{a.dtype}:{a.layer}:{a.choices}" for a in self.args),
            *(f"->{r.type}:{r.shape}:{r.dtype}" for r in self.returns),
            fake_source,
        ]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
