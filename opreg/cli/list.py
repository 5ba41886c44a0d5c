"""`opreg list`: every op, its kind and devices, the kernel that would run here, and why no better one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import start, table

if TYPE_CHECKING:
    from .facts import OpFacts


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "list", parents=[start.options()], help="every op: kind, devices, the kernel that runs here, why no better one"
    )
    parser.add_argument("--kind", help="only ops of this kind, such as attention (ops at which graphs are split)")
    parser.add_argument("--device", help="answer for this device type instead of the one found here")
    parser.add_argument("--names", action="store_true", help="names only, one a line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start.load_ops(args.verbose)
    from opreg import devices, registry
    from opreg.errors import UnknownOpError, nearest
    from opreg.spec import KINDS

    from .facts import look

    if args.kind is not None and args.kind not in KINDS:
        raise UnknownOpError(f"--kind: no kind '{args.kind}'; there is {', '.join(KINDS)}.{nearest(args.kind, KINDS)}")
    device = start.device_type(args.device)
    ops = [op for op in registry.all_ops() if args.kind in (None, op.spec.kind)]
    facts = [look(op, device) for op in ops]
    code = start.FAILED if any(fact.error for fact in facts) else start.OK
    if args.json:
        start.print_json(start.envelope(ops=[fact.json() for fact in facts]))
    elif args.names:
        print("\n".join(op.name for op in ops))
    else:
        header = f"HERE ({device})" if device in devices.present() else f"ON {device}"
        print(*_text(facts, header, device), sep="\n")
    return code


def _text(facts: list[OpFacts], header: str, device: str) -> list[str]:
    import torch

    rows = [
        (f.op.name, f.op.spec.kind or "-", " ".join(f.devices) or "-", f.selected or "nothing", f.note) for f in facts
    ]
    body = table.lines(("OP", "KIND", "DEVICES", header, "NOTE"), rows, {"nothing": "bad"})
    packages = [f"{name} {version}".strip() for name, version in _packages(facts).items()]
    count = f"{len(facts)} op{'' if len(facts) == 1 else 's'}"
    plural = "" if len(packages) == 1 else "s"
    origin = f" from {len(packages)} package{plural} ({', '.join(packages)})" if packages else ""
    return [*body, f"{count}{origin}, torch {torch.__version__}, device {device}"]


def _packages(facts: list[OpFacts]) -> dict[str, str]:
    """{distribution: version} of the packages that the listed ops come from."""
    from opreg import registry

    from .facts import comes_from

    points = [point for point in registry.packages() if point.dist is not None]
    found = [point.dist for point in points if any(comes_from(f.op, point) for f in facts)]
    return {dist.name: dist.version for dist in found if dist is not None}
