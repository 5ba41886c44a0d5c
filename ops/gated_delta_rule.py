"""opreg::gated_delta_rule: the recurrence of Gated DeltaNet and of the two rules that followed it, with gradients."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from opreg import like, register_op


def _wide(x: Tensor, dims: int = 4) -> Tensor:
    """Float32, and a last dimension of one where a gate is one number per head."""
    x = x.float()
    return x if x.dim() == dims else x.unsqueeze(-1)


@register_op("opreg::gated_delta_rule")
def gated_delta_rule(
    q: Annotated[Tensor, "b t hk k"],
    k: Annotated[Tensor, "b t hk k"],
    v: Annotated[Tensor, "b t hv v"],
    decay: Annotated[Tensor, "b t hv *d"],
    erase: Annotated[Tensor, "b t hv *e"],
    write: Annotated[Tensor, "b t hv *w"],
    initial_state: Annotated[Tensor, "b hv v k"] | None = None,
    scale: float | None = None,
) -> tuple[Annotated[Tensor, "b t hv v", like("v")], Annotated[Tensor, "b hv v k", torch.float32]]:
    """Gated delta rule with one number or one vector for each gate (Yang et al. 2025, equation 10, and after).

    Per batch entry and value head, with S the state [v, k]:

        S <- S diag(exp(decay)),  S <- S + (write * v - S (erase * k)) k^T,  o = scale * S q

    Gated DeltaNet has one decay and erase = write = beta; Kimi Delta Attention a decay per key channel; Gated
    DeltaNet-2 has all three as vectors. Keys should have length 1 (with erase at most 1), or the state may grow.

    q, k: value head h reads head h // (hv // hk). decay: logarithm, 0 or less, [b, t, hv] or [b, t, hv, k].
    erase: [b, t, hv] or [b, t, hv, k]. write: [b, t, hv] or [b, t, hv, v]. scale: None means k ** -0.5.
    initial_state: None means zeros.

    Returns (o, the state after the last token in float32). All sums are float32. Differentiable in every tensor.
    Raises ValueError for gates of another rank or size and for heads that do not divide.
    """
    scale = _check(q, k, v, decay, erase, write, scale)
    ratio = v.shape[2] // k.shape[2]
    g, e, w = _wide(decay).exp(), _wide(erase), _wide(write)
    keys, queries = (x.float().repeat_interleave(ratio, 2) for x in (k, q))
    state = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3], dtype=torch.float32)
    if initial_state is not None:
        state = state + initial_state.float()
    out = torch.zeros_like(v, dtype=torch.float32)
    outs = []
    for t in range(v.shape[1]):
        state = state * g[:, t, :, None]
        removed = (state * (e[:, t] * keys[:, t])[:, :, None]).sum(-1)
        delta = w[:, t] * v[:, t].float() - removed
        state = state + delta[..., None] * keys[:, t, :, None]
        outs.append(scale * (state * queries[:, t, :, None]).sum(-1))
    if outs:
        out = torch.stack(outs, 1)
    return out.to(v.dtype), state


def _check(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, erase: Tensor, write: Tensor, scale: float | None) -> float:
    if v.dtype == torch.float64:
        raise ValueError("opreg::gated_delta_rule: v is torch.float64, but all sums are float32; pass v.float()")
    if k.shape[2] == 0 or v.shape[2] % k.shape[2]:
        raise ValueError(
            f"opreg::gated_delta_rule: v has {v.shape[2]} heads, which is no multiple of the {k.shape[2]} heads of k"
        )
    for name, gate, last in (("decay", decay, k), ("erase", erase, k), ("write", write, v)):
        if gate.dim() not in (3, 4) or (gate.dim() == 4 and gate.shape[3] != last.shape[3]):
            wanted = f"{tuple(v.shape[:3])} or {(*v.shape[:3], last.shape[3])}"
            raise ValueError(
                f"opreg::gated_delta_rule: {name} has shape {tuple(gate.shape)}, expected {wanted}: one number a "
                f"head, or one for each channel of {'v' if last is v else 'k'}"
            )
    return k.shape[3] ** -0.5 if scale is None else scale


@register_op("opreg::gated_delta_rule_backward")
def gated_delta_rule_backward(
    grad_out: Annotated[Tensor, "b t hv v"],
    grad_state: Annotated[Tensor, "b hv v k"],
    q: Annotated[Tensor, "b t hk k"],
    k: Annotated[Tensor, "b t hk k"],
    v: Annotated[Tensor, "b t hv v"],
    decay: Annotated[Tensor, "b t hv *d"],
    erase: Annotated[Tensor, "b t hv *e"],
    write: Annotated[Tensor, "b t hv *w"],
    initial_state: Annotated[Tensor, "b hv v k"] | None = None,
    scale: float | None = None,
) -> tuple[
    Annotated[Tensor, "b t hk k", like("q")],
    Annotated[Tensor, "b t hk k", like("k")],
    Annotated[Tensor, "b t hv v", like("v")],
    Annotated[Tensor, "b t hv *d", like("decay")],
    Annotated[Tensor, "b t hv *e", like("erase")],
    Annotated[Tensor, "b t hv *w", like("write")],
    Annotated[Tensor, "b hv v k", torch.float32],
]:
    """Gradients of opreg::gated_delta_rule, from the last token to the first.

    With a = exp(decay), R = S_before diag(a), u = write * v - R (erase * k), D the gradient of the state after a token:

        D += scale do q^T;  dq = scale S^T do;  du = D k;  E = D - du (erase * k)^T
        dk = D^T u - erase * (R^T du);  derase = -k * (R^T du);  d(write * v) = du
        ddecay = a * sum over v of E * S_before;  D before the token = E diag(a)

    The first two arguments are the gradients of the two results, the others are those of the rule.
    Returns the gradients of q, k, v, decay, erase, write and initial_state (as of zeros where that is None).
    """
    factor = _check(q, k, v, decay, erase, write, scale)
    ratio = v.shape[2] // k.shape[2]
    g, e, w = _wide(decay).exp(), _wide(erase), _wide(write)
    keys, queries = (x.float().repeat_interleave(ratio, 2) for x in (k, q))
    values, grads = v.float(), grad_out.float()
    state = torch.zeros_like(grad_state, dtype=torch.float32)
    if initial_state is not None:
        state = state + initial_state.float()
    before, deltas = [], []
    for t in range(v.shape[1]):
        before.append(state)
        state = state * g[:, t, :, None]
        deltas.append(w[:, t] * values[:, t] - (state * (e[:, t] * keys[:, t])[:, :, None]).sum(-1))
        state = state + deltas[t][..., None] * keys[:, t, :, None]
    back = grad_state.float().clone()
    dq, dk, de, dg = (torch.zeros_like(keys) for _ in range(4))
    dwv = torch.zeros_like(values)
    for t in reversed(range(v.shape[1])):
        after = state if t + 1 == v.shape[1] else before[t + 1]
        back = back + factor * grads[:, t, ..., None] * queries[:, t, :, None]
        dq[:, t] = factor * (after * grads[:, t, ..., None]).sum(-2)
        du = (back * keys[:, t, :, None]).sum(-1)
        dk[:, t] = (back * deltas[t][..., None]).sum(-2)
        back = back - du[..., None] * (e[:, t] * keys[:, t])[:, :, None]
        de[:, t] = -((before[t] * g[:, t, :, None]) * du[..., None]).sum(-2)
        dg[:, t] = (back * before[t]).sum(-2) * g[:, t]
        dwv[:, t] = du
        back = back * g[:, t, :, None]
    return _gather(q, k, v, decay, erase, write, (dq, dk, de, dg, dwv, back))


def _gather(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, erase: Tensor, write: Tensor, found: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per value head and channel to what each argument has: key heads summed over value heads, gates over channels."""
    dq, dk, de, dg, dwv, back = found
    keys = k.float().repeat_interleave(v.shape[2] // k.shape[2], 2)
    dk = dk + de * _wide(erase)

    def over_heads(x: Tensor, like: Tensor) -> Tensor:
        summed: Tensor = x.unflatten(2, (like.shape[2], -1)).sum(3)
        return summed.to(like.dtype)

    def over_channels(x: Tensor, like: Tensor) -> Tensor:
        return (x if like.dim() == 4 else x.sum(-1)).to(like.dtype)

    return (
        over_heads(dq, q),
        over_heads(dk, k),
        (dwv * _wide(write)).to(v.dtype),
        over_channels(dg, decay),
        over_channels(de * keys, erase),
        over_channels(dwv * v.float(), write),
        back,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, decay, erase, write, start = ctx.saved_tensors
    found = gated_delta_rule_backward(grad_out, grad_state, q, k, v, decay, erase, write, start, ctx.scale)
    initial = None if start is None else found[6].to(start.dtype)
    return (*found[:6], initial, None)


gated_delta_rule.register_autograd(_backward, setup_context=_setup_context)


def make_rule_call(
    sizes: tuple[int, int, int, int, int, int],
    vectors: tuple[bool, bool, bool] = (False, False, False),
    *,
    state: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Return a call with sizes (b, t, hk, hv, k, v); `vectors` says which of decay, erase and write are vectors."""
    b, t, hk, hv, k, v = sizes
    g = generator or torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=g.device)

    unit = torch.nn.functional.normalize
    gates = [rand(b, t, hv, *((last,) if vector else ())) for last, vector in zip((k, k, v), vectors, strict=True)]
    tensors = {
        "q": unit(rand(b, t, hk, k), dim=-1),
        "k": unit(rand(b, t, hk, k), dim=-1),
        "v": rand(b, t, hv, v),
        "decay": -torch.nn.functional.softplus(gates[0] - 2),
        "erase": gates[1].sigmoid(),
        "write": gates[2].sigmoid(),
    }
    call: dict[str, Any] = {name: x.to(device=device, dtype=dtype) for name, x in tensors.items()}
    call["initial_state"] = (0.3 * rand(b, hv, v, k)).to(device) if state else None
    return call


@gated_delta_rule.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    common: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
    yield make_rule_call((2, 5, 2, 4, 16, 32), **common)
    yield {**make_rule_call((1, 40, 1, 3, 24, 20), (True, False, False), state=False, **common), "scale": 0.5}
    yield make_rule_call((1, 37, 2, 2, 16, 16), (True, True, True), **common)
    yield make_rule_call((1, 0, 1, 1, 16, 16), **common)


@gated_delta_rule_backward.register_inputs
def _backward_inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    for call in _inputs(device, dtype, generator):
        b, _, hv, v = call["v"].shape
        state = torch.randn(b, hv, v, call["k"].shape[3], generator=generator, device=generator.device).to(device)
        yield {"grad_out": torch.ones_like(call["v"]), "grad_state": state, **call}


for _op in (gated_delta_rule, gated_delta_rule_backward):
    _name = _op.name.partition("::")[2]
    _op.register_kernel(
        "cpu",
        f"opreg.kernels.cpu.gdn_rule:{_name}",
        requires="c++",
        why_not=f"opreg.kernels.cpu.gdn_rule:{_name}_why_not",
        priority=10,
    )
    _op.register_kernel(
        ("cuda", "xpu"),
        f"opreg.kernels.triton.gdn_rule:{_name}",
        requires="triton",
        why_not=f"opreg.kernels.triton.gdn_rule:{_name}_why_not",
        priority=10,
    )
    # On a GPU for what Triton refuses, and where there is none.
    _op.register_kernel(
        ("cpu", "cuda", "xpu"),
        f"opreg.kernels.cpu.gdn_rule_torch:{_name}_chunks",
        why_not=f"opreg.kernels.cpu.gdn_rule_torch:{_name}_chunks_why_not",
        priority=5,
    )
    _op.register_sharding("hk", "hv")
    _op.tolerance(torch.float32, 2e-6, "sums over channels in another order, along a recurrence")
    _op.tolerance(torch.bfloat16, 4e-3, "results are rounded to 8 bits")
    _op.tolerance(torch.float16, 5e-4, "results are rounded to 11 bits")
