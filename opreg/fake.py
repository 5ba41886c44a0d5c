"""The fake implementation of an op: explicit, from its contract, trivial where nothing is returned, or its body.

Also the contract check itself, used at trace time on symbolic sizes and in eager mode to word the error.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import digest, fusion, lowering, no_formula, sharding
from .errors import ContractError, RegistrationError
from .shapes import Binding, Mismatch
from .spec import ArgSpec, Like, OpSpec, ReturnSpec

if TYPE_CHECKING:
    from .op import Op

_log = logging.getLogger("opreg")

_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def show_tensor(value: Any) -> str:
    """'f32[4, 8]' of a tensor, 'None', or the repr of anything else."""
    if isinstance(value, torch.Tensor):
        dtype = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
        device = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{dtype}[{', '.join(str(size) for size in value.shape)}]{device}"
    return repr(value)


def bind(spec: OpSpec, args: Sequence[Any]) -> Binding:
    """Sizes of every name of the contract for a call with `args` (all, in order); ContractError says what differs."""
    integers = {
        arg.name: value
        for arg, value in zip(spec.args, args, strict=True)
        if arg.type in ("SymInt", "SymInt?") and isinstance(value, (int, torch.SymInt))
    }
    binding = Binding(integers)

    def check(condition: Any, cause: Callable[[], str]) -> None:
        # torch._check records the condition of a symbolic size; a condition known to be false raises here.
        if isinstance(condition, bool):
            if not condition:
                raise Mismatch(cause())
        else:
            torch._check(condition, lambda: _sentence(spec, args, cause()))

    try:
        for arg, value in zip(spec.args, args, strict=True):
            _bind_argument(arg, value, binding, check)
    except Mismatch as mismatch:
        raise ContractError(_sentence(spec, args, str(mismatch))) from None
    return binding


def _bind_argument(arg: ArgSpec, value: Any, binding: Binding, check: Callable[[Any, Callable[[], str]], None]) -> None:
    if arg.choices is not None and value is not None and value not in arg.choices:
        raise Mismatch(f"{arg.name} is {value!r}; it must be one of {', '.join(map(repr, arg.choices))}")
    if arg.length is not None and value is not None and len(value) != arg.length:
        raise Mismatch(f"{arg.name} has {len(value)} elements, {tuple(value)}; it must have {arg.length}")
    tensors = value if isinstance(value, (list, tuple)) else [value]
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            continue
        name = f"{arg.name}[{index}]" if tensors is value else arg.name
        if arg.dtype is not None and tensor.dtype != arg.dtype:
            raise Mismatch(f"{name} has dtype {tensor.dtype}; it must be {arg.dtype}; convert with .to({arg.dtype})")
        if arg.shape is not None:
            binding.bind(name, arg.shape, tensor.shape, check)


def _sentence(spec: OpSpec, args: Sequence[Any], cause: str) -> str:
    called = ", ".join(
        f"{arg.name}: {show_tensor(value)}{f' ({arg.shape.text!r})' if arg.shape is not None else ''}"
        for arg, value in zip(spec.args, args, strict=True)
        if isinstance(value, torch.Tensor) and not arg.layer
    )
    return f"{spec.name}: {cause}. Called with {called}"


def _from_contract(op: Op, args: Sequence[Any], binding: Binding) -> Any:
    first = next((t for s, a in zip(op.spec.args, args, strict=True) for t in _tensors(s, a)), None)
    if first is None:
        raise RegistrationError(
            f"{op.name}: no tensor argument gives the outputs' device and dtype; register a fake with register_fake"
        )
    by_name = {arg.name: value for arg, value in zip(op.spec.args, args, strict=True)}
    outputs = [_output(op, result, first, by_name, binding) for result in op.spec.returns]
    return tuple(outputs) if op.spec.returns_tuple else outputs[0]


def _tensors(arg: ArgSpec, value: Any) -> list[torch.Tensor]:
    """The tensors of an argument that may say what dtype and device the outputs have: never the layer's handle."""
    if arg.layer:
        return []
    return [t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, torch.Tensor)]


def _output(op: Op, result: ReturnSpec, first: torch.Tensor, by_name: dict[str, Any], binding: Binding) -> torch.Tensor:
    dtype, like = (None, first)
    if isinstance(result.dtype, Like):
        like = by_name[result.dtype.name]
        if like is None:
            raise ContractError(f"{op.name}: the output is like('{result.dtype.name}') but {result.dtype.name} is None")
    elif result.dtype is not None:
        dtype = result.dtype
    if result.shape is None:
        raise RegistrationError(f"{op.name}: an output has no contract")
    try:
        sizes = binding.output(result.shape)
    except KeyError as missing:
        raise ContractError(
            f"{op.name}: the output's dim {missing} comes from an optional argument that is None in this call"
        ) from None
    return torch.empty(sizes, dtype=dtype or like.dtype, device=like.device)


def fake_source(op: Op) -> str:
    """How the fake is made: "register_fake", "contract", "nothing returned" or "body"."""
    if op.explicit_fake is not None:
        return "register_fake"
    if not op.spec.returns:
        return "nothing returned"
    if all(result.shape is not None and result.type == "Tensor" for result in op.spec.returns):
        return "contract"
    return "body"


def _warn_of_mode(op: Op) -> None:
    """torch hands what an op that writes is given, by keyword, to functions with a parameter `mode` of their own."""
    if any(arg.name == "mode" for arg in op.spec.args) and any(arg.mutated for arg in op.spec.args):
        _log.warning(
            "%s: a parameter named 'mode', of an op that writes its arguments, makes torch.compile fail: "
            "\"multiple values for argument 'mode'\" (a clash of names inside AOTAutograd); rename it",
            op.name,
        )


_running_body = threading.local()


class Fake:
    """What torch is given as fake of an op: checks the contract, then makes the outputs. Looked up late, so that
    register_fake may come after the op was defined."""

    __slots__ = ("_gathered", "op")

    def __init__(self, op: Op) -> None:
        self.op = op
        self._gathered: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._gathered is None:
            self._gathered = self.op.gather(self._made)  # 30 us, paid by ops that are traced
        return self._gathered(*args, **kwargs)

    def _made(self, args: tuple[Any, ...]) -> Any:
        op = self.op
        op.traced = True
        lowering.install_if_inductor(op)
        fusion.install_if_inductor(op)
        sharding.install_if_distributed(op)
        digest.in_cache_key()
        no_formula.traced(op, args)
        _warn_of_mode(op)
        binding = bind(op.spec, args)
        source = fake_source(op)
        if source == "register_fake":
            if op.explicit_fake is None:
                raise RegistrationError(f"{op.name}: the registered fake vanished")
            return op.call_with(op.explicit_fake, args)
        if source == "nothing returned":
            return None
        if source == "contract":
            return _from_contract(op, args, binding)
        if not op.spec.has_body:
            raise RegistrationError(
                f"{op.name}: no fake: it has neither output contract nor body. Annotate the outputs, as in "
                "-> Annotated[Tensor, 't h'], or register one with register_fake"
            )
        if getattr(_running_body, "op", None) == op.name:
            raise RegistrationError(
                f"{op.name}: its body calls itself, so it cannot serve as the fake; use register_fake"
            )
        _running_body.op = op.name
        try:
            return op.call_with(op.body, args)
        finally:
            _running_body.op = None
