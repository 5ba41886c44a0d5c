"""What a JAX program returns for given inputs, without running it: jax.eval_shape, symbolic where torch's sizes are.

torch's symbolic sizes become jax.export's and come back as expressions of torch's, so that one graph serves many sizes.
Where a JAX function asks what only a number can answer, the sizes become numbers (a new graph for each), and the log
says why.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .errors import KernelError
from .jax_bridge_arrays import WIDE, runtime, torch_dtype
from .jax_bridge_cache import log, symbolically
from .jax_bridge_programs import Program


@dataclass(frozen=True)
class Signature:
    """The results of a program: the pytree, and each leaf's sizes (integers, or text in symbols) and torch dtype."""

    tree: Any
    leaves: tuple[tuple[tuple[int | str, ...], torch.dtype], ...]


def x64(dtypes: Sequence[torch.dtype]) -> Any:
    """The context in which jax keeps 64-bit types, where one is among the inputs; otherwise jax as the user set it."""
    return runtime().enable_x64(True) if any(dtype in WIDE for dtype in dtypes) else nullcontext()


def signature(
    program: Program, inputs: Sequence[tuple[tuple[Any, ...], torch.dtype]], bounds: tuple[str, ...] = ()
) -> Signature:
    """The results for inputs of these sizes (integers, or jax's symbolic dimensions within `bounds`) and dtypes."""
    run = runtime()
    described = tuple((tuple(map(str, shape)), dtype) for shape, dtype in inputs)
    key = (described, bounds, bool(run.jax.config.jax_enable_x64))
    known = program.signatures.get(key)
    if known is None:
        symbolic = any(not isinstance(size, int) for shape, _ in inputs for size in shape)
        with x64([dtype for _, dtype in inputs]):
            arguments = [run.jax.ShapeDtypeStruct(shape, run.to_numpy_dtype[dtype]) for shape, dtype in inputs]
            if symbolic:
                out = symbolically(lambda: run.jax.eval_shape(program.body, *arguments))
            else:
                out = program.compiled().eval_shape(*arguments)  # shares the trace with the call that follows
        known = program.signatures[key] = _signature(program, out)
    found: Signature = known
    return found


def _signature(program: Program, out: Any) -> Signature:
    leaves, tree = runtime().flatten(out)
    label = program.function.label
    described = tuple(
        (tuple(s if isinstance(s, int) else str(s) for s in leaf.shape), torch_dtype(leaf.dtype, label))
        for leaf in leaves
    )
    return Signature(tree, described)


def infer(program: Program, tensors: Sequence[torch.Tensor]) -> tuple[Signature, dict[str, Any]]:
    """The signature for tensors, which may be fake, and the values of the symbols in its sizes."""
    inputs = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    if all(type(size) is int for shape, _ in inputs for size in shape):
        return signature(program, inputs), {}
    symbols = _Symbols(inputs)
    try:
        return signature(program, symbols.inputs(), tuple(symbols.bounds)), symbols.values
    except (TypeError, ValueError, runtime().inconclusive) as reason:
        log.info("call_jax(%s): sizes become numbers, one graph each: %s", program.function.label, reason)
        return signature(program, [(_numbers(program, shape, reason), dtype) for shape, dtype in inputs]), {}


def symbolic_inputs(program: Program, tensors: Sequence[torch.Tensor]) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """Sizes in jax's symbols and dtypes of tensors for which `infer` found that symbols will do; else numbers."""
    inputs = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    # `infer` has turned sizes that must be numbers into numbers, so what is still symbolic may stay so.
    return _Symbols(inputs).inputs()


def _numbers(program: Program, shape: tuple[Any, ...], reason: Exception) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in shape)
    except torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode as unknown:
        raise KernelError(
            f"call_jax({program.function.label}): the sizes of the results cannot be expressed in the sizes of the "
            f"arguments, one of which is known only when the graph runs ({unknown}). JAX said: {reason}"
        ) from reason


class _Symbols:
    """Names for torch's symbolic sizes, one per distinct expression, and the bounds that torch knows of them."""

    def __init__(self, inputs: Sequence[tuple[tuple[Any, ...], torch.dtype]]) -> None:
        self.values: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.bounds: list[str] = []
        self._texts = [([self.text(size) for size in shape], dtype) for shape, dtype in inputs]

    def text(self, size: int | torch.SymInt) -> str:
        if isinstance(size, int):
            return str(size)
        fixed = size.node.maybe_as_int()
        if fixed is not None:
            return str(fixed)
        expression = str(size.node.expr)
        name = self.names.get(expression)
        if name is None:
            name = self.names[expression] = f"d{len(self.names)}"
            self.values[name] = size
            # torch takes a symbolic size to be at least 2 unless told otherwise; jax takes at least 1 for granted.
            bounds = size.node.shape_env.bound_sympy(size.node.expr) if size.node.shape_env is not None else None
            if bounds is not None and bounds.lower.is_finite and bounds.lower > 1:
                self.bounds.append(f"{name} >= {int(bounds.lower)}")
            if bounds is not None and bounds.upper.is_finite and bounds.upper < 2**31:
                self.bounds.append(f"{name} <= {int(bounds.upper)}")
        return name

    def inputs(self) -> list[tuple[tuple[Any, ...], torch.dtype]]:
        """The inputs with jax's symbolic dimensions, all of one scope."""
        export = runtime().export
        scope = export.SymbolicScope(self.bounds)
        every = iter(export.symbolic_shape(", ".join(t for sizes, _ in self._texts for t in sizes) + ",", scope=scope))
        return [(tuple(next(every) for _ in sizes), dtype) for sizes, dtype in self._texts]


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "max": torch.sym_max,
    "min": torch.sym_min,
}


def evaluate(size: int | str, values: dict[str, Any]) -> Any:
    """A size written by jax ('2*d0 + 1', 'floordiv(d0, 2)') as a torch size, from the values of the symbols."""
    if isinstance(size, int):
        return size
    # jax writes powers as d0^2, which python would read as exclusive or, with another precedence.
    return _evaluate(ast.parse(size.replace("^", "**"), mode="eval").body, values)


def _evaluate(node: ast.expr, values: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        return _CALLS[node.func.id](*(_evaluate(argument, values) for argument in node.args))
    raise KernelError(f"jax gave a size that opreg cannot read: {ast.unparse(node)}; please report it")
