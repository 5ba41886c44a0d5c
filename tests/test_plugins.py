"""A third party's package: its ops appear by one line of metadata, and a broken one hides nothing."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import pytest

PACKAGES = {
    "acme_ops": """
        from typing import Annotated

        from torch import Tensor

        from opreg import register_op

        print("a package that talks when it is imported")


        @register_op("acme::twice", kind="attention", mutates_args=("out",))
        def twice(x: Annotated[Tensor, "*n"], out: Annotated[Tensor, "*n"]) -> None:
            out.copy_(x * 2)


        twice.register_kernel("cpu", "acme_ops_kernels:twice", requires="acme_rt", priority=1)
    """,
    "acme_broken": """
        from torch import Tensor

        from opreg import register_op


        @register_op("acme::before_the_error")
        def before_the_error(x: Tensor) -> Tensor:
            return x + 1


        import acme_rt
    """,
    "acme_double": """
        from torch import Tensor

        from opreg import register_op


        @register_op("opreg::rms_norm")
        def rms_norm(x: Tensor) -> Tensor:
            return x + 1
    """,
    "acme_quits": "raise SystemExit('acme needs a licence')",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which pip has installed every package of PACKAGES."""
    target, sources = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("sources")
    for name, code in PACKAGES.items():
        folder = sources / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(dedent(code))
        (folder / "pyproject.toml").write_text(
            dedent(f"""
                [build-system]
                requires = ["setuptools"]
                build-backend = "setuptools.build_meta"

                [project]
                name = "{name.replace("_", "-")}"
                version = "1.2.3"

                [project.entry-points."opreg.ops"]
                {name} = "{name}"

                [tool.setuptools]
                py-modules = ["{name}"]
            """)
        )
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    folders = [str(sources / name) for name in PACKAGES]
    subprocess.run([*pip, "--target", str(target), *folders], check=True, capture_output=True, timeout=300)
    return target


def opreg(site: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "opreg", *argv],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_list_shows_the_ops_of_a_third_party_and_reports_broken_packages(site: Path) -> None:
    done = opreg(site, "list", "--json")
    assert done.returncode == 0
    ops = {op["name"]: op for op in json.loads(done.stdout)["ops"]}
    assert ops["acme::twice"]["kind"] == "attention"
    assert ops["acme::twice"]["source"] == f"{site / 'acme_ops.py'}:11"
    assert ops["acme::twice"]["selected"] == "reference"
    assert ops["acme::twice"]["kernels"][0]["why"] == "needs acme_rt"
    assert "opreg::rms_norm" in ops
    assert "(Tensor x, Tensor weight, float eps" in ops["opreg::rms_norm"]["schema"]
    assert "acme::before_the_error" in ops
    remarks = done.stderr.splitlines()
    assert (
        "opreg: op package 'acme_broken' could not be loaded: ModuleNotFoundError: No module named 'acme_rt'" in remarks
    )
    assert "opreg: op package 'acme_quits' could not be loaded: SystemExit: acme needs a licence" in remarks
    assert any("'acme_double' could not be loaded: DuplicateOpError: opreg::rms_norm is already" in r for r in remarks)


def test_list_counts_the_packages(site: Path) -> None:
    last = opreg(site, "list").stdout.splitlines()[-1]
    assert "from 3 packages (opreg 0.1.0, acme-broken 1.2.3, acme-ops 1.2.3)" in last


def test_doctor_names_the_broken_packages_and_fails(site: Path) -> None:
    done = opreg(site, "doctor")
    assert done.returncode == 1
    assert "3 problems:" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["acme_ops", "1", "ops", "(acme-ops", "1.2.3)"] in lines
    assert ["acme_quits", *"FAILED: SystemExit: acme needs a licence (acme-quits 1.2.3)".split()] in lines


def test_verbose_shows_where_a_package_broke(site: Path) -> None:
    done = opreg(site, "list", "--names", "--verbose")
    assert "acme::twice" in done.stdout.split()
    assert f'File "{site / "acme_broken.py"}", line 12' in done.stderr


def test_pytest_collects_conformance_tests_of_an_installed_package(site: Path, tmp_path: Path) -> None:
    """A third party writes no test: its own test command, with one option, checks its ops."""
    plugin = "import opreg.pytest_plugin as p, pytest, sys; sys.exit(pytest.main(sys.argv[1:], plugins=PLUGINS))"
    named = any(point.value == "opreg.pytest_plugin" for point in entry_points(group="pytest11"))
    done = subprocess.run(
        [
            *(sys.executable, "-c", plugin.replace("PLUGINS", "[]" if named else "[p]")),
            *("-v", "-p", "no:cacheprovider", "--opreg-op", "acme::twice", str(tmp_path)),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()

    def outcome(start: str) -> str:
        (line,) = [line for line in lines if line.startswith(f"::opreg::{start} ")]
        return line.partition(f"{start} ")[2].split()[0]

    assert outcome("acme::twice[checks]") == "PASSED", done.stdout + done.stderr
    assert outcome("acme::twice[kernel reference-input 0]") == "PASSED"
    assert outcome("acme::twice[kernel acme_ops_kernels/twice-input 0]") == "SKIPPED"
    assert outcome("package acme_broken") == "FAILED"
    assert "the package cannot be imported: ModuleNotFoundError: No module named 'acme_rt'" in done.stdout
    assert done.returncode == 1
