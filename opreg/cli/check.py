"""`opreg check [OP ...]`: try to break operators: writes, aliasing, fakes, layouts, compilers, every kernel."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING, Any

from . import start, table

if TYPE_CHECKING:
    from opreg.op import Op
    from opreg.testing import Report


def add(commands: Any) -> None:
    parser = commands.add_parser("check", parents=[start.options()], help="try to break operators and kernels")
    parser.add_argument("ops", metavar="OP", nargs="*", help="names, full or short; none means every installed op")
    parser.add_argument("--device", help="device type to run on (default: the one found here)")
    parser.add_argument("--kernel", help="check only this kernel against the reference")
    parser.add_argument("--input", type=int, help="only the registered input of this number")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default 0)")
    parser.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help="import this module first"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    loaded = start.load_ops(args.verbose)
    for module in args.modules:
        if not _import(module, args.verbose):
            return start.USAGE
    from opreg import registry
    from opreg.testing import check_op, summary

    chosen: list[Op[Any, Any]] = [start.find_op(name) for name in args.ops] or registry.all_ops()
    device = start.device_type(args.device)
    reports: list[Report] = []
    for op in chosen:
        report = check_op(op, device=device, seed=args.seed, kernel=args.kernel, input=args.input)
        reports.append(report)
        if not args.json:
            # Each op as it is done, without its own count: the last line counts all.
            print(*report.text(table.paint)[:-1], sep="\n", flush=True)
    if args.json:
        start.print_json(start.envelope(ops=[report.json() for report in reports]))
    else:
        print(summary(reports))
    if any(report.failed for report in reports) or any(error is not None for error in loaded.values()):
        return start.FAILED
    return start.OK if any(report.ran for report in reports) else start.NOTHING_RAN


def _import(module: str, verbose: bool) -> bool:
    sys.path.insert(0, "")  # as `python -m` does: a module of the current folder is meant, too
    try:
        importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything; it is reported, and nothing is checked
        print(f"opreg: cannot import '{module}': {type(error).__name__}: {error}", file=sys.stderr)
        if verbose:
            import traceback

            traceback.print_exception(error)
        return False
    return True
