"""Ragged attention by its definition, dense, in plain jax.numpy; and its plain derivatives.

Arrays are folded: query [B, Q, Hq, D], key [B, S, Hkv, D], value [B, S, Hkv, Dv], lengths and
starts [B, Q]. In the comments, for one query and one head, with t running over the window:

    s_t = scale <q, k_t>        z_t = cap tanh(s_t / cap)      m = max z_t
    p_t = exp(z_t - m)          l = sum p_t                    o = sum p_t v_t / l

The maximum is attained at t*, the first such position; everywhere else its derivative is 0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_ragged.lowering.contract import ByOperand, ByResult, Lowering, Operands, Residuals
from jax_ragged.lowering.params import RaggedAttentionParams, statistics_dtype


def window_mask(lengths: jax.Array, starts: jax.Array, S: int) -> jax.Array:
    """Which positions lie in each window: bool [..., S] for lengths and starts [...]."""
    position = lax.broadcasted_iota(jnp.int32, (*lengths.shape, S), lengths.ndim)
    return (position >= starts[..., None]) & (position < lengths[..., None])


def zero_outside(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Zeros what of the cache x [B, S, H, D] lies in no window of valid [B, Q, S].

    Multiplying by a probability of 0 is not enough: 0 * NaN is NaN.
    """
    return jnp.where(valid.any(axis=1)[:, :, None, None], x, jnp.zeros((), x.dtype))


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Contracts in y's dtype with wide accumulation; float32 is not rounded on the way."""
    return jnp.einsum(
        spec,
        x.astype(y.dtype),
        y,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=statistics_dtype(y.dtype),
    )


def _group(x: jax.Array, Hkv: int) -> jax.Array:
    """[B, Q, Hq, ...] to [B, Q, Hkv, G, ...]."""
    return x.reshape(*x.shape[:2], Hkv, x.shape[2] // Hkv, *x.shape[3:])


def _ungroup(x: jax.Array) -> jax.Array:
    """[B, Q, Hkv, G, ...] to [B, Q, Hq, ...]."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def _cap(s: jax.Array, params: RaggedAttentionParams) -> tuple[jax.Array, jax.Array | None]:
    """Z and dz/ds; None stands for 1."""
    if params.logits_soft_cap is None:
        return s, None
    tanh = jnp.tanh(s / params.logits_soft_cap)
    return params.logits_soft_cap * tanh, 1 - tanh * tanh


def _scaled_dot(q: jax.Array, k: jax.Array, params: RaggedAttentionParams) -> jax.Array:
    return params.softmax_scale * _dot("bqhgd,bshd->bqhgs", q, k)


def forward(operands: Operands, params: RaggedAttentionParams) -> ByResult[jax.Array]:
    """Returns out [B, Q, Hq, Dv], max_logits and denominator [B, Q, Hq]."""
    query, key, value, lengths, starts = operands
    S, Hkv = key.shape[1:3]
    valid = window_mask(lengths, starts, S)
    z, _ = _cap(_scaled_dot(_group(query, Hkv), key, params), params)
    mask_value = jnp.asarray(params.mask_value, z.dtype)
    z = jnp.where(valid[:, :, None, None], z, -jnp.inf)
    # The maximum as an element of z: its derivative is then that of the first position that
    # attains it, the convention of jvp and vjp below.
    if S == 0:
        m = jnp.full(z.shape[:-1], mask_value)
    else:
        t_star = jnp.argmax(lax.stop_gradient(z), axis=-1, keepdims=True)
        m = jnp.take_along_axis(z, t_star, axis=-1)[..., 0]
        m = jnp.where(valid.any(axis=-1)[:, :, None, None], m, mask_value)
    p = jnp.exp(z - m[..., None])
    denominator = p.sum(axis=-1)
    out = _dot("bqhgs,bshe->bqhge", p, zero_outside(value, valid))
    out = out * inverse(denominator)[..., None]
    out = out.astype(params.result_dtype(query.dtype))
    return ByResult(_ungroup(out), _ungroup(m), _ungroup(denominator))


def inverse(denominator: jax.Array) -> jax.Array:
    """1 / l, and 0 for an empty window, in values and derivatives."""
    empty = denominator == 0
    return jnp.where(empty, 0, 1 / jnp.where(empty, 1, denominator))


class _Softmax(NamedTuple):
    """What both derivatives recompute, [B, Q, Hkv, G, S], and 1 / l, [B, Q, Hkv, G, 1]."""

    p: jax.Array
    dz_ds: jax.Array | None
    at_max: jax.Array
    valid: jax.Array
    inverse: jax.Array


def _softmax(
    q: jax.Array,
    k: jax.Array,
    valid: jax.Array,
    m: jax.Array,
    denominator: jax.Array,
    params: RaggedAttentionParams,
) -> _Softmax:
    z, dz_ds = _cap(_scaled_dot(q, k, params), params)
    valid = valid[:, :, None, None]
    p = jnp.exp(jnp.where(valid, z - m[..., None], -jnp.inf))
    # t* comes from these logits and not from m: another lowering's maximum need not match
    # them to the last bit.
    masked = lax.stop_gradient(jnp.where(valid, z, -jnp.inf))
    if z.shape[-1] == 0:
        at_max = jnp.zeros(z.shape, bool)
    else:
        t_star = jnp.argmax(masked, axis=-1, keepdims=True)
        at_max = (lax.broadcasted_iota(t_star.dtype, z.shape, z.ndim - 1) == t_star) & valid
    return _Softmax(p, dz_ds, at_max, valid, inverse(denominator)[..., None])


def jvp(
    residuals: Residuals,
    tangents: ByOperand[jax.Array | None],
    params: RaggedAttentionParams,
) -> ByResult[jax.Array]:
    """Tangents of (out, max_logits, denominator) for tangents of (query, key, value).

    A None among the tangents is a zero. With a dot for a tangent:

        s_t. = scale (<q., k_t> + <q, k_t.>)       z_t. = (1 - tanh(s_t / cap)^2) s_t.
        m.   = z_t*.                               l.   = sum p_t z_t. - l m.
        o.   = sum p_t z_t. v_t / l - (sum p_t z_t. / l) o + sum p_t v_t. / l
    """
    query, key, value, lengths, starts, out, max_logits, denominator = residuals
    S, Hkv = key.shape[1:3]
    valid = window_mask(lengths, starts, S)
    q, k, v = _group(query, Hkv), zero_outside(key, valid), zero_outside(value, valid)
    o, m, denominator = (_group(x, Hkv) for x in (out, max_logits, denominator))
    softmax = _softmax(q, k, valid, m, denominator, params)
    q_dot, k_dot, v_dot = tangents
    z_dot = jnp.zeros_like(softmax.p)
    if q_dot is not None:
        z_dot += _scaled_dot(_group(q_dot, Hkv), k, params)
    if k_dot is not None:
        z_dot += _scaled_dot(q, zero_outside(k_dot, valid), params)
    if softmax.dz_ds is not None:
        z_dot *= softmax.dz_ds
    pz_dot = softmax.p * z_dot
    m_dot = jnp.where(softmax.at_max, z_dot, 0).sum(axis=-1)
    pz_dot_sum = pz_dot.sum(axis=-1)
    l_dot = pz_dot_sum - denominator * m_dot
    o_dot = _dot("bqhgs,bshe->bqhge", pz_dot * softmax.inverse, v)
    o_dot -= (pz_dot_sum[..., None] * softmax.inverse) * o.astype(o_dot.dtype)
    if v_dot is not None:
        v_dot = zero_outside(v_dot, valid)
        o_dot += _dot("bqhgs,bshe->bqhge", softmax.p * softmax.inverse, v_dot)
    o_dot = o_dot.astype(params.result_dtype(query.dtype))
    return ByResult(_ungroup(o_dot), _ungroup(m_dot), _ungroup(l_dot))


def vjp(
    residuals: Residuals,
    cotangents: ByResult[jax.Array | None],
    wrt: ByOperand[Any],
    params: RaggedAttentionParams,
) -> ByOperand[jax.Array | None]:
    """Cotangents of those of (query, key, value) that wrt asks for: the transpose of jvp.

    A None among the cotangents (o', m', l') of (out, max_logits, denominator) is a zero:

        z_t' = p_t (<o', v_t> - <o', o>) / l + l' p_t + (m' - l' l) [t = t*]
        s_t' = (1 - tanh(s_t / cap)^2) z_t'
        q' = scale sum_t s_t' k_t      k_t' = scale sum s_t' q      v_t' = sum p_t o' / l

    The last two sums run over the queries and the heads that share k_t and v_t.
    """
    query, key, value, lengths, starts, out, max_logits, denominator = residuals
    S, Hkv = key.shape[1:3]
    valid = window_mask(lengths, starts, S)
    q, k, v = _group(query, Hkv), zero_outside(key, valid), zero_outside(value, valid)
    o, m, denominator = (_group(x, Hkv) for x in (out, max_logits, denominator))
    softmax = _softmax(q, k, valid, m, denominator, params)
    o_bar, m_bar, l_bar = (None if x is None else _group(x, Hkv) for x in cotangents)
    z_bar = jnp.zeros_like(softmax.p)
    v_bar = None
    if o_bar is not None:
        wide = z_bar.dtype
        delta = (o_bar.astype(wide) * o.astype(wide)).sum(axis=-1, keepdims=True)
        p_normal = softmax.p * softmax.inverse
        z_bar += p_normal * (_dot("bqhge,bshe->bqhgs", o_bar, v) - delta)
        if wrt.value is not None:
            v_bar = _dot("bqhgs,bqhge->bshe", p_normal, o_bar).astype(wrt.value)
    at_max_bar = jnp.zeros_like(m)
    if l_bar is not None:
        z_bar += l_bar[..., None] * softmax.p
        at_max_bar -= l_bar * denominator
    if m_bar is not None:
        at_max_bar += m_bar
    if l_bar is not None or m_bar is not None:
        z_bar += jnp.where(softmax.at_max, at_max_bar[..., None], 0)
    s_bar = z_bar * params.softmax_scale
    if softmax.dz_ds is not None:
        s_bar *= softmax.dz_ds
    q_bar = k_bar = None
    if wrt.query is not None:
        q_bar = _ungroup(_dot("bqhgs,bshd->bqhgd", s_bar, k).astype(wrt.query))
    if wrt.key is not None:
        k_bar = _dot("bqhgs,bqhgd->bshd", s_bar, q).astype(wrt.key)
    if wrt.value is not None and v_bar is None:
        v_bar = jnp.zeros(value.shape, wrt.value)
    return ByOperand(q_bar, k_bar, v_bar)


class _Reference(Lowering):
    """The reference as a lowering: it takes every call."""

    def forward(
        self, operands: Operands, params: RaggedAttentionParams, device_kind: str | None
    ) -> ByResult[jax.Array]:
        del device_kind
        return forward(operands, params)

    def jvp(
        self,
        residuals: Residuals,
        tangents: ByOperand[jax.Array | None],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByResult[jax.Array]:
        del device_kind
        return jvp(residuals, tangents, params)

    def vjp(
        self,
        residuals: Residuals,
        cotangents: ByResult[jax.Array | None],
        wrt: ByOperand[Any],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByOperand[jax.Array | None]:
        del device_kind
        return vjp(residuals, cotangents, wrt, params)


REFERENCE = _Reference()
