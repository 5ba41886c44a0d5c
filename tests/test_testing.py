"""The report of a check, its command line and its pytest plug-in."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor

from opreg import register_op
from opreg.cli import main
from opreg.errors import UnknownOpError
from opreg.testing import Report, check_op, summary
from opreg.testing.compare import difference
from opreg.testing.outcome import Outcome, differ

pytest_plugins = ["pytester"]


@register_op("t_testing::doubled")
def doubled(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
    """Twice x."""
    return x * 2


@register_op("t_testing::wrong")
def wrong(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
    """Twice x, and x becomes absolute."""
    return x.abs_() * 2


@wrong.register_kernel("cpu", requires="no_such_module_here")
def absent(x: Tensor) -> Tensor:
    return x * 2


@register_op("t_testing::for_xpu", device_types="xpu")
def for_xpu(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
    """Twice x, on another device."""
    return x * 2


def test_a_right_op_is_ok_with_every_compiler() -> None:
    report = check_op(doubled)
    assert report.ok, str(report)
    assert {"contract", "opcheck", "writes", "fake", "compile", "kernel reference"} <= {
        line.check for line in report.lines
    }
    assert str(report).endswith(summary([report]))


def test_a_wrong_op_names_argument_line_and_command() -> None:
    report = check_op("t_testing::wrong", compilers=False)
    assert not report.ok
    line = next(line for line in report.failed if line.check == "writes")
    assert "writes x (aten.abs_.default, test_testing.py:" in line.detail
    assert "x.abs_()" in line.detail
    command = f"opreg check t_testing::wrong --import {__name__} --device cpu --input 0 --seed 0"
    assert line.reproduce == command  # no installed package registers it
    skipped = next(line for line in report.lines if line.check.startswith("kernel") and line.state == "skipped")
    assert skipped.detail == "needs no_such_module_here"


def test_unknown_op_and_kernel() -> None:
    with pytest.raises(UnknownOpError, match="Did you mean 't_testing::doubled'"):
        check_op("t_testing::doubld")
    with pytest.raises(UnknownOpError, match="has no kernel 'fast'; it has reference"):
        check_op(doubled, kernel="fast")
    with pytest.raises(UnknownOpError, match="takes what register_op returned"):
        check_op(lambda x: x)


def test_nothing_ran_is_neither_ok_nor_failed() -> None:
    report = Report("ns::op", "xpu")
    report.add("inputs", "skipped", "no kernel can run on xpu")
    assert (report.ok, report.ran, report.failed) == (False, False, [])


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "kv_cache_update", "--input", "0", "--kernel", "reference", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("opreg::kv_cache_update  cpu  1 input\n")
    assert main(["check", "t_testing::wrong", "--json", "--device", "cpu"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1
    assert found["ops"][0]["name"] == "t_testing::wrong"
    assert not found["ops"][0]["ok"]
    assert {"check", "state", "detail", "reproduce"} == set(found["ops"][0]["checks"][0])
    assert main(["check", "t_testing::doubld"]) == 2
    assert "Did you mean" in capsys.readouterr().err
    assert main(["check", "--import", "no_such_module_here"]) == 2
    assert "cannot import 'no_such_module_here'" in capsys.readouterr().err
    # Only for another device: nothing could be run here, which is neither fine nor a failure.
    assert main(["check", "t_testing::for_xpu", "--device", "cpu"]) == 5
    assert "no kernel can run on cpu" in capsys.readouterr().out


BROKEN_KERNEL = """
import torch
from typing import Annotated
from torch import Tensor
from opreg import register_op

@register_op("t_again::soft")
def soft(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
    return x.softmax(-1)

@soft.register_kernel("cpu")
def fast(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :4] = x[:, :4].softmax(-1)
    return y
"""


def test_the_printed_command_shows_the_same_finding_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_soft.py").write_text(BROKEN_KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("broken_soft")
    (line,) = check_op("t_again::soft", seed=3, compilers=False).failed
    assert line.check == "kernel broken_soft/fast"
    words = line.reproduce.split()
    assert words[0] == "opreg"
    done = subprocess.run(
        [sys.executable, "-m", *words, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    (again,) = [one for one in json.loads(done.stdout)["ops"][0]["checks"] if one["state"] == "FAILED"]
    # Without the count of what other inputs show.
    assert (again["check"], again["detail"].split(" (and ")[0]) == (line.check, line.detail.split(" (and ")[0])


PLUGIN = """
import torch
from typing import Annotated
from torch import Tensor
from opreg import register_op

@register_op("t_plugin::right")
def right(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
    return x * 2

@right.register_kernel("cpu", why_not=lambda x: "large" if x.shape[0] > 100 else None)
def ragged(x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] != 8 else x * 3

@right.register_kernel("xpu")
def elsewhere(x: Tensor) -> Tensor:
    return x * 2

@register_op("t_plugin::wrong")
def wrong(x: Annotated[Tensor, "t d"]) -> Annotated[Tensor, "t d"]:
    return x.mul_(2).clone()

def test_of_their_own():
    pass
"""


def test_the_pytest_plugin(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine=PLUGIN)
    plugin = [] if _installed() else ["-p", "opreg.pytest_plugin"]
    result = pytester.runpytest_subprocess(
        *plugin, "-p", "no:cacheprovider", "--opreg-op", "t_plugin::right", "--opreg-op", "t_plugin::wrong", "-v"
    )
    result.stdout.fnmatch_lines(
        [
            "*t_plugin::right*checks* PASSED*",
            "*t_plugin::right*kernel test_mine/ragged-input 0* PASSED*",
            "*t_plugin::right*kernel test_mine/ragged-input 1* FAILED*",
            "*t_plugin::right*kernel test_mine/ragged-input 2* SKIPPED*",
            "*t_plugin::right*kernel test_mine/elsewhere-input 0* SKIPPED*",
            "*t_plugin::right*kernel reference-input 0* PASSED*",
            "*t_plugin::wrong*checks* FAILED*",
            "*reproduce: opreg check t_plugin::right*--kernel test_mine/ragged --input 1*",
            "*writes x (aten.mul_.Tensor*",
            "*reproduce: opreg check t_plugin::wrong*",
        ]
    )
    # Their own test, the checks of one op, a kernel on one input, and the references on three inputs each.
    result.assert_outcomes(passed=1 + 1 + 1 + 6, failed=2, skipped=4)


def _installed() -> bool:
    from importlib.metadata import entry_points

    return any(point.value == "opreg.pytest_plugin" for point in entry_points(group="pytest11"))


def test_the_plugin_imports_no_torch_unasked() -> None:
    code = "import sys, opreg.pytest_plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent).returncode == 0


@pytest.mark.parametrize(
    ("one", "other", "rms", "text"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0, None),
        ([1.0, 2.0], [1.0, 2.000001], 1e-5, None),
        ([1.0, 2.0], [1.0, 3.0], 1e-5, "1 of 2 values differ, worst at [1]: 3 instead of 2"),
        ([1.0, 2.0], [1.0, float("nan")], 1.0, "(NaN)"),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0.0, None),
        ([float("inf"), 2.0], [float("-inf"), 2.0], 1.0, "not finite alike"),
        ([0.0, 0.0], [0.0, 1e-3], 1e-5, "1 of 2 values differ"),
    ],
)
def test_difference(one: list[float], other: list[float], rms: float, text: str | None) -> None:
    found = difference([torch.tensor(one)], [torch.tensor(other)], rms)
    assert found is None if text is None else found is not None and text in found


def test_one_wrong_row_in_a_thousand_is_seen() -> None:
    expected = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    actual = expected.clone()
    actual[500] = 0
    assert difference([expected], [actual], 4e-2) is not None


def test_integers_are_exact_and_shapes_and_dtypes_count() -> None:
    assert difference([torch.tensor([1, 2])], [torch.tensor([1, 3])], 1.0) is not None
    assert "shape [3] instead of [2]" in (difference([torch.zeros(2)], [torch.zeros(3)], 1.0) or "")
    assert "float64 instead of" in (difference([torch.zeros(2)], [torch.zeros(2).double()], 1.0) or "")
    results: list[Any] = []
    assert difference(results, [torch.zeros(1)], 1.0) == "1 tensors instead of 0"


def test_results_in_other_places_differ_though_the_tensors_are_equal() -> None:
    x = torch.ones(2)
    one, other = Outcome((x, None), [], []), Outcome((None, x), [], [])
    assert differ(one, other, 0.0) == "gives (None, Tensor) instead of (Tensor, None)"
    assert differ(one, Outcome([x, None], [], []), 0.0) is None
    assert differ(Outcome((x, 3), [], []), Outcome((x, 4), [], []), 0.0) is not None
    assert differ(Outcome((x, 3), [], []), Outcome((x, 3.0), [], []), 0.0) == (
        "gives (Tensor, float) instead of (Tensor, int)"
    )
