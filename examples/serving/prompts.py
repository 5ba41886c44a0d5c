"""Prompts of real text, a byte a token: the Zen of Python (PEP 20), which every Python carries in rot13."""

from __future__ import annotations

import codecs
import contextlib
import io

from .scheduler import Request

# (first line, number of lines, bytes to generate): long and short, so that sequences join and leave at different steps.
FULL = ((0, 1, 24), (2, 9, 18), (11, 1, 40), (12, 2, 12), (6, 1, 32), (0, 5, 28), (18, 2, 16), (14, 3, 36), (9, 2, 20))
QUICK = ((6, 1, 5), (2, 3, 4), (11, 1, 8))


def make_requests(lengths: tuple[tuple[int, int, int], ...]) -> list[Request]:
    """Fresh requests for (first line, number of lines, new tokens) each."""
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints its text when it is imported
        import this
    lines = codecs.decode(this.s, "rot13").splitlines()[2:]
    return [
        Request(f"r{index}", list("\n".join(lines[first : first + count]).encode()), new)
        for index, (first, count, new) in enumerate(lengths)
    ]
