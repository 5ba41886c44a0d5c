"""`opreg graph FILE:FUNCTION`: where a model is split, which pieces are the same, as text, JSON or an SVG picture."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from opreg.errors import UnknownOpError, nearest

from . import start, table

_HELP = """FUNCTION takes no arguments and returns (model, args) or (model, args, kwargs): what to compile, and one
call of it. The call is made, so set the forward context inside the model or in a wrapper of it."""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "graph",
        parents=[start.options()],
        help="where a model is split, and which pieces are the same",
        description="Compile one call of a model, and show the pieces.",
        epilog=_HELP,
    )
    parser.add_argument("target", metavar="FILE:FUNCTION", help="a Python file or module, and a function in it")
    parser.add_argument("--on", action="append", metavar="OP", help="split at this op instead (may be repeated)")
    parser.add_argument("--inner", default="eager", help="what compiles the pieces (default: eager, nothing)")
    parser.add_argument("--dynamic", action="store_true", help="trace with dynamic sizes")
    parser.add_argument("--svg", metavar="PATH", type=Path, help="also write the picture of the largest graph")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start.load_ops(args.verbose)
    model, inputs, keywords = _made(args.target)
    import torch

    from opreg.backend import reports
    from opreg.graph_picture import svg

    before = list(reports())
    options: dict[str, Any] = {"inner": args.inner}
    if args.on:
        options["split_on"] = args.on
    compiled: Any = torch.compile(model, backend="opreg", options=options, dynamic=True if args.dynamic else None)
    error: Exception | None = None
    with torch.no_grad():
        try:
            compiled(*inputs, **keywords)
        except Exception as raised:  # the model is the user's: whatever it raises, what was split until then is shown
            error = raised
    found = [r for r in reports() if not any(r is b for b in before)]
    if args.json:
        start.print_json(start.envelope(graphs=[r.to_dict() for r in found]))
    else:
        print(*_text(found), sep="\n")
    if args.svg is not None and found:
        largest = max(found, key=lambda r: len(r.pieces))
        args.svg.write_text(svg(largest, args.target), encoding="utf-8")
        print(f"picture: {args.svg}", file=sys.stderr)
    if error is not None:
        raise error
    return start.OK if found else start.NOTHING_RAN


def _text(found: list[Any]) -> list[str]:
    from opreg.graph_picture import rows

    lines: list[str] = []
    for i, report in enumerate(found):
        head = f"graph {i + 1} of {len(found)}: " if len(found) > 1 else ""
        lines += [table.paint(f"{head}{report.summary()}", "head")]
        lines += table.lines(("", "PIECE", "WHAT", ""), rows(report))
        lines += [f"distinct: {p.why_distinct}" for p in report.pieces if p.compiled and p.why_distinct]
        lines += [f"made an input: {n}" for n in report.lifted]
        lines += [f"note: {n}" for n in report.notes]
        lines += [f"note: nothing to split at '{n}' in this graph" for n in report.unmatched]
        lines.append("")
    return lines[:-1] or ["no graph was compiled"]


def _made(target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What FUNCTION returns, checked."""
    path, colon, name = target.rpartition(":")
    if not colon or not path or not name.isidentifier():
        raise UnknownOpError(
            f"'{target}' is not of the form FILE:FUNCTION, as in model.py:example or package.module:example."
        )
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise UnknownOpError(f"there is no file '{path}'.")
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        if spec is None or spec.loader is None:
            raise UnknownOpError(f"'{path}' cannot be imported as a Python module.")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)
        # As `python FILE` would: what lies beside the file can be imported by it.
        sys.path.insert(0, str(Path(path).resolve().parent))
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            raise UnknownOpError(f"there is no module '{path}': {error}.") from None
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownOpError(f"{path} has no function '{name}'.{nearest(name, known)}")
    made = function()
    if (
        not isinstance(made, tuple)
        or len(made) not in (2, 3)
        or not callable(made[0])
        or not isinstance(made[1], tuple)
    ):
        raise UnknownOpError(
            f"{target} must return (model, args) or (model, args, kwargs); it returned {type(made).__name__}."
        )
    return made[0], made[1], dict(made[2]) if len(made) == 3 else {}
