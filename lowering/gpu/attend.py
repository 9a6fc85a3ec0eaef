"""The kernel for few queries: in each stream a warpgroup copies, and another computes."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.gpu.forms import SCALED_HEADS, Pages, Place
from jax_ragged.lowering.gpu.launch import Refs, shared_rows
from jax_ragged.lowering.gpu.plan import COPIED, SWIZZLE_ROWS, WGMMA_ROWS, Plan, chunk
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
    COLUMNS,
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
      key_scale, value_scale: float32 [Hkv] or [positions, heads], if there are scales.
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
    key_unit, value_unit = (_scale_of_head(plan, refs, name, part) for name in ("key", "value"))

    def run(column: Column, segment: Segment) -> None:
        windows = _windows(plan, refs, tables, column, segment.row)
        plgpu.barrier_wait(refs.query_full.at[stream])

        def step(i: Any, state: _State) -> _State:
            place = _BlockPlace(
                stream=stream,
                slot=_slot(plan, stream, segment.step + i),
                head=column.head,
                first=segment.first + i * plan.T,
                last=i == segment.count - 1,
            )
            return _block(plan, refs, windows, place, key_unit, state)

        sums, softmax = lax.fori_loop(0, segment.count, step, _initial_state(plan))
        if value_unit is not None:
            sums = tuple(x * value_unit for x in sums)
        state = sums, softmax
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


class _BlockPlace(NamedTuple):
    """Where a block is.

    Attributes:
      stream: that computes it.
      slot: in shared memory.
      head: of the cache.
      first: its first position.
      last: whether it is the segment's last.
    """

    stream: Any
    slot: Any
    head: Any
    first: Any
    last: Any


def _block(
    plan: Plan, refs: Refs, windows: _Windows, place: _BlockPlace, key_unit: Any, state: _State
) -> _State:
    """Takes one block into the state: a step of the streaming softmax."""
    sums, softmax = state
    stream, slot, first = place.stream, place.slot, place.first
    edge = (first < windows.inner_low) | (first + plan.T > windows.inner_high)
    wide = plan.form.value.narrow is not None

    plgpu.barrier_wait(refs.key_full.at[slot])
    keys = _wide_block(plan, refs, "key", place)

    def dots(product_ref: Any) -> jax.Array:
        plgpu.wgmma(product_ref, refs.query_tiles.at[stream], keys.transpose((1, 0)))
        if wide:
            # Meanwhile.
            plgpu.barrier_wait(refs.value_full.at[slot])
            _wide_block(plan, refs, "value", place)
        product: jax.Array = product_ref[...]
        return product

    products = pl.run_scoped(dots, plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, plan.T), jnp.float32))
    if plan.form.key.narrow is None:
        plgpu.barrier_arrive(refs.key_free.at[slot])
    if plan.form.key.scale == "position":
        key_unit = mosaic_gpu_load(refs.key_scale_rows.at[stream], layout=COLUMNS)
    z = logits(plan.params, products, key_unit)

    @pl.when(place.last)
    def _() -> None:
        plgpu.barrier_arrive(refs.query_free.at[stream])

    z = lax.cond(edge, lambda z: masked(z, first, windows.low, windows.high), lambda z: z, z)
    softmax, correction, p = update(plan.params, softmax, z, scaled=True)

    values = refs.value_wide.at[stream] if wide else refs.value_blocks.at[slot]
    if not wide:
        plgpu.barrier_wait(refs.value_full.at[slot])
    pl.when(edge)(functools.partial(_zero_outside, plan, refs, windows, values, stream, first))
    if plan.form.value.scale == "position":
        unit = mosaic_gpu_load(refs.value_scale_rows.at[stream], layout=COLUMNS)
        p *= lax.broadcast_in_dim(unit, p.shape, [1])
    p = p.astype(plan.dtype)
    sums = tuple(
        x * down_rows(correction, x.shape)
        + _product(p, values.at[:, pl.ds(i * plan.chunk, plan.chunk)])
        for i, x in enumerate(sums)
    )
    if not wide:
        plgpu.barrier_arrive(refs.value_free.at[slot])
    return sums, softmax


def _scale_of_head(plan: Plan, refs: Refs, name: str, part: Part) -> Any:
    """The scale of a part's head of key or value, or None if there is not one for all positions."""
    if plan.form.stored(name).scale != "head":
        return None
    return refs[f"{name}_scale"][part.column.head]


def _wide_block(plan: Plan, refs: Refs, name: str, place: _BlockPlace) -> Any:
    """The block of key or value in shared memory in the dtype of query.

    A quantised block is widened there, and its slot is free then. The scales of its positions go
    from [T, 8 heads] to the row that the head of this stream has.
    """
    stored, blocks = plan.form.stored(name), refs[f"{name}_blocks"].at[place.slot]
    if stored.narrow is None:
        return blocks
    wide = refs[f"{name}_wide"].at[place.stream]
    step = chunk(blocks.shape[1], stored.narrow)
    for column in range(0, blocks.shape[1], step):
        columns = pl.ds(column, step)
        x = mosaic_gpu_load(blocks.at[:, columns], layout=plgpu.Layout.WGMMA_UPCAST_2X)
        if jnp.issubdtype(stored.narrow, jnp.floating):
            x = x.astype(jnp.float32)  # the hardware has no conversion to bfloat16
        wide[:, columns] = x.astype(plan.dtype)
    if stored.scale == "position":
        scales = mosaic_gpu_load(
            refs[f"{name}_scales"].at[place.slot], layout=TILE, optimized=False
        )
        head = plgpu.broadcasted_iota(jnp.int32, scales.shape, 1, layout=TILE)
        own = head == lax.rem(place.head, SCALED_HEADS)
        row = jnp.where(own, scales, 0.0).sum(axis=1)
        refs[f"{name}_scale_rows"][place.stream] = row
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs[f"{name}_free"].at[place.slot])
    return wide


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


def _zero_outside(
    plan: Plan, refs: Refs, windows: _Windows, values_ref: Any, stream: Any, first: Any
) -> None:
    """Zeros the values and scales of a block that lie in no window: 0 * NaN is NaN."""
    position = first + plgpu.broadcasted_iota(jnp.int32, (plan.T,), 0, layout=ROWS)
    if plan.Q == 1:
        inside = (position >= windows.low) & (position < windows.high)
        count = jnp.where(inside, 1, 0)
    else:

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
    if plan.form.value.scale == "position":
        row = mosaic_gpu_load(refs.value_scale_rows.at[stream], layout=ROWS)
        refs.value_scale_rows[stream] = jnp.where(count > 0, row, 0.0)
    plgpu.commit_smem()


def scratch_types(plan: Plan) -> dict[str, Any]:
    """The shared memory and the barriers of the kernel."""
    slots = plan.streams * plan.stages
    barrier = functools.partial(plgpu.Barrier, num_barriers=slots)
    query_barrier = functools.partial(plgpu.Barrier, num_barriers=plan.streams)
    scratch = {
        "query_tiles": shared_rows((plan.streams, WGMMA_ROWS, plan.D), plan.dtype),
        "sum_tiles": shared_rows((plan.streams, WGMMA_ROWS, plan.sum_columns), jnp.float32),
        "statistics": plgpu.SMEM((plan.streams, 2, WGMMA_ROWS), jnp.float32),
        "query_full": query_barrier(),
        "query_free": query_barrier(),
    }
    for name, columns in (("key", plan.D), ("value", plan.Dv)):
        stored = plan.form.stored(name)
        blocks = (slots, plan.T, columns)
        scratch[f"{name}_blocks"] = shared_rows(blocks, stored.narrow or plan.dtype)
        scratch[f"{name}_full"] = barrier(num_arrivals=plan.form.arrivals(name, plan.T // COPIED))
        scratch[f"{name}_free"] = barrier()
        if stored.narrow is not None:
            scratch[f"{name}_wide"] = shared_rows((plan.streams, *blocks[1:]), plan.dtype)
        if stored.scale == "position":
            scales = (slots, plan.T, SCALED_HEADS)
            scratch[f"{name}_scales"] = plgpu.SMEM(scales, jnp.float32)
            scratch[f"{name}_scale_rows"] = plgpu.SMEM((plan.streams, plan.T), jnp.float32)
    if plan.narrow_out:
        out = (plan.streams, WGMMA_ROWS, plan.out_columns)
        scratch["out_tiles"] = shared_rows(out, plan.out_dtype)
    if plan.tables_in_shared_memory:
        table = (plan.tables, plan.lines, plan.table_columns)
        scratch["tables"] = plgpu.SMEM(table, jnp.int32)
        scratch["bounds_full"] = plgpu.Barrier(num_arrivals=plan.bounds * plan.lines)
        scratch["blocks_full"] = plgpu.Barrier()
    return scratch
