"""`opreg bench OP`: every kernel that runs here, beside the reference, on the op's registered inputs, in one run.

`opreg bench --framework` times opreg's own calls, registration, splitting and compiling beside torch's ways.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from . import start, table

if TYPE_CHECKING:
    import torch

    from opreg.bench import Timing
    from opreg.op import Op

_SECTIONS = ("eager", "compiled", "registration", "context", "split", "cold", "warm")


def add(commands: Any) -> None:
    parser = commands.add_parser("bench", parents=[start.options()], help="time kernels, or opreg itself")
    parser.add_argument("op", metavar="OP", nargs="?", help="its name; left out with --framework")
    parser.add_argument("--framework", nargs="*", choices=_SECTIONS, metavar="SECTION", help="what opreg itself costs")
    parser.add_argument("--device", default="cpu", help="device of the inputs (default: cpu)")
    parser.add_argument("--dtype", default="float32", help="dtype of the inputs, as torch names it (default: float32)")
    parser.add_argument("--seconds", type=float, default=0.5, help="at least this long per input (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    if (args.op is None) == (args.framework is None):
        args.parser.error("give an operator's name, or --framework")
    rows = list(_framework(args) if args.framework is not None else _kernels(args))
    if args.json:
        start.print_json(start.envelope(bench=rows))
    else:
        for line in _text(rows):
            print(line)
    return start.OK if rows else start.NOTHING_RAN


def _framework(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from opreg.bench_framework import SECTIONS

    for section in args.framework or _SECTIONS:
        for row in SECTIONS[section]():
            yield {"input": row.section, "what": row.what, "seconds": row.seconds, "baseline": row.baseline} | {
                "ratio": row.ratio
            }


def _kernels(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch

    from opreg.bench import interleave
    from opreg.errors import UnknownOpError

    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UnknownOpError(f"--dtype: torch has no dtype '{args.dtype}'")
    start.load_ops(args.verbose)
    op = start.find_op(args.op)
    device = torch.device(args.device)
    for index, sample in enumerate(op.samples(args.device, dtype, args.seed)):
        alternatives = _alternatives(op, device, sample)
        timings = interleave(alternatives, seconds=args.seconds)
        yield from _rows(f"{index}: {_label(sample)}", timings)


def _alternatives(op: Op[..., Any], device: torch.device, sample: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """{kernel: call} of the kernels that take this call; mutated arguments keep what earlier calls wrote."""
    from opreg.select import explain, load

    everything = op.gather(lambda values: values)(**sample)
    ready = [d.kernel for d in explain(op, device.type, everything).decisions if d.state in ("used", "ready")]
    return {kernel.name: partial(op.call_with, load(op, kernel), everything) for kernel in ready}


def _rows(label: str, timings: dict[str, Timing]) -> Iterator[dict[str, Any]]:
    baseline = "reference" if "reference" in timings else next(iter(timings), "")
    for what, timing in timings.items():
        yield {
            "input": label,
            "what": what,
            "seconds": timing.median,
            "baseline": baseline,
            "ratio": timing.median / timings[baseline].median,
        }


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
    """A table; the input is named once. The last column is how many times faster than the baseline."""
    cells, last = [], None
    for row in rows:
        faster = f"{1 / row['ratio']:.2f}x" if row["ratio"] else "-"
        label = row["input"] if row["input"] != last else ""
        cells.append((label, row["what"], _duration(row["seconds"]), faster, row["baseline"]))
        last = row["input"]
    return table.lines(("INPUT", "WHAT", "TIME", "FASTER", "THAN"), cells)
