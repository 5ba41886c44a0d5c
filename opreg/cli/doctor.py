"""`opreg doctor`: what is installed, what that switches on or off, and what is broken."""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import footguns, start, table

KNOWN = {
    "jax": "call_jax and JAX kernels",
    "torch_xla": "XLA devices and TPU through PyTorch/XLA",
    "triton": "Triton kernels on cuda and xpu",
    "intel_extension_for_pytorch": "Intel's kernels on cpu; xpu works without it",
    "vllm_xpu_kernels": "Intel's fused kernels on xpu",
}
"""Optional packages and what they switch on. Those that registered kernels require are added as they are found."""

VARIABLES = (
    "OPREG_KERNELS",
    "OPREG_STRICT",
    "OPREG_NO_BUILD",
    "OPREG_CACHE_DIR",
    "OPREG_ALIAS_GUARD",
    "OPREG_GUARD",
    "CXX",
    "JAX_ENABLE_X64",
    "PJRT_DEVICE",
    "TORCHDYNAMO_AUTO_FUNCTIONALIZED_V2",
    "TORCH_LOGS",
    "NO_COLOR",
)


@dataclass(frozen=True)
class Package:
    """An optional package: version None where it is not installed; kernels are those that require it."""

    name: str
    version: str | None
    switches: str
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Plugin:
    """An installed op package: its entry point, how many ops it registered, and why it did not load."""

    name: str
    module: str
    distribution: str | None
    ops: int
    error: str | None


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        parents=[start.options()],
        help="versions, devices, optional packages, op packages, environment; exit 1 if something installed is broken",
    )
    parser.add_argument(
        "--split-on",
        action="append",
        default=[],
        metavar="OPS",
        help="names that you split graphs at, separated by commas: one that no operator has is a problem",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    loaded = start.load_ops(args.verbose)
    packages, plugins = find_packages(), find_plugins(loaded)
    split_on = [name for names in args.split_on for name in names.split(",") if name]
    problems, remarks = find_problems(plugins, split_on), footguns.remarks()
    if args.json:
        start.print_json(_json(packages, plugins, problems, remarks))
    else:
        print(*_text(packages, plugins, problems, remarks), sep="\n")
    return start.FAILED if problems else start.OK


def find_packages() -> list[Package]:
    """Optional packages, found without importing any of them."""
    from opreg import registry
    from opreg.requires import COMPILER, split

    needed: dict[str, list[str]] = {name: [] for name in KNOWN}
    for op in registry.all_ops():
        for kernel in op.kernels:
            for requirement in kernel.requires:
                if requirement == COMPILER:
                    continue  # no package
                module, _ = split(requirement, kernel.name)
                needed.setdefault(module.partition(".")[0], []).append(kernel.name)
    distributions = packages_distributions()
    return [
        Package(name, _version(name, distributions), KNOWN.get(name, ""), tuple(dict.fromkeys(kernels)))
        for name, kernels in needed.items()
    ]


def _version(module: str, distributions: Any) -> str | None:
    if find_spec(module) is None:
        return None
    # The index name differs from the module's for some (torch_xla is torch-xla): ask who installed the module.
    for distribution in distributions.get(module, [module]):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown version"


def find_plugins(loaded: dict[str, BaseException | None]) -> list[Plugin]:
    from opreg import registry

    from .facts import comes_from

    ops = registry.all_ops()
    plugins = []
    for point in registry.packages():
        error = loaded.get(point.name)
        words = None if error is None else f"{type(error).__name__}: {error}"
        dist = None if point.dist is None else f"{point.dist.name} {point.dist.version}"
        plugins.append(Plugin(point.name, point.value, dist, sum(comes_from(op, point) for op in ops), words))
    return plugins


def find_problems(plugins: list[Plugin], split_on: list[str]) -> list[str]:
    """What is installed or set, and broken. That something optional is absent is no problem."""
    problems = [f"op package '{p.name}' could not be loaded: {p.error}" for p in plugins if p.error is not None]
    if not plugins:
        problems.append("opreg itself is not installed, only importable, so no op package is found: pip install it")
    return [*problems, *footguns.problems(split_on)]


def _dotted(minor: tuple[int, int]) -> str:
    return f"{minor[0]}.{minor[1]}"


def _support() -> str:
    from opreg import _compat

    first, last = _compat.TESTED
    known = first <= _compat.torch_version() <= last
    return f"{'supported' if known else 'untested'} ({_dotted(first)} to {_dotted(last)})"


def _json(packages: list[Package], plugins: list[Plugin], problems: list[str], remarks: list[str]) -> dict[str, Any]:
    from torch.utils.collect_env import get_pretty_env_info

    from opreg import devices, guard

    return start.envelope(
        python=platform.python_version(),
        platform=platform.platform(),
        devices=devices.present(),
        compiler=footguns.compiler(),
        guard=guard.in_use(),
        packages=[asdict(package) for package in packages],
        plugins=[asdict(plugin) for plugin in plugins],
        environment={name: os.environ.get(name) for name in VARIABLES},
        problems=problems,
        remarks=remarks,
        collect_env=get_pretty_env_info(),
    )


def _text(packages: list[Package], plugins: list[Plugin], problems: list[str], remarks: list[str]) -> list[str]:
    import torch

    import opreg
    from opreg import devices, guard

    compiler = footguns.compiler()
    rows: list[tuple[str, ...]] = [
        (f"opreg {opreg.__version__}", str(Path(opreg.__file__).parent), f"python {platform.python_version()}"),
        (f"torch {torch.__version__}", _support(), f"devices: {' '.join(devices.present())}"),
        ("C++ compiler", compiler or "not found", "C++ kernels and Inductor on cpu" + ("" if compiler else " are off")),
        ("guard", guard.in_use(), "which eager calls go straight to the kernel"),
        *(_package_row(package) for package in packages),
    ]
    for i, plugin in enumerate(plugins):
        state = f"FAILED: {plugin.error}" if plugin.error else f"{plugin.ops} ops"
        rows.append(("plug-ins" if i == 0 else "", plugin.name, f"{state}   ({plugin.distribution or plugin.module})"))
    set_here = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    unset = " ".join(name for name in VARIABLES if name not in os.environ)
    rows.append(("environment", "   ".join([*set_here, f"unset: {unset}" if unset else ""])))
    lines = ["".join(row).rstrip() for row in table.columns(rows)]
    count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}:"
    verdict = [table.paint(count, "bad"), *(f"  {problem}" for problem in problems)]
    return [
        *lines,
        *(verdict if problems else [table.paint("no problems", "good")]),
        *(f"remark: {remark}" for remark in remarks),
        "for an issue: opreg doctor --json",
    ]


def _package_row(package: Package) -> tuple[str, str, str]:
    what = ": ".join(filter(None, (package.switches, " ".join(package.kernels))))
    if package.version is None:
        return package.name, "not installed", f"off: {what}"
    return f"{package.name} {package.version}", "installed", what
