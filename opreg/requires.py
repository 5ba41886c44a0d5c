"""What a kernel needs installed: "module", "module>=1.2" or "c++", a compiler. Looked up, never imported or run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil

from .errors import RegistrationError

COMPILER = "c++"
"""The requirement of a kernel that is compiled at its first use: what CXX names, else one of the usual compilers."""

_FORM = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:>=(\d+(?:\.\d+)*))?")
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*)[-_.]?(a|b|c|rc|alpha|beta|pre|preview|dev)?")


def split(requirement: str, who: str) -> tuple[str, str | None]:
    """The module and the least version that a requirement names, or RegistrationError."""
    if requirement == COMPILER:
        return requirement, None
    found = _FORM.fullmatch(requirement)
    if found is None:
        raise RegistrationError(f"{who}: requires={requirement!r} is neither 'module' nor 'module>=1.2' nor 'c++'")
    return found[1], found[2]


def lacking(requirement: str) -> str | None:
    """The requirement, with what is known of its version, where it is not met; None where it is."""
    module, least = split(requirement, "opreg")
    if module == COMPILER:
        return _no_compiler()
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


def _no_compiler() -> str | None:
    if os.environ.get("OPREG_NO_BUILD", "") not in ("", "0"):
        return "to be built with a C++ compiler, and OPREG_NO_BUILD is set"
    import shlex

    wanted = shlex.split(os.environ.get("CXX", ""))[:1]
    names = wanted or ["g++", "c++", "clang++"]
    if any(shutil.which(name) for name in names):
        return None
    return f"a C++ compiler (looked for {', '.join(names)}{', from CXX' if wanted else ''}); install g++ or set CXX"


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
