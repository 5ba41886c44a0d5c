"""`opreg show OP`: one op in full: contract, schema, where its fake comes from, every kernel with its state."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

from . import start, table

if TYPE_CHECKING:
    from opreg.spec import ArgSpec, OpSpec, ReturnSpec

    from .facts import OpFacts

_STATES = {"used here": "good", "missing": "dim", "other device": "dim", "unknown": "bad"}


def add(commands: Any) -> None:
    parser = commands.add_parser("show", parents=[start.options()], help="one op in full: contract, schema, kernels")
    parser.add_argument("op", metavar="OP", help="its name; the part after :: is enough where it is unique")
    parser.add_argument("--device", help="answer for this device type instead of the one found here")
    parser.add_argument("--doc", action="store_true", help="the whole docstring, not its first sentence only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start.load_ops(args.verbose)
    from .facts import look

    facts = look(start.find_op(args.op), start.device_type(args.device))
    if args.json:
        start.print_json(start.envelope(ops=[facts.json()]))
    else:
        print(*_text(facts, args.doc), sep="\n")
    return start.FAILED if facts.error else start.OK


def _text(facts: OpFacts, whole_doc: bool) -> list[str]:
    op, spec = facts.op, facts.op.spec
    doc = inspect.cleandoc(spec.doc).split("\n") if whole_doc else [spec.summary]
    from opreg.fake import fake_source

    sources = {"contract": "from the contract", "body": "from the body", "nothing returned": "none needed"}
    fake = sources.get(fake_source(op), fake_source(op))
    rules = [
        f"fake: {fake}",
        f"autograd: {'formula' if op.has_autograd else 'none'}",
        f"vmap: {'rule' if op.has_vmap else 'none'}",
        f"splits graphs: {'yes' if spec.kind == 'attention' else 'no'}",
    ]
    kernels = [
        (k.spec.name, k.spec.devices, str(k.spec.priority), _state(facts, k.state), k.why) for k in facts.kernels
    ]
    return [
        f"{table.paint(op.name, 'head')}   {spec.source}",
        *(f"  {line}".rstrip() for line in doc),
        "",
        *textwrap.wrap(spec.schema, 110, initial_indent="  ", subsequent_indent="    ", break_long_words=False),
        *(f"  {line}" for line in _contract(spec)),
        f"  {'     '.join(rules)}",
        "",
        *(f"  {line}" for line in table.lines(("KERNEL", "DEVICE", "PRIORITY", "STATE", "WHY"), kernels, _STATES)),
        *([f"  {facts.note}"] if facts.note and (facts.error or "forced" in facts.note) else []),
    ]


def _state(facts: OpFacts, state: str) -> str:
    from opreg import devices

    if state != "used":
        return state
    return "used here" if facts.device in devices.present() else f"used on {facts.device}"


def _contract(spec: OpSpec) -> list[str]:
    """One line per tensor: name, contract, and what the contract cannot say."""
    rows = [(arg.name, _shape(arg), _role(arg)) for arg in spec.args if "Tensor" in arg.type]
    rows += [("->", _shape(result), _dtype(spec, result)) for result in spec.returns]
    return ["".join(row).rstrip() for row in table.columns(rows)]


def _shape(item: ArgSpec | ReturnSpec) -> str:
    return item.shape.text if item.shape is not None else "any shape" if "Tensor" in item.type else item.type


def _role(arg: ArgSpec) -> str:
    if arg.layer:
        return "layer name; a handle inside graphs"
    words = [str(arg.dtype).removeprefix("torch.")] if arg.dtype is not None else []
    if arg.mutated:
        words.append("written in place")
    if arg.optional:
        words.append("may be None")
    return ", ".join(words)


def _dtype(spec: OpSpec, result: ReturnSpec) -> str:
    from opreg.spec import Like

    if isinstance(result.dtype, Like):
        return f"dtype of {result.dtype.name}"
    if result.dtype is not None:
        return str(result.dtype).removeprefix("torch.")
    first = spec.first_tensor
    return f"dtype of {first.name}" if first is not None and result.shape is not None else ""
