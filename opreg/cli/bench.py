"""`opreg bench OP`: the workloads that the op's speed is quoted for, beside named baselines and the machine's floor in
one run (see opreg.bench_cases); an op without any is timed on its registered inputs, every kernel beside the reference.

`opreg bench OP --tpu` times nothing: it shows what the TPU compiler makes of the op's kernel.
`opreg bench --framework` times opreg's own calls, registration, splitting and compiling beside torch's ways.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from . import start, table

if TYPE_CHECKING:
    import torch

    from opreg.bench import Timing
    from opreg.bench_cases import Case
    from opreg.op import Op

_SECTIONS = (
    "eager", "compiled", "registration", "context", "choice", "process", "split", "cold", "layers", "warm",
)  # fmt: skip
_ASKED_FOR = ("alias", "jax")
"""Sections that run when they are named: they take long, or need more than torch."""
_ROUNDS = 15
"""At least so many per input: medians of 7 differ by a tenth from run to run where memory is the limit."""


def add(commands: Any) -> None:
    parser = commands.add_parser("bench", parents=[start.options()], help="time kernels, or opreg itself")
    parser.add_argument("op", metavar="OP", nargs="?", help="its name; left out with --framework")
    parser.add_argument(
        "--framework",
        nargs="*",
        choices=(*_SECTIONS, *_ASKED_FOR),
        metavar="SECTION",
        help=f"what opreg itself costs: {', '.join(_SECTIONS)}; if named, {' and '.join(_ASKED_FOR)} too",
    )
    parser.add_argument(
        "--case", action="append", metavar="PATTERN", help="only these of the op's workloads, e.g. 'T=*'"
    )
    parser.add_argument("--samples", action="store_true", help="the registered inputs although there are workloads")
    parser.add_argument("--all-kernels", action="store_true", help="with workloads: not only the kernel that would run")
    parser.add_argument(
        "--tpu",
        nargs="*",
        metavar="CHIP",
        help="no times: what the TPU compiler says of the op's TPU kernel, no TPU needed",
    )
    parser.add_argument("--device", default="cpu", help="device of the inputs (default: cpu)")
    parser.add_argument(
        "--dtype", help="dtype of the inputs, as torch names it (default: the workloads' own, or float32)"
    )
    parser.add_argument("--threads", type=int, help="torch's threads (default: what it has); with 1, CPU time is taken")
    parser.add_argument("--seconds", type=float, default=0.5, help="at least this long per input (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    if (args.op is None) == (args.framework is None):
        args.parser.error("give an operator's name, or --framework")
    if args.threads is not None and args.threads < 1:
        args.parser.error(f"--threads: {args.threads} is no number of threads; give 1 or more")
    if args.tpu is not None:
        return _tpu(args)
    if args.framework is not None:
        rows = list(_framework(args))
    else:
        with _threads(args.threads):
            rows = list(_operator(args))
    if args.json:
        start.print_json(start.envelope(bench=rows))
    else:
        for line in _text(rows):
            print(line)
    return start.OK if rows else start.NOTHING_RAN


def _tpu(args: argparse.Namespace) -> int:
    """Figures of the TPU compiler, one column per key of the rows."""
    from opreg import bench_cases

    if args.op is None:
        args.parser.error("--tpu needs an operator's name")
    start.load_ops(args.verbose)
    found = bench_cases.compiled_for_tpu(start.find_op(args.op), args.tpu)
    if isinstance(found, str):
        print(f"opreg: --tpu: {found}", file=sys.stderr)
        return start.NOTHING_RAN
    if args.json:
        start.print_json(start.envelope(tpu=found))
        return start.OK
    header = [key.upper().replace("_", " ") for key in found[0]]
    for line in table.lines(header, [[_cell(value) for value in row.values()] for row in found]):
        print(line)
    return start.OK


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch's number of threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _framework(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from opreg.bench_framework import SECTIONS

    for section in args.framework or _SECTIONS:
        for row in SECTIONS[section]():
            base = row.seconds / row.ratio if row.ratio else None
            yield _row(row.section, row.what, row.seconds, row.baseline, base)


def _operator(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch

    from opreg import bench_cases, devices
    from opreg.errors import UnknownOpError

    dtype = None if args.dtype is None else getattr(torch, args.dtype, None)
    if args.dtype is not None and not isinstance(dtype, torch.dtype):
        raise UnknownOpError(f"--dtype: torch has no dtype '{args.dtype}'")
    start.load_ops(args.verbose)
    op, device = start.find_op(args.op), torch.device(args.device)
    devices.prepare(device.type, f"--device {args.device}")
    with torch.no_grad():
        if args.samples or not bench_cases.has_cases(op):
            if args.case:
                raise UnknownOpError(
                    f"--case: {op.name} has no workloads ({bench_cases.module_of(op)} would hold them)"
                )
            for index, sample in enumerate(op.samples(args.device, dtype or torch.float32, args.seed)):
                timings = _interleave(args, device, _kernels(op, device, sample, every=True))
                yield from _beside_reference(f"{index}: {_label(sample)}", timings)
            return
        names = []
        for case in bench_cases.cases(op, device, dtype, args.seed):
            names.append(case.name)
            if args.case is None or any(fnmatch.fnmatchcase(case.name, pattern) for pattern in args.case):
                yield from _beside_baselines(args, op, device, case)
    for pattern in args.case or ():
        if not fnmatch.filter(names, pattern):
            raise UnknownOpError(f"--case: {op.name} has no workload '{pattern}'; it has {', '.join(names)}")


def _kernels(
    op: Op[..., Any], device: torch.device, inputs: dict[str, Any], every: bool
) -> dict[str, Callable[[], Any]]:
    """{kernel: call} of the kernels that take this call; mutated arguments keep what earlier calls wrote."""
    from opreg.select import explain, load

    everything = op.gather(lambda values: values)(**inputs)
    states = ("used", "ready") if every else ("used",)
    ready = [d.kernel for d in explain(op, device.type, everything).decisions if d.state in states]
    # Arguments are put in order once: a caller has them so, and with cold caches it costs 50 us of a step of 400.
    return {kernel.name: op.call_with(partial(partial, load(op, kernel)), everything) for kernel in ready}


def _interleave(
    args: argparse.Namespace, device: torch.device, calls: dict[str, Callable[[], Any]]
) -> dict[str, Timing]:
    """Times of whole calls: CPU time where there is one thread (other processes do not count), else wall time."""
    import torch

    from opreg import devices
    from opreg.bench import interleave

    if device.type == "cpu" and torch.get_num_threads() == 1:
        return interleave(calls, seconds=args.seconds, rounds=_ROUNDS, clock=time.process_time)
    if device.type == "cpu":
        # As in a model, where some other op has just used all threads: after a call on one thread they sleep, and it
        # takes up to 70 us until they run again.
        work = torch.zeros(1 << 17)
        return interleave(calls, seconds=args.seconds, rounds=_ROUNDS, before=lambda: work.add_(1))
    wait = devices.waiter(device.type)

    def finished(call: Callable[[], Any]) -> None:
        result = call()  # kept until then: torch_xla computes only what somebody holds
        wait()
        del result

    return interleave(
        {name: partial(finished, call) for name, call in calls.items()}, seconds=args.seconds, rounds=_ROUNDS
    )


def _beside_reference(label: str, timings: dict[str, Timing]) -> Iterator[dict[str, Any]]:
    baseline = "reference" if "reference" in timings else next(iter(timings), "")
    for what, timing in timings.items():
        yield _row(label, what, timing.median, baseline, timings[baseline].median)


def _beside_baselines(
    args: argparse.Namespace, op: Op[..., Any], device: torch.device, case: Case
) -> Iterator[dict[str, Any]]:
    """Every kernel beside every baseline, then beside the time that its bytes and its arithmetic take at least."""
    import torch

    from opreg import bench_cases

    kernels = _kernels(op, device, dict(case.inputs), args.all_kernels)
    found = {name: bench_cases.baseline(op, case, name) for name in case.baselines}
    dtype = next(value.dtype for value in case.inputs.values() if isinstance(value, torch.Tensor))
    limits = bench_cases.floors(device, dtype)
    others = {name: call for name, call in found.items() if not isinstance(call, str)}
    calls = {**kernels, **others, **{name: call for name, (call, _) in limits.items()}}
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads > 1:
        calls.update({f"{name}, 1 thread": _on_one_thread(calls[name]) for name in (*kernels, *limits)})
    timings = _interleave(args, device, calls)
    copy, product = (limits[name][1] / timings[name].median for name in ("copy", "matrix product"))
    floors = {
        f"{case.bytes / 1e6:.3g} MB at the {copy / 1e9:.3g} GB/s of a copy": case.bytes / copy,
        f"{case.flops / 1e9:.3g} GFLOP at the {product / 1e9:.3g} GFLOP/s of a matrix product": case.flops / product,
    }
    for kernel in kernels:
        seconds = timings[kernel].median
        for name, call in found.items():
            if isinstance(call, str):
                yield _row(case.name, kernel, seconds, name, None, f"baseline missing: {call}")
            else:
                yield _row(case.name, kernel, seconds, name, timings[name].median)
        for what, least in floors.items():
            yield _row(case.name, kernel, seconds, what, least)
        if threads > 1:
            gains = {name: timings[f"{name}, 1 thread"].median / timings[name].median for name in limits}
            these = ", ".join(f"a {name} {gain:.2f}x" for name, gain in gains.items())
            alone = timings[f"{kernel}, 1 thread"].median
            yield _row(case.name, kernel, seconds, f"same on one thread; {threads} threads make {these} faster", alone)


def _on_one_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    def alone() -> None:
        with _threads(1):
            call()

    return alone


def _row(
    label: str, what: str, seconds: float, baseline: str, base: float | None, why: str | None = None
) -> dict[str, Any]:
    """One line; `ratio` is None where there is no baseline, and `why` says why."""
    ratio = seconds / base if base else None
    row = {"input": label, "what": what, "seconds": seconds, "baseline": baseline, "ratio": ratio}
    return {**row, "baseline_seconds": base, "why": why}


def _label(sample: dict[str, Any]) -> str:
    """The sizes of the first tensors: enough to tell the inputs apart."""
    from opreg.fake import show_tensor

    tensors = [f"{name} {show_tensor(value)}" for name, value in sample.items() if hasattr(value, "shape")]
    return ", ".join(tensors[:2])


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def _text(rows: list[dict[str, Any]]) -> list[str]:
    """A table; the input is named once. FASTER: how many times, than the time THAN THE ... OF what is named last."""
    cells: list[tuple[str, ...]] = []
    last = None
    for row in rows:
        faster = f"{1 / row['ratio']:.2f}x" if row["ratio"] else "-"
        its = _duration(row["baseline_seconds"]) if row["baseline_seconds"] else "-"
        label = row["input"] if row["input"] != last else ""
        than = f"{row['baseline']} ({row['why']})" if row["why"] else row["baseline"]
        cells.append((label, row["what"], _duration(row["seconds"]), faster, its, than))
        last = row["input"]
    return table.lines(("INPUT", "WHAT", "TIME", "FASTER", "THAN THE", "OF"), cells)
