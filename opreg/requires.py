"""What a kernel needs installed: "module", or "module>=1.2". Looked up, never imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

from .errors import RegistrationError

_FORM = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:>=(\d+(?:\.\d+)*))?")
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*)[-_.]?(a|b|c|rc|alpha|beta|pre|preview|dev)?")


def split(requirement: str, who: str) -> tuple[str, str | None]:
    """The module and the least version that a requirement names, or RegistrationError."""
    found = _FORM.fullmatch(requirement)
    if found is None:
        raise RegistrationError(f"{who}: requires={requirement!r} is neither 'module' nor 'module>=1.2'")
    return found[1], found[2]


def lacking(requirement: str) -> str | None:
    """The requirement, with what is known of its version, where it is not met; None where it is."""
    module, least = split(requirement, "opreg")
    if not _installed(module):
        return requirement
    if least is None:
        return None
    try:
        # The version is the distribution's, whose name is the top module's ("_" finds "-").
        version = importlib.metadata.version(module.partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement} (its version is not known)"
    return None if _key(version) >= _key(least) else f"{requirement} ({version} is installed)"


def _key(version: str) -> tuple[tuple[int, ...], bool]:
    """The release without trailing zeros, and whether it is out: 1.2rc1 and 1.2.dev0 come before 1.2."""
    found = _VERSION.match(version)
    if found is None:
        return (), False
    release = [int(part) for part in found[1].split(".")]
    while release and not release[-1]:
        release.pop()
    return tuple(release), found[2] is None


def _installed(module: str) -> bool:
    parent = module.rpartition(".")[0]
    # find_spec of a dotted name imports the parent and raises if it is absent, so parents are looked for first.
    return (not parent or _installed(parent)) and importlib.util.find_spec(module) is not None
