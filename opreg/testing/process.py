"""What a kernel changes in the process it runs in: modes, defaults, generators. Found, and put back after each call."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _numpy() -> Any:
    """numpy, where the process uses it already; asking for it must not import it."""
    return sys.modules.get("numpy")


def _numpy_state() -> tuple[Any, ...] | None:
    if _numpy() is None:
        return None
    name, key, *rest = _numpy().random.get_state()
    return (name, key.tobytes(), *rest)  # bytes, which compare at once


def _set_numpy_state(state: tuple[Any, ...] | None) -> None:
    if state is not None:
        name, key, *rest = state
        _numpy().random.set_state((name, _numpy().frombuffer(key, _numpy().uint32), *rest))


def _set_environment(values: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


def _matmul_precision() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch 2.9 says once per process that there are newer settings
        return torch.get_float32_matmul_precision()


def _set_matmul_precision(precision: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.set_float32_matmul_precision(precision)


_STATE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "float32 matmul precision": (_matmul_precision, _set_matmul_precision),
    "choice of deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        lambda on: torch.use_deterministic_algorithms(on, warn_only=True),
    ),
    "use of oneDNN": (lambda: torch.backends.mkldnn.enabled, lambda on: torch.backends.mkldnn.set_flags(on)),
    "working folder": (os.getcwd, os.chdir),
    "environment variables": (lambda: dict(os.environ), _set_environment),
    "state of Python's random numbers": (random.getstate, random.setstate),
    "state of numpy's random numbers": (_numpy_state, _set_numpy_state),
}
"""Name -> (get, set) of what belongs to the whole process or thread. torch's own generator is looked at by `repeat`."""


_COSTLY = {"environment variables", "state of Python's random numbers", "state of numpy's random numbers"}
"""0.5 ms together: looked at once per op, not around every call."""


def snapshot(everything: bool = True) -> dict[str, Any]:
    return {name: get() for name, (get, _) in _STATE.items() if everything or name not in _COSTLY}


def changes(before: dict[str, Any]) -> list[str]:
    """'grad mode (False became True)' of everything that is no longer as in `before`."""
    found = []
    for name, (get, _) in _STATE.items():
        now = get()
        if now != before[name]:
            short = isinstance(now, (bool, int, str, torch.dtype, torch.device))
            found.append(f"{name} ({before[name]} became {now})" if short else name)
    return found


def put_back(before: dict[str, Any]) -> None:
    for name, old in before.items():
        get, set_ = _STATE[name]
        if get() != old:
            set_(old)


def seed_others() -> None:
    """Seed the generators that are not torch's, with a number that no kernel chooses: one that seeds them in each call
    leaves them as it found them."""
    random.seed(60493)
    if _numpy() is not None:
        _numpy().random.seed(60493)


@contextmanager
def kept(everything: bool = False) -> Iterator[None]:
    """Whatever the block changes of the process is put back."""
    before = snapshot(everything)
    try:
        yield
    finally:
        put_back(before)
