"""opreg: register custom operators for torch.compile. Public names only, each imported at first use (PEP 562).

`import opreg` imports neither torch nor jax, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .context import LayerName as LayerName
    from .context import current_layer as current_layer
    from .context import forward_context as forward_context
    from .errors import ContextError as ContextError
    from .errors import ContractError as ContractError
    from .errors import DuplicateOpError as DuplicateOpError
    from .errors import KernelError as KernelError
    from .errors import OpregError as OpregError
    from .errors import RegistrationError as RegistrationError
    from .errors import SignatureError as SignatureError
    from .errors import UnknownOpError as UnknownOpError
    from .graph import split_graph as split_graph
    from .graph import splitting_ops as splitting_ops
    from .jax_bridge import call_jax as call_jax
    from .jax_bridge import from_jax as from_jax
    from .jax_bridge import jax_cache_clear as jax_cache_clear
    from .jax_bridge import jax_cache_info as jax_cache_info
    from .jax_bridge import jax_cache_limits as jax_cache_limits
    from .jax_bridge import jax_decompositions as jax_decompositions
    from .jax_bridge import register_jax_op as register_jax_op
    from .op import register_op as register_op
    from .recompiles import RecompileError as RecompileError
    from .recompiles import compiled_graphs as compiled_graphs
    from .recompiles import no_recompiles as no_recompiles
    from .select import use_kernel as use_kernel
    from .spec import like as like

_HOME = {
    "LayerName": "context",
    "current_layer": "context",
    "forward_context": "context",
    "ContextError": "errors",
    "ContractError": "errors",
    "DuplicateOpError": "errors",
    "KernelError": "errors",
    "OpregError": "errors",
    "RegistrationError": "errors",
    "SignatureError": "errors",
    "UnknownOpError": "errors",
    "split_graph": "graph",
    "splitting_ops": "graph",
    "call_jax": "jax_bridge",
    "from_jax": "jax_bridge",
    "jax_cache_clear": "jax_bridge",
    "jax_cache_info": "jax_bridge",
    "jax_cache_limits": "jax_bridge",
    "jax_decompositions": "jax_bridge",
    "register_jax_op": "jax_bridge",
    "register_op": "op",
    "RecompileError": "recompiles",
    "compiled_graphs": "recompiles",
    "no_recompiles": "recompiles",
    "use_kernel": "select",
    "like": "spec",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in ("backend", "profile", "transfer"):
        # torch.compile(backend=opreg.backend) reads naturally, and `import opreg.backend` gives the same module.
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'opreg' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
