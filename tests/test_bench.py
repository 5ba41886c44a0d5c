"""opreg bench: what the timers promise, and the command's output. No test here depends on how long anything takes."""

import importlib
import json
import re
import weakref
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opreg import devices
from opreg.bench import interleave, per_call
from opreg.cli import bench as bench_command
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


def test_what_comes_before_a_timed_call_is_not_in_its_time() -> None:
    seen: list[str] = []
    now = [0.0]

    def takes(seconds: float, name: str) -> None:
        now[0] += seconds
        seen.append(name)

    timings = interleave(
        {"a": lambda: takes(1.0, "a")}, seconds=0, rounds=3, clock=lambda: now[0], before=lambda: takes(5.0, "before")
    )
    assert timings["a"].high == 1.0
    assert seen == ["a", *["before", "a"] * 3]


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
    assert head.split() == ["INPUT", "WHAT", "TIME", "FASTER", "THAN", "THE", "OF"]
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


@pytest.fixture
def doubled(tmp_path, monkeypatch, request):
    """An op of a package of its own, `mylib.doubled`, with a module of workloads as the test wants it."""
    names = iter(f"bench_lib_{i}" for i in range(9))

    def make(workloads: str) -> str:
        # A name of its own per test: registrations last for the process.
        package = f"{request.node.name.split('[')[0]}_{next(names)}"
        folder = tmp_path / package
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "op.py").write_text(OP.replace("PACKAGE", package))
        if workloads:
            (folder / "op_bench.py").write_text(workloads.replace("PACKAGE", package))
        (folder / "others.py").write_text(OTHERS)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        importlib.import_module(f"{package}.op")
        return f"{package}::doubled"

    return make


OP = """
from typing import Annotated
from torch import Tensor
import torch
from opreg import register_op

@register_op("PACKAGE::doubled")
def doubled(x: Annotated[Tensor, "n"]) -> Annotated[Tensor, "n"]:
    return 2 * x

@doubled.register_kernel("cpu")
def fast(x: Tensor) -> Tensor:
    return x + x

@doubled.register_inputs
def inputs(device, dtype, generator):
    yield {"x": torch.ones(3, dtype=dtype, device=device)}
"""
OTHERS = """
def by_sum(call):
    return lambda: call["x"] + call["x"]

def absent(call):
    return "otherlib is not installed"
"""
WORKLOADS = """
import torch
def doubled(device, generator, dtype=torch.bfloat16):
    for n in (4, 8):
        baselines = {"sum": "PACKAGE.others:by_sum", "gone": "PACKAGE.others:absent"}
        x = torch.ones(n, dtype=dtype, device=device)
        case = {"name": f"n={n}", "inputs": {"x": x}, "baselines": baselines}
        yield {**case, "bytes": 64_000_000, "flops": 4_000_000_000}
"""


def bench(capsys, *arguments: str) -> list[dict]:
    assert main(["bench", *arguments, "--seconds", "0", "--json"]) == 0
    found: list[dict] = json.loads(capsys.readouterr().out)["bench"]
    return found


def test_workloads_are_timed_beside_their_baselines_and_floors(capsys, doubled):
    name = doubled(WORKLOADS)
    rows = bench(capsys, name, "--threads", "1")
    assert [row["input"] for row in rows] == ["n=4"] * 4 + ["n=8"] * 4
    assert {row["what"] for row in rows} == {"op/fast"}
    by_sum, gone, copy, product = rows[:4]
    assert by_sum["baseline"] == "sum"
    assert by_sum["ratio"] == pytest.approx(by_sum["seconds"] / by_sum["baseline_seconds"])
    assert (gone["ratio"], gone["why"]) == (None, "baseline missing: otherlib is not installed")
    # The floor is the work over the rate that the row names.
    for row, work, what in ((copy, 0.064, "GB/s of a copy"), (product, 4.0, "GFLOP/s of a matrix product")):
        rate = float(row["baseline"].split(" at the ")[1].split()[0])
        assert what in row["baseline"]
        assert row["baseline_seconds"] == pytest.approx(work / rate, rel=1e-2)
    assert len(bench(capsys, name, "--case", "n=8", "--all-kernels", "--threads", "1")) == 8


def test_several_threads_are_timed_beside_one_and_beside_what_the_machine_gains(capsys, doubled, monkeypatch):
    seen = []
    monkeypatch.setattr("opreg.cli.bench._on_one_thread", lambda call: seen.append(call) or call)
    *_, alone = bench(capsys, doubled(WORKLOADS), "--threads", "2", "--case", "n=4")
    assert len(seen) == 3  # the kernel, the copy and the product
    said = r"same on one thread; 2 threads make a copy \d+\.\d\dx, a matrix product \d+\.\d\dx faster"
    assert re.fullmatch(said, alone["baseline"])
    assert alone["ratio"] == pytest.approx(alone["seconds"] / alone["baseline_seconds"])


def test_one_thread_is_one_thread():
    from opreg.cli.bench import _on_one_thread

    before, seen = torch.get_num_threads(), []
    _on_one_thread(lambda: seen.append(torch.get_num_threads()))()
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_workloads_of_another_dtype_and_samples_instead(capsys, doubled):
    name = doubled(WORKLOADS)
    rows = bench(capsys, name, "--samples", "--dtype", "float64")
    assert [(row["input"], row["baseline"]) for row in rows] == [("0: x f64[3]", "reference")] * 2
    text = main(["bench", name, "--case", "n=4", "--seconds", "0"]), capsys.readouterr().out
    assert text[0] == 0
    assert "baseline missing: otherlib is not installed" in text[1]
    assert text[1].count("n=4") == 1


def test_what_is_wrong_about_workloads_is_said(capsys, doubled):
    def message(workloads: str, *more: str) -> tuple[int, str]:
        return main(["bench", doubled(workloads), "--seconds", "0", *more]), capsys.readouterr().err

    assert message(WORKLOADS, "--case", "n=5")[0] == 2
    assert "has no workload 'n=5'; it has n=4, n=8" in message(WORKLOADS, "--case", "n=5")[1]
    assert "has no workloads" in message("", "--case", "n=5")[1]
    code, text = message(WORKLOADS.replace("others:by_sum", "others:by_sun"))
    assert code == 1
    assert "has no 'by_sun'. Did you mean 'by_sum'?" in text
    code, text = message(WORKLOADS.replace('"flops"', '"flop"'))
    assert code == 1
    assert "a case is a dict with name, inputs, baselines, bytes, flops" in text


def test_the_number_of_threads_is_given_back(capsys, doubled):
    before = torch.get_num_threads()
    bench(capsys, doubled(WORKLOADS), "--case", "n=4", "--threads", str(before + 1))
    assert torch.get_num_threads() == before
    with pytest.raises(SystemExit):
        main(["bench", "opreg::rms_norm", "--threads", "0"])
    assert "--threads: 0 is no number of threads" in capsys.readouterr().err


def test_splitting_is_timed_beside_torch_s_own(monkeypatch):
    from opreg import bench_split

    small = bench_split.transformer(2)
    monkeypatch.setattr(bench_split, "transformer", lambda layers: small)
    rows = list(bench_split.splits(rounds=1))
    assert {row.what for row in rows} == {"split_module", "split_graph", "split_graph, every piece built"}
    assert all(row.seconds > 0 for row in rows)
    assert all(row.ratio == 1 for row in rows if row.what == row.baseline)


COMPILED = """
TPU = "PACKAGE.op_bench:report"

def report(chips):
    if "v99" in chips:
        raise ValueError("there is no chip 'v99'")
    if "v5e" in chips:
        raise RuntimeError("v5e: out of vector memory")
    if "v4" in chips:
        return "libtpu is not installed"
    return ({"chip": chip, "bound_of": "copies", "bundles": 12345, "ratio": 1.5} for chip in chips or ("v6e", "7x"))
"""


def test_jax_calls_are_timed_beside_jit_and_other_bridges(monkeypatch):
    """Few calls of everything: that each way gives what it should, not how fast it is."""
    pytest.importorskip("jax")  # Python 3.10 has none that is new enough
    # Ours is imported, not skipped: a bench that cannot be imported is a failure.
    bench = importlib.import_module("opreg.jax_bridge_bench")
    seen = {}

    def once(calls, **options):
        for name, (expression, names) in calls.items():
            seen[name] = eval(expression, dict(names))
        return {name: bench.Timing(1.0, 1.0, 1.0) for name in calls}

    monkeypatch.setattr(bench, "per_call", once)
    rows = list(bench._small())
    assert [row.what for row in rows][:2] == ["jax.jit", "call_jax"]
    a = torch.asarray(np.asarray(seen["jax.jit"]).copy())
    torch.testing.assert_close(seen["call_jax"], a)
    torch.testing.assert_close(seen["DLPack round trip"], a)
    assert {row.baseline for row in rows} == {"jax.jit"}
    a, b = torch.randn(3), torch.randn(3)
    for way in (*bench._ways().values(), bench._by_hand()):
        torch.testing.assert_close(bench._repeated(way, 2)(a, b), torch.sin(torch.sin(a) + b) + b)
    torch._dynamo.reset()
    assert [row.what for row in bench._entered()] == [*bench._ways()]


def test_figures_of_the_tpu_compiler(capsys, doubled):
    name = doubled(COMPILED)
    assert main(["bench", name, "--tpu"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["CHIP", "BOUND", "OF", "BUNDLES", "RATIO"],
        ["v6e", "copies", "12,345", "1.50"],
        ["7x", "copies", "12,345", "1.50"],
    ]
    assert main(["bench", name, "--tpu", "v5p", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["tpu"]
    assert row == {"chip": "v5p", "bound_of": "copies", "bundles": 12345, "ratio": 1.5}


@pytest.mark.parametrize(
    ("chip", "code", "words"),
    [
        ("v99", 2, "there is no chip 'v99'"),
        ("v5e", 1, "v5e: out of vector memory"),
        ("v4", 5, "libtpu is not installed"),
    ],
)
def test_why_there_are_no_figures_of_the_tpu_compiler(capsys, doubled, chip, code, words):
    assert main(["bench", doubled(COMPILED), "--tpu", chip]) == code
    assert words in capsys.readouterr().err


def test_an_op_without_figures_of_the_tpu_compiler(capsys, doubled):
    for workloads in ("", WORKLOADS):
        assert main(["bench", doubled(workloads), "--tpu"]) == 2
        assert "has no figures from the TPU compiler" in capsys.readouterr().err


def test_results_are_held_until_the_device_is_done(monkeypatch):
    """torch_xla computes only what somebody holds."""

    class Result:
        pass

    made, held = [], []

    def call():
        result = Result()
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(devices, "waiter", lambda device_type: lambda: held.append(made[-1]() is not None))
    bench_command._interleave(Namespace(seconds=0.0), torch.device("xla"), {"it": call})
    assert len(held) > 3
    assert all(held)
    assert all(result() is None for result in made)


def test_a_device_whose_package_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setattr(devices, "_has_torch_xla", lambda: False)
    assert main(["bench", "opreg::rms_norm", "--device", "xla"]) == 1
    assert "--device xla: device 'xla' needs torch_xla, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("installed", "pjrt", "expected"),
    [
        (False, None, ["cpu"]),
        (False, "TPU", ["cpu"]),
        (True, None, ["cpu", "xla"]),
        (True, "CPU", ["cpu", "xla"]),
        (True, "TPU", ["xla", "cpu"]),
    ],
)
def test_xla_is_present_where_torch_xla_is_installed(monkeypatch, installed, pjrt, expected):
    monkeypatch.setattr(devices, "_has_torch_xla", lambda: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch, "tpu", SimpleNamespace(is_available=lambda: False), raising=False)
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    if pjrt is not None:
        monkeypatch.setenv("PJRT_DEVICE", pjrt)
    assert devices.present() == expected
    torch.tpu.is_available = lambda: True
    assert devices.present() == ["tpu", *expected]
