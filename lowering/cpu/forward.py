"""The forward: a streaming softmax over the blocks of each row.

For one query and head, with z_t its logits and t running over the positions read so far,

    m = max z_t        l = sum exp(z_t - m)        a = sum exp(z_t - m) v_t

and a block with maximum n brings all three from m to max(m, n) by a factor exp(m - max(m, n)).

A window whose logits are all -inf adds nothing to l, so that it ends as an empty one does.
"""

import jax
import jax.numpy as jnp

from jax_ragged.lowering import reference
from jax_ragged.lowering.cache import forward_by_dense, positions, positions_axis
from jax_ragged.lowering.contract import ByResult, Operands, Residuals
from jax_ragged.lowering.cpu.blocks import (
    Block,
    Cache,
    Windows,
    along_positions,
    by_query,
    logits,
    pick,
    put,
    scaled_query,
    varying_like,
)
from jax_ragged.lowering.params import RaggedAttentionParams, statistics_dtype
from jax_ragged.lowering.reference import inverse

Arrays3 = tuple[jax.Array, jax.Array, jax.Array]

# Elements of a cache up to which the dense form is no slower than a loop.
_DENSE_ELEMENTS = 1 << 15


def is_small(operands: Operands | Residuals, params: RaggedAttentionParams) -> bool:
    """Whether the dense form runs: for little, unless a block size is asked for."""
    D, Dv = operands.key.shape[3], operands.value.shape[3]
    S, Hkv = positions(operands, params), operands.key.shape[3 - positions_axis(params)]
    elements = operands.query.shape[0] * S * Hkv * (D + Dv)
    return params.block_size is None and elements <= _DENSE_ELEMENTS


def forward(operands: Operands, params: RaggedAttentionParams) -> ByResult[jax.Array]:
    """Returns out [B, Q, Hq, Dv], max_logits and denominator [B, Q, Hq]."""
    if is_small(operands, params):
        return forward_by_dense(reference.forward, operands, params)
    query, Q = operands.query, operands.query.shape[1]
    windows = Windows.of(operands, params)
    wide = statistics_dtype(query.dtype)
    key, value = Cache.pair(operands, params)
    q = scaled_query(query, key.heads, params)
    highest, total, weighted = _stream(q, key, value, windows, Q, params)
    empty = total == 0
    # An empty window may share its row with one that holds a NaN, and 0 * NaN is NaN.
    out = jnp.where(empty[..., None], 0, weighted * inverse(total)[..., None])
    highest = jnp.where(empty, jnp.asarray(params.mask_value, wide), highest)
    out = out.astype(params.result_dtype(query.dtype))
    return ByResult(by_query(out, Q), by_query(highest, Q), by_query(total, Q))


def _stream(
    q: jax.Array,
    key: Cache,
    value: Cache,
    windows: Windows,
    Q: int,
    params: RaggedAttentionParams,
) -> Arrays3:
    """(m, l, a) of q [B, Hkv, R, D], scaled: [B, Hkv, R], [B, Hkv, R], [B, Hkv, R, Dv]."""
    B, Hkv, R, _ = q.shape

    def empty(*rows: int) -> Arrays3:
        lowest = varying_like(q, jnp.full((*rows, R), jnp.finfo(q.dtype).min, q.dtype))
        zeros = varying_like(q, jnp.zeros((*rows, R, value.x.shape[3]), q.dtype))
        return lowest, zeros[..., 0], zeros

    def block(at: Block, state: tuple[jax.Array, Arrays3]) -> tuple[jax.Array, Arrays3]:
        q_row, (highest, total, weighted) = state
        z, _ = logits(q_row, key.take(at), at, params)
        new = jnp.maximum(highest, z.max(axis=2))
        p = jnp.exp(z - new[..., None])
        factor = jnp.exp(highest - new)
        total = total * factor + p.sum(axis=2)
        weighted = weighted * factor[..., None] + along_positions(p, value.take(at))
        return q_row, (new, total, weighted)

    def end_row(b: jax.Array, rows: Arrays3, state: tuple[jax.Array, Arrays3]) -> Arrays3:
        highest, total, weighted = (put(x, y, b) for x, y in zip(rows, state[1], strict=True))
        return highest, total, weighted

    return windows.fold(
        empty(B, Hkv), R // Q, lambda b, _: (pick(q, b), empty(Hkv)), block, end_row
    )
