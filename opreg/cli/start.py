"""What every sub-command shares: its options, exit codes, and op packages loaded with the broken ones reported."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opreg.op import Op

OK = 0
FAILED = 1
USAGE = 2
NOTHING_RAN = 5
"""pytest's number for the same thing."""


def options() -> argparse.ArgumentParser:
    """Parent parser with the options that every command takes: --json and --verbose."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text")
    parent.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parent


def load_ops(verbose: bool = False) -> dict[str, BaseException | None]:
    """Load every installed op package; a broken one is a remark on stderr and hides no other. {name: None or error}"""
    from opreg import registry

    # A package that prints when imported must not end up inside --json.
    with contextlib.redirect_stdout(sys.stderr):
        loaded = registry.load_packages()
    for name, error in loaded.items():
        if error is not None:
            print(f"opreg: op package '{name}' could not be loaded: {type(error).__name__}: {error}", file=sys.stderr)
            if verbose:
                import traceback

                traceback.print_exception(error)
    return loaded


def find_op(name: str) -> Op:
    """The op of a full or unique short name; UnknownOpError with the nearest name."""
    from opreg import registry

    return registry.get(name)


def device_type(wanted: str | None) -> str:
    """The device type a command speaks about: the given one (checked), or what this machine offers first."""
    from opreg import devices

    return devices.present()[0] if wanted is None else devices.check(wanted, "--device")


def print_json(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=2))


def envelope(**facts: Any) -> dict[str, Any]:
    """The one object that --json prints: versions first. Keys are added over time, never renamed."""
    import torch

    from opreg import __version__

    return {"opreg": __version__, "torch": torch.__version__, "schema_version": 1, **facts}
