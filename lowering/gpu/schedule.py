"""Which CTA does what: tables of the rows' windows, and a CTA's segments of the line of blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ragged.lowering.gpu.chip import WGMMA_ROWS
from jax_ragged.lowering.gpu.launch import padded
from jax_ragged.lowering.gpu.plan import Plan


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
    def of(cls, plan: Plan, bounds: Any, blocks: Any = None) -> "Tables":
        """The tables from a ref of the bounds [2 or 4, lines, rows], and one of the blocks."""
        of = [bounds.at[i] for i in range(plan.bounds)]
        return cls(of[0], of[1], of[-2], of[-1], blocks)

    def hull(self, plan: Plan, line: Any, row: Any) -> tuple[Any, Any]:
        """The window of a row's tile, in positions of the joined cache; none is (0, 0)."""
        return joined(plan, row, self.start[line, row], self.end[line, row])

    def inner(self, plan: Plan, line: Any, row: Any) -> tuple[Any, Any]:
        """The positions that are in all windows of a row's tile."""
        return joined(plan, row, self.inner_start[line, row], self.inner_end[line, row])


def joined(plan: Plan, row: Any, start: Any, end: Any) -> tuple[Any, Any]:
    """A window of a row, clipped to the cache, in positions of the joined cache."""
    start, end = jnp.maximum(start, 0), jnp.minimum(end, plan.S)
    filled = end > start
    return (
        jnp.where(filled, start + row * plan.form.stride, 0),
        jnp.where(filled, end + row * plan.form.stride, 0),
    )


def _first_block(plan: Plan, low: Any) -> Any:
    return lax.div(low, plan.unit) * plan.unit


def count_of_blocks(plan: Plan, low: Any, high: Any) -> Any:
    """The number of blocks from low to high; low <= high, and both 0 where there is nothing."""
    return lax.div(high - _first_block(plan, low) + (plan.T - 1), plan.T)


def make_bounds(
    plan: Plan, lengths: jax.Array, starts: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Makes the tables that the rows' windows give.

    Args:
      plan: the plan.
      lengths: int32 [B, Q].
      starts: int32 [B, Q].

    Returns:
      The bounds of `Tables`, int32 [bounds, lines, line_size], in one array so that XLA makes them
      in one kernel; and with several queries the windows of the rows of each tile by name, int32
      [B, row_tiles, 64], in positions of the joined cache.
    """
    if plan.Q == 1:
        windows: dict[str, jax.Array] = {}
        bounds = [starts.T, lengths.T]
    else:
        # Rows past the last query repeat it.
        query = np.minimum(np.arange(plan.row_tiles * WGMMA_ROWS) // plan.G, plan.Q - 1)
        shape = (plan.B, plan.row_tiles, WGMMA_ROWS)
        start, end = (x[:, query].reshape(shape) for x in (starts, lengths))
        start, end = jnp.maximum(start, 0), jnp.minimum(end, plan.S)
        low, high = joined(plan, np.arange(plan.B)[:, None, None], start, end)
        windows = {"low": low, "high": high}
        end_of_hull = jnp.where(end > start, end, 0).max(axis=2)
        start_of_hull = jnp.where(end > start, start, plan.S).min(axis=2)
        bounds = [x.T for x in (start_of_hull, end_of_hull, start.max(axis=2), end.min(axis=2))]
    return padded(jnp.stack(bounds), 2, plan.line_size), windows


def count_blocks(plan: Plan, bounds: jax.Array) -> jax.Array:
    """The table of blocks, where the kernel does not make it."""
    row = np.minimum(np.arange(plan.line_size), plan.B)
    return jnp.cumsum(count_of_blocks(plan, *joined(plan, row, bounds[0], bounds[1])), axis=1)


def sum_blocks(plan: Plan, tables: Tables, counts: Any, line: int) -> None:
    """Makes a line of the table of blocks from the numbers of the rows' blocks [lines, rows]."""
    # Several rows at a time, so that their loads overlap.
    together = next(n for n in (16, 8, 4) if plan.line_size % n == 0)

    def scan(i: Any, total: Any) -> Any:
        rows = [i * together + k for k in range(together)]
        loaded = [counts[line, row] for row in rows]
        for row, count in zip(rows, loaded, strict=True):
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
      count: the number of its blocks.
      whole: whether the part has all blocks of the tile.
      partial: where its partial results go.
    """

    index: Any
    step: Any
    row: Any
    first: Any
    count: Any
    whole: Any
    partial: Any


@dataclasses.dataclass(frozen=True)
class Part:
    """A stream's part of the line of one column.

    Attributes:
      number: the part's number; one that is `plan.parts` or more has no blocks.
      column: the stream's column.
      begin: the position of its first block in the line.
      end: the position behind its last block.
      row: the row of the cache that its first block belongs to.
    """

    number: Any
    column: Column
    begin: Any
    end: Any
    row: Any


def part_of(plan: Plan, tables: Tables, stream: Any) -> Part:
    """The part of a stream of this CTA."""
    # Parts are interleaved over CTAs, so that no CTA gets two of the longer ones, the first.
    number = stream * plan.ctas + lax.axis_index("cta")
    part = lax.div(number, plan.columns)
    column = Column.of(plan, lax.rem(number, plan.columns))
    share, longer = share_of_parts(plan, tables, column.line)
    begin = part * share + jnp.minimum(part, longer)
    blocks = jnp.where(part < plan.parts, share + jnp.where(part < longer, 1, 0), 0)
    return Part(part, column, begin, begin + blocks, _row_of(plan, tables, column.line, begin))


def for_segments(
    plan: Plan, tables: Tables, part: Part, body: Callable[[Column, Segment], None]
) -> None:
    """Calls body for the segments of a part, in order."""
    column = part.column

    def run(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        index, position, row = carry
        # Past the rows without blocks.
        row = lax.while_loop(
            lambda row: tables.blocks[column.line, row] <= position, lambda row: row + 1, row
        )
        low, high = tables.hull(plan, column.line, row)
        blocks = count_of_blocks(plan, low, high)
        block = position - (tables.blocks[column.line, row] - blocks)
        count = jnp.minimum(blocks - block, part.end - position)
        segment = Segment(
            index=index,
            step=position - part.begin,
            row=row,
            first=_first_block(plan, low) + block * plan.T,
            count=count,
            whole=count == blocks,
            partial=place_of_partial(plan, column, row, part.number),
        )
        body(column, segment)
        return index + 1, position + segment.count, row

    lax.while_loop(lambda carry: carry[1] < part.end, run, (jnp.int32(0), part.begin, part.row))


def split_before(plan: Plan, tables: Tables, part: Part) -> tuple[Any, Any]:
    """The tile that is cut for the first time where a part begins.

    Returns:
      The tile's row of the cache, or -1 if no tile is cut there or it is cut before, and the
      number of its segments.
    """
    line = part.column.line
    share, longer = share_of_parts(plan, tables, line)
    blocks_of_longer = longer * (share + 1)

    def part_at(position: Any) -> Any:
        return jnp.where(
            position < blocks_of_longer,
            lax.div(position, share + 1),
            longer + lax.div(position - blocks_of_longer, jnp.maximum(share, 1)),
        )

    last = tables.blocks[line, part.row] - 1
    first = last + 1 - count_of_blocks(plan, *tables.hull(plan, line, part.row))
    cut = (part.begin < part.end) & (first < part.begin) & (part_at(first) == part.number - 1)
    return jnp.where(cut, part.row, -1), part_at(last) - (part.number - 1) + 1


def place_of_partial(plan: Plan, column: Column, row: Any, part: Any) -> Any:
    """Where the partial results of a row and a part stand.

    Along the line, the row or the part or both grow, so that row + part is another every time.
    """
    return column.number * (plan.B + plan.parts) + row + part
