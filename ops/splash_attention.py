"""opreg::splash_attention: attention that skips blocks that no row sees, and its gradients without a second pass."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import from_jax, like, register_op

from .splash_attention_gradients import gradients


@register_op("opreg::splash_attention")
def splash_attention(
    q: Annotated[Tensor, "b h n d"],
    k: Annotated[Tensor, "b g m d"],
    v: Annotated[Tensor, "b g m e"],
    q_segments: Annotated[Tensor, "b n"] | None = None,
    kv_segments: Annotated[Tensor, "b m"] | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[Annotated[Tensor, "b h n e"], Annotated[Tensor, "b h n"]]:
    """Attention over a dense batch, masked by position and by segment (Dao 2023, algorithm 1; jax's splash attention).

    Row i stands at place p = i + m - n, so that the last row sees the last key. It sees key j if all of these hold:

        j <= p (causal),  |j - p| < window (with a window),  kv_segments[j] == q_segments[i] (with segments)
        s[j] = cap(scale * <q, k[j]>),   cap(x) = soft_cap * tanh(x / soft_cap) if soft_cap is given
        out  = sum_j exp(s[j] - lse) v[j],   lse = log sum_j exp(s[j])

    q: query head h reads key head h // (h heads // g heads).
    q_segments, kv_segments: integers, both or none. scale: None means 1/sqrt(d). soft_cap: positive, any float.

    Returns out, in q's dtype, and lse, in float32 (float64 for float64); both have gradients. A row that sees nothing
    has out 0 and lse -inf.
    Raises ValueError for heads that do not divide, one segment tensor of two, a window below 1, a soft_cap not above 0.
    """
    ...


@splash_attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    # A contract can say "float32" or "like q", but not "float32 or wider".
    lse = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=lse)


@register_op("opreg::splash_attention_backward")
def splash_attention_backward(
    grad_out: Annotated[Tensor, "b h n e"],
    grad_lse: Annotated[Tensor, "b h n"],
    q: Annotated[Tensor, "b h n d"],
    k: Annotated[Tensor, "b g m d"],
    v: Annotated[Tensor, "b g m e"],
    out: Annotated[Tensor, "b h n e"],
    lse: Annotated[Tensor, "b h n"],
    q_segments: Annotated[Tensor, "b n"] | None = None,
    kv_segments: Annotated[Tensor, "b m"] | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[
    Annotated[Tensor, "b h n d", like("q")],
    Annotated[Tensor, "b g m d", like("k")],
    Annotated[Tensor, "b g m e", like("v")],
]:
    """Gradients of opreg::splash_attention, without a second forward pass (Dao 2023, algorithm 2).

    With p[j] = exp(s[j] - lse) and slope = 1 - (s[j] / soft_cap)^2, or 1 without a cap:

        ds[j] = scale * slope * p[j] * (<grad_out, v[j]> - <grad_out, out> + grad_lse)
        dq = sum_j ds[j] k[j],   dk[j] = sum over rows and query heads of ds[j] q,   dv[j] = the same of p[j] grad_out

    grad_out, grad_lse: gradients of the two results; out, lse: the results; the others are the arguments.
    """
    ...


def _why_not(q: Tensor, k: Tensor) -> str | None:
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"wants float32 or bfloat16, but q is {q.dtype}"
    sizes = {"n": q.shape[2], "m": k.shape[2]}
    odd = [f"{name} is {size}" for name, size in sizes.items() if size % 128 or not size]
    if odd:
        return f"wants multiples of 128, but {', '.join(odd)}"
    runtime = sys.modules.get("torch_xla.runtime") if q.device.type == "xla" else None
    if runtime is not None and runtime.device_type() != "TPU":
        return f"wants a TPU, but torch_xla runs on {runtime.device_type()}"
    return None


def why_not_splash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
) -> str | None:
    """The Pallas kernel works on blocks of 128 rows and keys, on a TPU (on tensors of the CPU: in an interpreter)."""
    return _why_not(q, k)


def why_not_splash_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
) -> str | None:
    """The same for the gradients."""
    return _why_not(q, k)


for _op, _refusal in ((splash_attention, why_not_splash), (splash_attention_backward, why_not_splash_backward)):
    _name = _op.name.partition("::")[2]
    _dense = _name.replace("splash", "dense")
    _op.register_kernel(None, f"opreg.kernels.reference.splash_attention:{_name}", priority=-100)
    # Plain torch; on a GPU for what Triton refuses, and where there is none.
    _op.register_kernel(("cpu", "cuda", "xpu"), f"opreg.kernels.cpu.splash_attention:{_name}")
    _op.register_kernel(
        ("cuda", "xpu"),
        f"opreg.kernels.triton.splash_attention:{_name}",
        requires="triton",
        why_not=f"opreg.kernels.triton.splash_attention:{_refusal.__name__.replace('_splash', '')}",
        priority=5,
    )
    _op.register_kernel(
        ("cpu", "xla", "tpu"),
        from_jax(f"opreg.kernels.pallas.splash_attention:{_name}"),
        requires="jax",
        why_not=_refusal,
        priority=-5,
    )
    _op.register_kernel(
        ("cpu", "xla", "tpu"),
        from_jax(f"opreg.kernels.pallas.splash_attention:{_dense}"),
        requires="jax",
        priority=-10,
    )
    _op.tolerance(torch.float32, 1e-5, "sums over keys in another order; each score is an exponent")
    _op.tolerance(torch.bfloat16, 1e-2, "q times scale is rounded to 8 bits before the product, and so is the result")
    _op.tolerance(torch.float16, 2e-3, "results are rounded to 11 bits, and so is out, which the gradients start from")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.options = inputs[5:]


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = splash_attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.options)
    return (*grads, *(None for _ in range(6)))


splash_attention.register_autograd(_backward, setup_context=_setup_context)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _backward_second(ctx: Any, *seconds: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the gradients, by autograd through their formula with all scores in memory.

    out and lse are arguments of that formula as the others are: what flows to them goes on through the forward op.
    """
    tensors = ctx.saved_tensors
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[:7]) if needed]

    def formula(*chosen: Tensor) -> tuple[Tensor, ...]:
        given = list(tensors)
        for index, value in zip(wanted, chosen, strict=True):
            given[index] = value
        return gradients(*given, *ctx.options)

    # torch.func's vjp, a level of its own: out depends on q, and here neither may be seen as the other's history. It
    # works under all of torch.func's transforms, and its results keep their history for a third derivative.
    found = torch.func.vjp(formula, *(tensors[i] for i in wanted))[1](tuple(seconds))
    result: list[Tensor | None] = [None] * 13
    for index, grad in zip(wanted, found, strict=True):
        result[index] = grad
    return tuple(result)


splash_attention_backward.register_autograd(_backward_second, setup_context=_setup_second)


def _fold(info: Any, dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    """Arguments with the mapped dimension folded into the batch, as every tensor has one in front."""
    folded = []
    for value, dim in zip(args, dims, strict=True):
        if isinstance(value, Tensor):
            many = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            value = many.flatten(0, 1)
        folded.append(value)
    return folded


@splash_attention.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    found = splash_attention(*_fold(info, in_dims, args))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0, 0)


@splash_attention_backward.register_vmap
def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
    found = splash_attention_backward(*_fold(info, in_dims, args))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0, 0, 0)


@splash_attention.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def call(b: int, h: int, g: int, n: int, m: int, d: int, segments: int = 0, **options: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"q": rand(b, h, n, d), "k": rand(b, g, m, d), "v": rand(b, g, m, d)}
        if segments:
            ids = torch.arange(max(n, m)) * segments // max(n, m)
            given["q_segments"], given["kv_segments"] = (ids[-size:].repeat(b, 1).to(device) for size in (n, m))
        return {**given, **options}

    yield call(2, 4, 2, 5, 7, 8, segments=2, causal=True, soft_cap=1.5)
    yield call(1, 2, 1, 6, 6, 4, window=2, scale=0.3)
    yield call(1, 2, 2, 128, 256, 16, segments=3, causal=True, window=70, soft_cap=20.0)
    yield call(1, 2, 1, 0, 3, 4)


@splash_attention_backward.register_inputs
def _backward_inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    for given in _inputs(device, dtype, generator):
        out, lse = splash_attention(**given)
        grads = [torch.randn(x.shape, generator=generator).to(x) for x in (out, lse)]
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        options = {name: value for name, value in given.items() if name not in tensors}
        yield {"grad_out": grads[0], "grad_lse": grads[1], **tensors, "out": out, "lse": lse, **options}
