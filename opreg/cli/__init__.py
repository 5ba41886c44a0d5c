"""The `opreg` command. One file per sub-command; each offers `add(subparsers)` and imports torch only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from opreg import __version__
from opreg.errors import OpregError, UnknownOpError

from . import bench, build, check, doctor, graph, list, show
from .start import FAILED, USAGE

COMMANDS = (list, show, check, bench, graph, build, doctor)
"""Modules of the sub-commands, in the order of `opreg --help`."""


def parser() -> argparse.ArgumentParser:
    """The whole command line; building it imports no torch."""
    top = argparse.ArgumentParser(
        prog="opreg",
        description="Which operators there are, which kernel of each runs here, and why no better one.",
        epilog="Exit codes: 0 fine, 1 something failed, 2 usage or unknown name, 5 nothing could be run.",
    )
    top.add_argument("--version", action="version", version=f"opreg {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except OpregError as error:
        if args.verbose:
            traceback.print_exc()
        else:
            print(f"opreg: {error}", file=sys.stderr)
        return USAGE if isinstance(error, UnknownOpError) else FAILED
    except BrokenPipeError:
        # `opreg list | head` closes our stdout early. That is no error, but the interpreter flushes once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
