"""Which block of which row a step of the derivatives' grids computes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_ragged.lowering.tpu.chunks import Plan, Windows, quotient, remainder
from jax_ragged.lowering.tpu.work_list import WorkList, item_of_step


@dataclasses.dataclass(frozen=True)
class Walk:
    """Which block of which row a grid step computes.

    Attributes:
      plan: of the kernel.
      V: rows of the work list, tiles of queries of a row of the cache.
      blocks: of a row of the cache.
      every: whether all blocks have steps, for each the tiles of its row in turn, or those in
        the work list alone. Of all, the cores take turns: so each has its share of the windows.
    """

    plan: Plan
    V: int
    blocks: int
    every: bool

    @property
    def _units(self) -> int:
        return self.V // self.plan.tiles * self.blocks

    @property
    def cores(self) -> int:
        """Those that have steps."""
        return min(self.plan.cores, self._units) if self.every else self.plan.cores

    def steps(self, work: WorkList) -> Any:
        """Of one core."""
        return -(-self._units // self.cores) * self.plan.tiles if self.every else work.size[1]

    def place(self, core: Any, step: Any, work: WorkList) -> tuple[Any, Any, Any]:
        """Row and block, and whether they are the step's: those of another, if none are left."""
        if not self.every:
            item = item_of_step(core, step, work.size)
            row = work.row[item]
            return row, work.offset[row] + item, core * work.size[1] + step < work.size[0]
        tiles, cores = self.plan.tiles, self.cores
        unit = quotient(step, tiles) * cores + core
        valid = unit < self._units
        unit = jnp.where(valid, unit, unit - cores)
        row = quotient(unit, self.blocks)
        return row * tiles + remainder(step, tiles), unit - row * self.blocks, valid

    def cache_row(self, row: Any) -> Any:
        """The row of the cache."""
        return quotient(row, self.plan.tiles)

    def read(self, core: Any, step: Any, work: WorkList) -> tuple[Any, Any]:
        """Row of the cache and block that a step reads: the nearest one in the windows."""
        row, block, _ = self.place(core, step, work)
        if self.every:
            T = self.plan.blocks.T
            first = quotient(work.start[row], T)
            last = quotient(jnp.maximum(work.end[row] - 1, 0), T)
            block = jnp.minimum(jnp.maximum(block, first), last)
        return self.cache_row(row), block

    def visited(self, work: WorkList) -> jax.Array:
        """Which core has a step of which row: bool [cores, V]."""
        core = lax.iota(jnp.int32, self.cores)[:, None]
        if self.every:
            row = lax.iota(jnp.int32, self.V)[None, :]
            # Of the units from first to end, those of a core are a multiple of cores apart.
            first = self.cache_row(row) * self.blocks
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
    """Where one step of the grid is."""

    def __init__(self, walk: Walk, work: WorkList) -> None:
        core, step = pl.program_id(0), pl.program_id(1)
        steps = walk.steps(work)
        self.row, block, self.valid = walk.place(core, step, work)
        before, _, _ = walk.place(core, jnp.maximum(step - 1, 0), work)
        after, _, more = walk.place(core, step + 1, work)
        self.first = self.valid & ((step == 0) | (before != self.row))
        self.last = self.valid & ((step == steps - 1) | jnp.logical_not(more) | (after != self.row))
        T = walk.plan.blocks.T
        self.start = block * T
        end = self.start + T
        self.lo, self.hi = work.start[self.row], work.end[self.row]
        self.touched = self.valid & (self.start < self.hi) & (end > self.lo)
        self.inner = (work.all_start[self.row] <= self.start) & (work.all_end[self.row] >= end)
        chunk = walk.plan.blocks.chunk
        self.first_chunk = quotient(jnp.maximum(self.lo - self.start, 0), chunk)
        after = jnp.minimum(self.hi, end) - self.start + (chunk - 1)
        self.end_chunk = quotient(after, chunk)

    def chunks(
        self, plan: Plan, bounds: Any, compute: Callable[[list[Any], Windows | None], None]
    ) -> None:
        """Computes the chunks that a window touches, masked if the block has an edge of one."""

        @pl.when(self.touched & self.inner)
        def _() -> None:
            compute(list(range(plan.chunks)), None)

        @pl.when(self.touched & jnp.logical_not(self.inner))
        def _() -> None:
            lo, hi = (self.lo, self.hi) if bounds is None else (bounds[0], bounds[1])
            windows = Windows(plan, lo, hi, self.start)
            lax.fori_loop(
                self.first_chunk, self.end_chunk, lambda j, _: compute([j], windows), None
            )
