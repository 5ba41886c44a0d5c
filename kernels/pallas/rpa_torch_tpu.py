"""The paged-attention ops on torch_tpu 0.2, whose torch.tpu.pallas.jax_op makes an operator of a JAX function.

jax_op refuses arrays that are keyword-only, knows no argument that is written, and leaves donated arguments invalid; so
the functions go to it with positional parameters, and a donated cache gets its new content back.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from . import rpa_xla

NAMESPACE = "opreg_torch_tpu"


class TorchTpuKernel:
    """A JAX function behind jax_op, with the parameters of the op; registered with torch_tpu at the first call.

    written: the parameter whose new value the function returns first, or None.
    """

    def __init__(self, fn: Callable[..., Any], written: str | None = None) -> None:
        self.fn = fn
        self.written = written
        self.__name__ = fn.__name__
        self.__signature__ = inspect.signature(fn)

    @functools.cached_property
    def op(self) -> Callable[..., Any]:
        """torch_tpu's operator."""
        importlib.import_module("torch_tpu")  # which adds torch.tpu
        jax_op = importlib.import_module("torch.tpu.pallas").jax_op
        donated = None if self.written is None else (list(self.__signature__.parameters).index(self.written),)
        made: Callable[..., Any] = jax_op(f"{NAMESPACE}::{self.__name__}", positional(self.fn), donate_argnums=donated)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        results = self.op(*map(narrow, bound.arguments.values()))
        if self.written is None:
            return results
        new, *rest = results if isinstance(results, tuple) else (results,)
        bound.arguments[self.written].copy_(new)
        return rest[0] if rest else None


def narrow(value: Any) -> Any:
    """64-bit slots in 32 bits, which is all that jax takes outside its x64 mode."""
    return value.int() if str(getattr(value, "dtype", None)) == "torch.int64" else value


def positional(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with its keyword-only parameters made positional, in the same order."""
    signature = inspect.signature(fn)
    parameters = list(signature.parameters.values())
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    def call(*args: Any) -> Any:
        split = len(parameters) - len(keywords)
        return fn(*args[:split], **dict(zip(keywords, args[split:], strict=True)))

    call.__name__ = fn.__name__
    changed: Any = call
    changed.__signature__ = signature.replace(parameters=[p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in parameters])
    return call


torch_tpu_rpa = TorchTpuKernel(rpa_xla.rpa)
torch_tpu_rpa_lse = TorchTpuKernel(rpa_xla.rpa_lse)
torch_tpu_rpa_update = TorchTpuKernel(rpa_xla.rpa_update, written="kv_pages")
torch_tpu_kv_cache_update = TorchTpuKernel(rpa_xla.kv_cache_update, written="kv_pages")
