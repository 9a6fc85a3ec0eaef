"""Ragged attention on Hopper GPUs: a Pallas Mosaic GPU kernel that reads only the windows.

A tile is what one row b of the cache has to do for one column: for a KV head h and up to 64 of
the queries and query heads (q, g) that share it, padded to the 64 rows of a wgmma. A tile's
window is the hull of its queries' windows, cut into blocks of T positions. The blocks of all
rows stand in one line, of which each of a fixed number of CTAs, the parts, takes an equal,
contiguous share, for each column: so few long rows fill the chip, and many short ones are
balanced. The CTAs of one part read neighbouring heads of the same positions at the same time,
which the memory likes. A share falls into segments, one a row, and a segment gives partial
results, unnormalised:

    m = max z_t        l = sum exp(z_t - m)        a = sum exp(z_t - m) v_t

A second kernel merges the partials of each tile in the order of its blocks. Logits are kept in
units of log 2.

Positions are counted in the cache with its rows joined, [B * S, Hkv, D]: a block starts at a
multiple of 8, as the copy engine's tiles do, which the start of a row need not be. What a block
holds outside of the windows is masked; what lies past the end of the array arrives as 0.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.reference import Arrays3

_WGMMA_ROWS = 64
# The rows of one tile of swizzled shared memory, and its bytes in a row.
_SWIZZLE_ROWS, _SWIZZLE_BYTES = 8, 128
_HEAD_DIMS = (64, 128, 256)
_MULTIPROCESSORS = 132
_SHARED_MEMORY = 227 * 1024
# Of shared memory, for the tables, if they fit.
_TABLES_BYTES = 20 * 1024
# Partial results that the merging kernel loads at once.
_MERGED_TOGETHER = 8
# Columns of the values that one matrix product takes.
_CHUNK = 128
_LOG2_E = math.log2(math.e)


def _ceil_to(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about one call.

    Attributes:
      rows: of queries and heads that share a KV head: Q * G.
      T: positions in a block.
      warpgroups: that compute, taking the blocks of a segment in turn.
      stages: blocks of keys and of values in flight.
      query_stages: tiles of queries in flight.
      parts: of the line of blocks.
    """

    B: int
    Q: int
    Hq: int
    Hkv: int
    S: int
    D: int
    Dv: int
    dtype: Any
    params: RaggedAttentionParams
    T: int
    warpgroups: int
    stages: int
    query_stages: int
    parts: int

    @property
    def G(self) -> int:
        return self.Hq // self.Hkv

    @property
    def rows(self) -> int:
        return self.Q * self.G

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // _WGMMA_ROWS)

    @property
    def tile_rows(self) -> int:
        """The rows of a tile that are copied: all of them, in whole swizzle tiles."""
        return min(_ceil_to(self.rows, _SWIZZLE_ROWS), _WGMMA_ROWS)

    @property
    def columns(self) -> int:
        """What is done for each row of the cache: KV heads, by tiles of their queries."""
        return self.Hkv * self.row_tiles

    @property
    def partials(self) -> int:
        """At most: a segment starts with a row or with a part."""
        return self.columns * (self.B + self.parts) * self.warpgroups

    @property
    def accumulator_columns(self) -> int:
        """Dv, but not less than the merging kernel's threads."""
        return max(self.Dv, 128)

    @property
    def bounds(self) -> int:
        """How many tables of the bounds of windows there are."""
        return 2 if self.Q == 1 else 4

    @property
    def lines(self) -> int:
        """Different lines of blocks; with one query, the tiles of a row have the same window."""
        return 1 if self.Q == 1 else self.row_tiles

    @property
    def line_size(self) -> int:
        """Rows, in whole units of what the copy engine moves."""
        return _ceil_to(self.B, 4)

    @property
    def tables_in_shared_memory(self) -> bool:
        size = (self.bounds + 1) * self.lines * _ceil_to(self.line_size, 32) * 4
        return size <= _TABLES_BYTES and self.lines <= 8

    @property
    def chunk(self) -> int:
        """Columns of the accumulator that one matrix product makes."""
        return min(self.Dv, _CHUNK)

    @property
    def query_step(self) -> int:
        """Rows r of a tile with the same r // query_step are of one query."""
        return self.G if self.row_tiles == 1 else math.gcd(self.G, _WGMMA_ROWS)


def _plan(
    query: jax.Array, key: jax.Array, value: jax.Array, params: RaggedAttentionParams
) -> _Plan:
    B, Q, Hq, D = query.shape
    S, Hkv, Dv = key.shape[1], key.shape[2], value.shape[3]
    T = 64
    parts = _parts(Hkv * -(-Q * (Hq // Hkv) // _WGMMA_ROWS))
    # Registers hold two accumulators of 128 columns; many parts give many partial results.
    warpgroups = 2 if Dv <= _CHUNK and parts <= 32 else 1
    itemsize = jnp.dtype(query.dtype).itemsize
    query_stages = 2 if D <= 128 else 1
    queries = query_stages * _WGMMA_ROWS * D * itemsize
    results = warpgroups * _WGMMA_ROWS * min(Dv, _CHUNK) * 4
    left = _SHARED_MEMORY - queries - results - _TABLES_BYTES - 4 * 1024
    stages = left // (T * (D + Dv) * itemsize) // warpgroups * warpgroups
    return _Plan(
        B, Q, Hq, Hkv, S, D, Dv, jnp.dtype(query.dtype), params,
        T, warpgroups, min(stages, 8), query_stages, parts,
    )  # fmt: skip


def _parts(columns: int) -> int:
    """How many parts, with a CTA for each column, fill the multiprocessors best."""

    def filled(waves: int) -> float:
        parts = waves * _MULTIPROCESSORS // columns
        # Fewer waves are better: each begins and ends with an idle memory.
        return parts * columns / (waves * _MULTIPROCESSORS) - 0.1 * waves

    fewest = -(-columns // _MULTIPROCESSORS)
    waves = max(range(fewest, fewest + 4), key=filled)
    return waves * _MULTIPROCESSORS // columns


@dataclasses.dataclass(frozen=True)
class _Tables:
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
    def of(cls, bounds: Sequence[Any], blocks: Any) -> "_Tables":
        """Of the two or four tables of bounds."""
        start, end, *inner = bounds
        return cls(start, end, *(inner or (start, end)), blocks)

    def hull(self, plan: "_Plan", line: Any, row: Any) -> tuple[Any, Any]:
        """The window of a row's tile, in positions of the joined cache; none is (0, 0)."""
        return _joined(plan, row, self.start[line, row], self.end[line, row])

    def inner(self, plan: "_Plan", line: Any, row: Any) -> tuple[Any, Any]:
        """The positions that are in all windows of a row's tile."""
        return _joined(plan, row, self.inner_start[line, row], self.inner_end[line, row])


def _joined(plan: _Plan, row: Any, start: Any, end: Any) -> tuple[Any, Any]:
    """A window of a row, clipped to the cache, in positions of the joined cache."""
    start, end = jnp.maximum(start, 0), jnp.minimum(end, plan.S)
    filled = end > start
    return (
        jnp.where(filled, start + row * plan.S, 0),
        jnp.where(filled, end + row * plan.S, 0),
    )


def _first_block(low: Any) -> Any:
    return lax.div(low, _SWIZZLE_ROWS) * _SWIZZLE_ROWS


def _blocks(plan: _Plan, low: Any, high: Any) -> Any:
    """The number of blocks from low to high; low <= high, and both 0 where there is nothing."""
    return lax.div(high - _first_block(low) + (plan.T - 1), plan.T)


def _schedule(
    plan: _Plan, lengths: jax.Array, starts: jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Tables of bounds, and i32 [B, row_tiles, 64] windows of a tile's rows if there are queries."""
    windows: tuple[jax.Array, ...] = ()
    if plan.Q == 1:
        bounds = (starts.reshape(1, plan.B), lengths.reshape(1, plan.B))
    else:
        # Rows past the last query repeat it.
        query = np.minimum(np.arange(plan.row_tiles * _WGMMA_ROWS) // plan.G, plan.Q - 1)
        shape = (plan.B, plan.row_tiles, _WGMMA_ROWS)
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


def _count_blocks(plan: _Plan, bounds: tuple[jax.Array, ...]) -> jax.Array:
    """The table of blocks, where the kernel does not make it."""
    row = np.minimum(np.arange(plan.line_size), plan.B)
    return jnp.cumsum(_blocks(plan, *_joined(plan, row, *bounds[:2])), axis=1)


def _scan_blocks(plan: _Plan, tables: _Tables, line: int) -> None:
    """Makes a line of the table of blocks, several rows at a time so that their loads overlap."""
    together = 8 if plan.line_size % 8 == 0 else 4

    def scan(i: Any, total: Any) -> Any:
        rows = [i * together + k for k in range(together)]
        counts = [_blocks(plan, *tables.hull(plan, line, row)) for row in rows]
        for row, count in zip(rows, counts, strict=True):
            total = total + count
            tables.blocks[line, row] = total
        return total

    lax.fori_loop(0, plan.line_size // together, scan, jnp.int32(0))


def _share(plan: _Plan, tables: _Tables, line: Any) -> tuple[Any, Any]:
    """The blocks that every part has, and how many of the first parts have one more."""
    total = tables.blocks[line, plan.line_size - 1]
    return lax.div(total, plan.parts), lax.rem(total, plan.parts)


def _row_of(plan: _Plan, tables: _Tables, line: Any, position: Any) -> Any:
    """The row of a block by its position in the line: how many rows end before it."""
    row = jnp.int32(0)
    for step in reversed(range((plan.B - 1).bit_length())):
        beyond = row + (1 << step)
        end = tables.blocks[line, jnp.minimum(beyond, plan.B) - 1]
        row = jnp.where((beyond < plan.B) & (end <= position), beyond, row)
    return row


@dataclasses.dataclass(frozen=True)
class _Column:
    """A KV head and a tile of its queries."""

    number: Any
    head: Any
    row_tile: Any
    line: Any

    @classmethod
    def of(cls, plan: _Plan, number: Any) -> "_Column":
        row_tile = lax.rem(number, plan.row_tiles) if plan.row_tiles > 1 else 0
        return cls(number, lax.div(number, plan.row_tiles), row_tile, row_tile % plan.lines)


@dataclasses.dataclass(frozen=True)
class _Segment:
    """One CTA's part of one tile.

    Attributes:
      index: among the CTA's segments.
      step: the CTA's blocks before it.
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


def _for_segments(
    plan: _Plan, tables: _Tables, body: Callable[[_Column, _Segment], None]
) -> None:
    """Calls body for the segments of this CTA, in order."""
    cta = lax.axis_index("cta")
    part = lax.div(cta, plan.columns)
    column = _Column.of(plan, lax.rem(cta, plan.columns))
    share, longer = _share(plan, tables, column.line)
    begin = part * share + jnp.minimum(part, longer)
    end = begin + share + jnp.where(part < longer, 1, 0)

    def run(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        index, position, row = carry
        # Past the rows without blocks.
        row = lax.while_loop(
            lambda row: tables.blocks[column.line, row] <= position, lambda row: row + 1, row
        )
        low, high = tables.hull(plan, column.line, row)
        blocks = _blocks(plan, low, high)
        block = position - (tables.blocks[column.line, row] - blocks)
        segment = _Segment(
            index=index,
            step=position - begin,
            row=row,
            first=_first_block(low) + block * plan.T,
            count=jnp.minimum(blocks - block, end - position),
            partial=_partial(plan, column, row, part),
        )
        body(column, segment)
        return index + 1, position + segment.count, row

    row = _row_of(plan, tables, column.line, begin)
    lax.while_loop(lambda carry: carry[1] < end, run, (jnp.int32(0), begin, row))


def _partial(plan: _Plan, column: _Column, row: Any, part: Any) -> Any:
    """The first warpgroup's place for the partial results of a row and a part.

    Along the line, the row or the part or both grow, so that row + part is another every time.
    """
    return (column.number * (plan.B + plan.parts) + row + part) * plan.warpgroups


@dataclasses.dataclass(frozen=True)
class _Refs:
    """The operands and results of the kernel, in its order."""

    tables: _Tables
    windows: tuple[Any, ...]
    query: Any
    key: Any
    value: Any
    accumulator: Any
    maximum: Any
    denominator: Any


def _attend(plan: _Plan, *refs: Any, **scratch: Any) -> None:
    bounds, rest = refs[: plan.bounds], refs[plan.bounds :]
    if plan.tables_in_shared_memory:
        *rest, blocks_ref = rest
        tables = _share_tables(plan, bounds, blocks_ref, scratch)
    else:
        blocks_ref, *rest = rest
        tables = _Tables.of(bounds, blocks_ref)
    named = _Refs(tables, tuple(rest[:-6]), *rest[-6:])

    @pl.when(lax.axis_index("wg") == plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        _load(plan, named, **scratch)

    @pl.when(lax.axis_index("wg") < plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        _compute(plan, named, **scratch)


def _share_tables(
    plan: _Plan, bounds: Sequence[Any], blocks_ref: Any, scratch: Mapping[str, Any]
) -> _Tables:
    """The tables in shared memory; that of blocks goes to global memory too, for the merge."""
    shared = [scratch["tables"].at[i] for i in range(plan.bounds + 1)]
    tables = _Tables.of(shared[:-1], shared[-1])
    rows = pl.ds(0, plan.line_size)

    @pl.when(lax.axis_index("wg") == plan.warpgroups)
    def _() -> None:
        for ref, copy in zip(bounds, shared, strict=False):
            for line in range(plan.lines):
                plgpu.copy_gmem_to_smem(
                    ref.at[line], copy.at[line, rows], scratch["bounds_full"]
                )
        plgpu.barrier_wait(scratch["bounds_full"])
        for line in range(plan.lines):
            _scan_blocks(plan, tables, line)
        plgpu.barrier_arrive(scratch["blocks_full"])

        @pl.when(lax.axis_index("cta") == 0)
        def _() -> None:
            plgpu.commit_smem()
            for line in range(plan.lines):
                plgpu.copy_smem_to_gmem(tables.blocks.at[line, rows], blocks_ref.at[line])

    plgpu.barrier_wait(scratch["blocks_full"])
    return tables


def _load(plan: _Plan, refs: _Refs, **scratch: Any) -> None:
    """Starts the copies of queries, keys and values, as far ahead as there is room."""

    def run(column: _Column, segment: _Segment) -> None:
        slot = lax.rem(segment.index, plan.query_stages)
        plgpu.barrier_wait(scratch["query_free"].at[slot])
        # 0, but not known to be: then the copy may leave the array, and what is past it is 0.
        start = pl.multiple_of(jnp.minimum(segment.index, 0), _SWIZZLE_ROWS)
        plgpu.copy_gmem_to_smem(
            refs.query.at[segment.row, column.number, pl.ds(start, plan.tile_rows)],
            scratch["query"].at[slot, pl.ds(0, plan.tile_rows)],
            scratch["query_full"].at[slot],
        )

        def block(i: Any, _: None) -> None:
            slot = lax.rem(segment.step + i, plan.stages)
            position = pl.multiple_of(segment.first + i * plan.T, _SWIZZLE_ROWS)
            for name, cache_ref in (("key", refs.key), ("value", refs.value)):
                plgpu.barrier_wait(scratch[f"{name}_free"].at[slot])
                plgpu.copy_gmem_to_smem(
                    cache_ref.at[pl.ds(position, plan.T), column.head],
                    scratch[name].at[slot],
                    scratch[f"{name}_full"].at[slot],
                )

        lax.fori_loop(0, segment.count, block, None)

    _for_segments(plan, refs.tables, run)
    for name, stages in _free(plan):
        for slot in range(stages):
            plgpu.barrier_wait(scratch[name].at[slot])
    plgpu.wait_smem_to_gmem(0)


def _free(plan: _Plan) -> tuple[tuple[str, int], ...]:
    """The barriers that tell that a slot may be filled, and how many slots there are."""
    return (
        ("query_free", plan.query_stages),
        ("key_free", plan.stages),
        ("value_free", plan.stages),
    )


def _logits(plan: _Plan, dots: jax.Array) -> jax.Array:
    """Logits in units of log 2, of <q, k>."""
    scale, cap = plan.params.softmax_scale, plan.params.logits_soft_cap
    if cap is None:
        return dots * (scale * _LOG2_E)
    # tanh x = 1 - 2 / (exp(2 x) + 1)
    exponential = jnp.exp2(dots * (2 * scale / cap * _LOG2_E))
    return cap * _LOG2_E - (2 * cap * _LOG2_E) / (exponential + 1)


def _compute(plan: _Plan, refs: _Refs, **scratch: Any) -> None:
    """Streaming softmax over this warpgroup's blocks of each segment, and its partial results."""
    wg = lax.axis_index("wg")
    # All slots are free at first. A slot of the cache is only ever used by one warpgroup.
    for name, stages in _free(plan):
        for slot in range(stages):

            @pl.when((name == "query_free") | (wg == slot % plan.warpgroups))
            def _(name: str = name, slot: int = slot) -> None:
                plgpu.barrier_arrive(scratch[name].at[slot])

    def run(column: _Column, segment: _Segment) -> None:
        query_slot = lax.rem(segment.index, plan.query_stages)
        block = functools.partial(
            _block, plan, refs, _windows(plan, refs, column, segment.row), query_slot, scratch
        )
        plgpu.barrier_wait(scratch["query_full"].at[query_slot])
        # This warpgroup's blocks are those whose step is wg modulo the warpgroups.
        skip = lax.rem(wg + segment.step * (plan.warpgroups - 1), plan.warpgroups)
        turns = lax.div(segment.count - skip + plan.warpgroups - 1, plan.warpgroups)

        def take_turn(i: Any, state: _State) -> _State:
            turn = i * plan.warpgroups + skip
            slot = lax.rem(segment.step + turn, plan.stages)
            return block(slot, segment.first + turn * plan.T, state)

        state = lax.fori_loop(0, turns, take_turn, _initial_state(plan))
        plgpu.barrier_arrive(scratch["query_free"].at[query_slot])
        _store_partial(plan, refs, segment.partial + wg, state, scratch)

    _for_segments(plan, refs.tables, run)
    plgpu.wait_smem_to_gmem(0)


# The accumulator in chunks of columns, [64, chunk] each; the maximum and the denominator, [64].
_State = tuple[tuple[jax.Array, ...], jax.Array, jax.Array]


def _initial_state(plan: _Plan) -> _State:
    rows = plgpu.Layout.WGMMA.reduce(1)
    zeros = jnp.zeros((_WGMMA_ROWS, plan.chunk), jnp.float32)
    return (
        (plgpu.layout_cast(zeros, plgpu.Layout.WGMMA),) * (plan.Dv // plan.chunk),
        plgpu.layout_cast(jnp.full((_WGMMA_ROWS,), -jnp.inf, jnp.float32), rows),
        plgpu.layout_cast(jnp.zeros((_WGMMA_ROWS,), jnp.float32), rows),
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


def _windows(plan: _Plan, refs: _Refs, column: _Column, row: Any) -> _Windows:
    inner = refs.tables.inner(plan, column.line, row)
    if plan.Q == 1:
        return _Windows(*inner, *inner)
    layout, shape = plgpu.Layout.WGMMA.reduce(1), (_WGMMA_ROWS, plan.T)
    of_rows = [x.at[row, column.row_tile] for x in refs.windows]
    low, high = (
        lax.broadcast_in_dim(plgpu.load(x, layout=layout, optimized=False), shape, [0])
        for x in of_rows
    )
    return _Windows(low, high, *inner, *of_rows)


def _block(
    plan: _Plan,
    refs: _Refs,
    windows: _Windows,
    query_slot: Any,
    scratch: Mapping[str, Any],
    slot: Any,
    first: Any,
    state: _State,
) -> _State:
    """One step of the streaming softmax."""
    accumulators, maximum, denominator = state
    edge = (first < windows.inner_low) | (first + plan.T > windows.inner_high)

    plgpu.barrier_wait(scratch["key_full"].at[slot])

    def dots(accumulator_ref: Any) -> jax.Array:
        keys = scratch["key"].at[slot].transpose((1, 0))
        plgpu.wgmma(accumulator_ref, scratch["query"].at[query_slot], keys)
        return accumulator_ref[...]

    z = _logits(plan, pl.run_scoped(dots, plgpu.ACC((_WGMMA_ROWS, plan.T), jnp.float32)))
    plgpu.barrier_arrive(scratch["key_free"].at[slot])

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
    plan: _Plan, refs: _Refs, partial: Any, state: _State, scratch: Mapping[str, Any]
) -> None:
    """Copies the rows of a tile that are more than padding to global memory."""
    accumulators, maximum, denominator = state
    wg = lax.axis_index("wg")
    rows = pl.ds(0, plan.tile_rows)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    scratch["statistics"][wg, 0] = maximum
    scratch["statistics"][wg, 1] = denominator
    for i, accumulator in enumerate(accumulators):
        if i > 0:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        scratch["accumulator"][wg] = accumulator
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            scratch["accumulator"].at[wg, rows],
            refs.accumulator.at[partial, :, pl.ds(i * plan.chunk, plan.chunk)],
        )
    plgpu.copy_smem_to_gmem(scratch["statistics"].at[wg, 0, rows], refs.maximum.at[partial])
    plgpu.copy_smem_to_gmem(scratch["statistics"].at[wg, 1, rows], refs.denominator.at[partial])


def _product(p: jax.Array, values_ref: Any) -> jax.Array:
    """[rows, T] in registers by [T, columns] in shared memory, in float32."""

    def run(accumulator_ref: Any) -> jax.Array:
        plgpu.wgmma(accumulator_ref, p, values_ref)
        return accumulator_ref[...]

    shape = (p.shape[0], values_ref.shape[1])
    product: jax.Array = pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
    return product


def _zero_outside(plan: _Plan, windows: _Windows, values_ref: Any, first: Any) -> None:
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
    values = plgpu.load(values_ref, layout=layout)
    values_ref[...] = jnp.where(valid, values, jnp.zeros((), values.dtype))
    plgpu.commit_smem()


def _merge(plan: _Plan, *refs: Any) -> None:
    """One row of the results, of the partials of its tile.

    m = max m_i        l = sum exp(m_i - m) l_i        o = sum exp(m_i - m) a_i / l
    """
    tables = _Tables.of(refs[: plan.bounds], refs[plan.bounds])
    accumulator_ref, maximum_ref, denominator_ref, out_ref, max_logits_ref, total_ref = refs[-6:]
    index = lax.axis_index("row")
    b, query_head = lax.div(index, plan.Q * plan.Hq), lax.rem(index, plan.Q * plan.Hq)
    q, hq = lax.div(query_head, plan.Hq), lax.rem(query_head, plan.Hq)
    h = lax.div(hq, plan.G)
    r = q * plan.G + hq - h * plan.G
    column = _Column.of(plan, h * plan.row_tiles + lax.div(r, _WGMMA_ROWS))
    row = lax.rem(r, _WGMMA_ROWS)

    blocks = _blocks(plan, *tables.hull(plan, column.line, b))
    share, longer = _share(plan, tables, column.line)
    blocks_of_longer = longer * (share + 1)

    def part_of(position: Any) -> Any:
        return jnp.where(
            position < blocks_of_longer,
            lax.div(position, share + 1),
            longer + lax.div(position - blocks_of_longer, jnp.maximum(share, 1)),
        )

    last = tables.blocks[column.line, b] - 1
    first_part, last_part = part_of(last - blocks + 1), part_of(last)
    partials = jnp.where(blocks > 0, last_part - first_part + 1, 0) * plan.warpgroups
    first_partial = _partial(plan, column, b, first_part)
    columns = plan.accumulator_columns
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // 128)

    # Several at a time: their loads do not wait for one another.
    together = _MERGED_TOGETHER

    def add(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        accumulator, maximum, denominator = carry
        parts = []
        new_maximum = maximum
        for k in range(together):
            number = i * together + k
            partial = first_partial + jnp.minimum(number, partials - 1)
            m = jnp.where(number < partials, maximum_ref[partial, row], -jnp.inf)
            new_maximum = jnp.maximum(new_maximum, m)
            part = plgpu.load(accumulator_ref.at[partial, row], layout=layout)
            parts.append((m, denominator_ref[partial, row], part))
        shift = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)
        weight = jnp.exp2(maximum - shift)
        accumulator, denominator = accumulator * weight, denominator * weight
        for m, l, part in parts:
            weight = jnp.exp2(m - shift)
            accumulator, denominator = accumulator + part * weight, denominator + l * weight
        return accumulator, new_maximum, denominator

    zeros = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), layout)
    accumulator, maximum, denominator = lax.fori_loop(
        0,
        lax.div(partials + together - 1, together),
        add,
        (zeros, jnp.float32(-jnp.inf), jnp.float32(0)),
    )
    empty = denominator == 0
    inverse = 1 / jnp.where(empty, 1.0, denominator)
    out_ref[index] = (accumulator * inverse).astype(plan.dtype)
    mask_value = jnp.float32(plan.params.mask_value)
    max_logits_ref[index] = jnp.where(maximum == -jnp.inf, mask_value, maximum * math.log(2))
    total_ref[index] = denominator


def _scratch(plan: _Plan) -> Mapping[str, Any]:
    def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
        tile = (_SWIZZLE_ROWS, _SWIZZLE_BYTES // jnp.dtype(dtype).itemsize)
        transforms = (plgpu.TilingTransform(tile), plgpu.SwizzleTransform(_SWIZZLE_BYTES))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    tables = {
        "tables": plgpu.SMEM(
            (plan.bounds + 1, plan.lines, _ceil_to(plan.line_size, 32)), jnp.int32
        ),
        "bounds_full": plgpu.Barrier(num_arrivals=plan.bounds * plan.lines),
        "blocks_full": plgpu.Barrier(),
    }
    barrier = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
    query_barrier = functools.partial(plgpu.Barrier, num_barriers=plan.query_stages)
    return {
        "query": swizzled((plan.query_stages, _WGMMA_ROWS, plan.D), plan.dtype),
        "key": swizzled((plan.stages, plan.T, plan.D), plan.dtype),
        "value": swizzled((plan.stages, plan.T, plan.Dv), plan.dtype),
        "accumulator": swizzled((plan.warpgroups, _WGMMA_ROWS, plan.chunk), jnp.float32),
        "statistics": plgpu.SMEM((plan.warpgroups, 2, _WGMMA_ROWS), jnp.float32),
        **(tables if plan.tables_in_shared_memory else {}),
        "query_full": query_barrier(),
        "query_free": query_barrier(num_arrivals=plan.warpgroups),
        "key_full": barrier(),
        "key_free": barrier(),
        "value_full": barrier(),
        "value_free": barrier(),
    }


def _query_tiles(plan: _Plan, query: jax.Array) -> jax.Array:
    """[B, Q, Hq, D] to [B, columns, rows, D]; a bitcast for one query a row of up to 8 heads."""
    x = query.reshape(plan.B, plan.Q, plan.Hkv, plan.G, plan.D).transpose(0, 2, 1, 3, 4)
    x = x.reshape(plan.B, plan.Hkv, plan.rows, plan.D)
    if plan.rows > _SWIZZLE_ROWS:
        padded = plan.row_tiles * plan.tile_rows
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - plan.rows), (0, 0)))
    return x.reshape(plan.B, plan.columns, -1, plan.D)


def _run(
    plan: _Plan,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    interpret: Any = None,
) -> Arrays3:
    bounds, windows = _schedule(plan, lengths, starts)
    scanned = plan.tables_in_shared_memory
    blocks = () if scanned else (_count_blocks(plan, bounds),)
    statistics = jax.ShapeDtypeStruct((plan.partials, plan.tile_rows), jnp.float32)
    accumulators = (plan.partials, plan.tile_rows, plan.accumulator_columns)
    table = jax.ShapeDtypeStruct((plan.lines, plan.line_size), jnp.int32)
    results = plgpu.kernel(
        functools.partial(_attend, plan),
        out_type=[
            jax.ShapeDtypeStruct(accumulators, jnp.float32),
            statistics,
            statistics,
            *([table] if scanned else []),
        ],
        scratch_types=_scratch(plan),
        grid=(plan.parts * plan.columns,),
        grid_names=("cta",),
        num_threads=plan.warpgroups + 1,
        thread_name="wg",
        kernel_name="ragged_attention",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )(
        *bounds,
        *blocks,
        *windows,
        _query_tiles(plan, query),
        key.reshape(plan.B * plan.S, plan.Hkv, plan.D),
        value.reshape(plan.B * plan.S, plan.Hkv, plan.Dv),
    )
    partials, blocks = results[:3], blocks or results[3:]
    rows = plan.B * plan.Q * plan.Hq
    row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    out, max_logits, denominator = plgpu.kernel(
        functools.partial(_merge, plan),
        out_type=[
            jax.ShapeDtypeStruct((rows, plan.accumulator_columns), plan.dtype),
            row,
            row,
        ],
        grid=(rows,),
        grid_names=("row",),
        kernel_name="ragged_attention_merge",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )(*bounds, *blocks, *partials)
    out = out[:, : plan.Dv].reshape(plan.B, plan.Q, plan.Hq, plan.Dv)
    return (
        out,
        max_logits.reshape(plan.B, plan.Q, plan.Hq),
        denominator.reshape(plan.B, plan.Q, plan.Hq),
    )


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    *,
    params: RaggedAttentionParams,
) -> Arrays3:
    """As `lowering.reference.forward`."""
    plan = _plan(query, key, value, params)
    return _run(plan, query, key, value, lengths, starts)
