"""The grid of a kernel over ragged windows: one step for each block that a window touches.

Rows [V] are pairs of a row of the cache and a tile of its queries; the windows of a row are those
of its queries, and its blocks are those from the first to the last position of any of them. The
blocks of all rows, in order, are cut in equal halves for the two cores of a megacore chip; the
row that is cut gets a partial result from each, and they are merged.
"""

import functools
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
      size: [2], the number of items and of those for each core.
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
            size=jnp.stack([items, lax.div(items + (cores - 1), cores)]),
        )

    def touched(self, T: int, cores: int) -> jax.Array:
        """Which core has an item of which row: bool [cores, V]."""
        first = lax.div(self.start, T) - self.offset
        last = lax.div(self.end + (T - 1), T) - self.offset
        core = lax.iota(jnp.int32, cores)[:, None]
        begin = core * self.size[1]
        end = jnp.minimum(begin + self.size[1], self.size[0])
        nonempty = self.start < self.end
        return nonempty & (jnp.maximum(first, begin) < jnp.minimum(last, end))


def _cumulative_sum(x: jax.Array) -> jax.Array:
    """Of a short vector, as one fused reduction."""
    index = lax.iota(jnp.int32, x.size)
    return jnp.where(index[None, :] <= index[:, None], x[None, :], 0).sum(axis=1, dtype=jnp.int32)


def item_of_step(core: jax.Array, step: jax.Array, size: jax.Array) -> jax.Array:
    """The item of a grid step; the last one again where the steps of a core have run out."""
    return jnp.minimum(core * size[1] + step, size[0] - 1)


def merge(
    outs: jax.Array,
    max_logits: jax.Array,
    denominators: jax.Array,
    touched: jax.Array,
    mask_value: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Merges the cores' partial results, of which those not touched hold anything.

        m = max m_c     w_c = l_c exp(m_c - m)     l = sum w_c     o = sum w_c o_c / l

    Args:
      outs: [cores, V, R, Dv], normalised.
      max_logits: [cores, V, R], mask_value where a core has nothing of a window.
      denominators: [cores, V, R], 0 there.
      touched: bool [cores, V].
      mask_value: of an empty window.
    """
    touched = touched[:, :, None]
    max_logits = jnp.where(touched, max_logits, mask_value)
    denominators = jnp.where(touched, denominators, 0)
    outs = jnp.where(touched[..., None], outs, 0)
    if outs.shape[0] == 1:
        return outs[0], max_logits[0], denominators[0]
    some = denominators != 0
    m = functools.reduce(jnp.maximum, jnp.where(some, max_logits, -jnp.inf))
    m = jnp.where(some.any(axis=0), m, mask_value)
    weights = jnp.where(some, denominators * jnp.exp(max_logits - m), 0)
    total = weights.sum(axis=0)
    weights = weights / jnp.where(total == 0, 1, total)
    return (weights[..., None] * outs).sum(axis=0), m, total
