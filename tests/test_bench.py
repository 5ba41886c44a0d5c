"""opreg bench: what the timers promise, and the command's output. No test here depends on how long anything takes."""

import json

import pytest

from opreg.bench import interleave, per_call
from opreg.cli import main


def test_every_alternative_runs_once_per_round_in_changing_order():
    calls = []
    timings = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, seconds=0, rounds=8)
    assert set(timings) == set("abc")
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert rounds[0] == ["a", "b", "c"]  # the warm-up
    assert len(rounds) == 9
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds[1:]}) > 1


def test_timings_are_medians_and_quartiles_of_the_clock():
    ticks = iter([0, 1, 10, 13, 20, 25, 30, 37, 40, 49])
    timing = interleave({"a": lambda: None}, seconds=0, rounds=5, clock=lambda: next(ticks))["a"]
    assert (timing.low, timing.median, timing.high) == (3, 5, 7)
    assert timing.spread == pytest.approx(4 / 5)


def test_per_call_runs_the_expression_and_subtracts_the_loop():
    seen = []
    timings = per_call({"append": ("f(x)", {"f": seen.append, "x": 3})}, number=10, rounds=2)
    assert seen == [3] * 30
    assert set(timings) == {"append"}


def test_command_times_each_kernel_beside_the_reference(capsys):
    assert main(["bench", "opreg::rms_norm", "--seconds", "0", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["bench"]
    assert {row["what"] for row in rows} == {"cpu/rms_norm", "reference"}
    assert all(row["ratio"] == 1 for row in rows if row["what"] == row["baseline"] == "reference")
    assert main(["bench", "opreg::rms_norm", "--seconds", "0"]) == 0
    head, first = capsys.readouterr().out.splitlines()[:2]
    assert head.split() == ["INPUT", "WHAT", "TIME", "FASTER", "THAN"]
    assert first.startswith("0: x f32[1, 1], weight f32[1]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "rms_nrm"], "Did you mean"),
        (["bench", "opreg::rms_norm", "--dtype", "float33"], "torch has no dtype 'float33'"),
    ],
)
def test_wrong_names_exit_with_2(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_op_or_the_framework_must_be_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench"])
    assert caught.value.code == 2
    assert "give an operator's name, or --framework" in capsys.readouterr().err


def test_splitting_is_timed_beside_torch_s_own(monkeypatch):
    from opreg import bench_split

    small = bench_split.transformer(2)
    monkeypatch.setattr(bench_split, "transformer", lambda layers: small)
    rows = list(bench_split.splits(rounds=1))
    assert {row.what for row in rows} == {"split_module", "split_graph", "split_graph, every piece built"}
    assert all(row.seconds > 0 for row in rows)
    assert all(row.ratio == 1 for row in rows if row.what == row.baseline)
