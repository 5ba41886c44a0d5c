"""What holds for every test: which environment it is, and nothing of the caller's environment that changes results."""

import ast
import importlib.util
import os
import sys
from pathlib import Path

import pytest

# A developer's own settings must not choose kernels for the tests; tests that need one set it themselves.
for _name in [name for name in os.environ if name.startswith("OPREG_") and name != "OPREG_CACHE_DIR"]:
    del os.environ[_name]


def _imports_jax(path: Path) -> bool:
    """Whether a test file imports jax, or a Pallas kernel, at its top level."""
    for node in ast.parse(path.read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "jax" or name.startswith("opreg.kernels.pallas") for name in names):
            return True
    return False


# `python -m pytest` puts the checkout on sys.path, and its folder `kernels` then stands where other packages (such as
# transformers) look for the package of that name.
_HERE = Path(__file__).parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE.parent]

# Python 3.10 has no jax that opreg supports (0.7.1 and later need 3.11), so these files cannot run there at all.
_WITHOUT_JAX = [] if importlib.util.find_spec("jax") else [p for p in _HERE.rglob("test_*.py") if _imports_jax(p)]
collect_ignore = [str(path) for path in _WITHOUT_JAX]


def pytest_report_header(config: pytest.Config) -> list[str]:
    import torch

    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]
    if _WITHOUT_JAX:
        lines.append(f"no jax here, so left out: {', '.join(sorted(p.name for p in _WITHOUT_JAX))}")
    return lines
