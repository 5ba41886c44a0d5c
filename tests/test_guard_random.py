"""Random ops in random surroundings: the function that register_op returns against the operator itself.

Whatever a call's tensors are and whatever is active around it, both must give the same results, write the same values,
count the same writes, pass the same gradients, be recorded alike by modes, tracers and profilers, or fail with the same
error.
"""

import concurrent.futures
import contextlib
import gc
import itertools
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opreg import guard, guard_build, register_op

from .corpus.tensors import NOTES, TENSORS, Wrapped, data

_serial = itertools.count()
KINDS = ("Tensor", "Tensor | None", "list[Tensor]", "int", "float", "bool", "str", "int | None", "float | None")


class Made:
    """An op with a random signature, and how to make arguments for it."""

    def __init__(self, rng: random.Random, label: str) -> None:
        self.kinds = ["Tensor", *(rng.choice(KINDS) for _ in range(rng.choice((0, 1, 2, 4, 8))))]
        self.keyword = rng.randrange(1, len(self.kinds) + 1)
        tensors = [i for i, kind in enumerate(self.kinds) if kind.startswith("Tensor") and kind == "Tensor"]
        self.mutates = rng.sample(tensors, rng.randint(1, len(tensors))) if rng.random() < 0.4 else []
        parameters = [f"a{i}: {kind}" for i, kind in enumerate(self.kinds)]
        parameters.insert(self.keyword, "*")
        adds = [self._adds(f"a{i}", kind) for i, kind in enumerate(self.kinds) if i not in self.mutates]
        lines = ["total = torch.ones_like(a0)" if self.mutates else "total = a0 * 2", *filter(None, adds)]
        if self.mutates:
            lines += [f"a{i}.mul_(0.5).add_({i + 1})" for i in self.mutates]
        self.results = 0 if self.mutates else rng.choice((1, 1, 2))
        values = {0: "None", 1: "Tensor", 2: "tuple[Tensor, Tensor]"}[self.results]
        lines += {0: [], 1: ["return total"], 2: ["return total, total + 1"]}[self.results]
        name = f"op_{next(_serial)}"
        if self.keyword == len(self.kinds):
            parameters.pop()
        source = f"def {name}({', '.join(parameters)}) -> {values}:\n" + "".join(f"    {line}\n" for line in lines)
        names: dict[str, Any] = {"torch": torch, "Tensor": Tensor, "__name__": __name__}
        exec(source, names)
        self.source = source
        self.unseen = set() if guard.native() is not None else UNSEEN
        self.op = register_op(f"t_guard_random_{label}::{name}", mutates_args=[f"a{i}" for i in self.mutates])(
            names[name]
        )
        only_tensors = all(kind == "Tensor" for kind in self.kinds) and self.keyword == len(self.kinds)
        self.rules = "none"
        if not self.mutates and self.results == 1 and only_tensors and rng.random() < 0.6:
            self.rules = "formula and batching rule"
            count = len(self.kinds)
            self.op.register_autograd(lambda ctx, grad: tuple(grad * (i + 2) for i in range(count)))
            self.op.register_vmap(
                lambda info, dims, *args: (self.op(*args) + 1, next(d for d in dims if d is not None))
            )

    @staticmethod
    def _adds(name: str, kind: str) -> str:
        if kind == "Tensor | None":
            return f"if {name} is not None: total = total + {name}"
        if kind == "list[Tensor]":
            return f"for item in {name}: total = total + item"
        if kind == "Tensor":
            return f"total = total + {name}" if name != "a0" else ""
        return f"total = total + (len({name}) if isinstance({name}, str) else 0 if {name} is None else {name})"

    def arguments(self, seed: int) -> tuple[list[Any], dict[str, Any]]:
        """New objects with the same values for the same seed."""
        rng = random.Random(seed)
        # Most calls have one strange tensor at most; with more of them both ways fail before anything of interest.
        usual = rng.choice(("plain", "plain", "plain", *(name for name in TENSORS if name not in self.unseen)))
        values: list[Any] = []
        for kind in self.kinds:
            strange = usual if rng.random() < 0.4 else "plain"
            values.append(self._value(rng, kind, strange))
        if rng.random() < 0.1 and len(values) > 1 and self.kinds[0] == self.kinds[1] and not self.mutates:
            values[1] = values[0]  # one tensor twice
        return values[: self.keyword], {f"a{i}": v for i, v in enumerate(values) if i >= self.keyword}

    def _value(self, rng: random.Random, kind: str, strange: str) -> Any:
        if "Tensor" in kind and rng.random() < 0.01:
            return rng.choice((None, 3, "text", [1], object))
        if kind == "list[Tensor]":
            return [TENSORS[strange](data(rng)) for _ in range(rng.choice((0, 1, 3)))]
        if kind.endswith("None") and rng.random() < 0.4:
            return None
        if kind.startswith("Tensor"):
            return TENSORS[strange](data(rng))
        return {"int": 3, "float": 0.5, "bool": True, "str": "text"}[kind.split(" ", 1)[0]]


# What Python's guard takes for plain tensors, and the operator resolves. Not among the tensors above: wrappers of
# functionalization, mkldnn and nested tensors, with which one run in several ends in a segmentation fault inside a
# torch operator of the body that the dispatcher has called.
UNSEEN = {"conjugate", "negative"}


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        NOTES.append(("function mode", getattr(func, "__name__", str(func))))
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        NOTES.append(("dispatch mode", str(func)))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _profiled() -> Iterator[None]:
    with torch.autograd.profiler.profile() as profile:
        yield
    NOTES.extend(event.name for event in profile.function_events)


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """A mode on another thread, which is none of ours."""
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        with Dispatches(), torch.no_grad():
            inside.set()
            done.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def _hooks() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (NOTES.append("saved"), x)[1], lambda x: x):
        yield


KEYS = torch._C.DispatchKeySet
CONTEXTS: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "not inference": lambda: torch.inference_mode(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "functions": Functions,
    "dispatches": Dispatches,
    "default device": lambda: torch.device("cpu"),
    "profiler": _profiled,
    "elsewhere": _elsewhere,
    "saved tensors": _hooks,
    "dual level": forward_ad.dual_level,
    "fake mode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "no subclass functions": torch._C.DisableTorchFunctionSubclass,
    "no functions": torch._C.DisableTorchFunction,
    "python dispatcher": torch._dispatch.python.enable_python_dispatcher,
    "below autograd": torch._C._AutoDispatchBelowAutograd,
    "no autocast keys": lambda: torch._C._ExcludeDispatchKeyGuard(KEYS(torch._C.DispatchKey.AutocastCPU)),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "no modes": lambda: torch.utils._python_dispatch._disable_current_modes(),
}
Call = Callable[..., Any]


def _jit(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    traced = torch.jit.trace(lambda a: call(a, *args[1:], **kwargs), (args[0],), check_trace=False)
    return [traced(args[0]), sorted({node.kind() for node in traced.graph.nodes()})]


def _make_fx(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return make_fx(lambda a: call(a, *args[1:], **kwargs))(args[0]).code


def _vmap(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return torch.func.vmap(lambda a: call(a, *args[1:], **kwargs))(args[0])


def _vjp(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    out, back = torch.func.vjp(lambda a: call(a, *args[1:], **kwargs), args[0])
    return [out, back(torch.ones_like(out))] if isinstance(out, Tensor) else out


def _jvp(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return torch.func.jvp(lambda a: call(a, *args[1:], **kwargs), (args[0],), (torch.ones_like(args[0]),))


def _inside_vmap(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """A transform is active, and the op's own tensors are none of its business."""
    return torch.func.vmap(lambda a: (a, call(*args, **kwargs))[0])(torch.ones(2))


def _backward(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    out = call(*args, **kwargs)
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_leaf and t.requires_grad]
    wanted = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    if not leaves or not wanted:
        return out
    return [out, torch.autograd.grad([t.sum() for t in wanted], leaves, allow_unused=True)]


TRANSFORMS: dict[str, Callable[[Call, list[Any], dict[str, Any]], Any]] = {
    "call": lambda call, args, kwargs: call(*args, **kwargs),
    "backward": _backward,
    "jit.trace": _jit,
    "make_fx": _make_fx,
    "vmap": _vmap,
    "vjp": _vjp,
    "jvp": _jvp,
    "inside vmap": _inside_vmap,
}


def _describe(value: Any) -> Any:
    """What two results must have in common."""
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if not isinstance(value, Tensor):
        return repr(value)
    with torch._C.DisableTorchFunction(), torch.no_grad():
        facts = [type(value).__name__, value.dtype, value.device.type, value.layout, value.requires_grad]
        facts += [value.is_inference(), value.grad_fn is not None, value.is_conj(), value.is_neg()]
        if isinstance(value, Wrapped):
            return [facts, _describe(value.inner)]
        facts.append(tuple(value.shape))
        if value.is_meta or isinstance(value, FakeTensor):
            return facts
        if value.layout is torch.strided:
            facts.append(value.stride())
        if value.layout is torch.strided:
            value = value.as_subclass(Tensor).resolve_conj().resolve_neg()
        return [facts, value.to_dense().clone().tolist()]


def _versions(values: Any) -> list[int]:
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    return [-1 if t.is_inference() else t._version for t in tensors]


def _keys() -> tuple[int, int]:
    """The dispatch keys that this thread adds to those of the tensors, and takes away."""
    return torch._C._dispatch_tls_local_include_set().raw_repr(), torch._C._dispatch_tls_local_exclude_set().raw_repr()


def _outcome(made: Made, call: Call, seed: int, contexts: list[str], inside: bool, transform: str) -> Any:
    """What a call comes to, described, and whether it left the thread's dispatch keys other than they were.

    torch 2.13 itself does that in some failing calls: `torch.mul(fake, real)` in a dual level shows the real tensor in
    its error, asks it for a tangent, fails, and leaves autograd switched off. So the keys are put back after each call.
    """
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude):
        before = _keys()
        came_to = _what_comes(made, call, seed, contexts, inside, transform)
        return (*came_to, "keys changed" if _keys() != before else "keys kept")


def _what_comes(made: Made, call: Call, seed: int, contexts: list[str], inside: bool, transform: str) -> Any:
    NOTES.clear()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        args, kwargs = ([], {}) if inside else made.arguments(seed)
        try:
            for name in contexts:
                stack.enter_context(CONTEXTS[name]())
            if inside:
                args, kwargs = made.arguments(seed)
            before = _versions((args, kwargs))
            result = TRANSFORMS[transform](call, args, kwargs)
            after = _versions((args, kwargs))
            stack.close()
            written = [new - old for new, old in zip(after, before, strict=True)]
            return "fine", _describe(result), _describe((args, list(kwargs.values()))), written, _plain(NOTES)
        except Exception as error:
            # Where an object lies, which some messages say, may be the same twice and another the third time.
            return "error", type(error).__name__, re.sub("0x[0-9a-f]+", "0x", str(error))


def _plain(notes: list[Any]) -> list[str]:
    # In a dual level the function asks its tensors for tangents, which profilers and wrappers see.
    asked = ("aten.alias", "aten._unpack_dual", "'aten::")
    return [text for text in map(repr, notes) if not any(part in text for part in asked)]


def _differ(made: Made, rng: random.Random) -> tuple[str | None, bool]:
    """What differs between the two ways in one random call, and whether it was one that ends well."""
    seed, inside = rng.randrange(1 << 30), rng.random() < 0.2
    contexts = rng.sample(sorted(CONTEXTS), rng.choice((0, 1, 1, 2)))
    transform = "call" if rng.random() < 0.5 else rng.choice(("backward", "backward", *sorted(TRANSFORMS)))
    if transform not in ("call", "backward") and not all(map(_is_simple, tree_leaves(made.arguments(seed)))):
        return None, False  # transforms are not made for these: torch ends in crashes on the operator's path
    # The operator first and last: what differs from itself tells nothing of the guard.
    through, direct, again = (
        _outcome(made, call, seed, contexts, inside, transform)
        for call in (made.op.overload, made.op, made.op.overload)
    )
    if direct[:2] == ("error", "AutogradError") and "dual tensor" in direct[2] and transform == "jvp":
        return None, False  # only the function sees such a tangent: it is gone before the operator's own code runs
    if through == direct or through != again:
        return None, through[0] == "fine"
    return (
        f"{transform} under {contexts}{' with arguments made inside' if inside else ''}, seed {seed}\n"
        f"rules: {made.rules}\n{made.source}arguments: {_describe(list(made.arguments(seed)[0]))}\n"
        f"operator: {through}\nfunction: {direct}"
    ), True


def _is_simple(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return True
    return value.layout is torch.strided and not value.is_meta and not isinstance(value, FakeTensor)


def _warm(made: Made) -> None:
    """Let the op's functions be written and its kernel chosen."""
    seeds = (seed for seed in itertools.count() if _outcome(made, made.op, seed, [], False, "call")[0] == "fine")
    for seed in itertools.islice(seeds, 2):
        _outcome(made, made.op, seed, [], False, "call")


def _search(label: str, seed: int, ops: int, calls: int) -> tuple[list[str], int]:
    """The differences found, and how many calls ended well.

    In a thread of its own: errors inside contexts leave cycles that hold guards of dispatch keys, and the thread that
    collects them gets the keys of that moment back.
    """

    def work() -> tuple[list[str], int]:
        try:
            return _search_here(label, seed, ops, calls)
        finally:
            gc.collect()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _search_here(label: str, seed: int, ops: int, calls: int) -> tuple[list[str], int]:
    found, fine = [], 0
    rng = random.Random(seed)
    for _ in range(ops):
        made = Made(rng, label)
        _warm(made)
        for _ in range(calls):
            text, well = _differ(made, rng)
            fine += well
            if text is not None:
                found.append(text)
    return found, fine


def _use(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_loaded", ["the test's choice"] if kind == "python" else [])
    if kind == "native":
        guard_build.build()
        assert guard.native() is not None, guard.in_use()


@pytest.mark.parametrize("kind", ["python", "native"])
def test_random_calls_mean_what_the_operator_means(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(kind, monkeypatch)
    found, fine = _search(kind, seed=0, ops=15, calls=50)
    assert not found, found[0]
    assert fine > 250  # else the search looks at nothing but errors


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", ["python", "native"])
def test_many_more_of_them(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(kind, monkeypatch)
    found, _ = _search(f"{kind}_{seed}", seed=1000 + seed, ops=6, calls=60)
    assert not found, found[0]
