"""Known ways in which an environment goes wrong without a word: each is named with its cure, for `opreg doctor`.

A problem is broken and makes the command fail; a remark is worth knowing. Nothing is imported to find out: packages are
looked up, and modules are asked only where the process has loaded them already.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PRIVATE_USE_1 = {
    "torch_npu": "npu",
    "torch_tpu": "tpu",
    "torch_musa": "musa",
    "torch_mlu": "mlu",
    "torch_openreg": "openreg",
    "torchax": "jax",
}
"""Packages that take torch's one free device key when they are imported, and the name they give it."""

OLDEST_JAX = (0, 7)
"""The oldest jax that opreg's bridge is tested with."""


def problems(split_on: Sequence[str] = ()) -> list[str]:
    """Everything that is broken here."""
    return [
        *_functionalization(),
        *_compiler(),
        *_swallowed_flax(),
        *_private_use(),
        *_old_versions(),
        *_mismatched_xla(),
        *_names(split_on),
    ]


def remarks() -> list[str]:
    """What works, but not as one may think."""
    return [*_x64(), *_new_versions()]


def _functionalization() -> Iterator[str]:
    name = "TORCHDYNAMO_AUTO_FUNCTIONALIZED_V2"
    config = sys.modules.get("torch._inductor.config")
    forced = os.environ.get(name, "1") != "1"
    if forced or (config is not None and not config.enable_auto_functionalized_v2):
        cure = f"unset {name}" if forced else "leave torch._inductor.config.enable_auto_functionalized_v2 at True"
        yield (
            "auto_functionalized v1 is forced: compiled graphs then copy the whole of a tensor where an op writes a "
            f"slice of it; {cure}"
        )


def compiler() -> str | None:
    """The C++ compiler that Inductor, the C++ kernels and the native guard call."""
    from opreg import guard_build

    return guard_build.compiler()


def _compiler() -> Iterator[str]:
    if compiler() is not None:
        return
    wanted = os.environ.get("CXX")
    what = f"CXX is {wanted!r}, which is no program here" if wanted else "there is no C++ compiler"
    cure = "unset CXX, or name an installed compiler" if wanted else "install g++ (apt-get install g++), or set CXX"
    yield f"{what}: torch.compile on the CPU fails, and opreg's C++ kernels are off; {cure}"


def _swallowed_flax() -> Iterator[str]:
    """The wheel of torch_xla 2.9 brings its own torchax 0.0.6, which imports flax; torchax 0.0.7 no longer does."""
    absent = any(find_spec(name) is None for name in ("torch_xla", "torchax"))
    if absent or find_spec("flax") is not None:
        return
    try:
        parts = [int(part) for part in version("torchax").split(".")[:3]]
    except (PackageNotFoundError, ValueError):
        parts = []  # not installed as a package of its own: it came with torch_xla
    if parts < [0, 0, 7]:
        yield (
            "torch_xla's own copy of torchax imports flax, which is not installed, and torch_xla swallows that error: "
            "its call_jax then says 'Jax is required for this feature'; pip install --no-deps 'torchax>=0.0.7', or "
            "pip install flax"
        )


def _private_use() -> Iterator[str]:
    import torch

    found = [package for package in PRIVATE_USE_1 if find_spec(package) is not None]
    taken = torch._C._get_privateuse1_backend_name()
    if len(found) > 1:
        yield (
            f"{' and '.join(found)} are installed, and each takes torch's one PrivateUse1 device "
            f"({', '.join(PRIVATE_USE_1[package] for package in found)}): the second one imported fails; keep one of "
            "them in this environment, or never import both (TORCH_DEVICE_BACKEND_AUTOLOAD=0 stops torch from doing it)"
        )
    elif found and taken not in ("privateuseone", PRIVATE_USE_1[found[0]]):
        yield (
            f"torch's one PrivateUse1 device is taken by '{taken}', so importing {found[0]} fails; keep one of the two "
            "in this environment"
        )


def _minor(package: str) -> tuple[int, int] | None:
    try:
        found = re.match(r"(\d+)\.(\d+)", version(package))
    except PackageNotFoundError:
        return None
    return None if found is None else (int(found[1]), int(found[2]))


def _old_versions() -> Iterator[str]:
    from opreg import _compat

    first, last = _compat.TESTED
    if _compat.torch_version() < first:
        yield (
            f"torch {_dotted(_compat.torch_version())} is older than {_dotted(first)}, the oldest that opreg is tested "
            f"with: pip install 'torch=={_dotted(last)}.*'"
        )
    jax = _minor("jax")
    if jax is not None and jax < OLDEST_JAX:
        yield f"jax {_dotted(jax)} is older than {_dotted(OLDEST_JAX)}, which call_jax needs: pip install -U jax"


def _new_versions() -> Iterator[str]:
    from opreg import _compat

    first, last = _compat.TESTED
    if _compat.torch_version() > last:
        yield (
            f"torch {_dotted(_compat.torch_version())} is newer than any that opreg is tested with "
            f"({_dotted(first)} to {_dotted(last)}); if something fails, try pip install 'torch=={_dotted(last)}.*'"
        )


def _mismatched_xla() -> Iterator[str]:
    from opreg import _compat

    xla = _minor("torch_xla")
    if xla is not None and xla != _compat.torch_version():
        yield (
            f"torch_xla {_dotted(xla)} works with torch {_dotted(xla)} only, and this is torch "
            f"{_dotted(_compat.torch_version())}; pip install 'torch=={_dotted(xla)}.*'"
        )


def _x64() -> Iterator[str]:
    import torch

    from opreg import registry

    jax = sys.modules.get("jax")
    on = os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true", "yes", "on")
    if find_spec("jax") is None or (jax.config.jax_enable_x64 if jax is not None else on):
        return
    wide = (torch.int64, torch.float64, torch.complex128)
    ops = [
        op.name
        for op in registry.all_ops()
        if any(arg.dtype in wide for arg in op.spec.args) or any(result.dtype in wide for result in op.spec.returns)
        if any(re.match(r"jax(?![\w.])", needed) for kernel in op.kernels for needed in kernel.requires)
    ]
    if ops:
        yield (
            f"jax's x64 mode is off, and {', '.join(ops)} take 64-bit tensors to jax: call_jax and from_jax turn it on "
            "for such calls, a kernel that calls jax itself gets 32 bits without a word; set JAX_ENABLE_X64=1 for those"
        )


def _names(split_on: Sequence[str]) -> Iterator[str]:
    """Lists of ops in which a name means nothing: OPREG_KERNELS, and what the user splits graphs at."""
    from opreg import graph_ops, registry, select
    from opreg.errors import OpregError

    try:
        forced = select.environment()
    except OpregError as error:
        yield str(error)
        forced = {}
    for name, kernel in forced.items():
        try:
            select.kernel_named(registry.get(name), kernel)
        except OpregError as error:
            yield f"OPREG_KERNELS: {error}"
    for name in split_on:
        try:
            graph_ops.targets_of([name])
        except OpregError as error:
            yield f"--split-on: {error}"


def _dotted(minor: tuple[int, int]) -> str:
    return f"{minor[0]}.{minor[1]}"
