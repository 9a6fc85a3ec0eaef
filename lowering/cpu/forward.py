"""The forward: a streaming softmax over the blocks of each row.

With z_t the logits of one query and head and t running over what has been read,

    m = max z_t        l = sum exp(z_t - m)        a = sum exp(z_t - m) v_t

and a block with maximum m' brings all three from m to max(m, m') by a factor exp(m - max(m, m')).
"""

import jax
import jax.numpy as jnp
from jax import lax

from jax_ragged.lowering import reference
from jax_ragged.lowering.cpu.blocks import (
    PARTS,
    Block,
    Work,
    block_size,
    by_key_head,
    by_query,
    dot,
    for_rows,
    over_heads,
    pick,
    put,
    take,
    varying_like,
)
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.reference import Arrays3, inverse, statistics_dtype


def soft_cap(s: jax.Array, params: RaggedAttentionParams) -> jax.Array:
    """From s = scale <q, k> to z."""
    cap = params.logits_soft_cap
    return s if cap is None else cap * jnp.tanh(s / cap)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    *,
    params: RaggedAttentionParams,
) -> Arrays3:
    """Returns out [B, Q, Hq, Dv], max_logits and denominator [B, Q, Hq]."""
    B, Q = lengths.shape
    S, Hkv = key.shape[1:3]
    if B * Q * S == 0:
        return reference.forward(query, key, value, lengths, starts, params=params)
    T = block_size(S, max(key.shape[-1], value.shape[-1]), params.block_size)
    wide = statistics_dtype(query.dtype)
    q = by_key_head(query.astype(wide) * jnp.asarray(params.softmax_scale, wide), Hkv)
    work = Work.of(lengths, starts, S, T)
    partials = [_part(part, work, q, key, value, T, params) for part in range(PARTS)]
    m, l, a = _merged(partials)
    out = a * inverse(l)[..., None]
    m = jnp.where(l == 0, jnp.asarray(params.mask_value, wide), m)
    return by_query(out.astype(query.dtype), Q), by_query(m, Q), by_query(l, Q)


def _part(
    part: int,
    work: Work,
    q: jax.Array,
    key: jax.Array,
    value: jax.Array,
    T: int,
    params: RaggedAttentionParams,
) -> Arrays3:
    """(m, l, a) of one part of the work, [B, Hkv, R, ...]; of q [B, Hkv, R, D], scaled."""
    B, Hkv, R, _ = q.shape
    S, Dv = key.shape[1], value.shape[-1]

    def empty(*rows: int) -> Arrays3:
        lowest = jnp.full((*rows, R), jnp.finfo(q.dtype).min, q.dtype)
        zeros = (jnp.zeros((*rows, R, *d), q.dtype) for d in ((), (Dv,)))
        m, l, a = (varying_like(q, x) for x in (lowest, *zeros))
        return m, l, a

    def block(at: Block, state: tuple[jax.Array, Arrays3]) -> tuple[jax.Array, Arrays3]:
        q_row, sums = state
        used = at.inside.any(axis=0)[:, None]
        inside = for_rows(at.inside, R)

        def head(h: jax.Array, sums: Arrays3) -> Arrays3:
            s = dot(pick(q_row, h), take(key, at, h, T), (((1,), (1,)), ((), ())))
            z = jnp.where(inside, soft_cap(s, params), -jnp.inf)
            # A probability of 0 does not remove a NaN.
            v = jnp.where(used, take(value, at, h, T), 0)
            return _stream(z, v, h, sums)

        return q_row, over_heads(Hkv, head, sums)

    def end_row(b: jax.Array, rows: Arrays3, state: tuple[jax.Array, Arrays3]) -> Arrays3:
        m, l, a = (put(x, y, b) for x, y in zip(rows, state[1], strict=True))
        return m, l, a

    return work.fold(
        part, T, S, empty(B, Hkv), lambda b, _: (pick(q, b), empty(Hkv)), block, end_row
    )


def _stream(z: jax.Array, v: jax.Array, h: jax.Array, sums: Arrays3) -> Arrays3:
    """Adds logits z [R, T] and values v [T, Dv] to head h of the running (m, l, a)."""
    m, l, a = (pick(x, h) for x in sums)
    m_new = jnp.maximum(m, z.max(axis=1))
    p = jnp.exp(z - m_new[:, None])
    factor = jnp.exp(m - m_new)
    l = l * factor + p.sum(axis=1)
    a = a * factor[:, None] + dot(p, v, (((1,), (0,)), ((), ())))
    m, l, a = (put(x, y, h) for x, y in zip(sums, (m_new, l, a), strict=True))
    return m, l, a


def _merged(partials: list[Arrays3]) -> Arrays3:
    """The parts of a row brought to one maximum and added."""
    m = partials[0][0]
    for other, _, _ in partials[1:]:
        m = jnp.maximum(m, other)
    factors = [jnp.exp(part[0] - m) for part in partials]
    l = sum(f * part[1] for f, part in zip(factors, partials, strict=True))
    a = sum(f[..., None] * part[2] for f, part in zip(factors, partials, strict=True))
    return m, jnp.asarray(l), jnp.asarray(a)
