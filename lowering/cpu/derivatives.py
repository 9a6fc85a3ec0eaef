"""The derivatives, in one more run through the blocks of each row.

The run takes m, l and o from the residuals, and p_t = exp(z_t - m) from logits z_t that it computes
as the forward does. The derivation is in `lowering/reference.py`; here the order is another:

    o_dot   = (sum p_t z_dot_t v_t + sum p_t v_dot_t - o sum p_t z_dot_t) / l
    z_bar_t = p_t (<o_bar / l, v_t> + shift) + at_max [t = t*]
    shift   = l_bar - <o_bar, o> / l        at_max = m_bar - l_bar l

Queries are scaled before the products, in the derivatives as in the forward. With q = scale query,

    z_dot_t   = slope_t (<scale query_dot, k_t> + <q, k_dot_t>)
    query_bar = scale sum_t slope_t z_bar_t k_t        k_bar_t = sum slope_t z_bar_t q

The two parts of o_dot cancel where the keys are much alike, and so do the two parts of z_bar_t.
They cancel to the rounding of float32, since o is not rounded in the residuals.

The terms that need t*, the position of the maximum, are left out of the run. The run finds t*, the
first position at which the logits that it computes are largest; its terms, one position for each
query and head, are added afterwards.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_ragged.lowering import reference
from jax_ragged.lowering.cache import is_dense, jvp_by_dense, positions_axis, vjp_by_dense
from jax_ragged.lowering.contract import ByOperand, ByResult, Residuals
from jax_ragged.lowering.cpu.blocks import (
    Block,
    Cache,
    Windows,
    along_features,
    along_positions,
    along_rows,
    by_key_head,
    by_query,
    logits,
    pick,
    put,
    put_block,
    scaled_query,
    soft_cap_slope,
    varying_like,
    written_cache,
    zero_cache,
)
from jax_ragged.lowering.cpu.forward import is_small
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.reference import inverse


class _Maximum(NamedTuple):
    """The largest logit so far and the first position that has it: [Hkv, R], or [B, Hkv, R].

    Blocks come last first.
    """

    z: jax.Array
    t: jax.Array

    @classmethod
    def none(cls, like: jax.Array, shape: tuple[int, ...]) -> "_Maximum":
        z = varying_like(like, jnp.full(shape, -jnp.inf, like.dtype))
        return cls(z, varying_like(like, jnp.zeros(shape, jnp.int32)))

    def of(self, z: jax.Array, at: Block) -> "_Maximum":
        """With a block's logits [Hkv, R, T], -inf outside of the windows."""
        highest = z.max(axis=2)
        last = jnp.iinfo(jnp.int32).max
        t = jnp.where(z == highest[..., None], at.position[None, None], last).min(axis=2)
        newer = highest >= self.z
        return _Maximum(jnp.where(newer, highest, self.z), jnp.where(newer, t, self.t))

    def gather(self, x: Cache) -> jax.Array:
        """x at t*, widened, [B, Hkv, R, D]; 0 where there is none."""
        return jnp.where(self.exists[..., None], x.gather(self.t), 0)

    @property
    def where(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Where t* lies in a cache: row, position and head, [B, Hkv, R] each."""
        b, h = (lax.broadcasted_iota(jnp.int32, self.t.shape, i) for i in (0, 1))
        return b, self.t, h

    @property
    def exists(self) -> jax.Array:
        return self.z > -jnp.inf

    def slope(self, params: RaggedAttentionParams) -> jax.Array | float:
        """dz / ds at the maximum."""
        return soft_cap_slope(jnp.where(self.exists, self.z, 0), params)


class _Rows(NamedTuple):
    """The queries and the residuals by key head, widened: R = Q * G of them for each.

    Where the window is empty, all is such that its weights and its terms are 0.

    Attributes:
      q: [B, Hkv, R, D], scaled; 0 for an empty window.
      m: [B, Hkv, R], the maximum; infinity for an empty window.
      o: [B, Hkv, R, Dv], the output.
      denominator: [B, Hkv, R], l.
      inverse: [B, Hkv, R], 1 / l; 0 for an empty window.
      nonempty: bool [B, Hkv, R].
    """

    q: jax.Array
    m: jax.Array
    o: jax.Array
    denominator: jax.Array
    inverse: jax.Array
    nonempty: jax.Array

    @classmethod
    def of(cls, residuals: Residuals, params: RaggedAttentionParams) -> "_Rows":
        query, key = residuals.query, residuals.key
        results = residuals.out, residuals.max_logits, residuals.denominator
        Hkv = key.shape[3 - positions_axis(params)]
        q = scaled_query(query, Hkv, params)
        o, m, denominator = (by_key_head(x.astype(q.dtype), Hkv) for x in results)
        nonempty = denominator != 0
        q = jnp.where(nonempty[..., None], q, 0)
        m = jnp.where(nonempty, m, jnp.inf)
        return cls(q, m, o, denominator, inverse(denominator), nonempty)

    def kept(self, x: jax.Array) -> jax.Array:
        """x [B, Hkv, R, ...], but 0 for an empty window, whatever x holds there."""
        nonempty = self.nonempty.reshape(*self.nonempty.shape, *[1] * (x.ndim - 3))
        return jnp.where(nonempty, x, 0)


class _Tangents(NamedTuple):
    """The arrays of one row that the run of jvp reads.

    Attributes:
      q: [Hkv, R, D], scaled.
      m: [Hkv, R].
      q_dot: [Hkv, R, D], scaled, or None for a zero.
    """

    q: jax.Array
    m: jax.Array
    q_dot: jax.Array | None


class _Moments(NamedTuple):
    """The sums of the run of jvp, [Hkv, R, ...] of a row or [B, Hkv, R, ...] of all.

    Attributes:
      pz_dot: [..., R], the sum of p z_dot.
      weighted: [..., R, Dv], the sum of p z_dot v + p v_dot.
      maximum: [..., R].
    """

    pz_dot: jax.Array
    weighted: jax.Array
    maximum: _Maximum


def jvp(
    residuals: Residuals,
    tangents: ByOperand[jax.Array | None],
    params: RaggedAttentionParams,
) -> ByResult[jax.Array]:
    """Tangents of (out, max_logits, denominator) for tangents of (query, key, value)."""
    if is_small(residuals, params):
        return jvp_by_dense(reference.jvp, residuals, tangents, params)
    if tangents.key_scale is not None or tangents.value_scale is not None:
        return jvp_by_dense(jvp, residuals, tangents, params)
    query, Q = residuals.query, residuals.query.shape[1]
    key, value = Cache.pair(residuals, params)
    k_dot = None if tangents.key is None else key._replace(x=tangents.key)
    v_dot = None if tangents.value is None else value._replace(x=tangents.value)
    Hkv = key.heads
    rows = _Rows.of(residuals, params)
    q_dot = None if tangents.query is None else scaled_query(tangents.query, Hkv, params)
    all_tangents = _Tangents(rows.q, rows.m, q_dot)
    B, _, R, Dv = rows.o.shape

    def moments(*leading: int) -> _Moments:
        zeros = varying_like(rows.q, jnp.zeros((*leading, R, Dv), rows.q.dtype))
        return _Moments(zeros[..., 0], zeros, _Maximum.none(rows.q, (*leading, R)))

    def block(at: Block, state: tuple[_Tangents, _Moments]) -> tuple[_Tangents, _Moments]:
        row, sums = state
        k, v = key.take(at), value.take(at)
        z, slope = logits(row.q, k, at, params)
        p = jnp.exp(z - row.m[..., None])
        s_dot = jnp.zeros_like(z)
        if row.q_dot is not None:
            s_dot += along_features(row.q_dot, k)
        if k_dot is not None:
            s_dot += along_features(row.q, k_dot.take(at))
        pz_dot = p * (s_dot * slope)
        weighted = along_positions(pz_dot, v)
        if v_dot is not None:
            weighted += along_positions(p, v_dot.take(at))
        total = sums.pz_dot + pz_dot.sum(axis=2)
        return row, _Moments(total, sums.weighted + weighted, sums.maximum.of(z, at))

    sums = Windows.of(residuals, params).fold(
        moments(B, Hkv),
        R // Q,
        lambda b, _: (jax.tree.map(lambda x: pick(x, b), all_tangents), moments(Hkv)),
        block,
        lambda b, all_sums, state: jax.tree.map(lambda x, y: put(x, y, b), all_sums, state[1]),
    )
    s_dot = jnp.zeros_like(sums.pz_dot)
    if q_dot is not None:
        s_dot += (q_dot * sums.maximum.gather(key)).sum(axis=3)
    if k_dot is not None:
        s_dot += (rows.q * sums.maximum.gather(k_dot)).sum(axis=3)
    m_dot = s_dot * sums.maximum.slope(params)
    l_dot = sums.pz_dot - rows.denominator * m_dot
    o_dot = (sums.weighted - sums.pz_dot[..., None] * rows.o) * rows.inverse[..., None]
    o_dot, m_dot, l_dot = (by_query(rows.kept(x), Q) for x in (o_dot, m_dot, l_dot))
    return ByResult(o_dot.astype(params.result_dtype(query.dtype)), m_dot, l_dot)


class _Cotangents(NamedTuple):
    """The arrays of one row that the run of vjp reads: [Hkv, R, ...]; of all, [B, Hkv, R, ...].

    Attributes:
      q: [..., R, D], scaled.
      m: [..., R].
      o_bar: [..., R, Dv], o_bar / l, or None for a zero.
      shift: [..., R], l_bar - <o_bar, o> / l.
    """

    q: jax.Array
    m: jax.Array
    o_bar: jax.Array | None
    shift: jax.Array


class _Gradients(NamedTuple):
    """The gradients so far, None for those that are not asked for; likewise the maximum.

    Attributes:
      q: [Hkv, R, D] of a row or [B, Hkv, R, D] of all, wide, and not yet scaled.
      k: a zero_cache [B, S, Hkv, D].
      v: a zero_cache [B, S, Hkv, Dv].
      maximum: [Hkv, R] of a row or [B, Hkv, R] of all.
    """

    q: jax.Array | None
    k: jax.Array | None
    v: jax.Array | None
    maximum: _Maximum | None


def vjp(
    residuals: Residuals,
    cotangents: ByResult[jax.Array | None],
    wrt: ByOperand[Any],
    params: RaggedAttentionParams,
) -> ByOperand[jax.Array | None]:
    """Cotangents of query, key and value, for each that wrt asks for: the transpose of jvp."""
    if is_small(residuals, params):
        return vjp_by_dense(reference.vjp, residuals, cotangents, wrt, params)
    of_cache = any(dtype is not None for dtype in wrt[1:])
    if of_cache and not is_dense(residuals, params):
        return vjp_by_dense(vjp, residuals, cotangents, wrt, params)
    query, (key, _) = residuals.query, Cache.pair(residuals, params)
    rows = _Rows.of(residuals, params)
    o_bar, m_bar, l_bar = (
        None if x is None else rows.kept(by_key_head(x.astype(rows.q.dtype), key.heads))
        for x in cotangents
    )
    shift, at_max = jnp.zeros_like(rows.m), jnp.zeros_like(rows.m)
    if o_bar is not None:
        o_bar *= rows.inverse[..., None]
        shift -= (o_bar * rows.o).sum(axis=3)
    if l_bar is not None:
        shift += l_bar
        at_max -= l_bar * rows.denominator
    if m_bar is not None:
        at_max += m_bar
    maximum_asked = l_bar is not None or m_bar is not None
    # The terms at t* are added to the others before these are rounded: many queries may have
    # their maximum at one position.
    wide_key = rows.q.dtype if maximum_asked and wrt.key is not None else wrt.key
    grads = _run_vjp(
        residuals,
        _Cotangents(rows.q, rows.m, o_bar, shift),
        wrt._replace(key=wide_key),
        maximum_asked,
        params,
    )
    q_bar, k_bar = grads.q, grads.k
    if grads.maximum is not None:
        maximum = grads.maximum
        s_bar = jnp.where(maximum.exists, at_max * maximum.slope(params), 0)[..., None]
        if q_bar is not None:
            q_bar += s_bar * maximum.gather(key)
        if k_bar is not None:
            k_bar = k_bar.at[maximum.where].add(s_bar * rows.q, mode="promise_in_bounds")
    if q_bar is not None:
        q_bar = rows.kept(q_bar * jnp.asarray(params.softmax_scale, q_bar.dtype))
        q_bar = by_query(q_bar.astype(wrt.query), query.shape[1])
    if k_bar is not None:
        k_bar = k_bar.astype(wrt.key)
    return ByOperand(q_bar, k_bar, grads.v)


def _run_vjp(
    residuals: Residuals,
    cotangents: _Cotangents,
    wrt: ByOperand[Any],
    maximum_asked: bool,
    params: RaggedAttentionParams,
) -> _Gradients:
    """The gradients without the terms at t*; k and v in the dtypes that wrt names."""
    key, value = Cache.pair(residuals, params)
    q = cotangents.q
    B, Hkv, R, D = q.shape

    def begin(*leading: int) -> tuple[jax.Array | None, _Maximum | None]:
        zeros = varying_like(q, jnp.zeros((*leading, R, D), q.dtype))
        maximum = _Maximum.none(q, (*leading, R))
        return (None if wrt.query is None else zeros), (maximum if maximum_asked else None)

    def begin_row(b: jax.Array, grads: _Gradients) -> tuple[_Cotangents, _Gradients]:
        q_bar, maximum = begin(Hkv)
        row = jax.tree.map(lambda x: pick(x, b), cotangents)
        return row, grads._replace(q=q_bar, maximum=maximum)

    def block(at: Block, state: tuple[_Cotangents, _Gradients]) -> tuple[_Cotangents, _Gradients]:
        row, grads = state
        k = key.take(at)
        z, slope = logits(row.q, k, at, params)
        p = jnp.exp(z - row.m[..., None])
        z_bar = row.shift[..., None]
        if row.o_bar is not None and (wrt.query is not None or wrt.key is not None):
            z_bar = z_bar + along_features(row.o_bar, value.take(at))
        s_bar = p * z_bar * slope
        if grads.q is not None:
            grads = grads._replace(q=grads.q + along_positions(s_bar, k))
        if grads.k is not None:
            grads = grads._replace(k=put_block(grads.k, at, along_rows(s_bar, row.q)))
        if grads.v is not None and row.o_bar is not None:
            grads = grads._replace(v=put_block(grads.v, at, along_rows(p, row.o_bar)))
        if grads.maximum is not None:
            grads = grads._replace(maximum=grads.maximum.of(z, at))
        return row, grads

    def end_row(
        b: jax.Array, grads: _Gradients, state: tuple[_Cotangents, _Gradients]
    ) -> _Gradients:
        done = state[1]
        q_bar, maximum = jax.tree.map(
            lambda x, y: put(x, y, b), (grads.q, grads.maximum), (done.q, done.maximum)
        )
        return done._replace(q=q_bar, maximum=maximum)

    q_bar, maximum = begin(B, Hkv)
    k_bar, v_bar = (
        None if dtype is None else varying_like(q, zero_cache(x.x.shape, dtype, tie))
        for x, tie, dtype in zip((key, value), (q, cotangents.m), wrt[1:3], strict=True)
    )
    initial = _Gradients(q_bar, k_bar, v_bar, maximum)
    windows = Windows.of(residuals, params)
    grads = windows.fold(initial, R // residuals.query.shape[1], begin_row, block, end_row)
    return grads._replace(
        k=None if grads.k is None else written_cache(grads.k, wrt.key),
        v=None if grads.v is None else written_cache(grads.v, wrt.value),
    )
