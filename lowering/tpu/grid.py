"""The grid: which block and which tile of queries a step computes, and merging two cores' work.

A *tile* is the queries of one row of the cache that a step computes together; V is the number of
tiles. A *work list* has one item for each block that a window of a tile touches, in order; an item
is one grid step. The items are cut in equal halves for the two cores of a megacore chip. A tile
that is cut gets a partial result from each core, and they are merged:

    row 0 of the cache    |..[======|========|===]....|      window [===] in blocks |...|
    row 1                 |...[==]..|........|........|
    row 2                 |........|.[=======|======].|
    items                  (0,0) (0,1) (0,2) (1,0) (2,1) (2,2)     (tile, block)
    two cores             |----- core 0 ------|----- core 1 ---|

Cotangents of the cache need every block once, also those outside of all windows (`Walk.every`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_ragged.lowering.tpu.choice import KernelPlan
from jax_ragged.lowering.tpu.chunks import WindowMask, quotient, remainder

# As scalars of the kernel, in this order.
SCALARS = 7


class WorkList(NamedTuple):
    """Scalars that the kernel and its index maps read, int32.

    Attributes:
      tile: [items], the tile of each item, the last tile of all behind the end.
      offset: [V]: the block of an item is `offset[tile] + item`.
      start: [V], the first position of any window of the tile.
      end: [V], behind the last position of any window of the tile.
      all_start: [V], the last of the first positions of its windows.
      all_end: [V], the first of the ends of its windows; between all_start and all_end a position
        lies in every window.
      size: [3], the number of items, the items of each core, and the tile of the first core's last.
    """

    tile: jax.Array
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
        tile = (ends[None, :] <= jnp.minimum(item, items - 1)[:, None]).sum(axis=1, dtype=jnp.int32)
        return cls(
            tile=jnp.minimum(tile, start.size - 1),
            offset=first - (ends - counts),
            start=start,
            end=end,
            all_start=lo.max(axis=1),
            all_end=hi.min(axis=1),
            size=jnp.stack([items, share, tile[jnp.maximum(share - 1, 0)]]),
        )


def _cumulative_sum(x: jax.Array) -> jax.Array:
    """The running sum of a short vector, as one fused reduction."""
    index = lax.iota(jnp.int32, x.size)
    return jnp.where(index[None, :] <= index[:, None], x[None, :], 0).sum(axis=1, dtype=jnp.int32)


def item_of_step(core: jax.Array, step: jax.Array, size: jax.Array) -> jax.Array:
    """The item of a grid step; the last one again where the steps of a core have run out."""
    return jnp.minimum(core * size[1] + step, size[0] - 1)


@dataclasses.dataclass(frozen=True)
class Walk:
    """Which block and which tile each grid step computes.

    Attributes:
      plan: of the kernel.
      V: tiles of the call.
      blocks: blocks of a row.
      every: whether every block of the cache has steps, one for each tile of its row in turn. Then
        the cores alternate between blocks, which balances the windows between them. Else the
        blocks of the work list alone have steps.
    """

    plan: KernelPlan
    V: int
    blocks: int
    every: bool

    @property
    def _units(self) -> int:
        return self.V // self.plan.tiles * self.blocks

    @property
    def cores(self) -> int:
        """Number of cores that have steps."""
        return min(self.plan.cores, self._units) if self.every else self.plan.cores

    def steps(self, work: WorkList) -> Any:
        """Number of steps of one core."""
        return -(-self._units // self.cores) * self.plan.tiles if self.every else work.size[1]

    def place(self, core: Any, step: Any, work: WorkList) -> tuple[Any, Any, Any]:
        """Returns tile, block, valid. Past the end it repeats another step, with valid False."""
        if not self.every:
            item = item_of_step(core, step, work.size)
            tile = work.tile[item]
            return tile, work.offset[tile] + item, core * work.size[1] + step < work.size[0]
        tiles, cores = self.plan.tiles, self.cores
        unit = quotient(step, tiles) * cores + core
        valid = unit < self._units
        unit = jnp.where(valid, unit, unit - cores)
        row = quotient(unit, self.blocks)
        return row * tiles + remainder(step, tiles), unit - row * self.blocks, valid

    def row_of(self, tile: Any) -> Any:
        """The row of the cache to which a tile belongs."""
        return quotient(tile, self.plan.tiles)

    def read(self, core: Any, step: Any, work: WorkList) -> tuple[Any, Any]:
        """Row and block that a step reads: the nearest block in the windows of the tile."""
        tile, block, _ = self.place(core, step, work)
        if self.every:
            T = self.plan.blocks.T
            first = quotient(work.start[tile], T)
            last = quotient(jnp.maximum(work.end[tile] - 1, 0), T)
            block = jnp.minimum(jnp.maximum(block, first), last)
        return self.row_of(tile), block

    def visited(self, work: WorkList) -> jax.Array:
        """Which core has a step of which tile: bool [cores, V]."""
        core = lax.iota(jnp.int32, self.cores)[:, None]
        if self.every:
            tile = lax.iota(jnp.int32, self.V)[None, :]
            # The units of one core, among all from first to end, are a multiple of cores apart.
            first = self.row_of(tile) * self.blocks
            skipped = remainder(core - first + self.V * self.blocks * self.cores, self.cores)
            return skipped < self.blocks
        T = self.plan.blocks.T
        first = (lax.div(work.start, T) - work.offset)[None, :]
        end = (lax.div(work.end + (T - 1), T) - work.offset)[None, :]
        begin = core * work.size[1]
        own = jnp.maximum(first, begin) < jnp.minimum(end, begin + work.size[1])
        visited: jax.Array = (work.start < work.end)[None, :] & own
        return visited


class Step:
    """The place of one grid step, as scalars.

    Attributes:
      tile: the tile.
      valid: whether the step computes anything.
      first, last: whether it is valid and the first or last of its tile on its core.
      start: the first position of the block.
      lo, hi: the bounds of the union of the tile's windows.
      touched: whether a window may have a position in the block.
      inner: whether all windows of the tile have all positions of the block.
      cut: the last tile of the first core, which the second may continue.
    """

    def __init__(self, walk: Walk, work: WorkList) -> None:
        core, step = pl.program_id(0), pl.program_id(1)
        steps = walk.steps(work)
        self.tile, block, self.valid = walk.place(core, step, work)
        before, _, _ = walk.place(core, jnp.maximum(step - 1, 0), work)
        after, _, more = walk.place(core, step + 1, work)
        self.first = self.valid & ((step == 0) | (before != self.tile))
        ends = (step == steps - 1) | jnp.logical_not(more) | (after != self.tile)
        self.last = self.valid & ends
        self._plan = walk.plan
        self.cut = work.size[2]
        self.start = block * walk.plan.blocks.T
        self._end = self.start + walk.plan.blocks.T
        self.lo, self.hi = work.start[self.tile], work.end[self.tile]
        # The work list has touched blocks only.
        inside = (self.start < self.hi) & (self._end > self.lo) if walk.every else True
        self.touched = self.valid & inside
        all_start, all_end = work.all_start[self.tile], work.all_end[self.tile]
        self.inner = (all_start <= self.start) & (all_end >= self._end)

    def chunks(self, bounds: Any, compute: Callable[[list[Any], WindowMask | None], None]) -> None:
        """Computes the chunks that a window touches, masked if the block has an edge of one.

        A block inside every window is computed as a whole: the latency of one chunk hides behind
        the others.

        Args:
          bounds: a ref [2, C, 128] with the windows of the query rows, or None if all have
            (lo, hi).
          compute: called with chunks, and with masks where they are needed.
        """
        plan = self._plan

        @pl.when(self.touched & self.inner)
        def _() -> None:
            compute(list(range(plan.chunks)), None)

        @pl.when(self.touched & jnp.logical_not(self.inner))
        def _() -> None:
            lo, hi = (self.lo, self.hi) if bounds is None else (bounds[0], bounds[1])
            mask = WindowMask(plan, lo, hi, self.start)
            chunk = plan.blocks.chunk
            first = quotient(jnp.maximum(self.lo - self.start, 0), chunk)
            behind = jnp.minimum(self.hi, self._end) - self.start + (chunk - 1)
            lax.fori_loop(first, quotient(behind, chunk), lambda j, _: compute([j], mask), None)


class Results(NamedTuple):
    """Results of the forward kernel over a work list; tiles without items are undefined.

    Attributes:
      out: [V, R, Dv], normalised; for two cores [V + 1, R, Dv], with the tiles of the second from
        their index + 1 on, so that there are two results of the tile that is cut.
      max_logits: [V, R] or [V + 1, R].
      denominator: [V, R] or [V + 1, R].
      partials: float32 [2, R, Dv], each core's `out` of the tile that is cut; None for one core.
    """

    out: jax.Array
    max_logits: jax.Array
    denominator: jax.Array
    partials: jax.Array | None


def complete(results: Results, work: WorkList, mask_value: float) -> tuple[jax.Array, ...]:
    """Returns out [V, R, Dv], max_logits and denominator [V, R] of all tiles."""
    *arrays, partials = results
    V = work.start.size
    if partials is not None:
        items, share, last = work.size
        index = lax.iota(jnp.int32, V)
        is_cut = (index == last) & (share < items) & (work.tile[share] == last)
        statistics = (lax.dynamic_slice_in_dim(x, last, 2) for x in arrays[1:])
        merged = _merge_two(partials, *statistics, mask_value=mask_value)
        arrays = [_select(index > last, x[1:], x[:V]) for x in arrays]
        arrays = [
            _select(is_cut, one.astype(x.dtype), x) for one, x in zip(merged, arrays, strict=True)
        ]
    empty = work.start >= work.end
    fills = (0.0, mask_value, 0.0)
    return tuple(
        _select(empty, jnp.asarray(fill, x.dtype), x) for fill, x in zip(fills, arrays, strict=True)
    )


def _select(tiles: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x in some tiles, and else y."""
    return jnp.where(tiles.reshape(-1, *(1,) * (y.ndim - 1)), x, y)


def _merge_two(
    outs: jax.Array, max_logits: jax.Array, denominators: jax.Array, *, mask_value: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Merges partial results of the same windows, which stand along the first axis.

    m = max m_c     w_c = l_c exp(m_c - m)     l = sum w_c     o = sum w_c o_c / l
    """
    some = denominators != 0
    m = jnp.where(some, max_logits, -jnp.inf).max(axis=0)
    m = jnp.where(some.any(axis=0), m, mask_value)
    weights = jnp.where(some, denominators * jnp.exp(max_logits - m[None]), 0)
    total = weights.sum(axis=0)
    weights = weights / jnp.where(total == 0, 1, total)[None]
    return (weights[..., None] * outs).sum(axis=0), m, total
