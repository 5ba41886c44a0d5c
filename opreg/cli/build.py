"""`opreg build`: compile ahead what is otherwise compiled at first use, or not at all."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from . import start

if TYPE_CHECKING:
    from opreg.op import Op


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "build",
        parents=[start.options()],
        help="compile the native guard of eager calls, and the kernels that would be compiled at their first use",
    )
    parser.add_argument("op", nargs="*", metavar="OP", help="kernels of these ops only")
    parser.add_argument("--guard", action="store_true", help="the native guard only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opreg import guard_build, registry

    facts: dict[str, Any] = {"guard": str(guard_build.build()), "kernels": [], "failed": {}}
    if not args.guard:
        start.load_ops(args.verbose)
        for op in [registry.get(name) for name in args.op] or registry.all_ops():
            try:
                facts["kernels"] += [f"{op.name} {kernel}" for kernel in kernels(op)]
            except Exception as error:  # an op's inputs and kernels are its author's code; the others are built
                facts["failed"][op.name] = f"{type(error).__name__}: {error}"
    if args.json:
        start.print_json(start.envelope(**facts))
    else:
        print(f"native guard: {facts['guard']}", *(f"ready: {name}" for name in facts["kernels"]), sep="\n")
        for name, reason in facts["failed"].items():
            print(f"opreg: {name}: {reason}", file=sys.stderr)
    return start.FAILED if facts["failed"] else start.OK


def kernels(op: Op) -> list[str]:
    """The CPU kernels that take the op's sample calls, each called once: what is compiled, is compiled then."""
    import torch

    from opreg.spec import REFERENCE

    taken: dict[str, None] = {}
    for dtype in (torch.float32, torch.bfloat16) if op.inputs is not None else ():
        for call in op.samples("cpu", dtype):
            selected = op.explain(**call).selected
            if selected is not None and selected.name != REFERENCE and selected.name not in taken:
                op.function(**call)
                taken[selected.name] = None
    return list(taken)
