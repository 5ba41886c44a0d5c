"""The README's code runs as printed, and its tables say what the command says."""

import re
import subprocess
import sys
from pathlib import Path

import opreg.ops  # noqa: F401 - registers the shipped ops

from opreg import cli, registry
from opreg.cli.facts import device_types

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def table(header: str) -> list[list[str]]:
    """Rows of the table whose header line starts with `header`."""
    rows = README.split(f"\n{header}", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_twenty_lines_run(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert 15 <= sum(bool(line.strip()) for line in code.splitlines()) <= 20
    # From a file: torch reads the source of what it compiles, and the contract's error names the file.
    (tmp_path / "scale.py").write_text(code)
    done = subprocess.run([sys.executable, "scale.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "tensor([6., 6., 6.])" in done.stdout
    assert "mylib::scale_rows on cpu: scale/by_einsum" in done.stdout.replace("__main__", "scale")
    line = next(line for line in done.stdout.splitlines() if line.startswith("mylib::scale_rows   "))
    assert line.split()[:4] == ["mylib::scale_rows", "-", "cpu", "any"]
    assert "opreg::rms_norm" in done.stdout


def test_the_page_on_running_models_is_true(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "running.md").read_text(), re.DOTALL)
    (tmp_path / "running.py").write_text(code)
    done = subprocess.run([sys.executable, "running.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    marked, graphs, refused = done.stdout.splitlines()
    assert (marked, graphs) == ("True", "1")
    assert refused.startswith("inside no_recompiles(): torch.compile met a call that needs a new graph")


def test_the_table_of_shipped_ops_is_what_list_shows() -> None:
    shown = [row[:3] for row in table("| op | kind |")]
    ops = [
        op for op in registry.all_ops() if op.name.startswith("opreg::") and op.body.__module__.startswith("opreg.ops")
    ]
    assert shown == [[f"`{op.name}`", op.spec.kind or "-", " ".join(device_types(op))] for op in ops]


def test_the_table_of_commands_is_the_command(capsys) -> None:
    shown = {row[0].strip("`").split()[1] for row in table("| command |")}
    assert shown == {module.__name__.rpartition(".")[2] for module in cli.COMMANDS}


def test_files_that_are_named_exist() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"\]\(([\w./]+)\)|(?:^|\s)(tests/test_\w+\.py)", text):
        assert (ROOT / (name[0] or name[1])).exists(), name
    for target in re.findall(r"`make (\w+)`|^make (\w+)", text, re.MULTILINE):
        assert f"\n{target[0] or target[1]}:" in (ROOT / "Makefile").read_text()
