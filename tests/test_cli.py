"""opreg list, show and doctor: what they print, their JSON, their exit codes, and that --help is quick."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from opreg import cli, register_op, registry
from opreg.cli import table

OP_KEYS = ["name", "kind", "schema", "mutates", "devices", "kernels", "selected", "source"]
KERNEL_KEYS = ["name", "devices", "priority", "state", "why"]


@pytest.fixture(autouse=True, scope="module")
def acme():
    """A package's ops: one with kernels that cannot run here, one attention op."""

    @register_op("acme::stretch")
    def stretch(x: torch.Tensor, by: float) -> torch.Tensor:
        """Multiply by a number (Acme 2024, eq. 1)."""
        return x * by

    stretch.register_kernel("cpu", "acme.kernels.fast:stretch", requires="acme_fast_math", priority=5)
    stretch.register_kernel("xpu", "acme.kernels.xpu:stretch", requires="acme_xpu")
    stretch.register_kernel("cuda", "acme.kernels.tri:stretch", priority=3)

    @register_op("acme::attend", mutates_args=("out",), kind="attention")
    def attend(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x)

    yield
    for name in ("acme::stretch", "acme::attend"):
        registry.discard(registry.get(name))


def out_of(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert cli.main(argv) == code
    return capsys.readouterr().out


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_list_names_what_runs_and_why_no_better(capsys) -> None:
    text = out_of(capsys, "list")
    assert text.splitlines()[0].split() == ["OP", "KIND", "DEVICES", "HERE", "(cpu)", "NOTE"]
    stretch = line_of(text, "acme::stretch")
    assert stretch.split(maxsplit=7) == [
        *("acme::stretch", "-", "cpu", "cuda", "xpu", "any", "reference"),
        "fast/stretch needs acme_fast_math",
    ]
    assert line_of(text, "acme::attend").split() == ["acme::attend", "attention", "any", "reference"]
    assert f"opreg {cli.__version__}" in text.splitlines()[-1]
    assert f"torch {torch.__version__}, device cpu" in text.splitlines()[-1]


def test_list_is_sorted_and_aligned(capsys) -> None:
    head, *body = out_of(capsys, "list").splitlines()[:-1]
    names = [line.split()[0] for line in body]
    assert names == sorted(names)
    assert all(line[head.index("KIND") - 1] == " " != line[head.index("KIND")] for line in body)


def test_list_by_kind_and_names(capsys) -> None:
    names = out_of(capsys, "list", "--kind", "attention", "--names").split()
    assert "acme::attend" in names
    assert "opreg::gdn_attention_core" in names
    assert "acme::stretch" not in names
    assert names == [op.name for op in registry.all_ops() if op.spec.kind == "attention"]


def test_list_for_another_device(capsys) -> None:
    text = out_of(capsys, "list", "--device", "cuda")
    assert "ON cuda" in text.splitlines()[0]
    assert "tri/stretch" in line_of(text, "acme::stretch")


def test_list_json_has_the_fixed_keys(capsys) -> None:
    facts = json.loads(out_of(capsys, "list", "--json"))
    assert list(facts) == ["opreg", "torch", "schema_version", "ops"]
    assert (facts["opreg"], facts["torch"], facts["schema_version"]) == (cli.__version__, torch.__version__, 1)
    for op in facts["ops"]:
        assert list(op) == OP_KEYS
        assert all(list(kernel) == KERNEL_KEYS for kernel in op["kernels"])
    ops = {op["name"]: op for op in facts["ops"]}
    stretch = ops["acme::stretch"]
    assert stretch["schema"] == "(Tensor x, float by) -> Tensor"
    assert (stretch["kind"], stretch["mutates"], stretch["selected"]) == (None, [], "reference")
    assert stretch["devices"] == ["cpu", "cuda", "xpu", "any"]
    assert [(k["name"], k["priority"], k["state"], k["why"]) for k in stretch["kernels"]] == [
        ("fast/stretch", 5, "missing", "needs acme_fast_math"),
        ("tri/stretch", 3, "other device", ""),
        ("xpu/stretch", 0, "other device", "needs acme_xpu"),
        ("reference", -100, "used", ""),
    ]
    assert stretch["source"].startswith(__file__)
    assert (ops["acme::attend"]["kind"], ops["acme::attend"]["mutates"]) == ("attention", ["out"])


def test_show_json_is_the_op_in_the_same_shape(capsys) -> None:
    listed = {op["name"]: op for op in json.loads(out_of(capsys, "list", "--json"))["ops"]}
    assert json.loads(out_of(capsys, "show", "stretch", "--json"))["ops"] == [listed["acme::stretch"]]


def test_show_prints_contract_and_kernels(capsys) -> None:
    text = out_of(capsys, "show", "opreg::rms_norm")
    assert line_of(text, "opreg::rms_norm").endswith(registry.get("opreg::rms_norm").spec.source)
    assert "Root-mean-square norm over the last dimension" in text
    assert "(Tensor x, Tensor weight, float eps=1e-06) -> Tensor" in text
    assert line_of(text, "  x ").split() == ["x", "*n", "d"]
    assert line_of(text, "  ->").split() == ["->", "*n", "d", "dtype", "of", "x"]
    assert "fake: from the contract" in text
    assert "autograd: formula" in text
    assert "splits graphs: no" in text
    assert line_of(text, "  KERNEL").split() == ["KERNEL", "DEVICE", "PRIORITY", "STATE", "WHY"]
    assert line_of(text, "  cpu/rms_norm").split()[:5] == ["cpu/rms_norm", "cpu", "0", "used", "here"]
    assert line_of(text, "  reference").split() == ["reference", "any", "-100", "ready"]


def test_show_marks_what_is_written_and_what_names_a_layer(capsys) -> None:
    text = out_of(capsys, "show", "opreg::gdn_attention_core")
    assert line_of(text, "  z ").split(maxsplit=4) == ["z", "t", "hv", "v", "written in place"]
    assert "handle" in line_of(text, "  layer_name")
    assert "splits graphs: yes" in text


def test_show_doc_prints_the_whole_docstring(capsys) -> None:
    assert "Raises ContractError" not in out_of(capsys, "show", "opreg::rms_norm")
    assert "Raises ContractError" in out_of(capsys, "show", "opreg::rms_norm", "--doc")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("show", "rms_nrom"), "no op 'rms_nrom' is registered.*Did you mean 'opreg::rms_norm'?"),
        (("show", "opreg::stretch"), "no op 'opreg::stretch' is registered.*Did you mean 'acme::stretch'?"),
        (("list", "--device", "xpuu"), "--device: unknown device type 'xpuu'.*Did you mean 'xpu'?"),
        (("list", "--kind", "atention"), "--kind: no kind 'atention'; there is attention. Did you mean 'attention'?"),
    ],
)
def test_unknown_names_exit_2_with_the_nearest(capsys, argv, message) -> None:
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    start, _, end = message.partition(".*")
    assert shown.err.startswith(f"opreg: {start}")
    assert end in shown.err


def test_ambiguous_short_names_exit_2(capsys) -> None:
    @register_op("acme2::stretch")
    def stretch(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    assert cli.main(("show", "stretch")) == 2
    assert "'stretch' is ambiguous: acme::stretch, acme2::stretch" in capsys.readouterr().err
    registry.discard(stretch.op)


@pytest.mark.parametrize("argv", [(), ("lst",), ("show",), ("list", "--colour")])
def test_usage_errors_exit_2(capsys, argv) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: opreg" in capsys.readouterr().err


def test_a_forced_kernel_shows(capsys, monkeypatch) -> None:
    monkeypatch.setenv("OPREG_KERNELS", "opreg::rms_norm=reference")
    line = line_of(out_of(capsys, "list"), "opreg::rms_norm")
    assert line.split(maxsplit=6)[6].split(maxsplit=1) == ["reference", "forced by OPREG_KERNELS"]


@pytest.mark.parametrize(
    ("forced", "note"),
    [
        (
            "acme::stretch=fast/stretch",
            "OPREG_KERNELS forces fast/stretch, which cannot run here: needs acme_fast_math",
        ),
        (
            "acme::stretch=tri/stretch",
            "OPREG_KERNELS forces tri/stretch, which cannot run here: it is for cuda, not cpu",
        ),
        ("acme::stretch=refrence", "acme::stretch has no kernel 'refrence'"),
        ("acme::stretch", "OPREG_KERNELS: 'acme::stretch' is not of the form ns::op=kernel"),
        ("stretch=reference", "OPREG_KERNELS: 'stretch=reference' is not of the form ns::op=kernel"),
    ],
)
def test_a_forced_kernel_that_cannot_run_fails_list_and_show(capsys, monkeypatch, forced, note) -> None:
    monkeypatch.setenv("OPREG_KERNELS", forced)
    assert note in line_of(out_of(capsys, "list", code=1), "acme::stretch")
    assert note in out_of(capsys, "show", "acme::stretch", code=1)


def test_doctor_finds_nothing_wrong_here(capsys) -> None:
    text = out_of(capsys, "doctor")
    assert line_of(text, "torch ").split()[1:3] == [torch.__version__, "supported"]
    assert re.search(r"opreg +\d+ ops +\(opreg 0\.1\.0\)", line_of(text, "plug-ins"))
    assert line_of(text, "acme_fast_math").split(maxsplit=3)[1:] == ["not", "installed", "off: fast/stretch"]
    assert "no problems" in text


@pytest.mark.parametrize(
    ("forced", "problem"),
    [
        ("opreg::rms_nrom=reference", "Did you mean 'opreg::rms_norm'?"),
        ("opreg::rms_norm=cpu/rms_nrm", "Did you mean 'cpu/rms_norm'?"),
        ("rms_norm", "'rms_norm' is not of the form ns::op=kernel"),
    ],
)
def test_doctor_finds_a_wrong_override(capsys, monkeypatch, forced, problem) -> None:
    monkeypatch.setenv("OPREG_KERNELS", forced)
    text = out_of(capsys, "doctor", code=1)
    assert "1 problem:" in text
    assert problem in text
    assert f"OPREG_KERNELS={forced}" in text


def test_doctor_json_embeds_what_an_issue_needs(capsys, monkeypatch) -> None:
    # torch's own collector runs pip and lscpu, seconds that this test need not take.
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "PyTorch version: x")
    facts = json.loads(out_of(capsys, "doctor", "--json"))
    assert list(facts) == [
        *("opreg", "torch", "schema_version", "python", "platform", "devices", "compiler", "guard"),
        *("packages", "plugins", "environment", "problems", "remarks", "collect_env"),
    ]
    assert facts["collect_env"] == "PyTorch version: x"
    assert "cpu" in facts["devices"]
    assert {"name": "opreg", "module": "opreg.ops"}.items() <= facts["plugins"][0].items()
    assert facts["problems"] == []


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "opreg", *argv],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_imports_no_torch() -> None:
    done = run("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert "list" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "opreg.cli.list" in imported
    assert not {"torch", "jax", "numpy"} & imported


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m opreg list | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("OP ")


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(("--version",))
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"opreg {cli.__version__}\n"


class _Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("no_color", "terminal", "coloured"),
    [(None, True, True), ("1", True, False), ("", True, True), (None, False, False)],
)
def test_colour_only_on_a_terminal_and_without_no_color(monkeypatch, no_color, terminal, coloured) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    if terminal:
        monkeypatch.setattr(sys, "stdout", _Terminal())
    assert table.coloured() is coloured
    assert ("\x1b[" in table.paint("used here", "good")) is coloured


def test_columns_start_at_one_place() -> None:
    assert table.lines(("A", "B"), [("xx", "1"), ("y", "")]) == ["A    B", "xx   1", "y"]
