"""Which CTA does what: tables of the rows' windows, and a CTA's segments of the line of blocks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ragged.lowering.gpu.plan import SWIZZLE_ROWS, WGMMA_ROWS, Plan


@dataclasses.dataclass(frozen=True)
class Tables:
    """Where the work lies, by line and row; in kernels, refs of the same names.

    Attributes:
      start, end: i32 [lines, rows]: as the caller gave them, with one query; else the hull of
        the windows.
      inner_start, inner_end: where all windows overlap; start and end with one query.
      blocks: the number of the line's blocks up to and with this row's.

    The number of rows is rounded up to what the copy engine moves; the rest have no blocks.
    """

    start: Any
    end: Any
    inner_start: Any
    inner_end: Any
    blocks: Any

    @classmethod
    def of(cls, bounds: Sequence[Any], blocks: Any) -> "Tables":
        """Of the two or four tables of bounds."""
        inner_start, inner_end = bounds[-2:]
        return cls(bounds[0], bounds[1], inner_start, inner_end, blocks)

    def hull(self, plan: "Plan", line: Any, row: Any) -> tuple[Any, Any]:
        """The window of a row's tile, in positions of the joined cache; none is (0, 0)."""
        return _joined(plan, row, self.start[line, row], self.end[line, row])

    def inner(self, plan: "Plan", line: Any, row: Any) -> tuple[Any, Any]:
        """The positions that are in all windows of a row's tile."""
        return _joined(plan, row, self.inner_start[line, row], self.inner_end[line, row])


def _joined(plan: Plan, row: Any, start: Any, end: Any) -> tuple[Any, Any]:
    """A window of a row, clipped to the cache, in positions of the joined cache."""
    start, end = jnp.maximum(start, 0), jnp.minimum(end, plan.S)
    filled = end > start
    return (
        jnp.where(filled, start + row * plan.S, 0),
        jnp.where(filled, end + row * plan.S, 0),
    )


def _first_block(low: Any) -> Any:
    return lax.div(low, SWIZZLE_ROWS) * SWIZZLE_ROWS


def count_of_blocks(plan: Plan, low: Any, high: Any) -> Any:
    """The number of blocks from low to high; low <= high, and both 0 where there is nothing."""
    return lax.div(high - _first_block(low) + (plan.T - 1), plan.T)


def schedule(
    plan: Plan, lengths: jax.Array, starts: jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Tables of bounds, and with queries the windows of a tile's rows, i32 [B, row_tiles, 64]."""
    windows: tuple[jax.Array, ...] = ()
    bounds: tuple[jax.Array, ...]
    if plan.Q == 1:
        bounds = (starts.reshape(1, plan.B), lengths.reshape(1, plan.B))
    else:
        # Rows past the last query repeat it.
        query = np.minimum(np.arange(plan.row_tiles * WGMMA_ROWS) // plan.G, plan.Q - 1)
        shape = (plan.B, plan.row_tiles, WGMMA_ROWS)
        start, end = (x[:, query].reshape(shape) for x in (starts, lengths))
        start, end = jnp.maximum(start, 0), jnp.minimum(end, plan.S)
        windows = _joined(plan, np.arange(plan.B)[:, None, None], start, end)
        end_of_hull = jnp.where(end > start, end, 0).max(axis=2)
        start_of_hull = jnp.where(end > start, start, plan.S).min(axis=2)
        bounds = (start_of_hull, end_of_hull, start.max(axis=2), end.min(axis=2))
        bounds = tuple(x.T for x in bounds)
    if rest := plan.line_size - plan.B:
        bounds = tuple(jnp.pad(x, ((0, 0), (0, rest))) for x in bounds)
    return bounds, windows


def count_blocks(plan: Plan, bounds: tuple[jax.Array, ...]) -> jax.Array:
    """The table of blocks, where the kernel does not make it."""
    row = np.minimum(np.arange(plan.line_size), plan.B)
    return jnp.cumsum(count_of_blocks(plan, *_joined(plan, row, *bounds[:2])), axis=1)


def scan_blocks(plan: Plan, tables: Tables, line: int) -> None:
    """Makes a line of the table of blocks, several rows at a time so that their loads overlap."""
    together = 8 if plan.line_size % 8 == 0 else 4

    def scan(i: Any, total: Any) -> Any:
        rows = [i * together + k for k in range(together)]
        counts = [count_of_blocks(plan, *tables.hull(plan, line, row)) for row in rows]
        for row, count in zip(rows, counts, strict=True):
            total = total + count
            tables.blocks[line, row] = total
        return total

    lax.fori_loop(0, plan.line_size // together, scan, jnp.int32(0))


def share_of_parts(plan: Plan, tables: Tables, line: Any) -> tuple[Any, Any]:
    """The blocks that every part has, and how many of the first parts have one more."""
    total = tables.blocks[line, plan.line_size - 1]
    return lax.div(total, plan.parts), lax.rem(total, plan.parts)


def _row_of(plan: Plan, tables: Tables, line: Any, position: Any) -> Any:
    """The row of a block by its position in the line: how many rows end before it."""
    row = jnp.int32(0)
    for step in reversed(range((plan.B - 1).bit_length())):
        beyond = row + (1 << step)
        end = tables.blocks[line, jnp.minimum(beyond, plan.B) - 1]
        row = jnp.where((beyond < plan.B) & (end <= position), beyond, row)
    return row


@dataclasses.dataclass(frozen=True)
class Column:
    """A KV head and a tile of its queries."""

    number: Any
    head: Any
    row_tile: Any
    line: Any

    @classmethod
    def of(cls, plan: Plan, number: Any) -> "Column":
        row_tile = lax.rem(number, plan.row_tiles) if plan.row_tiles > 1 else 0
        return cls(number, lax.div(number, plan.row_tiles), row_tile, row_tile % plan.lines)


@dataclasses.dataclass(frozen=True)
class Segment:
    """What one part has of one tile.

    Attributes:
      index: among the part's segments.
      step: the part's blocks before it.
      row: of the cache.
      first: the first position.
      count: of blocks.
      partial: where its results go.
    """

    index: Any
    step: Any
    row: Any
    first: Any
    count: Any
    partial: Any


def for_segments(
    plan: Plan, tables: Tables, stream: Any, body: Callable[[Column, Segment], None]
) -> None:
    """Calls body for the segments of a stream of this CTA, in order."""
    # The first parts, which may be longer, are of different CTAs.
    number = stream * plan.ctas + lax.axis_index("cta")
    part = lax.div(number, plan.columns)
    column = Column.of(plan, lax.rem(number, plan.columns))
    share, longer = share_of_parts(plan, tables, column.line)
    begin = part * share + jnp.minimum(part, longer)
    blocks_of_part = jnp.where(part < plan.parts, share + jnp.where(part < longer, 1, 0), 0)
    end = begin + blocks_of_part

    def run(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        index, position, row = carry
        # Past the rows without blocks.
        row = lax.while_loop(
            lambda row: tables.blocks[column.line, row] <= position, lambda row: row + 1, row
        )
        low, high = tables.hull(plan, column.line, row)
        blocks = count_of_blocks(plan, low, high)
        block = position - (tables.blocks[column.line, row] - blocks)
        segment = Segment(
            index=index,
            step=position - begin,
            row=row,
            first=_first_block(low) + block * plan.T,
            count=jnp.minimum(blocks - block, end - position),
            partial=place_of_partial(plan, column, row, part),
        )
        body(column, segment)
        return index + 1, position + segment.count, row

    row = _row_of(plan, tables, column.line, begin)
    lax.while_loop(lambda carry: carry[1] < end, run, (jnp.int32(0), begin, row))


def place_of_partial(plan: Plan, column: Column, row: Any, part: Any) -> Any:
    """Where the partial results of a row and a part stand.

    Along the line, the row or the part or both grow, so that row + part is another every time.
    """
    return column.number * (plan.B + plan.parts) + row + part
