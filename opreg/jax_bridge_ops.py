"""JAX functions as named operators: register_jax_op makes an op of one, from_jax makes a kernel of one for an op."""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Union

import torch

from .errors import DuplicateOpError, KernelError, SignatureError
from .jax_bridge_arrays import runtime
from .jax_bridge_executors import execute
from .jax_bridge_export import call_carried, let_carry
from .jax_bridge_op import OP, gradients, tangents, vmap
from .jax_bridge_programs import Program, find_function, find_program
from .jax_bridge_shapes import evaluate, infer
from .op import register_op
from .op_function import OpFunction

DEVICES = ("cpu", "cuda", "xla", "tpu")
"""Device types for which jax_bridge_executors has an executor; a kernel made from a JAX function serves all of them."""


class JaxKernel:
    """A JAX function with the calling convention of a kernel: torch tensors in and out, written arguments updated.

    Callable with the op's arguments. The function is imported and jax is started at the first call.
    """

    def __init__(self, target: str | Callable[..., Any], mutates_args: tuple[str, ...]) -> None:
        if isinstance(target, str) and (target.count(":") != 1 or not all(target.split(":"))):
            raise SignatureError(f"from_jax: target '{target}' is not of the form 'package.module:function'")
        self.target = target
        self.mutates_args = mutates_args
        module, name = target.split(":") if isinstance(target, str) else (target.__module__, target.__name__)
        self.__module__, self.__name__, self.__qualname__ = module, name, name
        if not isinstance(target, str):
            self.__wrapped__ = target  # the contract digest reads the function behind the fake and the gradients

    @functools.cached_property
    def fn(self) -> Callable[..., Any]:
        """The JAX function."""
        if not isinstance(self.target, str):
            return self.target
        runtime()
        module, _, name = self.target.partition(":")
        try:
            found: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise KernelError(f"from_jax('{self.target}'): importing '{module}' failed: {error}") from error
        if found is None:
            raise KernelError(f"from_jax('{self.target}'): module '{module}' has no '{name}'")
        return found

    @property
    def __signature__(self) -> inspect.Signature:
        # Registration compares signatures; a function named by a string must not be imported for that.
        if isinstance(self.target, str) and "fn" not in self.__dict__:
            raise ValueError("not imported yet")
        return inspect.signature(self.fn)

    @functools.cached_property
    def _binding(self) -> inspect.Signature:
        """The function's signature, found to have every argument that it writes."""
        signature = inspect.signature(self.fn)
        unknown = [name for name in self.mutates_args if name not in signature.parameters]
        if unknown:
            raise SignatureError(
                f"from_jax({self.__name__}): mutates_args names {unknown}, but it takes {list(signature.parameters)}"
            )
        return signature

    def program(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Program, list[torch.Tensor], Any]:
        """The program, the tensors and the pytree of arguments."""
        leaves, treedef = runtime().flatten((tuple(args), dict(kwargs)))
        function = find_function(self.fn)
        program, tensors = find_program(function, treedef, leaves)
        return program, tensors, treedef

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        program, tensors, _ = self.program(args, kwargs)
        if not self.mutates_args:
            results, tree = execute(program, tensors)
            return tree.unflatten(results)
        old = self._written(args, kwargs)
        written = tuple(i for i, tensor in enumerate(tensors) if any(tensor is argument for argument in old))
        results, tree = execute(program, tensors, written)
        return self._write_back(old, tree.unflatten(results))

    def carried(self, *args: Any, **kwargs: Any) -> Any:
        """The same call for a graph that leaves the process: the operator in it carries the function."""
        program, tensors, _ = self.program(args, kwargs)
        results = call_carried(program, tensors)
        return self._write_back(self._written(args, kwargs), results) if self.mutates_args else results

    def _written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        bound = self._binding.bind(*args, **kwargs)
        return [bound.arguments[name] for name in self.mutates_args]

    def _write_back(self, arguments: list[torch.Tensor], results: Any) -> Any:
        """Copy the new values of written arguments, which the function returns first, into the arguments."""
        values = results if isinstance(results, tuple) else (results,)
        if len(values) < len(arguments):
            raise KernelError(
                f"{self.__name__}: a JAX function that stands for an op writing {', '.join(self.mutates_args)} returns "
                f"the new values of these first, then the op's results; it returned {len(values)} values"
            )
        for name, old, new in zip(self.mutates_args, arguments, values, strict=False):
            if old.shape != new.shape or old.dtype != new.dtype:
                raise KernelError(
                    f"{self.__name__}: the new value of '{name}' is {new.dtype} {list(new.shape)}, but the argument is "
                    f"{old.dtype} {list(old.shape)}; return the whole updated array"
                )
            old.copy_(new)
        rest = values[len(arguments) :]
        return None if not rest else rest[0] if len(rest) == 1 else rest


def from_jax(target: str | Callable[..., Any], *, mutates_args: str | Iterable[str] = ()) -> JaxKernel:
    """A kernel, for register_kernel, that runs a JAX function through the bridge.

    target: a JAX function with the op's parameters in the op's order, or "module:function", imported at first use (add
        requires="jax" to register_kernel). Arrays arrive as JAX arrays, other arguments as static Python values.
    mutates_args: the op's mutated arguments that the function updates. It returns their new values first, in this
        order, then the op's results.

        op.register_kernel(("cpu", "cuda"), from_jax("mylib.jax_kernels:rms_norm"), requires="jax")
    """
    names = (mutates_args,) if isinstance(mutates_args, str) else tuple(mutates_args)
    return JaxKernel(target, names)


def register_jax_op(
    name: str | None = None,
    /,
    *,
    mutates_args: str | Iterable[str] = (),
    example: Sequence[Any] | None = None,
    kind: str | None = None,
) -> Callable[[Callable[..., Any]], OpFunction[..., Any]]:
    """Turn a JAX function into a torch operator with fake, gradients and batching rule.

    name: "namespace::name", as for register_op.
    mutates_args: names of array parameters that the op writes. The function returns their new values first, in this
        order, then the results; the annotation of the return covers the results only.
    example: example arguments, for a function without annotations; the schema is inferred from them and from what the
        function returns for them.
    kind: as for register_op.

    Annotations are jax.Array (Annotated[jax.Array, "t h"] for a contract), list[jax.Array], jax.Array | None, int,
    float, bool, str, Literal; arrays are operands, everything else is static. The fake is jax.eval_shape.

    Raises SignatureError, RegistrationError, DuplicateOpError.

        @opreg.register_jax_op("mylib::scale")
        def scale(x: jax.Array, factor: float = 2.0) -> jax.Array:
            return x * factor
    """
    names = (mutates_args,) if isinstance(mutates_args, str) else tuple(mutates_args)
    return lambda fn: _register(name, fn, names, example, kind)


def _register(
    name: str | None,
    fn: Callable[..., Any],
    mutates_args: tuple[str, ...],
    example: Sequence[Any] | None,
    kind: str | None,
) -> OpFunction[..., Any]:
    hints = _hints(fn) if example is None else _example_hints(fn, example, len(mutates_args))
    function = register_op(name or _default_name(fn), mutates_args=mutates_args, kind=kind)(_declaration(fn, hints))
    op = function.op
    known = next((k.target for k in op.kernels if isinstance(k.target, JaxKernel)), None)
    if known is not None:
        if getattr(known.fn, "__code__", known.fn) == getattr(fn, "__code__", fn):
            return function
        raise DuplicateOpError(
            f"{op.name} is already registered for the JAX function {known.__module__}.{known.__name__}"
        )
    kernel = JaxKernel(fn, mutates_args)
    op.register_kernel(DEVICES, kernel, requires="jax")
    let_carry(op, kernel)
    if mutates_args:
        op.register_fake(op.gather(lambda args: op.call_with(functools.partial(_fake_results, kernel), args)))
        return function
    op.register_fake(op.gather(lambda args: op.call_with(functools.partial(_fake, kernel), args)))
    backward, setup = _formula(kernel, any(arg.keyword_only for arg in op.spec.args))
    op.jvp = tangents
    op.register_autograd(backward, setup_context=setup)
    op.register_vmap(op_vmap(op, kernel))
    return function


def _default_name(fn: Callable[..., Any]) -> str:
    return f"{fn.__module__.split('.')[0].strip('_') or 'main'}::{fn.__name__}"


def _hints(fn: Callable[..., Any]) -> dict[str, Any]:
    """The function's annotations with JAX's array types replaced by torch's."""
    cells = inspect.getclosurevars(fn).nonlocals if getattr(fn, "__closure__", None) else {}
    found = typing.get_type_hints(fn, localns=dict(cells) or None, include_extras=True)
    for parameter in (*inspect.signature(fn).parameters, "return"):
        if parameter not in found:
            what = "the return value" if parameter == "return" else f"parameter '{parameter}'"
            raise SignatureError(
                f"register_jax_op: {what} of {fn.__name__} has no annotation; write jax.Array (or its type), or pass "
                "example=(arguments, ...)"
            )
    return {parameter: _translate(hint) for parameter, hint in found.items()}


def _translate(hint: Any) -> Any:
    jax = runtime().jax
    if hint is jax.Array or hint is jax.typing.ArrayLike:
        return torch.Tensor
    if isinstance(hint, type) and all(hasattr(hint, a) for a in ("dim_str", "array_type", "dtypes")):
        shaped: Any = hint
        return Annotated[_translate(shaped.array_type), shaped.dim_str]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return Annotated.__class_getitem__((_translate(args[0]), *args[1:]))
    if origin in (Union, types.UnionType):
        return functools.reduce(lambda a, b: Union[a, b], [_translate(arg) for arg in args])
    if origin in (list, collections.abc.Sequence):
        return list[_translate(args[0])]  # type: ignore[misc]
    if origin is tuple:
        return tuple[tuple(arg if arg is ... else _translate(arg) for arg in args)]  # type: ignore[misc]
    return hint


def _example_hints(fn: Callable[..., Any], example: Sequence[Any], written: int) -> dict[str, Any]:
    run = runtime()
    parameters = list(inspect.signature(fn).parameters)
    if len(example) != len(parameters):
        raise SignatureError(
            f"register_jax_op: {fn.__name__} has {len(parameters)} parameters ({', '.join(parameters)}) and the "
            f"example {len(example)} arguments; give one for each"
        )

    def is_array(value: Any) -> bool:
        return hasattr(value, "shape") and hasattr(value, "dtype")

    def kind(value: Any) -> Any:
        if is_array(value):
            return torch.Tensor
        if isinstance(value, (list, tuple)) and value:
            return list[kind(value[0])]  # type: ignore[misc]
        return type(value)

    def as_struct(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return run.jax.ShapeDtypeStruct(tuple(value.shape), run.to_numpy_dtype[value.dtype])
        return value

    leaves, tree = run.flatten(tuple(example))
    arrays = [as_struct(leaf) for leaf in leaves if is_array(leaf)]

    def call(*operands: Any) -> Any:
        given = iter(operands)
        return fn(*tree.unflatten([next(given) if is_array(leaf) else leaf for leaf in leaves]))

    out = run.jax.eval_shape(call, *arrays)
    values = out if isinstance(out, tuple) else () if out is None else (out,)
    values = values[written:]
    returns = None if not values else torch.Tensor if len(values) == 1 else tuple[(torch.Tensor,) * len(values)]  # type: ignore[misc]
    return {**{p: kind(v) for p, v in zip(parameters, example, strict=True)}, "return": returns}


def _declaration(fn: Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    """A function without body that register_op can read: the JAX function's parameters, torch's types."""
    parameters = inspect.signature(fn).parameters.values()
    bare = [p.replace(annotation=p.empty, default=p.empty) for p in parameters]
    namespace: dict[str, Any] = {}
    source = f"def {fn.__name__}{inspect.Signature(bare)}:\n    ...\n"
    exec(compile(source, f"<opreg {fn.__name__}>", "exec"), namespace)
    made: Any = namespace[fn.__name__]
    made.__code__ = made.__code__.replace(
        co_filename=fn.__code__.co_filename, co_firstlineno=fn.__code__.co_firstlineno
    )
    made.__module__, made.__qualname__, made.__doc__ = fn.__module__, fn.__qualname__, fn.__doc__
    made.__defaults__, made.__kwdefaults__ = fn.__defaults__, fn.__kwdefaults__
    made.__annotations__ = hints
    return typing.cast(Callable[..., Any], made)


def _fake(kernel: JaxKernel, *args: Any, **kwargs: Any) -> Any:
    program, tensors, _ = kernel.program(args, kwargs)
    program.function.pin()
    found, values = infer(program, tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    outputs = [
        torch.empty([evaluate(size, values) for size in sizes], dtype=dtype, device=device)
        for sizes, dtype in found.leaves
    ]
    return found.tree.unflatten(outputs)


def _fake_results(kernel: JaxKernel, *args: Any, **kwargs: Any) -> Any:
    """The fake of an op that writes arguments: its results without the new values of these."""
    values = _fake(kernel, *args, **kwargs)
    rest = (values if isinstance(values, tuple) else (values,))[len(kernel.mutates_args) :]
    return None if not rest else rest[0] if len(rest) == 1 else rest


def _formula(kernel: JaxKernel, keyword_only: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(backward, setup_context) of an op with a JAX kernel: the vjp of its program, through opreg::jax_call."""

    def remember(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        program, tensors, treedef = kernel.program(args, kwargs)
        ctx.save_for_backward(*tensors)
        ctx.program, ctx.treedef = program, treedef
        leaves = runtime().flatten((args, kwargs))[0]
        ctx.kept = [isinstance(a, (list, tuple)) and all(isinstance(x, torch.Tensor) for x in a) for a in args]
        ctx.kept = [k or isinstance(a, torch.Tensor) for k, a in zip(ctx.kept, args, strict=True)]
        ctx.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        remember(ctx, inputs, {})

    def setup_with_keywords(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        remember(ctx, inputs, keyword_only_inputs)

    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        needed = [tensor.requires_grad for tensor in ctx.saved_tensors]
        found = gradients(ctx, needed, grads, lambda tensors, name: OP(tensors, name))
        placed: list[Any] = [None] * ctx.treedef.num_leaves
        for place, grad in zip(ctx.places, found, strict=True):
            placed[place] = grad
        # torch hands over every argument but wants gradients only for those that were passed.
        args = ctx.treedef.unflatten(placed)[0][: len(ctx.needs_input_grad)]
        args = tuple(arg if kept else None for arg, kept in zip(args, ctx.kept, strict=False))
        return args if len(args) != 1 else args[0]

    return backward, setup_with_keywords if keyword_only else setup


def op_vmap(op: Any, kernel: JaxKernel) -> Callable[..., Any]:
    """The batching rule of an op with a JAX kernel: jax.vmap of its program, through opreg::jax_call."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        program, tensors, _ = kernel.program(args, kwargs)
        dims = []
        args = (*args, *kwargs.values())
        for arg, dim in zip(args, in_dims, strict=True):
            many = arg if isinstance(arg, (list, tuple)) else [arg]
            each = dim if isinstance(dim, (list, tuple)) else [dim] * len(many)
            dims += [d for value, d in zip(many, each, strict=True) if isinstance(value, torch.Tensor)]
        found = OP(tensors, vmap(program, tuple(dims)).name)
        if op.spec.returns_tuple:
            return tuple(found), (0,) * len(found)
        return found[0], 0

    return rule
