"""The kernel for few queries: in each stream a warpgroup copies, and another computes."""

import functools
import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.gpu import across, down
from jax_ragged.lowering.gpu.chip import MOST_COPIED, SWIZZLE_ROWS, ceil_to
from jax_ragged.lowering.gpu.forms import Pages, Place
from jax_ragged.lowering.gpu.launch import Refs, overhanging, shared_rows, swizzle_columns
from jax_ragged.lowering.gpu.plan import COPIED, Plan
from jax_ragged.lowering.gpu.schedule import (
    Column,
    Part,
    Segment,
    Tables,
    count_of_blocks,
    for_segments,
    joined,
    part_of,
    split_before,
    sum_blocks,
)
from jax_ragged.lowering.gpu.softmax import inverse, max_logits
from jax_ragged.lowering.gpu.tile import BlockPlace, State, Windows


def _registers(plan: Plan) -> tuple[int, int]:
    """Registers of a copying and of a computing thread, which have 256 together.

    Page numbers take more of the copying thread's.
    """
    copying = 32 if plan.form.paged else 24
    return copying, 256 - copying


def _tile(plan: Plan) -> ModuleType:
    """The way of computing a tile."""
    return down if plan.positions_down else across


def attend(plan: Plan, refs: Refs) -> None:
    """The kernel.

    Refs:
      bounds: int32 [bounds, lines, line_size]: `schedule.make_bounds`.
      blocks: int32 [lines, line_size]: `Tables.blocks`, if the kernel does not make it.
      low, high: int32 [B, row_tiles, 64]: the rows' windows, if there are several queries.
      query: [B, columns, result_rows, D].
      key, value: the cache as `forms` has it: [B * S, Hkv, D] and [B * S, Hkv, Dv] if dense.
      page_table: int32 [B, W], if there is one.
      key_scale, value_scale: float32 [B, Hkv] or [positions, heads], if there are scales.
      out: [B, columns, result_rows, Dv], max_logits, denominator: [B, columns, tile_rows]: the
        results of the tiles that one part has whole.
      accumulators: [partials, tile_rows, accumulator_columns], maxima, denominators: [partials,
        tile_rows]: the partial results of the others, the maximum in units of log 2.
      splits: int32 [2, lines, parts]: `schedule.split_before` of each part.
      the others: `scratch_types`.
    """
    wg = lax.axis_index("wg")
    copying, computing = _registers(plan)
    if plan.tables_in_shared_memory:
        tables = _share_tables(plan, refs)
    else:
        tables = Tables.of(plan, refs.bounds, refs.blocks)

    @pl.when(wg >= plan.streams)
    def _() -> None:
        plgpu.set_max_registers(copying, action="decrease")
        stream = wg - plan.streams
        part = part_of(plan, tables, stream)
        _copy(plan, refs, tables, stream, part)
        _write_split(plan, refs, tables, part)

    @pl.when(wg < plan.streams)
    def _() -> None:
        plgpu.set_max_registers(computing, action="increase")
        _compute(plan, refs, tables, wg, part_of(plan, tables, wg))


def _share_tables(plan: Plan, refs: Refs) -> Tables:
    """Copies the bounds to shared memory and makes the table of blocks there."""
    tables = Tables.of(plan, refs.tables, refs.tables.at[plan.bounds])
    # Not in place: a warp that adds must not overtake one that still reads.
    counts = refs.tables.at[plan.bounds + 1]

    @pl.when(lax.axis_index("wg") == plan.streams)
    def _() -> None:
        for i, line, rows in _bounds_copies(plan):
            source = refs.bounds.at[i, line, rows]
            plgpu.copy_gmem_to_smem(source, refs.tables.at[i, line, rows], refs.bounds_full)
        plgpu.barrier_wait(refs.bounds_full)
        for line in range(plan.lines):
            _count_blocks(plan, tables, counts, line)
        plgpu.commit_smem()
        for line in range(plan.lines):
            sum_blocks(plan, tables, counts, line)
        plgpu.barrier_arrive(refs.blocks_full)

    plgpu.barrier_wait(refs.blocks_full)
    return tables


def _bounds_copies(plan: Plan) -> list[tuple[int, int, Any]]:
    """The table, the line and the rows of each copy of the bounds."""
    starts = range(0, plan.line_size, MOST_COPIED)
    rows = [pl.ds(start, min(MOST_COPIED, plan.line_size - start)) for start in starts]
    return list(itertools.product(range(plan.bounds), range(plan.lines), rows))


def _count_blocks(plan: Plan, tables: Tables, counts: Any, line: int) -> None:
    """Writes the number of blocks of each row to counts [lines, rows], all rows at a time."""
    shape = (plan.table_columns,)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=plan.table_columns // 128)
    start, end = (mosaic_gpu_load(x.at[line], layout=layout) for x in (tables.start, tables.end))
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    counts[line] = count_of_blocks(plan, *joined(plan, row, start, end))


def _write_split(plan: Plan, refs: Refs, tables: Tables, part: Part) -> None:
    """Tells the merging kernel which tile is cut before a part: the first column of a line does."""

    @pl.when((part.number < plan.parts) & (part.column.number < plan.lines))
    def _() -> None:
        row, segments = split_before(plan, tables, part)
        refs.splits[0, part.column.line, part.number] = row
        refs.splits[1, part.column.line, part.number] = segments


def _slot(plan: Plan, stream: Any, step: Any) -> Any:
    """Where a block of a stream lies in shared memory."""
    return stream * plan.stages + lax.rem(step, plan.stages)


def _copy(plan: Plan, refs: Refs, tables: Tables, stream: Any, part: Part) -> None:
    """Starts the copies of queries, keys and values, as far ahead as there is room."""

    def load_query(column: Column, segment: Segment) -> None:
        plgpu.barrier_wait(refs.query_free.at[stream])
        plgpu.copy_gmem_to_smem(
            refs.query.at[segment.row, column.number, _tile_rows(plan, segment)],
            refs.query_tiles.at[stream, pl.ds(0, plan.tile_rows)],
            refs.query_full.at[stream],
        )

    def run(column: Column, segment: Segment) -> None:
        _, end = tables.hull(plan, column.line, segment.row)
        place = Place(segment.row, column.head, end, COPIED)

        def block(i: Any, pages: Pages) -> Pages:
            slot = _slot(plan, stream, segment.step + i)
            first = segment.first + i * plan.T
            following = plan.form.pages(refs, place, first + plan.T, plan.T)
            for name in ("key", "value"):
                plgpu.barrier_wait(refs[f"{name}_free"].at[slot])
                plan.form.copy_block(refs, name, slot, place, first, pages)
            # Behind the first block, which need not wait until the last queries are used.
            pl.when(i == 0)(functools.partial(load_query, column, segment))
            return following

        pages = plan.form.pages(refs, place, segment.first, plan.T)
        lax.fori_loop(0, segment.count, block, pages)

    for_segments(plan, tables, part, run)
    # The last arrivals at each barrier are waited for, so that none is left when the CTA ends.
    plgpu.barrier_wait(refs.query_free.at[stream])
    for i in range(plan.stages):
        plgpu.barrier_wait(refs.key_free.at[stream * plan.stages + i])
        plgpu.barrier_wait(refs.value_free.at[stream * plan.stages + i])


def _tile_rows(plan: Plan, segment: Segment) -> Any:
    """The rows of a tile in global memory, which may have fewer."""
    return overhanging(0, plan.tile_rows, SWIZZLE_ROWS, segment.index)


def _compute(plan: Plan, refs: Refs, tables: Tables, stream: Any, part: Part) -> None:
    """Computes the streaming softmax over the blocks of each segment."""
    # Everything is free at first.
    plgpu.barrier_arrive(refs.query_free.at[stream])
    for i in range(plan.stages):
        plgpu.barrier_arrive(refs.key_free.at[stream * plan.stages + i])
        plgpu.barrier_arrive(refs.value_free.at[stream * plan.stages + i])

    def run(column: Column, segment: Segment) -> None:
        windows = _windows(plan, refs, tables, column, segment.row)
        key_unit, value_unit = (
            plan.form.scale_of_row(refs, name, segment.row, column.head)
            for name in ("key", "value")
        )
        plgpu.barrier_wait(refs.query_full.at[stream])
        _tile(plan).prepare(plan, refs, stream)

        def step(i: Any, state: State) -> State:
            place = BlockPlace(
                stream=stream,
                slot=_slot(plan, stream, segment.step + i),
                head=column.head,
                first=segment.first + i * plan.T,
                last=i == segment.count - 1,
            )
            following: State = _tile(plan).block(plan, refs, windows, place, key_unit, state)
            return following

        state = lax.fori_loop(0, segment.count, step, _tile(plan).initial_state(plan))
        if value_unit is not None:
            state = state._replace(sums=tuple(x * value_unit for x in state.sums))
        # Copies of the segment before may still read the shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(segment.whole)
        def _() -> None:
            _store_results(plan, refs, stream, column, segment, state)

        @pl.when(~segment.whole)
        def _() -> None:
            _store_partial(plan, refs, stream, segment.partial, state)

    for_segments(plan, tables, part, run)
    plgpu.wait_smem_to_gmem(0)


def _windows(plan: Plan, refs: Refs, tables: Tables, column: Column, row: Any) -> Windows:
    inner = tables.inner(plan, column.line, row)
    if plan.Q == 1:
        return Windows(*inner, *inner)
    rows = pl.ds(0, plan.padded_rows)
    of_rows = [x.at[row, column.row_tile, rows] for x in (refs.low, refs.high)]
    layout = _tile(plan).ROW_VALUES
    low, high = (mosaic_gpu_load(x, layout=layout, optimized=False) for x in of_rows)
    return Windows(low, high, *inner, *of_rows)


def _store_results(
    plan: Plan, refs: Refs, stream: Any, place: Column, segment: Segment, state: State
) -> None:
    """Normalises a tile's results and copies them to global memory."""
    of_tile = _tile(plan)
    denominator = of_tile.denominator(plan, refs, stream, state)
    factor = inverse(denominator)
    staging = refs.out_tiles if plan.narrow_out else refs.sum_tiles
    rows = _tile_rows(plan, segment)
    maximum = max_logits(state.maximum, plan.params.mask_value)
    _stage_statistics(plan, refs, stream, maximum, denominator)
    sums = tuple(of_tile.times(x, factor) for x in state.sums)
    for column, x in _stage(plan, staging.at[stream], sums):
        unit = swizzle_columns(plan.staged_unit, plan.out_dtype)
        columns = overhanging(column, plan.staged, unit, segment.index)
        plgpu.copy_smem_to_gmem(x, refs.out.at[segment.row, place.number, rows, columns])
    for i, ref in enumerate((refs.max_logits, refs.denominator)):
        of_rows = refs.statistics.at[stream, i, pl.ds(0, plan.tile_rows)]
        plgpu.copy_smem_to_gmem(of_rows, ref.at[segment.row, place.number])


def _store_partial(plan: Plan, refs: Refs, stream: Any, partial: Any, state: State) -> None:
    """Copies a segment's partial results, unnormalised, to global memory."""
    of_tile = _tile(plan)
    denominator = of_tile.denominator(plan, refs, stream, state)
    _stage_statistics(plan, refs, stream, state.maximum, denominator)
    for column, x in _stage(plan, refs.sum_tiles.at[stream], state.sums):
        columns = pl.ds(column, plan.staged)
        plgpu.copy_smem_to_gmem(x, refs.accumulators.at[partial, :, columns])
    for i, ref in enumerate((refs.maxima, refs.denominators)):
        of_rows = refs.statistics.at[stream, i, pl.ds(0, plan.tile_rows)]
        plgpu.copy_smem_to_gmem(of_rows, ref.at[partial])


def _stage(plan: Plan, staging: Any, sums: Any) -> Iterator[tuple[int, Any]]:
    """Writes sums to shared memory, as many columns as have room there at a time.

    Yields the first column and the ref [tile_rows, staged] that holds the columns, to be copied.
    """
    for column in range(0, plan.value_columns, plan.staged):
        if column > 0:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged = _tile(plan).write(plan, staging, sums, column)
        plgpu.commit_smem()
        yield column, staged


def _stage_statistics(plan: Plan, refs: Refs, stream: Any, *statistics: Any) -> None:
    """Writes the maximum and the denominator to shared memory, which `_stage` commits."""
    for i, x in enumerate(statistics):
        refs.statistics[stream, i, pl.ds(0, plan.padded_rows)] = x


def scratch_types(plan: Plan) -> dict[str, Any]:
    """The shared memory and the barriers of the kernel."""
    slots = plan.streams * plan.stages
    barrier = functools.partial(plgpu.Barrier, num_barriers=slots)
    query_barrier = functools.partial(plgpu.Barrier, num_barriers=plan.streams)
    rows = plan.padded_rows
    scratch = {
        "query_tiles": shared_rows((plan.streams, rows, plan.D), plan.dtype),
        "sum_tiles": shared_rows(
            (plan.streams, rows, plan.staged), jnp.float32, like=plan.staged_unit
        ),
        # The copy engine reads from multiples of 128 bytes.
        "statistics": plgpu.SMEM((plan.streams, 2, ceil_to(rows, 32)), jnp.float32),
        "query_full": query_barrier(),
        "query_free": query_barrier(),
        **_tile(plan).scratch_types(plan),
    }
    for name, columns, like in (
        ("key", plan.D, plan.D),
        ("value", plan.value_columns, plan.Dv),
    ):
        stored = plan.form.stored(name)
        blocks = (slots, plan.T, columns)
        scratch[f"{name}_blocks"] = shared_rows(blocks, stored.narrow or plan.dtype, like=like)
        scratch[f"{name}_full"] = barrier(num_arrivals=plan.form.arrivals(name, plan.T // COPIED))
        scratch[f"{name}_free"] = barrier()
        scratch |= plan.form.scales_scratch(name, slots, plan.T)
    if plan.narrow_out:
        out = (plan.streams, rows, plan.staged)
        scratch["out_tiles"] = shared_rows(out, plan.out_dtype, like=plan.staged_unit)
    if plan.tables_in_shared_memory:
        table = (plan.tables, plan.lines, plan.table_columns)
        scratch["tables"] = plgpu.SMEM(table, jnp.int32)
        scratch["bounds_full"] = plgpu.Barrier(num_arrivals=len(_bounds_copies(plan)))
        scratch["blocks_full"] = plgpu.Barrier()
    return scratch
