"""Ragged attention by its definition, dense, in plain jax.numpy; and its plain derivatives.

Arrays are folded: query [B, Q, Hq, D], key [B, S, Hkv, D], value [B, S, Hkv, Dv], lengths and
starts [B, Q]. In the comments, for one query and one head, with t running over the window:

    s_t = scale <q, k_t>        z_t = cap tanh(s_t / cap)      m = max z_t
    p_t = exp(z_t - m)          l = sum p_t                    o = sum p_t v_t / l

The maximum is attained at t*, the first such position; everywhere else its derivative is 0.

A window without a position, or one whose logits are all -inf, is empty: m = mask_value, l = 0,
o = 0, and all derivatives are 0, whatever the query and the cotangents hold.

Each derivative computes the logits, m and l again instead of taking m, l and o from the residuals.
Its weights p_t / l then sum to 1 whatever lowering ran the forward: logits of 1e4 have a unit in
the last place of 1e-3, so another order of operations would move the weights by that much.

Rounding: logits, weights and their cotangents stay in float32 (float64 for float64). Only the
forward may round weights, to the dtype of out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_ragged.lowering.cache import forward_by_dense, jvp_by_dense, vjp_by_dense, window_mask
from jax_ragged.lowering.contract import ByOperand, ByResult, Lowering, Operands, Residuals
from jax_ragged.lowering.params import RaggedAttentionParams, statistics_dtype


def zero_outside(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Zeros the positions of the cache x [B, S, H, D] that no window of valid [B, Q, S] holds.

    Multiplying by a probability of 0 is not enough: 0 * NaN is NaN.
    """
    return jnp.where(valid.any(axis=1)[:, :, None, None], x, jnp.zeros((), x.dtype))


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Contracts with wide accumulation. Operands of two dtypes are both widened, none narrowed."""
    wide = statistics_dtype(y.dtype)
    if x.dtype != y.dtype:
        x, y = x.astype(wide), y.astype(wide)
    return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST, preferred_element_type=wide)


def _group(x: jax.Array, Hkv: int) -> jax.Array:
    """[B, Q, Hq, ...] to [B, Q, Hkv, G, ...]."""
    return x.reshape(*x.shape[:2], Hkv, x.shape[2] // Hkv, *x.shape[3:])


def _ungroup(x: jax.Array) -> jax.Array:
    """[B, Q, Hkv, G, ...] to [B, Q, Hq, ...]."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


class _Softmax(NamedTuple):
    """The softmax of one window for each query and head.

    Attributes:
      p: [B, Q, Hkv, G, S], exp(z - m); 0 outside of the window.
      dz_ds: [B, Q, Hkv, G, S], the slope of the soft cap; None stands for 1.
      at_max: bool [B, Q, Hkv, G, S], whether a position is t*.
      m: [B, Q, Hkv, G], the maximum.
      denominator: [B, Q, Hkv, G], l.
      nonempty: bool [B, Q, Hkv, G], whether any logit is more than -inf.
    """

    p: jax.Array
    dz_ds: jax.Array | None
    at_max: jax.Array
    m: jax.Array
    denominator: jax.Array
    nonempty: jax.Array

    @property
    def inverse(self) -> jax.Array:
        """1 / l, [B, Q, Hkv, G, 1]; 0 for an empty window."""
        return inverse(self.denominator)[..., None]

    def kept(self, x: jax.Array) -> jax.Array:
        """x [B, Q, Hkv, G, ...], but 0 for an empty window, whatever x holds there."""
        nonempty = self.nonempty.reshape(*self.nonempty.shape, *[1] * (x.ndim - 4))
        return jnp.where(nonempty, x, jnp.zeros((), x.dtype))

    def weighted(self, x: jax.Array) -> jax.Array:
        """The products p x, [B, Q, Hkv, G, S], but 0 where p is 0, whatever x holds there."""
        return jnp.where(self.p == 0, 0, self.p * x)


def _scaled_dot(q: jax.Array, k: jax.Array, params: RaggedAttentionParams) -> jax.Array:
    """The logits s [B, Q, Hkv, G, S] of q [B, Q, Hkv, G, D] and k [B, S, Hkv, D]."""
    return params.softmax_scale * _dot("bqhgd,bshd->bqhgs", q, k)


def _cap(s: jax.Array, params: RaggedAttentionParams) -> tuple[jax.Array, jax.Array | None]:
    """The capped logits z and dz/ds, both in the shape of s; None stands for 1."""
    if params.logits_soft_cap is None:
        return s, None
    tanh = jnp.tanh(s / params.logits_soft_cap)
    return params.logits_soft_cap * tanh, 1 - tanh * tanh


def _maximum(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maximum of z [..., S] and, bool [..., S], the first position that attains it.

    The maximum is taken as an element of z, so that JAX's own rules give it the derivative that
    the definition gives it.
    """
    if z.shape[-1] == 0:
        return jnp.full(z.shape[:-1], -jnp.inf, z.dtype), jnp.zeros(z.shape, bool)
    first = jnp.argmax(lax.stop_gradient(z), axis=-1, keepdims=True)
    at_max = lax.broadcasted_iota(first.dtype, z.shape, z.ndim - 1) == first
    return jnp.where(at_max, z, 0).sum(axis=-1), at_max


def _softmax(
    q: jax.Array, k: jax.Array, valid: jax.Array, params: RaggedAttentionParams
) -> _Softmax:
    """The softmax of q [B, Q, Hkv, G, D] over k [B, S, Hkv, D] in the windows valid [B, Q, S].

    Every pass takes it from here, so that all have the same order of operations.
    """
    z, dz_ds = _cap(_scaled_dot(q, k, params), params)
    z = jnp.where(valid[:, :, None, None], z, -jnp.inf)
    m, at_max = _maximum(z)
    nonempty = m != -jnp.inf
    m = jnp.where(nonempty, m, jnp.asarray(params.mask_value, z.dtype))
    p = jnp.exp(z - m[..., None])
    return _Softmax(p, dz_ds, at_max & nonempty[..., None], m, p.sum(axis=-1), nonempty)


def inverse(denominator: jax.Array) -> jax.Array:
    """1 / l, and 0 for an empty window, in values and derivatives."""
    empty = denominator == 0
    return jnp.where(empty, 0, 1 / jnp.where(empty, 1, denominator))


def forward(operands: Operands, params: RaggedAttentionParams) -> ByResult[jax.Array]:
    """Returns out [B, Q, Hq, Dv], max_logits and denominator [B, Q, Hq]."""
    query, key, value, lengths, starts, *_ = operands
    S, Hkv = key.shape[1:3]
    dtype = params.result_dtype(query.dtype)
    valid = window_mask(lengths, starts, S)
    softmax = _softmax(_group(query, Hkv), key, valid, params)
    out = _dot("bqhgs,bshe->bqhge", softmax.p.astype(dtype), zero_outside(value, valid))
    # An empty window may share its row with one that holds a NaN: kept makes 0 of 0 * NaN.
    out = softmax.kept(out * softmax.inverse).astype(dtype)
    return ByResult(_ungroup(out), _ungroup(softmax.m), _ungroup(softmax.denominator))


def definition(operands: Operands, params: RaggedAttentionParams) -> ByResult[jax.Array]:
    """The forward, made for differentiation by JAX's own rules.

    Operands are widened first, so that no cotangent on the way is narrower. Queries of empty
    windows, and positions outside of every window, are zeroed first: JAX's rules multiply them
    by cotangents of 0, which would not remove a NaN.
    """
    query, key, value, lengths, starts, *_ = operands
    wide = statistics_dtype(query.dtype)
    valid = window_mask(lengths, starts, key.shape[1])
    attends = valid.any(axis=-1)[:, :, None, None]
    results = forward(
        Operands(
            jnp.where(attends, query.astype(wide), 0),
            zero_outside(key, valid).astype(wide),
            zero_outside(value, valid).astype(wide),
            lengths,
            starts,
        ),
        params.with_unrounded_out(query.dtype),
    )
    return results._replace(out=results.out.astype(params.result_dtype(query.dtype)))


def jvp(
    residuals: Residuals,
    tangents: ByOperand[jax.Array | None],
    params: RaggedAttentionParams,
) -> ByResult[jax.Array]:
    """Tangents of (out, max_logits, denominator) for tangents of (query, key, value).

    A None among the tangents is a zero. With a mean over the window weighted by p_t / l:

        s_dot_t = scale (<q_dot, k_t> + <q, k_dot_t>)
        z_dot_t = (1 - tanh(s_t / cap)^2) s_dot_t
        m_dot   = z_dot_t*
        l_dot   = sum p_t (z_dot_t - m_dot)
        o_dot   = sum p_t / l (z_dot_t - mean z_dot) v_t + sum p_t / l v_dot_t

    The mean is subtracted before the products with v_t, which would otherwise cancel.
    """
    query, key, value, lengths, starts, *_ = residuals
    S, Hkv = key.shape[1:3]
    valid = window_mask(lengths, starts, S)
    q, k, v = _group(query, Hkv), zero_outside(key, valid), zero_outside(value, valid)
    softmax = _softmax(q, k, valid, params)
    q_dot, k_dot, v_dot, *_ = tangents
    z_dot = jnp.zeros_like(softmax.p)
    if q_dot is not None:
        z_dot += _scaled_dot(_group(q_dot, Hkv), k, params)
    if k_dot is not None:
        z_dot += _scaled_dot(q, zero_outside(k_dot, valid), params)
    if softmax.dz_ds is not None:
        z_dot *= softmax.dz_ds
    m_dot = jnp.where(softmax.at_max, z_dot, 0).sum(axis=-1)
    l_dot = softmax.weighted(z_dot - m_dot[..., None]).sum(axis=-1)
    mean = softmax.weighted(z_dot).sum(axis=-1, keepdims=True) * softmax.inverse
    p_dot = softmax.weighted(z_dot - mean) * softmax.inverse
    o_dot = _dot("bqhgs,bshe->bqhge", p_dot, v)
    if v_dot is not None:
        v_dot = zero_outside(v_dot, valid)
        o_dot += _dot("bqhgs,bshe->bqhge", softmax.p * softmax.inverse, v_dot)
    o_dot = o_dot.astype(params.result_dtype(query.dtype))
    dots = ByResult(o_dot, m_dot, l_dot)
    return ByResult(*(_ungroup(softmax.kept(x)) for x in dots))


def vjp(
    residuals: Residuals,
    cotangents: ByResult[jax.Array | None],
    wrt: ByOperand[Any],
    params: RaggedAttentionParams,
) -> ByOperand[jax.Array | None]:
    """Cotangents of query, key and value, for each that wrt asks for: the transpose of jvp.

    A None among the cotangents of (out, max_logits, denominator) is a zero. With a mean over the
    window weighted by p_t / l, and p_bar_t = <o_bar, v_t>:

        z_bar_t = p_t / l (p_bar_t - mean p_bar) + l_bar p_t + (m_bar - l_bar l) [t = t*]
        s_bar_t = (1 - tanh(s_t / cap)^2) z_bar_t
        q_bar   = scale sum_t s_bar_t k_t
        k_bar_t = scale sum s_bar_t q
        v_bar_t = sum p_t / l o_bar

    The last two sums run over the queries and the heads that share k_t and v_t. The mean is
    <o_bar, o>. Taken from the same products as p_bar_t, it makes the first term sum to 0 over the
    window, so that a part that all keys have in common cancels in q_bar.
    """
    query, key, value, lengths, starts, *_ = residuals
    S, Hkv = key.shape[1:3]
    valid = window_mask(lengths, starts, S)
    q, k, v = _group(query, Hkv), zero_outside(key, valid), zero_outside(value, valid)
    softmax = _softmax(q, k, valid, params)
    q = softmax.kept(q)
    o_bar, m_bar, l_bar = (None if x is None else softmax.kept(_group(x, Hkv)) for x in cotangents)
    z_bar = jnp.zeros_like(softmax.p)
    v_bar = None
    if o_bar is not None:
        p_bar = _dot("bqhge,bshe->bqhgs", o_bar, v)
        mean = softmax.weighted(p_bar).sum(axis=-1, keepdims=True) * softmax.inverse
        z_bar += softmax.weighted(p_bar - mean) * softmax.inverse
        if wrt.value is not None:
            p_normal = softmax.p * softmax.inverse
            v_bar = _dot("bqhgs,bqhge->bshe", p_normal, o_bar).astype(wrt.value)
    at_max_bar = jnp.zeros_like(softmax.m)
    if l_bar is not None:
        z_bar += l_bar[..., None] * softmax.p
        at_max_bar -= l_bar * softmax.denominator
    if m_bar is not None:
        at_max_bar += m_bar
    if l_bar is not None or m_bar is not None:
        z_bar += jnp.where(softmax.at_max, at_max_bar[..., None], 0)
    s_bar = z_bar * params.softmax_scale
    if softmax.dz_ds is not None:
        s_bar *= softmax.dz_ds
    q_bar = k_bar = None
    if wrt.query is not None:
        q_bar = softmax.kept(_dot("bqhgs,bshd->bqhgd", s_bar, k))
        q_bar = _ungroup(q_bar.astype(wrt.query))
    if wrt.key is not None:
        k_bar = _dot("bqhgs,bqhgd->bshd", s_bar, q).astype(wrt.key)
    if wrt.value is not None and v_bar is None:
        v_bar = jnp.zeros(value.shape, wrt.value)
    return ByOperand(q_bar, k_bar, v_bar)


class _Reference(Lowering):
    """The reference as a lowering: it takes every call, and every form of cache."""

    dense_only = False

    def forward(
        self, operands: Operands, params: RaggedAttentionParams, device_kind: str | None
    ) -> ByResult[jax.Array]:
        del device_kind
        return forward_by_dense(forward, operands, params)

    def jvp(
        self,
        residuals: Residuals,
        tangents: ByOperand[jax.Array | None],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByResult[jax.Array]:
        del device_kind
        return jvp_by_dense(jvp, residuals, tangents, params)

    def vjp(
        self,
        residuals: Residuals,
        cotangents: ByResult[jax.Array | None],
        wrt: ByOperand[Any],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByOperand[jax.Array | None]:
        del device_kind
        return vjp_by_dense(vjp, residuals, cotangents, wrt, params)


REFERENCE = _Reference()
