"""The grid of a kernel over ragged windows: one step for each block that a window touches.

Rows [V] are pairs of a row of the cache and a tile of its queries; the windows of a row are those
of its queries, and its blocks are those from the first to the last position of any of them. The
blocks of all rows, in order, are cut in equal halves for the two cores of a megacore chip; a row
that is cut gets a partial result from each, and they are merged.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# As scalars of the kernel, in this order.
SCALARS = 7


class WorkList(NamedTuple):
    """Scalars that the kernel and its index maps read, int32.

    Attributes:
      row: [items], the row of each item, the last row of all behind the end.
      offset: [V]: the block of an item is `offset[row] + item`.
      start: [V], the first position of any window of the row.
      end: [V], behind the last position of any window of the row.
      all_start: [V], the last of the first positions of its windows.
      all_end: [V], the first of the ends of its windows; between all_start and all_end a position
        lies in every window.
      size: [3], the number of items, of those for each core, and the row of the first core's last.
    """

    row: jax.Array
    offset: jax.Array
    start: jax.Array
    end: jax.Array
    all_start: jax.Array
    all_end: jax.Array
    size: jax.Array

    @classmethod
    def of(cls, lo: jax.Array, hi: jax.Array, T: int, blocks: int, cores: int) -> "WorkList":
        """From windows lo <= t < hi within the cache, [V, queries], and blocks of T positions."""
        empty = lo >= hi
        start = jnp.where(empty, jnp.iinfo(jnp.int32).max, lo).min(axis=1)
        end = jnp.where(empty, 0, hi).max(axis=1)
        start = jnp.minimum(start, end)
        first = lax.div(start, T)
        counts = jnp.where(start < end, lax.div(end + (T - 1), T) - first, 0)
        ends = _cumulative_sum(counts)
        items = ends[-1]
        share = lax.div(items + (cores - 1), cores)
        item = lax.iota(jnp.int32, start.size * blocks + cores)
        # Comparing with all ends is one fused loop; a search or a scatter would be serial.
        row = (ends[None, :] <= jnp.minimum(item, items - 1)[:, None]).sum(axis=1, dtype=jnp.int32)
        return cls(
            row=jnp.minimum(row, start.size - 1),
            offset=first - (ends - counts),
            start=start,
            end=end,
            all_start=lo.max(axis=1),
            all_end=hi.min(axis=1),
            size=jnp.stack([items, share, row[jnp.maximum(share - 1, 0)]]),
        )


def _cumulative_sum(x: jax.Array) -> jax.Array:
    """Of a short vector, as one fused reduction."""
    index = lax.iota(jnp.int32, x.size)
    return jnp.where(index[None, :] <= index[:, None], x[None, :], 0).sum(axis=1, dtype=jnp.int32)


def item_of_step(core: jax.Array, step: jax.Array, size: jax.Array) -> jax.Array:
    """The item of a grid step; the last one again where the steps of a core have run out."""
    return jnp.minimum(core * size[1] + step, size[0] - 1)


class Results(NamedTuple):
    """What a kernel makes of a work list, in which rows with no item hold anything.

    Attributes:
      out: [V, R, Dv], normalised; for two cores [V + 1, R, Dv], with the rows of the second from
        their index + 1 on, so that there are two of the row that is cut.
      max_logits: [V, R] or [V + 1, R].
      denominator: [V, R] or [V + 1, R].
      parts: float32 [2, R, Dv], what each core makes of the first core's last row; None for one.
    """

    out: jax.Array
    max_logits: jax.Array
    denominator: jax.Array
    parts: jax.Array | None


def complete(results: Results, work: WorkList, mask_value: float) -> tuple[jax.Array, ...]:
    """Out, max_logits and denominator, [V, R, Dv] and [V, R], of all rows."""
    *arrays, parts = results
    V = work.start.size
    if parts is not None:
        items, share, last = work.size
        index = lax.iota(jnp.int32, V)
        is_cut = (index == last) & (share < items) & (work.row[share] == last)
        statistics = (lax.dynamic_slice_in_dim(x, last, 2) for x in arrays[1:])
        merged = _merge_two(parts, *statistics, mask_value=mask_value)
        arrays = [_select(index > last, x[1:], x[:V]) for x in arrays]
        arrays = [
            _select(is_cut, one.astype(x.dtype), x) for one, x in zip(merged, arrays, strict=True)
        ]
    empty = work.start >= work.end
    fills = (0.0, mask_value, 0.0)
    return tuple(
        _select(empty, jnp.asarray(fill, x.dtype), x) for fill, x in zip(fills, arrays, strict=True)
    )


def _select(rows: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """X in some rows, and else y."""
    return jnp.where(rows.reshape(-1, *(1,) * (y.ndim - 1)), x, y)


def _merge_two(
    outs: jax.Array, max_logits: jax.Array, denominators: jax.Array, *, mask_value: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Merges partial results of the same windows, the parts along the first axis.

    m = max m_c     w_c = l_c exp(m_c - m)     l = sum w_c     o = sum w_c o_c / l
    """
    some = denominators != 0
    m = jnp.where(some, max_logits, -jnp.inf).max(axis=0)
    m = jnp.where(some.any(axis=0), m, mask_value)
    weights = jnp.where(some, denominators * jnp.exp(max_logits - m[None]), 0)
    total = weights.sum(axis=0)
    weights = weights / jnp.where(total == 0, 1, total)[None]
    return (weights[..., None] * outs).sum(axis=0), m, total
