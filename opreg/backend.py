"""torch.compile(backend="opreg"): split at attention, compile each distinct piece once, run the rest as it is."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opreg import _compat
from opreg.backend_artifacts import artifacts_checked, unwritable_cache
from opreg.backend_cpp import kernels_built_together
from opreg.backend_inductor import compile_piece
from opreg.backend_sizes import Compile, SizeError, Variant, compile_variant, dispatch, plan_points, plan_variants
from opreg.cudagraph_device import DEVICES, Device
from opreg.cudagraphs import Captures
from opreg.errors import OpregError, listing, nearest
from opreg.garbage import rare_collections
from opreg.graph import SplitGraph, split_graph
from opreg.graph_lift import Lifted
from opreg.graph_ops import value_of
from opreg.graph_report import Report

log = logging.getLogger("opreg")
OPTIONS = ("inner", "split_on", "sizes", "ranges", "cudagraphs")
_REPORTS: deque[Report] = deque(maxlen=64)


class BackendError(OpregError, ValueError):
    """An option of torch.compile(backend="opreg") that does not exist or cannot be used."""


def reports() -> list[Report]:
    """Reports of the graphs compiled by this process, oldest first, at most the last 64."""
    return list(_REPORTS)


def last_report() -> Report:
    """The report of the graph compiled last.

    Raises BackendError when nothing has been compiled with backend="opreg" yet."""
    if not _REPORTS:
        raise BackendError(
            'opreg.backend: nothing is compiled yet; call a model made with torch.compile(model, backend="opreg").'
        )
    return _REPORTS[-1]


def opreg_backend(gm: GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None = None) -> Any:
    """Compile a Dynamo graph piece by piece.

    options: "inner" is what compiles a piece: "inductor" (default), "aot_eager", "eager", the name of any other Dynamo
        backend, or a function (gm, example_inputs) -> callable. "split_on" is what split_graph splits at; default
        splitting_ops(). "sizes" is a list of sizes, and "ranges" a list of pairs (first, last), to compile every piece
        for besides the general case, where the graph has dynamic sizes; with several of those, a mapping from what the
        size is called, "x.size(0)", to such a list. The most special variant that fits is run; a graph without dynamic
        sizes has no variants. "cudagraphs" records compiled pieces as CUDA graphs and replays them: for the "sizes"
        with True, else for a list or mapping like those; other sizes are padded to the next one where rows cannot see
        each other, and run unrecorded elsewhere. For inference on a GPU only.
    Raises BackendError for an option that does not exist, UnknownOpError for an op that does not."""
    chosen = dict(options or {})
    for key in chosen:
        if key not in OPTIONS:
            raise BackendError(
                f'torch.compile(backend="opreg"): there is no option {key!r}.{nearest(key, OPTIONS)} '
                f"Options: {listing(OPTIONS)}."
            )
    inner = chosen.get("inner", "inductor")
    compiler = _inner_compiler(inner)
    mode = _ensure_values(gm, example_inputs)
    split = split_graph(gm, on=chosen.get("split_on"), lift=True)
    try:
        variants = plan_variants(split, chosen.get("sizes"), chosen.get("ranges"))
        asked = chosen.get("cudagraphs")
        points = plan_points(split, asked, chosen.get("sizes")) if asked else []
    except SizeError as error:
        raise BackendError(f'torch.compile(backend="opreg"): {error}') from None
    recording = _device_of(split, example_inputs) if points else None
    report = split.report()
    report.inner = inner if isinstance(inner, str) else getattr(inner, "__name__", repr(inner))
    _REPORTS.append(report)
    log.info("%s", report.summary())
    unsure = _given_by_ops(split)

    def compile_one(index: int, module: GraphModule, values: list[Any]) -> Callable[..., Any]:
        lowered = compiler is not _as_it_is and not _compat.compiles_pieces_of_dtensors()
        if lowered and any(is_traceable_wrapper_subclass(value) for value in values):
            raise BackendError(
                'torch.compile(backend="opreg"): a piece takes a DTensor, which torch before 2.10 cannot compile '
                'there; use torch 2.10 or later, hand local tensors to the model, or options={"inner": "eager"}'
            )
        if compiler is compile_piece:
            # Inductor's own CUDA graphs would be recorded inside of ours.
            return compile_piece(module, values, checked=index not in unsure, own_graphs=recording is None)
        # A compiler may keep `module.forward`, which should then be the module's code and not what writes it.
        _LazyGraphModule.force_recompile(module)
        run: Callable[..., Any] = compiler(module, values)
        return run

    with contextlib.ExitStack() as stack:
        stack.enter_context(rare_collections())
        if compiler is compile_piece:
            stack.enter_context(_cache_explained())
            stack.enter_context(kernels_built_together())
            stack.enter_context(artifacts_checked())
        _compile_pieces(split, report, compile_one, mode)
        special = _compile_variants(split, report, compile_one, mode, variants)
        if compiler is compile_piece:
            _show("opreg: building the kernels of all pieces")
    _show("")
    made = [(variant, split.function_of(split.runs(runs))) for variant, runs in special]
    if recording is not None:
        made = [*_recorded(split, report, points, special, *recording), *made]
    run = dispatch(split, made) if made else split.function()
    for note in report.notes:
        log.warning("%s", note)
    return run


@contextlib.contextmanager
def _cache_explained() -> Iterator[None]:
    """Inside, an error of Inductor's says so where it comes of a cache folder that nothing can be written to."""
    try:
        yield
    except Exception as error:
        where = unwritable_cache()
        if not where:
            raise
        raise BackendError(
            f'torch.compile(backend="opreg"): Inductor keeps what it compiles in a folder that cannot be written to: '
            f"{where}. Set the environment variable TORCHINDUCTOR_CACHE_DIR to one that can."
        ) from error


def _as_it_is(module: GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
    run: Callable[..., Any] = module.forward
    return run


def _inner_compiler(inner: Any) -> Callable[..., Any]:
    """The function (module, values) -> callable that compiles one piece."""
    if callable(inner):
        made: Callable[..., Any] = inner
        return made
    if inner == "eager":
        return _as_it_is
    if inner == "inductor":
        return compile_piece
    from torch._dynamo.backends.registry import list_backends, lookup_backend

    known = list_backends(exclude_tags=())
    if inner not in known or inner == "opreg":
        raise BackendError(
            f'torch.compile(backend="opreg"): option "inner" is {inner!r}, which is no backend that could compile a '
            f"piece.{nearest(str(inner), known)} Give inductor, aot_eager, eager, another of "
            f"torch._dynamo.list_backends() or a callable."
        )
    found: Callable[..., Any] = lookup_backend(inner)
    return found


def _ensure_values(gm: GraphModule, example_inputs: Sequence[Any]) -> FakeTensorMode | None:
    """The fake mode of the graph's values; a graph that carries none is run once on fake inputs to get them."""
    values = [value_of(n) for n in gm.graph.nodes if n.op == "placeholder"]
    # Not the tracing context's mode: Dynamo before 2.10 puts a fresh one there while the graph's values keep theirs.
    modes = [v.fake_mode for v in values if isinstance(v, FakeTensor)]
    if all(v is not None for v in values):
        return modes[0] if modes else None
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = torch._guards.detect_fake_mode(list(example_inputs)) or FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(gm, mode).propagate(*example_inputs)
    return mode


def _given_by_ops(split: SplitGraph) -> set[int]:
    """Distinct pieces that hold or take what a registered op returned: it may differ from what the fake promised."""
    found: set[int] = set()
    for piece in split.pieces:
        if split.same[piece.index] == piece.index and any(split.keys.is_custom(step) for step in piece.steps):
            found.add(piece.index)
        for node in piece.inputs:
            home = None if isinstance(node, Lifted) else split.plan.piece_of.get(node)
            if home is not None and split.pieces[home].split:
                found.add(split.same[piece.index])
    return found


def _compile_pieces(split: SplitGraph, report: Report, compile_one: Compile, mode: FakeTensorMode | None) -> None:
    likes = Counter(split.same)
    for done, (index, module) in enumerate(split.modules.items(), 1):
        start = time.perf_counter()
        ops, total = len(split.pieces[index].nodes), len(split.modules)
        _show(f"opreg: compiling piece {done} of {total} ({ops} ops, runs {likes[index]} times)")
        # Each piece has a context of its own: AOTAutograd leaves facts about the graph it compiled in it (fw_metadata,
        # params_flat), and those of one piece must not reach the next. Guards on sizes live in the shared shape env.
        with tracing(TracingContext(mode)):
            values = [value_of(n) for n in module.graph.nodes if n.op == "placeholder"]
            split.use(index, compile_one(index, module, values))
        report.seconds[index] = time.perf_counter() - start
        log.info(
            "compiled piece %d (%d of %d, %d ops, runs %d times) in %.2f s",
            index,
            done,
            total,
            ops,
            likes[index],
            report.seconds[index],
        )
    _show("")


def _show(text: str) -> None:
    """What is being compiled, on one line of a terminal that the next text replaces; nothing anywhere else."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


Special = list[tuple[Variant, dict[int, Any]]]


def _compile_variants(
    split: SplitGraph, report: Report, compile_one: Compile, mode: FakeTensorMode | None, variants: list[Variant]
) -> Special:
    made: Special = []
    for variant in variants:
        start = time.perf_counter()
        _show(f"opreg: compiling for {variant.text}")
        with tracing(TracingContext(mode)):
            runs, notes = compile_variant(split, variant, compile_one)
        made.append((variant, runs))
        report.notes += tuple(notes)
        report.variants += (variant.text,)
        log.info("compiled for %s in %.2f s", variant.text, time.perf_counter() - start)
        _show("")
    return made


def _device_of(split: SplitGraph, example_inputs: Sequence[Any]) -> tuple[Device, str]:
    """What records pieces here, and its device type. Raises BackendError where nothing can."""
    there = {kind: device for kind, device in DEVICES.items() if device.available()}
    if not there:
        raise BackendError(
            'torch.compile(backend="opreg"): option "cudagraphs" needs a GPU, and torch.cuda.is_available() is False. '
            "Leave the option out on this machine."
        )
    if torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in example_inputs):
        raise BackendError(
            'torch.compile(backend="opreg"): option "cudagraphs" is for inference, and gradients are wanted here. Call '
            "the model under torch.no_grad() or torch.inference_mode()."
        )
    values = [value_of(n) for piece in split.pieces for n in piece.inputs]
    used = Counter(v.device.type for v in values if isinstance(v, torch.Tensor) and v.device.type in there)
    kind = used.most_common(1)[0][0] if used else next(iter(there))
    return there[kind], kind


def _recorded(
    split: SplitGraph, report: Report, points: list[Variant], special: Special, device: Device, kind: str
) -> list[tuple[Variant, Callable[..., Any]]]:
    """The functions for sizes at which pieces are recorded and replayed."""
    captures = Captures(split, device, kind)
    made: list[tuple[Variant, Callable[..., Any]]] = []
    for point in points:
        sizes = {symbol: high for symbol, (_, high) in point.bounds}
        exact = tuple((symbol, (high, high)) for symbol, high in sizes.items())
        runs = next((runs for variant, runs in special if set(variant.bounds) == set(exact)), {})
        made.append((point, captures.function(sizes, point.text, runs, pad=bool(sizes))))
    report.recorded = tuple(captures.lines)
    return made
