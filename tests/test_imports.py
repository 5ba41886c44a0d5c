"""Who may import whom: the rules that keep listing an op free of vendors and the folders free of cycles."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "jax", "jaxlib", "numpy", "triton", "torch_xla", "transformers"}


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    probe = f"import sys; {code}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=300)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code", ["import opreg", "import opreg.cli", "import opreg; dir(opreg)", "import opreg.errors"]
)
def test_importing_opreg_loads_nothing_heavy(code: str) -> None:
    assert not HEAVY & modules_after(code)


def test_the_probe_sees_what_is_imported() -> None:
    assert "torch" in modules_after("import opreg; opreg.register_op")


def test_declaring_the_shipped_ops_loads_no_vendor_and_no_compiler() -> None:
    # What torch loads by itself (with some packages beside it) is none of our doing.
    probe = (
        "import sys, torch; before = set(sys.modules); import opreg.ops; new = set(sys.modules) - before; "
        "print(*sorted(m for m in new if m.startswith(('torch._dynamo', 'torch._inductor')) or m.partition('.')[0] in "
        "('jax', 'triton', 'torch_xla', 'intel_extension_for_pytorch', 'numpy')), len(new))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=300)
    *found, new = done.stdout.split()
    assert found == []
    assert int(new) > 10


def test_importing_opreg_costs_a_hundredth_of_importing_torch(tmp_path: Path) -> None:
    """The budget is 10 ms of CPU on a machine where torch takes 1.4 s; imported again, so that no file is compiled."""
    probe = (
        "import sys, time; sys.dont_write_bytecode = False; a = time.process_time(); import torch\n"
        "torch_seconds, least = time.process_time() - a, 1e9\n"
        "for _ in range(5):\n"
        "    for name in [m for m in sys.modules if m.partition('.')[0] == 'opreg']: del sys.modules[name]\n"
        "    a = time.process_time(); from opreg import register_op\n"
        "    least = min(least, time.process_time() - a)\n"
        "print(least / torch_seconds, any(m.startswith(('torch._dynamo', 'torch._inductor')) for m in sys.modules))"
    )
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, env=environment)
    ratio, compilers = done.stdout.split()
    assert float(ratio) < 0.015
    assert compilers == "False"


def imports(source: str, inside_functions: bool = True) -> set[str]:
    """Absolute and relative modules that a source imports; optionally only those of the module's own level.

    Imports under `if TYPE_CHECKING:` never run and are left out.
    """
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not inside_functions:
            continue
        todo += ast.iter_child_nodes(node)
    return found


def names(source: str) -> set[str]:
    """Every dotted name that a source reads, such as 'torch.library.define'."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}


def top(module: str) -> str:
    return module.partition(".")[0]


def forbidden_in_framework(source: str, file: str) -> set[str]:
    """opreg/*: no ops, no kernels, no vendor; jax only inside functions of jax_bridge*.py."""
    everywhere, at_top = imports(source), imports(source, inside_functions=False)
    bad = {
        m for m in everywhere if m.startswith(("opreg.ops", "opreg.kernels", ".ops", ".kernels", "..ops", "..kernels"))
    }
    bad |= {m for m in everywhere if top(m) in ("triton", "torch_xla", "intel_extension_for_pytorch", "transformers")}
    bad |= {m for m in everywhere if top(m) == "jax" and not Path(file).name.startswith("jax_bridge")}
    return bad | {m for m in at_top if top(m) in ("jax", "numpy")}


def forbidden_in_ops(source: str, file: str) -> set[str]:
    """ops/*: the standard library, torch, `from opreg import ...` and each other."""
    allowed = {*sys.stdlib_module_names, "torch", "opreg"}
    return {
        m
        for m in imports(source)
        if (m.startswith("..") or not m.startswith(".")) and (top(m) not in allowed or "opreg." in m)
    }


def forbidden_in_kernels(source: str, file: str) -> set[str]:
    """kernels/*: anything but opreg, which a relative import that leaves the folder would be, too."""
    depth = len(Path(file).parts)
    return {m for m in imports(source) if top(m) == "opreg" or len(m) - len(m.lstrip(".")) >= depth}


RULES = {"opreg": forbidden_in_framework, "ops": forbidden_in_ops, "kernels": forbidden_in_kernels}


def files(folder: str) -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield str(path.relative_to(ROOT)), path.read_text()


@pytest.mark.parametrize("folder", RULES)
def test_imports_of(folder: str) -> None:
    found = {file: bad for file, source in files(folder) if (bad := RULES[folder](source, file))}
    assert not found


@pytest.mark.parametrize(
    ("folder", "file", "source", "bad"),
    [
        ("opreg", "opreg/select.py", "from opreg.ops import rms_norm", {"opreg.ops"}),
        ("opreg", "opreg/select.py", "def f():\n    from .kernels.cpu import gdn", {".kernels.cpu"}),
        ("opreg", "opreg/devices.py", "def f():\n    import jax", {"jax"}),
        ("opreg", "opreg/jax_bridge.py", "import jax.numpy", {"jax.numpy"}),
        ("opreg", "opreg/jax_bridge.py", "def f():\n    import jax", set()),
        ("opreg", "opreg/jax_bridge.py", "if TYPE_CHECKING:\n    import jax", set()),
        ("opreg", "opreg/devices.py", "def f():\n    import torch_xla", {"torch_xla"}),
        ("ops", "ops/a.py", "from opreg.registry import get", {"opreg.registry"}),
        ("ops", "ops/a.py", "def f():\n    import triton", {"triton"}),
        ("ops", "ops/a.py", "from ..kernels import cpu", {"..kernels"}),
        ("ops", "ops/a.py", "from opreg import register_op\nfrom .b import c\nimport math, torch.nn", set()),
        ("kernels", "kernels/cpu/a.py", "def f():\n    import opreg", {"opreg"}),
        ("kernels", "kernels/cpu/a.py", "from ...select import explain", {"...select"}),
        ("kernels", "kernels/cpu/a.py", "from ..reference import gdn\nimport triton", set()),
    ],
)
def test_the_rules_find_what_they_forbid(folder: str, file: str, source: str, bad: set[str]) -> None:
    assert RULES[folder](source, file) == bad


def calls_torch_library(source: str) -> bool:
    imported = any(m.startswith("torch.library") for m in imports(source))
    return imported or any(name.startswith("torch.library.") for name in names(source))


def test_only_library_py_calls_torch_library() -> None:
    found = {file for folder in RULES for file, source in files(folder) if calls_torch_library(source)}
    assert found == {"opreg/library.py"}


def asks_for_a_version(source: str) -> bool:
    return any(name.endswith(("torch.__version__", "torch.version", "torch_version")) for name in names(source)) or any(
        m == "torch.torch_version" for m in imports(source)
    )


def test_only_compat_py_asks_for_torch_s_version() -> None:
    # The command line prints the version, which decides nothing.
    asked = {file for folder in RULES for file, source in files(folder) if asks_for_a_version(source)}
    assert {file for file in asked if not file.startswith("opreg/cli/")} == {"opreg/_compat.py"}


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (calls_torch_library, "import torch\ntorch.library.register_fake('a::b', f)"),
        (calls_torch_library, "from torch.library import Library"),
        (asks_for_a_version, "import torch\nif torch.__version__ < '2.9': pass"),
    ],
)
def test_these_rules_find_what_they_forbid(check, source: str) -> None:
    assert check(source)
    assert not check("import torch\ntorch.ops.a.b(torch.zeros(1))")


def test_every_public_name_is_importable_and_typed() -> None:
    import opreg

    assert all(getattr(opreg, name) is not None for name in opreg.__all__)
    # `import opreg` is lazy; type checkers read the other branch, so both must name the same things.
    tree = ast.parse((ROOT / "opreg" / "__init__.py").read_text())
    typed = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.If)
        for line in node.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert typed == set(opreg.__all__) - {"__version__"}
