"""Inductor for one piece: past AOTAutograd's runtime wrapper wherever that wrapper would have nothing to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._guards import TracingContext
from torch.fx import GraphModule

from opreg.backend_symbols import sizes_named_by_order


@dataclass(frozen=True)
class Boxed:
    """A callable that takes one list of arguments, which it empties, instead of the arguments themselves."""

    boxed: Callable[[list[Any]], Sequence[Any]]

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self.boxed(list(args))


def compile_piece(
    gm: GraphModule, example_inputs: Sequence[Any], checked: bool, own_graphs: bool
) -> Callable[..., Any]:
    """Compile a piece with Inductor, in the current tracing context.

    checked: leave out the size checks on the piece's inputs, because all of them come from Dynamo, which guards on
        their sizes, or from other compiled pieces, whose sizes were proved when they were compiled. Measured on 32
        layers: 9 % of the forward.
    own_graphs: Inductor may record CUDA graphs of its own, as its configuration says."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    made: list[tuple[Any, int]] = []

    def inner(graph: GraphModule, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        with sizes_named_by_order(inputs):
            compiled = compile_fx_inner(graph, inputs, *args, **kwargs)
        made.append((compiled, len(inputs)))
        return compiled

    # AOTAutograd's cache would return its whole wrapper without calling `inner`; Inductor's own cache stays on, and
    # tracing a piece again costs 20 to 40 ms.
    patches = {"size_asserts": False} if checked and inductor_config.size_asserts else {}
    if not own_graphs:
        patches["triton.cudagraphs"] = False
    with functorch_config.patch(enable_autograd_cache=False), inductor_config.patch(patches):
        wrapped = cast(Callable[..., Any], compile_fx(gm, list(example_inputs), inner_compile=inner))
    if len(made) == 1 and made[0][1] == len(example_inputs) and _wrapper_is_idle(example_inputs):
        compiled = made[0][0]
        run = getattr(compiled, "current_callable", None)
        if run is not None:
            # Off the CPU the first call also closes the bundle of autotuned kernels, which is the object's part.
            on_cpu = all(v.device.type == "cpu" for v in example_inputs if isinstance(v, torch.Tensor))
            return Boxed(run if on_cpu else compiled)
    return wrapped


def _wrapper_is_idle(example_inputs: Sequence[Any]) -> bool:
    """Whether AOTAutograd's wrapper would only pass arguments on: no gradient, no mutation, no alias, no autocast."""
    context = TracingContext.try_get()
    facts = context.fw_metadata if context is not None else None
    if facts is None or torch._C._is_any_autocast_enabled():
        return False
    if torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in example_inputs):
        return False
    return (
        not any(i.mutates_data or i.mutates_metadata for i in facts.input_info)
        and facts.num_outputs_aliased == 0
        and facts.num_intermediate_bases == 0
        and not facts.tokens
        and facts.grad_enabled_mutation is None
        and not facts.is_rng_op_functionalized
        and len(facts.input_info) == len(example_inputs)
    )
