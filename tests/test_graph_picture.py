"""Folding repeated layers, the SVG picture, and `opreg graph`."""

import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from opreg.cli import main
from opreg.graph_picture import fold, gist, rows, shapes, short, svg
from opreg.graph_report import PieceReport, Report


def piece(index: int, ops: str, same_as: int | None = None, splitting: bool = False) -> PieceReport:
    return PieceReport(index, splitting, tuple(ops.split()), ("float32[4, 8]",), ("float32[4, 8]",), "d", same_as)


def hybrid(periods: int) -> Report:
    """A model whose layers come in periods of three of one kind and one of another."""
    found = [piece(0, "embedding norm linear")]
    first: dict[str, int] = {}
    for _ in range(periods):
        for op in ("ns::gdn", "ns::gdn", "ns::gdn", "ns::attn"):
            found.append(piece(len(found), op, splitting=True))
            after = len(found) % 8
            same = first.setdefault(f"{after}", len(found))
            found.append(piece(len(found), "add norm linear linear mul linear", same if same != len(found) else None))
    return Report(tuple(found), ("ns::gdn", "ns::attn"))


def test_layers_that_repeat_are_folded() -> None:
    report = hybrid(10)
    runs = fold(report.pieces)
    assert sum(len(run.pieces) * run.times for run in runs) == len(report.pieces)
    assert max(run.times for run in runs) >= 9
    assert sum(len(run.pieces) for run in runs) <= 17, "81 pieces are shown as at most 17 rows"
    assert len(rows(report)) == sum(len(run.pieces) for run in runs)


def test_what_does_not_repeat_is_one_run() -> None:
    report = Report((piece(0, "add"), piece(1, "ns::a", splitting=True), piece(2, "mul")), ("ns::a",))
    (run,) = fold(report.pieces)
    assert run.times == 1
    assert len(run.pieces) == 3


def test_the_picture_of_a_40_layer_model_is_small_and_well_formed() -> None:
    report = hybrid(10)
    root = ElementTree.fromstring(svg(report, "a <model> & more"))
    assert int(root.get("height", "0")) < 1000
    text = " ".join(t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}text"))
    assert " x" in text
    assert "gdn" in text
    assert "a <model> & more" in text
    assert "linear x3 and 3 more" in text
    assert "6 ops, makes float32[4, 8]" in text
    # Where nothing repeats, bars and their texts stay apart.
    bars = [*root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    tops = [(float(bar.get("y", 0)), float(bar.get("height", 0))) for bar in bars]
    assert all(y + height < below for (y, height), (below, _) in itertools.pairwise(tops))


def test_ops_are_shortened_where_they_repeat_or_are_many() -> None:
    assert short(["linear", "linear", "getitem", "ns::moe"]) == "linear x2 moe"
    assert short([f"op{i}" for i in range(40)], room=20).endswith("more")


def test_a_piece_is_named_by_what_takes_time() -> None:
    assert gist(["pow", "mul", "linear", "getitem", "linear", "ns::moe"]) == "linear x2 moe and 3 more"
    assert gist(["pow", "mul"]) == "pow mul"
    assert gist(["linear", "embedding", "conv1d"], room=16) == "linear embedding and 1 more"
    made = PieceReport(0, False, (), (), ("float32[s0, 8]", "float32[s0, 8]", "", "int64[4]"), "d")
    assert shapes(made) == "float32[s0, 8] int64[4]"
    assert shapes(made, room=16) == "float32[s0, 8] ..."


MODEL = """
import torch
from torch import nn

LIB = torch.library.Library("opreg_graph_cli", "FRAGMENT")
if not hasattr(torch.ops.opreg_graph_cli, "core"):
    LIB.define("core(Tensor x) -> Tensor")
    LIB.impl("core", lambda x: x + 1, "CompositeExplicitAutograd")
    torch.library.register_fake("opreg_graph_cli::core", torch.empty_like, lib=LIB)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.ops.opreg_graph_cli.core(torch.relu(self.lin(x)))


def example():
    return nn.Sequential(*(Layer() for _ in range(12))), (torch.randn(3, 8),)


def wrong():
    return 42
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import torch

    torch._dynamo.reset()
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    return path


def test_opreg_graph_prints_and_draws(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = model.with_suffix(".svg")
    code = main(["graph", f"{model}:example", "--on", "opreg_graph_cli::core", "--svg", str(picture)])
    out = capsys.readouterr().out
    assert code == 0
    assert out.startswith("25 pieces: 12 at opreg_graph_cli::core, 13 compiled as 3 distinct")
    assert "11 x" in out or "10 x" in out
    assert "linear and 2 more" in out
    assert "makes float32[3, 8]" in out
    assert "compiled in" not in out, "nothing is compiled unless asked for"
    ElementTree.fromstring(picture.read_text(encoding="utf-8"))


def test_opreg_graph_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", f"{model}:example", "--on", "opreg_graph_cli::core", "--json", "--dynamic"]) == 0
    (graph,) = json.loads(capsys.readouterr().out)["graphs"]
    assert len(graph["pieces"]) == 25
    assert len(graph["distinct"]) == 3


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{}", "is not of the form FILE:FUNCTION"),
        ("{}:exampel", "Did you mean 'example'"),
        ("{}:wrong", "must return (model, args) or (model, args, kwargs); it returned int"),
        ("nowhere.py:f", "there is no file 'nowhere.py'"),
        ("no.such.module:f", "there is no module 'no.such.module'"),
    ],
)
def test_bad_targets_are_usage_errors(
    model: Path, target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["graph", target.format(model)]) == 2
    assert message in capsys.readouterr().err
