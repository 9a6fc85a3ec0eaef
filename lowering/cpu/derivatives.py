"""The derivatives, in one more run through the blocks of each row: terms as in the reference.

What hangs on the maximum alone, attained at t*, is left out of the run. The run finds t*, the
first position at which the logits that it recomputes are largest; its terms, one position for
each query and head, are added afterwards.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_ragged.lowering import reference
from jax_ragged.lowering.contract import ByOperand, ByResult, Residuals
from jax_ragged.lowering.cpu.blocks import (
    Block,
    Windows,
    along_features,
    along_positions,
    along_rows,
    by_key_head,
    by_query,
    pick,
    put,
    put_block,
    soft_cap,
    soft_cap_slope,
    take,
    varying_like,
    written_cache,
    zero_cache,
)
from jax_ragged.lowering.cpu.forward import is_dense
from jax_ragged.lowering.params import RaggedAttentionParams, statistics_dtype
from jax_ragged.lowering.reference import inverse

_Rows = dict[str, jax.Array]


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
        t = jnp.where(z == highest[..., None], at.position, last).min(axis=2)
        newer = highest >= self.z
        return _Maximum(jnp.where(newer, highest, self.z), jnp.where(newer, t, self.t))

    def gather(self, x: jax.Array) -> jax.Array:
        """x [B, S, Hkv, D] at t*, widened, [B, Hkv, R, D]; 0 where there is none."""
        b, h = (lax.broadcasted_iota(jnp.int32, self.t.shape, i) for i in (0, 1))
        at_max = x.at[b, self.t, h].get(mode="promise_in_bounds").astype(self.z.dtype)
        return jnp.where(self.exists[..., None], at_max, 0)

    @property
    def exists(self) -> jax.Array:
        return self.z > -jnp.inf


def _rows(residuals: Residuals) -> _Rows:
    """The residuals by key head, wide: q, o [B, Hkv, R, ...]; m, 1 / l, l [B, Hkv, R]."""
    query, key, _, _, _, *results = residuals
    wide = statistics_dtype(query.dtype)
    q, o, m, l_ = (by_key_head(x.astype(wide), key.shape[2]) for x in (query, *results))
    return {"q": q, "o": o, "m": m, "inverse": inverse(l_), "denominator": l_}


def _logits(
    row: _Rows, k: jax.Array, at: Block, params: RaggedAttentionParams
) -> tuple[jax.Array, jax.Array, jax.Array | float]:
    """A block's z, -inf outside of the windows, p and dz / ds, [Hkv, R, T]."""
    z = soft_cap(params.softmax_scale * along_features(row["q"], k), params)
    slope = soft_cap_slope(z, params)
    z = jnp.where(at.inside, z, -jnp.inf)
    return z, jnp.exp(z - row["m"][..., None]), slope


def _slope_at(maximum: _Maximum, params: RaggedAttentionParams) -> jax.Array | float:
    return soft_cap_slope(jnp.where(maximum.exists, maximum.z, 0), params)


class _Moments(NamedTuple):
    """Sums over a window: of p z., of p z. v + p v.; and the maximum."""

    pz_dot: jax.Array
    weighted: jax.Array
    maximum: _Maximum


def jvp(
    residuals: Residuals,
    tangents: ByOperand[jax.Array | None],
    params: RaggedAttentionParams,
) -> ByResult[jax.Array]:
    """Tangents of (out, max_logits, denominator) for tangents of (query, key, value)."""
    query, key, value, lengths, starts, *_ = residuals
    if is_dense(query, key, value, params):
        return reference.jvp(residuals, tangents, params)
    Q, Hkv = lengths.shape[1], key.shape[2]
    rows = _rows(residuals)
    q_dot, k_dot, v_dot = tangents
    if q_dot is not None:
        rows["q_dot"] = by_key_head(q_dot.astype(rows["q"].dtype), Hkv)
    B, _, R, Dv = rows["o"].shape

    def moments(*leading: int) -> _Moments:
        zeros = varying_like(rows["q"], jnp.zeros((*leading, R, Dv), rows["q"].dtype))
        return _Moments(zeros[..., 0], zeros, _Maximum.none(rows["q"], (*leading, R)))

    def block(at: Block, state: tuple[_Rows, _Moments]) -> tuple[_Rows, _Moments]:
        row, sums = state
        k, v = take(key, at), take(value, at)
        z, p, slope = _logits(row, k, at, params)
        s_dot = jnp.zeros_like(z)
        if q_dot is not None:
            s_dot += along_features(row["q_dot"], k)
        if k_dot is not None:
            s_dot += along_features(row["q"], take(k_dot, at))
        pz_dot = p * (s_dot * (params.softmax_scale * slope))
        weighted = along_positions(pz_dot, v)
        if v_dot is not None:
            weighted += along_positions(p, take(v_dot, at))
        total = sums.pz_dot + pz_dot.sum(axis=2)
        return row, _Moments(total, sums.weighted + weighted, sums.maximum.of(z, at))

    sums = Windows.of(query, key, value, lengths, starts, params).fold(
        moments(B, Hkv),
        R // Q,
        lambda b, _: (_row(rows, b), moments(Hkv)),
        block,
        lambda b, all_sums, state: jax.tree.map(lambda x, y: put(x, y, b), all_sums, state[1]),
    )
    s_dot = jnp.zeros_like(sums.pz_dot)
    if q_dot is not None:
        s_dot += (rows["q_dot"] * sums.maximum.gather(key)).sum(axis=3)
    if k_dot is not None:
        s_dot += (rows["q"] * sums.maximum.gather(k_dot)).sum(axis=3)
    m_dot = s_dot * (params.softmax_scale * _slope_at(sums.maximum, params))
    l_dot = sums.pz_dot - rows["denominator"] * m_dot
    o_dot = (sums.weighted - sums.pz_dot[..., None] * rows["o"]) * rows["inverse"][..., None]
    o_dot = o_dot.astype(params.result_dtype(query.dtype))
    return ByResult(by_query(o_dot, Q), by_query(m_dot, Q), by_query(l_dot, Q))


def _row(rows: _Rows, b: jax.Array) -> _Rows:
    return {name: pick(x, b) for name, x in rows.items()}


class _Gradients(NamedTuple):
    """Cotangents so far, those that are asked for, and the maximum, if it is."""

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
    """Cotangents of those of (query, key, value) that wrt asks for: the transpose of jvp."""
    query, key, value, lengths, starts, *_ = residuals
    if is_dense(query, key, value, params):
        return reference.vjp(residuals, cotangents, wrt, params)
    Q, Hkv = lengths.shape[1], key.shape[2]
    rows = _rows(residuals)
    _add_cotangents(rows, cotangents, Hkv)
    at_max = cotangents[1] is not None or cotangents[2] is not None
    windows = Windows.of(query, key, value, lengths, starts, params)
    grads = _run_vjp(rows, key, value, windows, wrt, at_max, params, Q)
    q_bar, k_bar = grads.q, grads.k
    if grads.maximum is not None:
        maximum = grads.maximum
        s_bar = rows["at_max"] * (params.softmax_scale * _slope_at(maximum, params))
        s_bar = jnp.where(maximum.exists, s_bar, 0)[..., None]
        if q_bar is not None:
            q_bar += s_bar * maximum.gather(key)
        if k_bar is not None:
            b, h = (lax.broadcasted_iota(jnp.int32, maximum.t.shape, i) for i in (0, 1))
            k_bar = k_bar.at[b, maximum.t, h].add((s_bar * rows["q"]).astype(k_bar.dtype))
    if q_bar is not None:
        q_bar = by_query(q_bar.astype(wrt.query), Q)
    return ByOperand(q_bar, k_bar, grads.v)


def _add_cotangents(rows: _Rows, cotangents: ByResult[jax.Array | None], Hkv: int) -> None:
    """Adds what the cotangents (o', m', l') make of a row, each only if it is there.

    z_t' = p_t (<o' / l, v_t> + shift) and at t* besides at_max, with shift = l' - <o', o> / l
    and at_max = m' - l' l.
    """
    wide = rows["q"].dtype
    o_bar, m_bar, l_bar = (
        None if x is None else by_key_head(x.astype(wide), Hkv) for x in cotangents
    )
    shift, at_max = jnp.zeros_like(rows["m"]), jnp.zeros_like(rows["m"])
    if o_bar is not None:
        rows["o_bar"] = o_bar * rows["inverse"][..., None]
        shift -= (rows["o_bar"] * rows["o"]).sum(axis=3)
    if l_bar is not None:
        shift += l_bar
        at_max -= l_bar * rows["denominator"]
    if m_bar is not None:
        at_max += m_bar
    rows["shift"], rows["at_max"] = shift, at_max


def _run_vjp(
    rows: _Rows,
    key: jax.Array,
    value: jax.Array,
    windows: Windows,
    wrt: ByOperand[Any],
    at_max: bool,
    params: RaggedAttentionParams,
    Q: int,
) -> _Gradients:
    """The gradients but for the terms at t*, q's [B, Hkv, R, D] and wide."""
    q = rows["q"]
    B, Hkv, R, D = q.shape

    def begin(*leading: int) -> tuple[jax.Array | None, _Maximum | None]:
        zeros = varying_like(q, jnp.zeros((*leading, R, D), q.dtype))
        maximum = _Maximum.none(q, (*leading, R))
        return (None if wrt.query is None else zeros), (maximum if at_max else None)

    def begin_row(b: jax.Array, grads: _Gradients) -> tuple[_Rows, _Gradients]:
        q_bar, maximum = begin(Hkv)
        return _row(rows, b), grads._replace(q=q_bar, maximum=maximum)

    def block(at: Block, state: tuple[_Rows, _Gradients]) -> tuple[_Rows, _Gradients]:
        row, grads = state
        k = take(key, at)
        z, p, slope = _logits(row, k, at, params)
        z_bar = row["shift"][..., None]
        if "o_bar" in row and (wrt.query is not None or wrt.key is not None):
            z_bar = z_bar + along_features(row["o_bar"], take(value, at))
        s_bar = p * z_bar * (params.softmax_scale * slope)
        if grads.q is not None:
            grads = grads._replace(q=grads.q + along_positions(s_bar, k))
        if grads.k is not None:
            grads = grads._replace(k=put_block(grads.k, at, along_rows(s_bar, row["q"])))
        if grads.v is not None and "o_bar" in row:
            grads = grads._replace(v=put_block(grads.v, at, along_rows(p, row["o_bar"])))
        if grads.maximum is not None:
            grads = grads._replace(maximum=grads.maximum.of(z, at))
        return row, grads

    def end_row(b: jax.Array, grads: _Gradients, state: tuple[_Rows, _Gradients]) -> _Gradients:
        done = state[1]
        q_bar, maximum = jax.tree.map(
            lambda x, y: put(x, y, b), (grads.q, grads.maximum), (done.q, done.maximum)
        )
        return done._replace(q=q_bar, maximum=maximum)

    q_bar, maximum = begin(B, Hkv)
    k_bar, v_bar = (
        None if dtype is None else varying_like(q, zero_cache(x.shape, dtype, tie))
        for x, tie, dtype in zip((key, value), (q, rows["m"]), wrt[1:], strict=True)
    )
    initial = _Gradients(q_bar, k_bar, v_bar, maximum)
    grads = windows.fold(initial, R // Q, begin_row, block, end_row)
    return grads._replace(
        k=None if grads.k is None else written_cache(grads.k, wrt.key),
        v=None if grads.v is None else written_cache(grads.v, wrt.value),
    )
