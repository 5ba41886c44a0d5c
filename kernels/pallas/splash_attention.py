"""Attention with its gradients in JAX: jax's own splash-attention kernel for TPU, and the dense formula elsewhere.

The Pallas kernel runs as machine code where it is lowered for TPU and in Pallas' interpreter elsewhere. Its backward
kernel is called with what the forward pass returned; jax.vjp of the public function would run the forward kernel again.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from ..reference.splash_attention_check import check, scale_of

LANES = 128
BLOCKS = (512, 256, 128)
MASKED = splash.DEFAULT_MASK_VALUE


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) by jax's Pallas kernel; q and k have a multiple of 128 rows."""
    check(q, k, (q_segments, kv_segments), window, soft_cap)
    scaled = _scaled(q, scale)

    def run(interpret: bool, *arrays: Any) -> Any:
        kernel = _kernel(q, k, causal, window, soft_cap, interpret)
        return jax.vmap(kernel)(*arrays)

    out, (lse,) = _by_platform(run, scaled, k, v, _ids(q_segments, kv_segments))
    # A row that sees nothing comes back with the mean of whatever blocks were visited, or with nan.
    empty = ~(lse > MASKED / 2)
    return jnp.where(empty[..., None], 0, out).astype(q.dtype), jnp.where(empty, -jnp.inf, lse)


def splash_attention_backward(
    grad_out: jax.Array,
    grad_lse: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) by jax's Pallas kernel."""
    check(q, k, (q_segments, kv_segments), window, soft_cap)
    through_lse = jnp.einsum("bhnd,bhnd->bhn", _wide(out), _wide(grad_out)) - grad_lse
    finite = jnp.where(lse > -jnp.inf, lse, 0)

    def run(interpret: bool, *arrays: Any) -> Any:
        kernel = _kernel(q, k, causal, window, soft_cap, interpret)
        blocks = kernel.kwargs["block_sizes"]

        def one(q: Any, k: Any, v: Any, ids: Any, lse: Any, grad: Any, through_lse: Any) -> Any:
            return splash._splash_attention_bwd_dkv(
                q,
                k,
                v,
                ids,
                None,
                lse,
                grad,
                through_lse,
                bq=blocks.block_q_dkv,
                bkv=blocks.block_kv_dkv,
                bkv_compute=blocks.block_kv_dkv_compute,
                is_mqa=False,
                mask_info=kernel.dkv_mask_info,
                mask_value=MASKED,
                attn_logits_soft_cap=soft_cap,
                use_fused_bwd_kernel=True,
                q_layout=blocks.q_layout,
                k_layout=blocks.k_layout,
                v_layout=blocks.v_layout,
                mask_function=kernel.kwargs["mask_function"],
                interpret=interpret,
            )

        return jax.vmap(one)(*arrays)

    ids = _ids(q_segments, kv_segments)
    dq, dk, dv = _by_platform(run, _scaled(q, scale), k, v, ids, finite, grad_out.astype(q.dtype), through_lse)
    return (_wide(dq) * scale_of(q, scale)).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _by_platform(run: Callable[..., Any], *arrays: Any) -> Any:
    """run(interpret, *arrays), as machine code where it is lowered for TPU, interpreted elsewhere."""
    with _in_32_bits():
        return jax.lax.platform_dependent(*arrays, tpu=partial(run, False), default=partial(run, True))


def _in_32_bits() -> AbstractContextManager[Any]:
    """jax's kernel counts blocks in int32, and fails where 64-bit segment ids have switched jax's x64 mode on."""
    # jax.enable_x64 is the public name from jax 0.8; before that it lived in jax.experimental.
    found = getattr(jax, "enable_x64", None)
    switch = found if callable(found) else importlib.import_module("jax.experimental").enable_x64
    context: AbstractContextManager[Any] = switch(False)
    return context


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _scaled(q: jax.Array, scale: float | None) -> jax.Array:
    """q with the scale in it, for the kernel knows none."""
    return (_wide(q) * scale_of(q, scale)).astype(q.dtype)


def _ids(q_segments: jax.Array | None, kv_segments: jax.Array | None) -> Any:
    if q_segments is None or kv_segments is None:
        return None
    return splash.SegmentIds(q=q_segments.astype(jnp.int32), kv=kv_segments.astype(jnp.int32))


def _kernel(
    q: jax.Array, k: jax.Array, causal: bool, window: int | None, soft_cap: float | None, interpret: bool
) -> Any:
    heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
    offset = keys - rows
    mask: Any
    if window is not None:
        mask = masks.LocalMask((rows, keys), (window - 1, 0 if causal else window - 1), offset)
    elif causal:
        mask = masks.CausalMask((rows, keys), offset)
    else:
        mask = masks.FullMask((rows, keys))
    block_q = next(block for block in BLOCKS if rows % block == 0)
    block_kv = next(block for block in BLOCKS if keys % block == 0)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) with all scores in memory, for any size and platform."""
    check(q, k, (q_segments, kv_segments), window, soft_cap)
    seen = _seen(q, k, q_segments, kv_segments, causal, window)
    scores = jnp.where(seen, _scores(q, k, soft_cap, scale_of(q, scale)), -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
    out = jnp.einsum("bgrnm,bgme->bgrne", weights, _wide(v), precision="highest")
    return out.reshape(*q.shape[:3], v.shape[3]).astype(q.dtype), lse.reshape(q.shape[:3])


def dense_attention_backward(
    grad_out: jax.Array,
    grad_lse: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) of dense_attention."""
    check(q, k, (q_segments, kv_segments), window, soft_cap)
    seen = _seen(q, k, q_segments, kv_segments, causal, window)
    scores = _scores(q, k, soft_cap, scale_of(q, scale))
    grouped = (q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    total = jnp.where(lse > -jnp.inf, lse, 0).reshape(*grouped, 1)
    grad = _wide(grad_out).reshape(*grouped, v.shape[3])
    through_lse = (_wide(out) * _wide(grad_out)).sum(-1).reshape(*grouped, 1) - grad_lse.reshape(*grouped, 1)
    weights = jnp.where(seen, jnp.exp(scores - total), 0)
    product = partial(jnp.einsum, precision="highest")
    dscores = weights * (product("bgrne,bgme->bgrnm", grad, _wide(v)) - through_lse) * scale_of(q, scale)
    if soft_cap is not None:
        dscores *= 1 - (scores / soft_cap) ** 2
    dq = product("bgrnm,bgmd->bgrnd", dscores, _wide(k)).reshape(q.shape)
    dk = product("bgrnm,bgrnd->bgmd", dscores, _wide(q).reshape(*grouped, q.shape[3]))
    dv = product("bgrnm,bgrne->bgme", weights, grad)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _scores(q: jax.Array, k: jax.Array, soft_cap: float | None, factor: float) -> jax.Array:
    """Capped scores [b, g, r, n, m]; key head g is read by r query heads."""
    grouped = _wide(q).reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], *q.shape[2:])
    scores = jnp.einsum("bgrnd,bgmd->bgrnm", grouped, _wide(k), precision="highest") * factor
    return scores if soft_cap is None else jnp.tanh(scores / soft_cap) * soft_cap


def _seen(
    q: jax.Array,
    k: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    causal: bool,
    window: int | None,
) -> jax.Array:
    """Which row sees which key, broadcastable to [b, g, r, n, m]."""
    place = jnp.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    column = jnp.arange(k.shape[2])
    seen = jnp.ones((q.shape[2], k.shape[2]), bool)
    if causal:
        seen &= column <= place
    if window is not None:
        seen &= jnp.abs(column - place) < window
    if q_segments is not None and kv_segments is not None:
        seen = seen & (q_segments[:, None, None, :, None] == kv_segments[:, None, None, None, :])
    return seen
