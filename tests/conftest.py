"""What holds for every test: which environment it is, and nothing of the caller's environment that changes results."""

import ast
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

# A developer's own settings must not choose kernels for the tests; tests that need one set it themselves.
for _name in [name for name in os.environ if name.startswith("OPREG_") and name != "OPREG_CACHE_DIR"]:
    del os.environ[_name]


def _top_level_imports(path: Path) -> set[str]:
    """Packages that a test file imports at its top level; a Pallas kernel stands for jax, which it imports."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    return {"jax" if name.startswith("opreg.kernels.pallas") else name.partition(".")[0] for name in names}


# `python -m pytest` puts the checkout on sys.path, and its folder `kernels` then stands where other packages (such as
# transformers) look for the package of that name.
_HERE = Path(__file__).parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE.parent]

# Python 3.10 has no jax that opreg supports (0.7.1 and later need 3.11), and lanes with an older torch have not every
# package. Files that import what is absent are left out there, and named in the header. In the main environment an
# absent package is an error.
_MAY_LACK = sys.version_info < (3, 11) or not version("torch").startswith("2.13.")
_ABSENT = {name for name in ("jax", "transformers") if _MAY_LACK and not importlib.util.find_spec(name)}
_LEFT_OUT = [path for path in _HERE.rglob("test_*.py") if _ABSENT and _ABSENT & _top_level_imports(path)]
collect_ignore = [str(path) for path in _LEFT_OUT]


def pytest_report_header(config: pytest.Config) -> list[str]:
    import torch

    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]
    if _LEFT_OUT:
        lines.append(
            f"no {' and no '.join(sorted(_ABSENT))} here: {', '.join(sorted(p.name for p in _LEFT_OUT))} left out"
        )
    return lines


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """No compiled code of an earlier test. torch 2.8 also crashes without it: when a function that one test compiled is
    compiled by another, Dynamo compares the new backend with one that has been freed."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture(autouse=True, scope="module")
def no_collection_inside_a_test() -> Iterator[None]:
    """torch 2.9 and earlier lose attributes of fake tensors that only C++ holds when a garbage collection falls into
    AOTAutograd's tracing (see opreg._compat.around_opcheck), so rubbish is collected between files there."""
    if not version("torch").startswith(("2.8.", "2.9.")):
        yield
        return
    gc.disable()
    yield
    gc.enable()
    gc.collect()
