"""Every exception of opreg. Each message says what was wrong, where, with which values, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OpregError(Exception):
    """Base of all errors raised by opreg."""


class RegistrationError(OpregError, ValueError):
    """An op or kernel was declared in a way that cannot work."""


class SignatureError(RegistrationError, TypeError):
    """A signature cannot be expressed as a torch schema, or a kernel's signature differs from its op's."""


class DuplicateOpError(RegistrationError):
    """Two different operators were registered under one name."""


class UnknownOpError(OpregError, LookupError):
    """A name that no registered op, kernel or device type has."""


class ContractError(OpregError, ValueError):
    """Arguments of a call disagree with the op's shape contract."""


class KernelError(OpregError, RuntimeError):
    """No kernel takes the call, a forced kernel cannot run, or a kernel could not be loaded."""


class AutogradError(OpregError, RuntimeError):
    """A gradient was asked of an op that has no backward formula."""


class ContextError(OpregError, LookupError):
    """A layer was asked for that the forward context does not hold."""


class NotBuilt(Exception):
    """There is no native guard to load; the text says why and what to do."""

    def __init__(self, text: str, buildable: bool = False) -> None:
        """buildable: whether `in_background` may build it."""
        super().__init__(text)
        self.buildable = buildable


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean ...?' with the closest of `names`, or '' when nothing is close."""
    known = list(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close and "::" in name:
        # A wrong namespace should not hide a right name.
        by_tail = {known_name.split("::")[-1]: known_name for known_name in known}
        close = [by_tail[t] for t in difflib.get_close_matches(name.split("::")[-1], by_tail, n=1, cutoff=0.6)]
    return f" Did you mean '{close[0]}'?" if close else ""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """'a, b, c and 4 more', or 'none'."""
    known = [str(n) for n in names]
    if not known:
        return "none"
    shown = ", ".join(known[:limit])
    return shown if len(known) <= limit else f"{shown} and {len(known) - limit} more"
