"""How Inductor's Python wrapper calls an op: the kernel's function itself instead of `torch.ops.ns.op.default(...)`.

The dispatcher's argument conversions cost 2 us per call inside a compiled graph, ten times the call itself. Sizes,
dtypes and devices were checked when the graph was traced and are guarded since, so the call needs neither dispatch nor
contract check. Nothing else changes: the layout constraint of the op's tags holds. Under cpp_wrapper, which cannot call
a function, an operator of its own is called, which does nothing but that. Installed when a fake runs with Inductor
loaded, so that importing opreg imports no Inductor.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import alias, library, registry

if TYPE_CHECKING:
    from .op import Op

_installed: set[torch._ops.OpOverload] = set()


def compiled_call(name: str) -> Callable[..., Any]:
    """What a compiled graph calls for the op `name`; generated modules bind it once, also when loaded from a cache."""
    call: Callable[..., Any] = registry.get(name).calls.compiled
    return call


def compiled_operator(name: str, on_cpu: bool) -> torch._ops.OpOverload:
    """The operator that C++ calls for the op `name` in a compiled graph: the op without contract check, formula or
    fake. Generated modules define it when they are loaded, also from a cache.

    on_cpu: the graph has tensors on the CPU; its kernel is made ready."""
    op = registry.get(name)
    namespace, _, rest = op.name.partition("::")
    qualname = f"opreg_compiled_{namespace}::{rest}"
    if not library.is_defined(qualname):
        text = str(op.overload._schema)
        library.define(qualname, text[text.index("(") :], tuple(op.overload.tags))
        library.implement(qualname, op.calls.compiled)
    if on_cpu and op.spec.first_tensor is not None and not library.is_implemented(qualname, "CPU"):
        library.implement(qualname, op.calls.compiled_on_cpu.function, "CPU")
    return library.overload(qualname)


def install_if_inductor(op: Op[..., Any]) -> None:
    """Give Inductor the direct call of `op`, once, if Inductor is loaded at all."""
    if op.overload not in _installed:
        symbol = "_opreg_" + op.name.replace("::", "_")
        lines = (
            "from opreg.lowering import compiled_call as _opreg_compiled_call",
            f"{symbol} = _opreg_compiled_call({op.name!r})",
        )
        install(op.overload, symbol, lines, functools.partial(alias.separate, op), op.name)


def install(
    overload: torch._ops.OpOverload,
    symbol: str,
    lines: tuple[str, ...],
    prepare: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    name: str | None = None,
) -> None:
    """Make Inductor's Python wrapper call `symbol`, which `lines` of the generated module define, for the op; once.

    prepare: (args, kwargs) -> (args, kwargs), applied while the graph is lowered. name: of the opreg op whose
    `compiled_operator` C++ calls; None: it calls the overload.
    """
    if overload in _installed or "torch._inductor.lowering" not in sys.modules:
        return
    _installed.add(overload)
    from torch._inductor import config, ir, lowering
    from torch._inductor.virtualized import V
    from torch._library.utils import get_layout_constraint_tag

    if overload in lowering.lowerings:
        return  # someone registered a lowering of their own for it
    # What Inductor does for an op without lowering: inputs realized, laid out as the tags (or torch's default) demand.
    tag = get_layout_constraint_tag(overload, with_default=True)
    lowering.make_fallback(overload, layout_constraint=lowering.tag_to_layout_constraint(tag), warn=False)

    class DirectKernel(ir.FallbackKernel):
        """A fallback kernel whose wrapper line names the op's Python function, or the operator that calls it."""

        def codegen(self, wrapper: Any) -> None:
            if not V.graph.cpp_wrapper:
                for line in lines:
                    wrapper.add_import_once(line)
                self.python_kernel_name = symbol
            elif name is not None and not V.graph.aot_mode:
                # A package made ahead of time is run without this module, and without opreg's operators.
                wrapper.add_import_once("from opreg.lowering import compiled_operator as _opreg_compiled_operator")
                on_cpu = "cpu" in V.graph.device_types
                wrapper.add_import_once(f"_opreg_compiled_operator({name!r}, {on_cpu})")
                self.op_overload = compiled_operator(name, on_cpu)
                self.python_kernel_name = f"torch.ops.{self.op_overload}"
            super().codegen(wrapper)

    class DirectOutput(ir.MultiOutput):
        """A result, whose sizes and strides are compared before Inductor's check is called."""

        def codegen_size_asserts(self, wrapper: Any) -> None:
            sizes = self.get_size()
            if V.graph.cpp_wrapper or not config.size_asserts or any(size == 0 for size in sizes):
                super().codegen_size_asserts(wrapper)
                return
            # The same check at half the price, which is the larger part of a call; Inductor's is asked for its error.
            size = V.graph.wrapper_code.codegen_shape_tuple(sizes)
            stride = V.graph.wrapper_code.codegen_shape_tuple(self.get_stride())
            name = self.get_name()
            wrapper.writeline(
                f"if {name}.shape != {size} or {name}.stride() != {stride}: "
                f"assert_size_stride({name}, {size}, {stride}, {self.get_op_name()!r})"
            )

    fallback = lowering.fallback_handler(overload)

    def lower(*args: Any, **kwargs: Any) -> Any:
        if prepare is not None:
            args, kwargs = prepare(args, kwargs)
        first = len(V.graph.operations)
        result = fallback(*args, **kwargs)
        for operation in V.graph.operations[first:]:
            if type(operation) is ir.FallbackKernel and operation.op_overload is overload:
                operation.__class__ = DirectKernel
            elif type(operation) is ir.MultiOutput:
                operation.__class__ = DirectOutput
        return result

    # The mark by which Inductor knows that a lowering is a plain call.
    lower._is_fallback_handler = True  # type: ignore[attr-defined]
    lowering.register_lowering(overload, type_promotion_kind=None)(lower)
