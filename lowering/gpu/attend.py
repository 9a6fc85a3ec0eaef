"""The kernel for few queries: in each stream a warpgroup copies, and another computes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.gpu.forms import Pages, Place
from jax_ragged.lowering.gpu.launch import Refs, shared_rows
from jax_ragged.lowering.gpu.plan import COPIED, SWIZZLE_ROWS, WGMMA_ROWS, Plan
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
from jax_ragged.lowering.gpu.softmax import (
    ROWS,
    TILE,
    Softmax,
    down_rows,
    inverse,
    logits,
    masked,
    update,
)


def _registers(plan: Plan) -> tuple[int, int]:
    """Registers of a copying and of a computing thread, which have 256 together.

    Page numbers take more of the copying thread's.
    """
    copying = 32 if plan.form.paged else 24
    return copying, 256 - copying


def attend(plan: Plan, refs: Refs) -> None:
    """The kernel.

    Refs:
      bounds: int32 [bounds, lines, line_size]: `schedule.make_bounds`.
      blocks: int32 [lines, line_size]: `Tables.blocks`, if the kernel does not make it.
      low, high: int32 [B, row_tiles, 64]: the rows' windows, if there are several queries.
      query: [B, columns, result_rows, D].
      key, value: the cache as `forms` has it: [B * S, Hkv, D] and [B * S, Hkv, Dv] if dense.
      page_table: int32 [B, W], if there is one.
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
    rows = pl.ds(0, plan.line_size)

    @pl.when(lax.axis_index("wg") == plan.streams)
    def _() -> None:
        for i in range(plan.bounds):
            for line in range(plan.lines):
                plgpu.copy_gmem_to_smem(
                    refs.bounds.at[i, line], refs.tables.at[i, line, rows], refs.bounds_full
                )
        plgpu.barrier_wait(refs.bounds_full)
        for line in range(plan.lines):
            _count_blocks(plan, tables, counts, line)
        plgpu.commit_smem()
        for line in range(plan.lines):
            sum_blocks(plan, tables, counts, line)
        plgpu.barrier_arrive(refs.blocks_full)

    plgpu.barrier_wait(refs.blocks_full)
    return tables


def _count_blocks(plan: Plan, tables: Tables, counts: Any, line: int) -> None:
    """Writes the number of blocks of each row to counts [lines, rows], all rows at a time."""
    shape = (plan.table_columns,)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=plan.table_columns // 128)
    start, end = (mosaic_gpu_load(x.at[line], layout=layout) for x in (tables.start, tables.end))
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    counts[line] = count_of_blocks(plan, *joined(plan, row, start, end))


def _write_split(plan: Plan, refs: Refs, tables: Tables, part: Part) -> None:
    """Tells the merging kernel which tile is cut before a part. All columns of a line agree."""

    @pl.when(part.number < plan.parts)
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
                to, full = refs[f"{name}_blocks"].at[slot], refs[f"{name}_full"].at[slot]
                plan.form.copy_block(refs[name], to, full, place, first, pages)
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
    """The rows of a tile in global memory, in whole units of what the copy engine moves.

    They start at 0. The compiler is not to know: then they may leave the array, where a tile has
    fewer rows. What is copied from there arrives as 0, and nothing is copied to there.
    """
    start = pl.multiple_of(jnp.minimum(segment.index, 0), SWIZZLE_ROWS)
    return pl.ds(start, plan.tile_rows)


def _compute(plan: Plan, refs: Refs, tables: Tables, stream: Any, part: Part) -> None:
    """Computes the streaming softmax over the blocks of each segment."""
    # Everything is free at first.
    plgpu.barrier_arrive(refs.query_free.at[stream])
    for i in range(plan.stages):
        plgpu.barrier_arrive(refs.key_free.at[stream * plan.stages + i])
        plgpu.barrier_arrive(refs.value_free.at[stream * plan.stages + i])

    def run(column: Column, segment: Segment) -> None:
        windows = _windows(plan, refs, tables, column, segment.row)
        plgpu.barrier_wait(refs.query_full.at[stream])

        def step(i: Any, state: _State) -> _State:
            slot = _slot(plan, stream, segment.step + i)
            first = segment.first + i * plan.T
            return _block(plan, refs, windows, stream, slot, first, i == segment.count - 1, state)

        state = lax.fori_loop(0, segment.count, step, _initial_state(plan))
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


# The sum of weighted values in chunks of columns, [64, chunk] each; and its rows' statistics.
_State = tuple[tuple[jax.Array, ...], Softmax]


def _initial_state(plan: Plan) -> _State:
    zeros = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, plan.chunk), jnp.float32), TILE)
    return (zeros,) * (plan.Dv // plan.chunk), Softmax.empty(WGMMA_ROWS)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """The windows of a tile.

    Attributes:
      low: the first position of each row's window, [64]; a scalar if all have the same.
      high: the end of each row's window, like low.
      inner_low, inner_high: the positions that lie in all of them.
      low_ref, high_ref: [64], low and high in memory, if they are not scalars.
    """

    low: Any
    high: Any
    inner_low: Any
    inner_high: Any
    low_ref: Any = None
    high_ref: Any = None


def _windows(plan: Plan, refs: Refs, tables: Tables, column: Column, row: Any) -> _Windows:
    inner = tables.inner(plan, column.line, row)
    if plan.Q == 1:
        return _Windows(*inner, *inner)
    of_rows = [x.at[row, column.row_tile] for x in (refs.low, refs.high)]
    low, high = (mosaic_gpu_load(x, layout=ROWS, optimized=False) for x in of_rows)
    return _Windows(low, high, *inner, *of_rows)


def _block(
    plan: Plan,
    refs: Refs,
    windows: _Windows,
    stream: Any,
    slot: Any,
    first: Any,
    last: Any,
    state: _State,
) -> _State:
    """Takes one block into the state: a step of the streaming softmax."""
    sums, softmax = state
    edge = (first < windows.inner_low) | (first + plan.T > windows.inner_high)

    plgpu.barrier_wait(refs.key_full.at[slot])

    def dots(product_ref: Any) -> jax.Array:
        keys = refs.key_blocks.at[slot].transpose((1, 0))
        plgpu.wgmma(product_ref, refs.query_tiles.at[stream], keys)
        product: jax.Array = product_ref[...]
        return product

    z = logits(
        plan.params,
        pl.run_scoped(dots, plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, plan.T), jnp.float32)),
    )
    plgpu.barrier_arrive(refs.key_free.at[slot])

    @pl.when(last)
    def _() -> None:
        plgpu.barrier_arrive(refs.query_free.at[stream])

    z = lax.cond(edge, lambda z: masked(z, first, windows.low, windows.high), lambda z: z, z)
    softmax, correction, p = update(plan.params, softmax, z, scaled=True)
    p = p.astype(plan.dtype)

    plgpu.barrier_wait(refs.value_full.at[slot])
    values = refs.value_blocks.at[slot]
    pl.when(edge)(functools.partial(_zero_outside, plan, windows, values, first))
    sums = tuple(
        x * down_rows(correction, x.shape)
        + _product(p, values.at[:, pl.ds(i * plan.chunk, plan.chunk)])
        for i, x in enumerate(sums)
    )
    plgpu.barrier_arrive(refs.value_free.at[slot])
    return sums, softmax


def _store_results(
    plan: Plan, refs: Refs, stream: Any, place: Column, segment: Segment, state: _State
) -> None:
    """Normalises a tile's results and copies them to global memory."""
    sums, softmax = state
    factor = inverse(softmax.denominator)
    staging = refs.out_tiles.at[stream] if plan.narrow_out else refs.sum_tiles.at[stream]
    rows = _tile_rows(plan, segment)
    refs.statistics[stream, 0] = softmax.max_logits(plan.params.mask_value)
    refs.statistics[stream, 1] = softmax.denominator
    for i, x in enumerate(sums):
        x *= down_rows(factor, x.shape)
        for column in range(0, plan.chunk, plan.out_columns):
            if i + column > 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staging[...] = x[:, column : column + plan.out_columns].astype(plan.out_dtype)
            plgpu.commit_smem()
            columns = pl.ds(i * plan.chunk + column, plan.out_columns)
            plgpu.copy_smem_to_gmem(
                staging.at[pl.ds(0, plan.tile_rows)],
                refs.out.at[segment.row, place.number, rows, columns],
            )
    for i, ref in enumerate((refs.max_logits, refs.denominator)):
        plgpu.copy_smem_to_gmem(
            refs.statistics.at[stream, i, pl.ds(0, plan.tile_rows)],
            ref.at[segment.row, place.number],
        )


def _store_partial(plan: Plan, refs: Refs, stream: Any, partial: Any, state: _State) -> None:
    """Copies a segment's partial results, unnormalised, to global memory."""
    sums, softmax = state
    rows = pl.ds(0, plan.tile_rows)
    refs.statistics[stream, 0] = softmax.maximum
    refs.statistics[stream, 1] = softmax.denominator
    for i, x in enumerate(sums):
        for column in range(0, plan.chunk, plan.sum_columns):
            if i + column > 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            refs.sum_tiles[stream] = x[:, column : column + plan.sum_columns]
            plgpu.commit_smem()
            columns = pl.ds(i * plan.chunk + column, plan.sum_columns)
            plgpu.copy_smem_to_gmem(
                refs.sum_tiles.at[stream, rows], refs.accumulators.at[partial, :, columns]
            )
    for i, ref in enumerate((refs.maxima, refs.denominators)):
        plgpu.copy_smem_to_gmem(refs.statistics.at[stream, i, rows], ref.at[partial])


def _product(p: jax.Array, values_ref: Any) -> jax.Array:
    """[rows, T] in registers by [T, columns] in shared memory, in float32."""

    def run(accumulator_ref: Any) -> jax.Array:
        plgpu.wgmma(accumulator_ref, p, values_ref)
        product: jax.Array = accumulator_ref[...]
        return product

    shape = (p.shape[0], values_ref.shape[1])
    product: jax.Array = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    return product


def _zero_outside(plan: Plan, windows: _Windows, values_ref: Any, first: Any) -> None:
    """Zeros the values of a block that lie in no window: 0 * NaN is NaN."""
    if plan.Q == 1:
        position = first + plgpu.broadcasted_iota(jnp.int32, values_ref.shape, 0, layout=TILE)
        valid = (position >= windows.low) & (position < windows.high)
    else:
        position = first + plgpu.broadcasted_iota(jnp.int32, (plan.T,), 0, layout=ROWS)

        def windows_with(i: Any, count: jax.Array) -> jax.Array:
            r = i * plan.query_step
            inside = (position >= windows.low_ref[r]) & (position < windows.high_ref[r])
            return count + jnp.where(inside, 1, 0)

        count = plgpu.layout_cast(jnp.zeros((plan.T,), jnp.int32), ROWS)
        queries = plan.tile_rows // plan.query_step
        count = lax.fori_loop(0, queries, windows_with, count)
        valid = down_rows(count, values_ref.shape) > 0
    values = mosaic_gpu_load(values_ref, layout=TILE)
    values_ref[...] = jnp.where(valid, values, jnp.zeros((), values.dtype))
    plgpu.commit_smem()


def scratch_types(plan: Plan) -> dict[str, Any]:
    """The shared memory and the barriers of the kernel."""
    slots = plan.streams * plan.stages
    barrier = functools.partial(plgpu.Barrier, num_barriers=slots)
    query_barrier = functools.partial(plgpu.Barrier, num_barriers=plan.streams)
    scratch = {
        "query_tiles": shared_rows((plan.streams, WGMMA_ROWS, plan.D), plan.dtype),
        "key_blocks": shared_rows((slots, plan.T, plan.D), plan.dtype),
        "value_blocks": shared_rows((slots, plan.T, plan.Dv), plan.dtype),
        "sum_tiles": shared_rows((plan.streams, WGMMA_ROWS, plan.sum_columns), jnp.float32),
        "statistics": plgpu.SMEM((plan.streams, 2, WGMMA_ROWS), jnp.float32),
        "query_full": query_barrier(),
        "query_free": query_barrier(),
        "key_full": barrier(num_arrivals=plan.T // COPIED),
        "key_free": barrier(),
        "value_full": barrier(num_arrivals=plan.T // COPIED),
        "value_free": barrier(),
    }
    if plan.narrow_out:
        out = (plan.streams, WGMMA_ROWS, plan.out_columns)
        scratch["out_tiles"] = shared_rows(out, plan.out_dtype)
    if plan.tables_in_shared_memory:
        table = (plan.tables, plan.lines, plan.table_columns)
        scratch["tables"] = plgpu.SMEM(table, jnp.int32)
        scratch["bounds_full"] = plgpu.Barrier(num_arrivals=plan.bounds * plan.lines)
        scratch["blocks_full"] = plgpu.Barrier()
    return scratch
