"""The forms of caches: paged, heads first, quantised; and the dense cache that each stands for.

A lowering that reads a form in place never makes the dense cache. The reference does, and so do
gradients of a cache in another form, which are as large as the cache.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_ragged.lowering.contract import ByOperand, ByResult, Operands, Residuals, Unsupported
from jax_ragged.lowering.params import RaggedAttentionParams, statistics_dtype

# The dtypes of quantised caches.
NARROW = (jnp.dtype("int8"), jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2"))


def require_dense(operands: Operands | Residuals, params: RaggedAttentionParams) -> None:
    """Raises Unsupported for a cache that is not dense."""
    if not is_dense(operands, params):
        form = [params.cache_layout, str(operands.key.dtype), str(operands.value.dtype)]
        form += params.optional
        raise Unsupported(
            "its kernel reads caches [B, S, Hkv, D] in the dtype of query, and this one is "
            f"{', '.join(form)}"
        )


def is_dense(operands: Operands | Residuals, params: RaggedAttentionParams) -> bool:
    """Whether key and value are [B, S, Hkv, D] and [B, S, Hkv, Dv] in the dtype of query."""
    own = operands.query.dtype
    narrow = operands.key.dtype != own or operands.value.dtype != own
    return params.cache_layout == "BSHD" and not params.optional and not narrow


def positions_axis(params: RaggedAttentionParams) -> int:
    """The axis of key and value that has their positions: [B, S, Hkv, D] or [B, Hkv, S, D]."""
    return 1 if params.cache_layout == "BSHD" else 2


def heads_axis(params: RaggedAttentionParams) -> int:
    """The axis of key and value that has their heads."""
    return 3 - positions_axis(params)


def positions(operands: Operands | Residuals, params: RaggedAttentionParams) -> Any:
    """S, the number of positions of a row."""
    size = operands.key.shape[positions_axis(params)]
    return size if operands.page_table is None else size * operands.page_table.shape[1]


def window_mask(lengths: jax.Array, starts: jax.Array, S: int) -> jax.Array:
    """Which positions lie in each window: bool [..., S] for lengths and starts [...]."""
    position = lax.broadcasted_iota(jnp.int32, (*lengths.shape, S), lengths.ndim)
    return (position >= starts[..., None]) & (position < lengths[..., None])


def dense_operands(operands: Operands, params: RaggedAttentionParams) -> Operands:
    """The operands with a dense cache, 0 outside of every window of its row.

    A quantised cache is dequantised to the dtype of the statistics, and query is widened to it.
    """
    own = operands.query.dtype
    dtype = own if operands.key.dtype == operands.value.dtype == own else statistics_dtype(own)
    if operands.key_scale is not None or operands.value_scale is not None:
        dtype = statistics_dtype(own)
    S = positions(operands, params)
    used = window_mask(operands.lengths, operands.starts, S).any(axis=1)
    dense = functools.partial(_dense, page_table=operands.page_table, used=used, params=params)
    return Operands(
        operands.query.astype(dtype),
        dense(operands.key, operands.key_scale).astype(dtype),
        dense(operands.value, operands.value_scale).astype(dtype),
        operands.lengths,
        operands.starts,
    )


def _dense(
    x: jax.Array,
    scale: jax.Array | None,
    *,
    page_table: jax.Array | None,
    used: jax.Array,
    params: RaggedAttentionParams,
) -> jax.Array:
    """The dense cache [B, S, Hkv, D] that x stands for, 0 where used [B, S] is False.

    Both factors are masked before they are multiplied: unused ones may be NaN, and so would be
    their product's derivatives.
    """
    if scale is not None:
        scale = jnp.broadcast_to(scale, x.shape[:3])[..., None]
        x = x.astype(scale.dtype)
    factors = [x] if scale is None else [x, scale]
    for i, factor in enumerate(factors):
        factor = factor if params.cache_layout == "BSHD" else factor.swapaxes(1, 2)
        if page_table is not None:
            pages = factor.at[page_table].get(mode="promise_in_bounds")
            factor = pages.reshape(used.shape + factor.shape[2:])
        factors[i] = jnp.where(used[:, :, None, None], factor, jnp.zeros((), factor.dtype))
    dense = functools.reduce(jnp.multiply, factors)
    if params.cache_layout == "BHSD":
        # XLA on CPUs would make the swap a part of a product, and has no such one of bfloat16.
        dense = lax.optimization_barrier(dense)
    return dense


def _dense_params(query: jax.Array, params: RaggedAttentionParams) -> RaggedAttentionParams:
    out_dtype = params.result_dtype(query.dtype).name
    return dataclasses.replace(params, cache_layout="BSHD", optional=(), out_dtype=out_dtype)


def forward_by_dense(
    forward: Callable[..., ByResult[jax.Array]], operands: Operands, params: RaggedAttentionParams
) -> ByResult[jax.Array]:
    """Runs a forward of dense caches on one of any form."""
    if is_dense(operands, params):
        return forward(operands, params)
    return forward(dense_operands(operands, params), _dense_params(operands.query, params))


def jvp_by_dense(
    jvp: Callable[..., ByResult[jax.Array]],
    residuals: Residuals,
    tangents: ByOperand[jax.Array | None],
    params: RaggedAttentionParams,
) -> ByResult[jax.Array]:
    """Runs a jvp of dense caches on one of any form."""
    if is_dense(residuals, params):
        return jvp(residuals, tangents, params)
    moving = {name: x for name, x in tangents._asdict().items() if x is not None}
    at = {name: getattr(residuals, name) for name in moving}

    def dense(moving: dict[str, jax.Array]) -> Operands:
        return dense_operands(residuals.operands._replace(**moving), params)

    operands, dots = jax.jvp(dense, (at,), (moving,))
    cache = {"query": "query", "key": "key", "key_scale": "key"}
    cache |= {"value": "value", "value_scale": "value"}
    moved = {cache[name] for name in moving}
    dense_dots = ByOperand(
        *(getattr(dots, n, None) if n in moved else None for n in ByOperand._fields)
    )
    return jvp(
        _dense_residuals(residuals, operands), dense_dots, _dense_params(residuals.query, params)
    )


def vjp_by_dense(
    vjp: Callable[..., ByOperand[jax.Array | None]],
    residuals: Residuals,
    cotangents: ByResult[jax.Array | None],
    wrt: ByOperand[Any],
    params: RaggedAttentionParams,
) -> ByOperand[jax.Array | None]:
    """Runs a vjp of dense caches on one of any form.

    The gradient of a dense cache goes back to pages by a sum over the rows that share a page, and
    to values and scales by the product rule. Sums are taken in the dtype of the statistics.
    """
    if is_dense(residuals, params):
        return vjp(residuals, cotangents, wrt, params)
    wide = statistics_dtype(residuals.query.dtype)
    asked = {name: dtype for name, dtype in wrt._asdict().items() if dtype is not None}
    at = {name: getattr(residuals, name).astype(wide) for name in asked}

    def dense(moving: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        return dense_operands(residuals.operands._replace(**moving), params)[:3]

    (query, key, value), pull = jax.vjp(dense, at)
    operands = Operands(query, key, value, residuals.lengths, residuals.starts)
    need = (
        "query" in asked,
        bool({"key", "key_scale"} & asked.keys()),
        bool({"value", "value_scale"} & asked.keys()),
    )
    dense_wrt = ByOperand(
        *(x.dtype if n else None for x, n in zip((query, key, value), need, strict=True))
    )
    dense_bars = vjp(
        _dense_residuals(residuals, operands),
        cotangents,
        dense_wrt,
        _dense_params(residuals.query, params),
    )
    bars = [
        jnp.zeros_like(x) if bar is None else bar
        for x, bar in zip((query, key, value), dense_bars[:3], strict=True)
    ]
    (pulled,) = pull(tuple(bars))
    return ByOperand(
        *(pulled[name].astype(asked[name]) if name in asked else None for name in ByOperand._fields)
    )


def _dense_residuals(residuals: Residuals, operands: Operands) -> Residuals:
    return Residuals(*operands[:5], residuals.out, residuals.max_logits, residuals.denominator)
