"""What is built and installed: everything of opreg, nothing else, under names that collide with nobody's."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = {"opreg": "opreg", "opreg.ops": "ops", "opreg.kernels": "kernels"}
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def packages_in_tree() -> set[str]:
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    return found


def files_in_tree() -> set[str]:
    """Paths, as installed, of every source file in the tree."""
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                found.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder)}")
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and a wheel made from that sdist, so that what the sdist lacks is missed."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, *map(str, built.glob("*.whl"))], check=True, capture_output=True, timeout=300)
    return target


def run(site: Path, *command: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, *command], cwd=site, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_packages_list_is_the_tree() -> None:
    assert set(SETTINGS["packages"]) == packages_in_tree()
    assert SETTINGS["package-dir"] == FOLDERS


def test_the_packages_list_is_sorted_and_has_no_doubles() -> None:
    assert SETTINGS["packages"] == sorted(set(SETTINGS["packages"]))


def test_the_wheel_holds_every_file_and_only_opreg(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"opreg", "opreg-0.1.0.dist-info"}
    assert {name for name in names if name.startswith("opreg/")} == files_in_tree()


def test_the_wheel_says_where_ops_and_backend_are(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        points = archive.read("opreg-0.1.0.dist-info/entry_points.txt").decode()
        metadata = archive.read("opreg-0.1.0.dist-info/METADATA").decode()
        assert "opreg-0.1.0.dist-info/licenses/LICENSE" in archive.namelist()
    for line in ("[opreg.ops]", "opreg = opreg.ops", "[torch_dynamo_backends]", "opreg = opreg.cli:main"):
        assert line in points.splitlines()
    assert "[torch.backends]" not in points  # it would run in every `import torch`
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.8", "Requires-Dist: typing-extensions>=4.12"]


def test_the_sdist_holds_the_sources_and_no_others(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if "/" in name}
    assert {name.split("/")[0] for name in names} == {
        *FOLDERS.values(),
        "opreg.egg-info",
        *("pyproject.toml", "setup.cfg", "PKG-INFO", "README.md", "LICENSE"),
    }
    folder = {package.replace(".", "/"): folder for package, folder in FOLDERS.items()}
    for path in files_in_tree():
        head = max((h for h in folder if path.startswith(f"{h}/")), key=len)
        assert f"{folder[head]}{path.removeprefix(head)}" in names


def test_an_installed_wheel_lists_its_ops(installed: Path) -> None:
    assert {path.name for path in installed.iterdir()} == {"opreg", "opreg-0.1.0.dist-info", "bin"}
    where, ops = run(installed, "-c", "import opreg, opreg.ops; print(opreg.__file__, opreg.ops.__file__)").split()
    assert Path(where).is_relative_to(installed)
    assert Path(ops).is_relative_to(installed)
    listed = json.loads(run(installed, "-m", "opreg", "list", "--json"))
    sources = {op["name"]: op["source"] for op in listed["ops"]}
    assert "opreg::rms_norm" in sources
    assert all(source.startswith(str(installed)) for source in sources.values())


@pytest.mark.parametrize("name", ["ops", "kernels"])
def test_ops_and_kernels_refuse_their_top_level_names(name: str) -> None:
    # The checkout is on sys.path here on purpose: these are names of other projects on the index.
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert f"ImportError: this package is opreg.{name}; install opreg and import it by that name" in done.stderr


def test_ops_and_kernels_are_not_importable_once_installed(installed: Path) -> None:
    probe = "from importlib.util import find_spec; print([n for n in ('ops', 'kernels') if find_spec(n)])"
    assert run(installed, "-I", "-c", f"import sys; sys.path.insert(0, {str(installed)!r}); {probe}").strip() == "[]"
