"""The kernel that reads the cache: in each stream a warpgroup copies, and another computes."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.gpu.plan import (
    COPIED,
    SWIZZLE_BYTES,
    SWIZZLE_ROWS,
    WGMMA_ROWS,
    Plan,
    ceil_to,
)
from jax_ragged.lowering.gpu.schedule import Column, Segment, Tables, for_segments, scan_blocks

_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class _Refs:
    """The operands and results of the kernel, in its order."""

    tables: Tables
    windows: tuple[Any, ...]
    query: Any
    key: Any
    value: Any
    accumulator: Any
    maximum: Any
    denominator: Any


def attend(plan: Plan, *refs: Any, **scratch: Any) -> None:
    bounds, rest = refs[: plan.bounds], list(refs[plan.bounds :])
    if plan.tables_in_shared_memory:
        *rest, blocks_ref = rest
        tables = _share_tables(plan, bounds, blocks_ref, scratch)
    else:
        blocks_ref, *rest = rest
        tables = Tables.of(bounds, blocks_ref)
    named = _Refs(tables, tuple(rest[:-6]), *rest[-6:])

    wg = lax.axis_index("wg")

    @pl.when(wg >= plan.streams)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        _load(plan, named, wg - plan.streams, **scratch)

    @pl.when(wg < plan.streams)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        _compute(plan, named, wg, **scratch)


def _share_tables(
    plan: Plan, bounds: Sequence[Any], blocks_ref: Any, scratch: Mapping[str, Any]
) -> Tables:
    """The tables in shared memory; that of blocks goes to global memory too, for the merge."""
    shared = [scratch["tables"].at[i] for i in range(plan.bounds + 1)]
    tables = Tables.of(shared[:-1], shared[-1])
    rows = pl.ds(0, plan.line_size)

    @pl.when(lax.axis_index("wg") == plan.streams)
    def _() -> None:
        for ref, copy in zip(bounds, shared, strict=False):
            for line in range(plan.lines):
                plgpu.copy_gmem_to_smem(ref.at[line], copy.at[line, rows], scratch["bounds_full"])
        plgpu.barrier_wait(scratch["bounds_full"])
        for line in range(plan.lines):
            scan_blocks(plan, tables, line)
        plgpu.barrier_arrive(scratch["blocks_full"])

        @pl.when(lax.axis_index("cta") == 0)
        def _() -> None:
            plgpu.commit_smem()
            for line in range(plan.lines):
                plgpu.copy_smem_to_gmem(tables.blocks.at[line, rows], blocks_ref.at[line])

    plgpu.barrier_wait(scratch["blocks_full"])
    return tables


def _slot(plan: Plan, stream: Any, step: Any) -> Any:
    """Where a block of a stream lies in shared memory."""
    return stream * plan.stages + lax.rem(step, plan.stages)


def _load_block(
    plan: Plan, cache_ref: Any, head: Any, first: Any, end: Any, to: Any, full: Any
) -> None:
    """Starts the copies of a block's positions before the end; what is past it stays as it was."""
    for offset in range(0, plan.T, COPIED):
        at = pl.multiple_of(first + offset, SWIZZLE_ROWS)

        def copy(offset: int = offset, at: Any = at) -> None:
            source = cache_ref.at[pl.ds(at, COPIED), head]
            plgpu.copy_gmem_to_smem(source, to.at[pl.ds(offset, COPIED)], full)

        def skip() -> None:
            plgpu.barrier_arrive(full)

        lax.cond(at < end, copy, skip)


def _load(plan: Plan, refs: _Refs, stream: Any, **scratch: Any) -> None:
    """Starts the copies of queries, keys and values, as far ahead as there is room."""

    def load_query(column: Column, segment: Segment) -> None:
        plgpu.barrier_wait(scratch["query_free"].at[stream])
        # 0, but not known to be: then the copy may leave the array, and what is past it is 0.
        start = pl.multiple_of(jnp.minimum(segment.index, 0), SWIZZLE_ROWS)
        plgpu.copy_gmem_to_smem(
            refs.query.at[segment.row, column.number, pl.ds(start, plan.tile_rows)],
            scratch["query"].at[stream, pl.ds(0, plan.tile_rows)],
            scratch["query_full"].at[stream],
        )

    def run(column: Column, segment: Segment) -> None:
        _, end = refs.tables.hull(plan, column.line, segment.row)

        def block(i: Any, _: None) -> None:
            slot = _slot(plan, stream, segment.step + i)
            first = segment.first + i * plan.T
            for name, cache_ref in (("key", refs.key), ("value", refs.value)):
                plgpu.barrier_wait(scratch[f"{name}_free"].at[slot])
                to, full = scratch[name].at[slot], scratch[f"{name}_full"].at[slot]
                _load_block(plan, cache_ref, column.head, first, end, to, full)
            # Behind the first block, which need not wait until the last queries are used.
            pl.when(i == 0)(functools.partial(load_query, column, segment))

        lax.fori_loop(0, segment.count, block, None)

    for_segments(plan, refs.tables, stream, run)
    plgpu.barrier_wait(scratch["query_free"].at[stream])
    for i in range(plan.stages):
        for name in ("key_free", "value_free"):
            plgpu.barrier_wait(scratch[name].at[stream * plan.stages + i])
    plgpu.wait_smem_to_gmem(0)


def _logits(plan: Plan, dots: jax.Array) -> jax.Array:
    """Logits in units of log 2, of <q, k>."""
    scale, cap = plan.params.softmax_scale, plan.params.logits_soft_cap
    if cap is None:
        return dots * (scale * _LOG2_E)
    # tanh x = 1 - 2 / (exp(2 x) + 1)
    exponential = jnp.exp2(dots * (2 * scale / cap * _LOG2_E))
    return cap * _LOG2_E - (2 * cap * _LOG2_E) / (exponential + 1)


def _compute(plan: Plan, refs: _Refs, stream: Any, **scratch: Any) -> None:
    """Streaming softmax over the blocks of each segment, and its partial results."""
    # Everything is free at first.
    plgpu.barrier_arrive(scratch["query_free"].at[stream])
    for i in range(plan.stages):
        for name in ("key_free", "value_free"):
            plgpu.barrier_arrive(scratch[name].at[stream * plan.stages + i])

    def run(column: Column, segment: Segment) -> None:
        windows = _windows(plan, refs, column, segment.row)
        block = functools.partial(_block, plan, windows, stream, scratch)
        plgpu.barrier_wait(scratch["query_full"].at[stream])

        def step(i: Any, state: _State) -> _State:
            slot = _slot(plan, stream, segment.step + i)
            return block(slot, segment.first + i * plan.T, i == segment.count - 1, state)

        state = lax.fori_loop(0, segment.count, step, _initial_state(plan))
        _store_partial(plan, refs, stream, segment.partial, state, scratch)

    for_segments(plan, refs.tables, stream, run)
    plgpu.wait_smem_to_gmem(0)


# The accumulator in chunks of columns, [64, chunk] each; the maximum and the denominator, [64].
_State = tuple[tuple[jax.Array, ...], jax.Array, jax.Array]


def _initial_state(plan: Plan) -> _State:
    rows = plgpu.Layout.WGMMA.reduce(1)
    zeros = jnp.zeros((WGMMA_ROWS, plan.chunk), jnp.float32)
    return (
        (plgpu.layout_cast(zeros, plgpu.Layout.WGMMA),) * (plan.Dv // plan.chunk),
        plgpu.layout_cast(jnp.full((WGMMA_ROWS,), -jnp.inf, jnp.float32), rows),
        plgpu.layout_cast(jnp.zeros((WGMMA_ROWS,), jnp.float32), rows),
    )


@dataclasses.dataclass(frozen=True)
class _Windows:
    """The windows of a tile.

    Attributes:
      low, high: of its rows, [64, T]; scalars if they are one.
      inner_low, inner_high: where all overlap.
      low_ref, high_ref: [64], of its rows, if they are not one.
    """

    low: Any
    high: Any
    inner_low: Any
    inner_high: Any
    low_ref: Any = None
    high_ref: Any = None


def _windows(plan: Plan, refs: _Refs, column: Column, row: Any) -> _Windows:
    inner = refs.tables.inner(plan, column.line, row)
    if plan.Q == 1:
        return _Windows(*inner, *inner)
    layout, shape = plgpu.Layout.WGMMA.reduce(1), (WGMMA_ROWS, plan.T)
    of_rows = [x.at[row, column.row_tile] for x in refs.windows]
    low, high = (
        lax.broadcast_in_dim(mosaic_gpu_load(x, layout=layout, optimized=False), shape, [0])
        for x in of_rows
    )
    return _Windows(low, high, *inner, *of_rows)


def _block(
    plan: Plan,
    windows: _Windows,
    stream: Any,
    scratch: Mapping[str, Any],
    slot: Any,
    first: Any,
    last: Any,
    state: _State,
) -> _State:
    """One step of the streaming softmax."""
    accumulators, maximum, denominator = state
    edge = (first < windows.inner_low) | (first + plan.T > windows.inner_high)

    plgpu.barrier_wait(scratch["key_full"].at[slot])

    def dots(accumulator_ref: Any) -> jax.Array:
        keys = scratch["key"].at[slot].transpose((1, 0))
        plgpu.wgmma(accumulator_ref, scratch["query"].at[stream], keys)
        product: jax.Array = accumulator_ref[...]
        return product

    z = _logits(
        plan, pl.run_scoped(dots, plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, plan.T), jnp.float32))
    )
    plgpu.barrier_arrive(scratch["key_free"].at[slot])

    @pl.when(last)
    def _() -> None:
        plgpu.barrier_arrive(scratch["query_free"].at[stream])

    def mask(z: jax.Array) -> jax.Array:
        layout = plgpu.Layout.WGMMA
        position = first + plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=layout)
        inside = (position >= windows.low) & (position < windows.high)
        return jnp.where(inside, z, -jnp.inf)

    z = lax.cond(edge, mask, lambda z: z, z)
    new_maximum = jnp.maximum(maximum, z.max(axis=1))
    # Of a row without a position yet: -inf - -inf is NaN.
    shift = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)
    correction = jnp.exp2(maximum - shift)
    p = jnp.exp2(z - lax.broadcast_in_dim(shift, z.shape, [0]))
    denominator = denominator * correction + p.sum(axis=1)
    p = p.astype(plan.dtype)

    plgpu.barrier_wait(scratch["value_full"].at[slot])
    values = scratch["value"].at[slot]
    pl.when(edge)(functools.partial(_zero_outside, plan, windows, values, first))
    accumulators = tuple(
        accumulator * lax.broadcast_in_dim(correction, accumulator.shape, [0])
        + _product(p, values.at[:, pl.ds(i * plan.chunk, plan.chunk)])
        for i, accumulator in enumerate(accumulators)
    )
    plgpu.barrier_arrive(scratch["value_free"].at[slot])
    return accumulators, new_maximum, denominator


def _store_partial(
    plan: Plan,
    refs: _Refs,
    stream: Any,
    partial: Any,
    state: _State,
    scratch: Mapping[str, Any],
) -> None:
    """Copies the rows of a tile that are more than padding to global memory."""
    accumulators, maximum, denominator = state
    rows = pl.ds(0, plan.tile_rows)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    scratch["statistics"][stream, 0] = maximum
    scratch["statistics"][stream, 1] = denominator
    for i, accumulator in enumerate(accumulators):
        if i > 0:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        scratch["accumulator"][stream] = accumulator
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            scratch["accumulator"].at[stream, rows],
            refs.accumulator.at[partial, :, pl.ds(i * plan.chunk, plan.chunk)],
        )
    plgpu.copy_smem_to_gmem(scratch["statistics"].at[stream, 0, rows], refs.maximum.at[partial])
    plgpu.copy_smem_to_gmem(scratch["statistics"].at[stream, 1, rows], refs.denominator.at[partial])


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
    layout = plgpu.Layout.WGMMA
    if plan.Q == 1:
        position = first + plgpu.broadcasted_iota(jnp.int32, values_ref.shape, 0, layout=layout)
        valid = (position >= windows.low) & (position < windows.high)
    else:
        position = first + plgpu.broadcasted_iota(jnp.int32, (plan.T,), 0, layout=layout.reduce(1))

        def windows_with(i: Any, count: jax.Array) -> jax.Array:
            r = i * plan.query_step
            inside = (position >= windows.low_ref[r]) & (position < windows.high_ref[r])
            return count + jnp.where(inside, 1, 0)

        count = plgpu.layout_cast(jnp.zeros((plan.T,), jnp.int32), layout.reduce(1))
        queries = plan.tile_rows // plan.query_step
        count = lax.fori_loop(0, queries, windows_with, count)
        valid = lax.broadcast_in_dim(count, values_ref.shape, [0]) > 0
    values = mosaic_gpu_load(values_ref, layout=layout)
    values_ref[...] = jnp.where(valid, values, jnp.zeros((), values.dtype))
    plgpu.commit_smem()


def scratch(plan: Plan) -> Mapping[str, Any]:
    def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
        tile = (SWIZZLE_ROWS, SWIZZLE_BYTES // jnp.dtype(dtype).itemsize)
        transforms = (plgpu.TilingTransform(tile), plgpu.SwizzleTransform(SWIZZLE_BYTES))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    tables = {
        "tables": plgpu.SMEM((plan.bounds + 1, plan.lines, ceil_to(plan.line_size, 32)), jnp.int32),
        "bounds_full": plgpu.Barrier(num_arrivals=plan.bounds * plan.lines),
        "blocks_full": plgpu.Barrier(),
    }
    slots = plan.streams * plan.stages
    barrier = functools.partial(plgpu.Barrier, num_barriers=slots)
    query_barrier = functools.partial(plgpu.Barrier, num_barriers=plan.streams)
    return {
        "query": swizzled((plan.streams, WGMMA_ROWS, plan.D), plan.dtype),
        "key": swizzled((slots, plan.T, plan.D), plan.dtype),
        "value": swizzled((slots, plan.T, plan.Dv), plan.dtype),
        "accumulator": swizzled((plan.streams, WGMMA_ROWS, plan.chunk), jnp.float32),
        "statistics": plgpu.SMEM((plan.streams, 2, WGMMA_ROWS), jnp.float32),
        **(tables if plan.tables_in_shared_memory else {}),
        "query_full": query_barrier(),
        "query_free": query_barrier(),
        "key_full": barrier(num_arrivals=plan.T // COPIED),
        "key_free": barrier(),
        "value_full": barrier(num_arrivals=plan.T // COPIED),
        "value_free": barrier(),
    }
