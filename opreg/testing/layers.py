"""Whether a layer op keeps to the layer that it is given: of the others it neither reads nor writes a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..context import current_context, layer_name
from ..op import Op
from .eager import Crashed, Refused, run
from .outcome import differ
from .samples import Call, layer_tensors


def check_other_layers(op: Op[Any, Any], fn: Callable[..., Any], call: Call) -> str | None:
    """What a call does with layers that it does not name, seen with NaN in all of their tensors."""
    if op.spec.layer_arg is None or torch.Tag.nondeterministic_seeded in op.spec.tags:
        return None
    handle = next(value for arg, value in zip(op.spec.args, call.args, strict=True) if arg.layer)
    name = handle if isinstance(handle, str) else layer_name(handle)
    context = current_context()
    layers = {} if context is None else context.layers
    own = {t.untyped_storage()._cdata for t in layer_tensors(name, layers[name]).values()}
    others = {
        path: tensor
        for other, layer in layers.items()
        if other != name
        for path, tensor in layer_tensors(other, layer).items()
        if tensor.is_floating_point() and tensor.untyped_storage()._cdata not in own
    }
    if not others:
        return None
    saved = {path: tensor.detach().clone() for path, tensor in others.items()}
    try:
        call = replace(call, state={path: tensor for path, tensor in call.state.items() if path not in others})
        expected = run(op, fn, call)
        with torch.no_grad():
            for tensor in others.values():
                tensor.fill_(float("nan"))
        actual = run(op, fn, call)
        written = [path for path, tensor in others.items() if not tensor.isnan().all()]
    except (Refused, Crashed):
        return None  # reported by the other checks
    finally:
        with torch.no_grad():
            for path, tensor in others.items():
                tensor.copy_(saved[path])
    if written:
        return f"called for layer '{name}' it writes {', '.join(written[:3])}; use the layer that current_layer returns"
    found = differ(expected, actual, 0.0)
    return None if found is None else f"called for layer '{name}' it depends on another layer's tensors: {found}"
