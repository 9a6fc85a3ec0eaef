"""Ragged attention on Hopper GPUs: a Pallas Mosaic GPU kernel that reads only the windows.

The rows of a tile are the queries and query heads (q, g) that share one KV head of one row b of
the cache, at most 64 of them, padded to the 64 rows of a wgmma. A tile's window is the hull of
its queries' windows, cut into blocks of T positions. The blocks of all tiles stand in one line,

    [row b][KV head h][block j],

of which every one of a fixed number of CTAs takes an equal, contiguous share: so few long rows
fill the chip, and many short ones are balanced. A share falls into segments, one a tile, and a
segment gives partial results, unnormalised:

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
from collections.abc import Callable, Mapping
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
      ctas: that share the work.
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
    ctas: int

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
    def groups(self) -> int:
        """Groups of Hkv tiles with the same windows."""
        return self.B * self.row_tiles

    @property
    def tiles(self) -> int:
        return self.groups * self.Hkv

    @property
    def partials(self) -> int:
        return (self.tiles + self.ctas) * self.warpgroups

    @property
    def accumulator_columns(self) -> int:
        """Dv, but not less than the merging kernel's threads."""
        return max(self.Dv, 128)

    @property
    def chunk(self) -> int:
        """Columns of the accumulator that one matrix product makes."""
        return min(self.Dv, 128)

    @property
    def query_step(self) -> int:
        """Rows r of a tile with the same r // query_step are of one query."""
        return self.G if self.row_tiles == 1 else math.gcd(self.G, _WGMMA_ROWS)


def _plan(
    query: jax.Array, key: jax.Array, value: jax.Array, params: RaggedAttentionParams, ctas: int
) -> _Plan:
    B, Q, Hq, D = query.shape
    S, Hkv, Dv = key.shape[1], key.shape[2], value.shape[3]
    T = 64
    warpgroups = 2 if Dv <= 128 else 1
    itemsize = jnp.dtype(query.dtype).itemsize
    query_stages = 2 if D <= 128 else 1
    queries = query_stages * _WGMMA_ROWS * D * itemsize
    results = warpgroups * _WGMMA_ROWS * Dv * 4
    left = _SHARED_MEMORY - queries - results - 8 * 1024
    stages = left // (T * (D + Dv) * itemsize) // warpgroups * warpgroups
    return _Plan(
        B, Q, Hq, Hkv, S, D, Dv, jnp.dtype(query.dtype), params,
        T, warpgroups, min(stages, 8), query_stages, ctas,
    )  # fmt: skip


# Columns of the table of groups: the first block's first position; the number of blocks; the
# hull of the windows; where all windows overlap; the blocks of this and all groups before; the
# next group that has blocks.
_BASE, _BLOCKS, _LOW, _HIGH, _INNER_LOW, _INNER_HIGH, _NEXT = range(7)
# Columns of the table of shares: the first group, head and block; the blocks; the segments.
_GROUP, _HEAD, _BLOCK, _COUNT, _SEGMENTS = range(5)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """What is to be read, and by whom.

    Attributes:
      groups: i32 [groups, 7], the table of groups.
      shares: i32 [ctas, 5], the table of shares.
      merges: i32 [groups, 3]: the first block and the number of blocks of each group's first
        tile, and the number of all blocks.
      low, high: i32 [groups, 64], the window of each row of a tile.
    """

    groups: jax.Array
    shares: jax.Array
    merges: jax.Array
    low: jax.Array
    high: jax.Array


def _cumsum(x: jax.Array) -> jax.Array:
    """Inclusive, of a vector; a short one as one reduction, which is one kernel."""
    if x.size > 1024:
        return jnp.cumsum(x)
    before = np.tril(np.ones((x.size, x.size), bool))
    return jnp.where(before, x, 0).sum(axis=1, dtype=x.dtype)


def _schedule(plan: _Plan, lengths: jax.Array, starts: jax.Array) -> _Schedule:
    low = jnp.maximum(starts, 0)
    high = jnp.maximum(jnp.minimum(lengths, plan.S), low)
    offset = lax.broadcasted_iota(jnp.int32, low.shape, 0) * plan.S
    low, high = low + offset, high + offset

    # Rows past the last query have empty windows.
    query = np.minimum(np.arange(plan.row_tiles * _WGMMA_ROWS) // plan.G, plan.Q - 1)
    real = np.arange(query.size) < plan.rows
    low = jnp.where(real, low[:, query], 0).reshape(plan.groups, _WGMMA_ROWS)
    high = jnp.where(real, high[:, query], 0).reshape(plan.groups, _WGMMA_ROWS)
    real = jnp.broadcast_to(
        real.reshape(1, plan.row_tiles, _WGMMA_ROWS), (plan.B, plan.row_tiles, _WGMMA_ROWS)
    ).reshape(low.shape)
    limit = np.iinfo(np.int32).max
    hull_low = jnp.where(high > low, low, limit).min(axis=1)
    hull_high = jnp.where(high > low, high, 0).max(axis=1)
    empty = hull_high <= hull_low
    base = jnp.where(empty, 0, hull_low // _SWIZZLE_ROWS * _SWIZZLE_ROWS)
    blocks = jnp.where(empty, 0, (hull_high - base + plan.T - 1) // plan.T)
    inner_low = jnp.where(real, low, 0).max(axis=1)
    inner_high = jnp.where(real, high, limit).min(axis=1)

    ends = _cumsum(blocks)
    group = jnp.arange(plan.groups, dtype=jnp.int32)
    later = jnp.where(blocks > 0, group, plan.groups)
    following = jnp.concatenate([later[1:], jnp.full((1,), plan.groups, jnp.int32)])
    following = lax.cummin(following, reverse=True)
    groups = jnp.stack(
        [base, blocks, hull_low, hull_high, inner_low, inner_high, following], axis=1
    )
    total = ends[-1] * plan.Hkv
    merges = jnp.stack([(ends - blocks) * plan.Hkv, blocks, jnp.full_like(ends, total)], axis=1)
    cta = jnp.arange(plan.ctas, dtype=jnp.int32)
    share, rest = total // plan.ctas, total % plan.ctas
    first = cta * share + jnp.minimum(cta, rest)
    count = share + (cta < rest)
    # The tile of the first and of the last block, among those that have blocks.
    filled = _cumsum((blocks > 0).astype(jnp.int32))

    def locate(position: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        group = (ends[None] * plan.Hkv <= position[:, None]).sum(axis=1, dtype=jnp.int32)
        group = jnp.minimum(group, plan.groups - 1)
        n = jnp.maximum(blocks[group], 1)
        within = position - (ends[group] - blocks[group]) * plan.Hkv
        return group, within // n, within % n, filled[group] * plan.Hkv + within // n

    group, head, block, tile = locate(first)
    *_, last_tile = locate(first + count - 1)
    segments = jnp.where(count > 0, last_tile - tile + 1, 0)
    shares = jnp.stack([group, head, block, count, segments], axis=1)
    return _Schedule(groups, shares, merges, low, high)


@dataclasses.dataclass(frozen=True)
class _Segment:
    """One CTA's part of one tile."""

    group: Any
    head: Any
    block: Any
    left: Any
    step: Any
    blocks: Any
    base: Any

    @property
    def count(self) -> Any:
        return jnp.minimum(self.blocks - self.block, self.left)


def _for_segments(
    plan: _Plan, groups_ref: Any, shares_ref: Any, body: Callable[[Any, _Segment], None]
) -> None:
    """Calls body(index, segment) for the segments of this CTA; step counts its blocks."""
    cta = lax.axis_index("cta")
    group, head, block, left, segments = (shares_ref[cta, i] for i in range(5))

    def run(index: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        group, head, block, left, step = carry
        segment = _Segment(
            group, head, block, left, step, groups_ref[group, _BLOCKS], groups_ref[group, _BASE]
        )
        body(index, segment)
        next_head = head + 1
        next_group = jnp.where(next_head == plan.Hkv, groups_ref[group, _NEXT], group)
        count = segment.count
        return (
            # The last group has no next; its table row is not read then.
            jnp.minimum(next_group, plan.groups - 1),
            jnp.where(next_head == plan.Hkv, 0, next_head),
            jnp.zeros_like(block),
            left - count,
            step + count,
        )

    lax.fori_loop(0, segments, run, (group, head, block, left, jnp.int32(0)))


def _attend(plan: _Plan, *refs: Any, **scratch: Any) -> None:
    @pl.when(lax.axis_index("wg") == plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _load(plan, *refs, **scratch)

    @pl.when(lax.axis_index("wg") < plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        _compute(plan, *refs, **scratch)


def _load(
    plan: _Plan,
    groups_ref: Any,
    shares_ref: Any,
    low_ref: Any,
    high_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    *_: Any,
    **scratch: Any,
) -> None:
    """Starts the copies of queries, keys and values, as far ahead as there is room."""
    query, key, value = scratch["query"], scratch["key"], scratch["value"]

    def segment(index: Any, segment: _Segment) -> None:
        slot = lax.rem(index, plan.query_stages)

        plgpu.barrier_wait(scratch["query_free"].at[slot])
        tile = segment.group * plan.Hkv + segment.head
        # 0, but not known to be: then the copy may leave the array, and what is past it is 0.
        start = pl.multiple_of(jnp.minimum(tile, 0), _SWIZZLE_ROWS)
        plgpu.copy_gmem_to_smem(
            query_ref.at[tile, pl.ds(start, plan.tile_rows)],
            query.at[slot, pl.ds(0, plan.tile_rows)],
            scratch["query_full"].at[slot],
        )

        def block(i: Any, _: None) -> None:
            step = segment.step + i
            slot = lax.rem(step, plan.stages)
            position = segment.base + (segment.block + i) * plan.T
            positions = pl.ds(pl.multiple_of(position, _SWIZZLE_ROWS), plan.T)
            for cache_ref, cache, name in ((key_ref, key, "key"), (value_ref, value, "value")):
                plgpu.barrier_wait(scratch[f"{name}_free"].at[slot])
                plgpu.copy_gmem_to_smem(
                    cache_ref.at[positions, segment.head],
                    cache.at[slot],
                    scratch[f"{name}_full"].at[slot],
                )

        lax.fori_loop(0, segment.count, block, None)

    _for_segments(plan, groups_ref, shares_ref, segment)
    for name, stages in _free(plan):
        for slot in range(stages):
            plgpu.barrier_wait(scratch[name].at[slot])


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


def _compute(
    plan: _Plan,
    groups_ref: Any,
    shares_ref: Any,
    low_ref: Any,
    high_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    accumulator_ref: Any,
    maximum_ref: Any,
    denominator_ref: Any,
    **scratch: Any,
) -> None:
    """Streaming softmax over this warpgroup's blocks of each segment, and its partial results."""
    wg = lax.axis_index("wg")
    rows = plgpu.Layout.WGMMA.reduce(1)
    copied = pl.ds(0, plan.tile_rows)
    # All slots are free at first. A slot of the cache is only ever used by one warpgroup.
    for name, stages in _free(plan):
        for slot in range(stages):

            @pl.when((name == "query_free") | (wg == slot % plan.warpgroups))
            def _(name: str = name, slot: int = slot) -> None:
                plgpu.barrier_arrive(scratch[name].at[slot])

    def segment(index: Any, segment: _Segment) -> None:
        query_slot = lax.rem(index, plan.query_stages)
        group = segment.group
        if plan.Q == 1:
            low, high = groups_ref[group, _LOW], groups_ref[group, _HIGH]
        else:
            low, high = (
                lax.broadcast_in_dim(
                    plgpu.load(ref.at[group], layout=rows, optimized=False),
                    (_WGMMA_ROWS, plan.T),
                    [0],
                )
                for ref in (low_ref, high_ref)
            )
        inner_low, inner_high = groups_ref[group, _INNER_LOW], groups_ref[group, _INNER_HIGH]
        plgpu.barrier_wait(scratch["query_full"].at[query_slot])

        def block(i: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            accumulators, maximum, denominator = carry
            step = segment.step + i * plan.warpgroups + skip
            slot = lax.rem(step, plan.stages)
            first = segment.base + (segment.block + (step - segment.step)) * plan.T
            edge = (first < inner_low) | (first + plan.T > inner_high)

            plgpu.barrier_wait(scratch["key_full"].at[slot])

            def dots(accumulator_ref: Any) -> jax.Array:
                plgpu.wgmma(
                    accumulator_ref,
                    scratch["query"].at[query_slot],
                    scratch["key"].at[slot].transpose((1, 0)),
                )
                return accumulator_ref[...]

            z = _logits(plan, pl.run_scoped(dots, plgpu.ACC((_WGMMA_ROWS, plan.T), jnp.float32)))
            plgpu.barrier_arrive(scratch["key_free"].at[slot])

            def mask(z: jax.Array) -> jax.Array:
                position = first + plgpu.broadcasted_iota(
                    jnp.int32, z.shape, 1, layout=plgpu.Layout.WGMMA
                )
                return jnp.where((position >= low) & (position < high), z, -jnp.inf)

            z = lax.cond(edge, mask, lambda z: z, z)
            new_maximum = jnp.maximum(maximum, z.max(axis=1))
            # Of a row without a position yet: -inf - -inf is NaN.
            shift = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)
            correction = jnp.exp2(maximum - shift)
            p = jnp.exp2(z - lax.broadcast_in_dim(shift, z.shape, [0]))
            denominator = denominator * correction + p.sum(axis=1)
            p = p.astype(plan.dtype)

            plgpu.barrier_wait(scratch["value_full"].at[slot])

            @pl.when(edge)
            def _() -> None:
                _zero_outside(
                    plan, scratch["value"].at[slot], low_ref, high_ref, groups_ref, group, first
                )

            values = scratch["value"].at[slot]
            accumulators = tuple(
                accumulator * lax.broadcast_in_dim(correction, accumulator.shape, [0])
                + _product(p, values.at[:, pl.ds(i * plan.chunk, plan.chunk)])
                for i, accumulator in enumerate(accumulators)
            )
            plgpu.barrier_arrive(scratch["value_free"].at[slot])
            return accumulators, new_maximum, denominator

        # This warpgroup's blocks are those whose step is wg modulo the warpgroups.
        skip = lax.rem(wg - segment.step + (1 << 30), plan.warpgroups)
        turns = lax.div(segment.count - skip + plan.warpgroups - 1, plan.warpgroups)
        zeros = jnp.zeros((_WGMMA_ROWS, plan.chunk), jnp.float32)
        initial = (
            (plgpu.layout_cast(zeros, plgpu.Layout.WGMMA),) * (plan.Dv // plan.chunk),
            plgpu.layout_cast(jnp.full((_WGMMA_ROWS,), -jnp.inf, jnp.float32), rows),
            plgpu.layout_cast(jnp.zeros((_WGMMA_ROWS,), jnp.float32), rows),
        )
        accumulators, maximum, denominator = lax.fori_loop(0, turns, block, initial)
        plgpu.barrier_arrive(scratch["query_free"].at[query_slot])

        partial = (group * plan.Hkv + segment.head + lax.axis_index("cta")) * plan.warpgroups + wg
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, accumulator in enumerate(accumulators):
            scratch["accumulator"][wg, :, pl.ds(i * plan.chunk, plan.chunk)] = accumulator
        scratch["maximum"][wg] = maximum
        scratch["denominator"][wg] = denominator
        plgpu.commit_smem()
        columns = pl.ds(0, plan.Dv)
        plgpu.copy_smem_to_gmem(
            scratch["accumulator"].at[wg, copied], accumulator_ref.at[partial, :, columns]
        )
        plgpu.copy_smem_to_gmem(scratch["maximum"].at[wg, copied], maximum_ref.at[partial])
        plgpu.copy_smem_to_gmem(scratch["denominator"].at[wg, copied], denominator_ref.at[partial])

    _for_segments(plan, groups_ref, shares_ref, segment)
    plgpu.wait_smem_to_gmem(0)


def _product(p: jax.Array, values_ref: Any) -> jax.Array:
    """[rows, T] in registers by [T, columns] in shared memory, in float32."""

    def run(accumulator_ref: Any) -> jax.Array:
        plgpu.wgmma(accumulator_ref, p, values_ref)
        return accumulator_ref[...]

    shape = (p.shape[0], values_ref.shape[1])
    product: jax.Array = pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
    return product


def _zero_outside(
    plan: _Plan,
    block_ref: Any,
    low_ref: Any,
    high_ref: Any,
    groups_ref: Any,
    group: Any,
    first: Any,
) -> None:
    """Zeros the values of a block that lie in no window: 0 * NaN is NaN."""
    layout = plgpu.Layout.WGMMA
    if plan.Q == 1:
        position = first + plgpu.broadcasted_iota(jnp.int32, block_ref.shape, 0, layout=layout)
        valid = (position >= groups_ref[group, _LOW]) & (position < groups_ref[group, _HIGH])
    else:
        position = first + plgpu.broadcasted_iota(jnp.int32, (plan.T,), 0, layout=layout.reduce(1))

        def windows_with(i: Any, count: jax.Array) -> jax.Array:
            r = i * plan.query_step
            inside = (position >= low_ref[group, r]) & (position < high_ref[group, r])
            return count + jnp.where(inside, 1, 0)

        count = plgpu.layout_cast(jnp.zeros((plan.T,), jnp.int32), layout.reduce(1))
        queries = plan.tile_rows // plan.query_step
        count = lax.fori_loop(0, queries, windows_with, count)
        valid = lax.broadcast_in_dim(count, block_ref.shape, [0]) > 0
    values = plgpu.load(block_ref, layout=layout)
    block_ref[...] = jnp.where(valid, values, jnp.zeros((), values.dtype))
    plgpu.commit_smem()


def _merge(
    plan: _Plan,
    merges_ref: Any,
    accumulator_ref: Any,
    maximum_ref: Any,
    denominator_ref: Any,
    out_ref: Any,
    max_logits_ref: Any,
    total_ref: Any,
) -> None:
    """One row of the results, of the partials of its tile.

    m = max m_i        l = sum exp(m_i - m) l_i        o = sum exp(m_i - m) a_i / l
    """
    index = lax.axis_index("row")
    b, query_head = lax.div(index, plan.Q * plan.Hq), lax.rem(index, plan.Q * plan.Hq)
    q, hq = lax.div(query_head, plan.Hq), lax.rem(query_head, plan.Hq)
    h = lax.div(hq, plan.G)
    r = q * plan.G + hq - h * plan.G
    group = b * plan.row_tiles + lax.div(r, _WGMMA_ROWS)
    row = lax.rem(r, _WGMMA_ROWS)
    tile = group * plan.Hkv + h

    first_of_group, blocks, total = (merges_ref[group, i] for i in range(3))
    share, rest = lax.div(total, plan.ctas), lax.rem(total, plan.ctas)

    def cta_of(block: Any) -> Any:
        longer = rest * (share + 1)
        return jnp.where(
            block < longer,
            lax.div(block, share + 1),
            rest + lax.div(block - longer, jnp.maximum(share, 1)),
        )

    first = first_of_group + h * blocks
    first_cta, last_cta = cta_of(first), cta_of(first + blocks - 1)
    partials = jnp.where(blocks > 0, last_cta - first_cta + 1, 0) * plan.warpgroups
    first_partial = (tile + first_cta) * plan.warpgroups
    columns = plan.accumulator_columns
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // 128)

    # Several at a time: their loads do not wait for one another.
    together = 4

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

    statistics = plgpu.SMEM((plan.warpgroups, _WGMMA_ROWS), jnp.float32)
    barrier = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
    query_barrier = functools.partial(plgpu.Barrier, num_barriers=plan.query_stages)
    return {
        "query": swizzled((plan.query_stages, _WGMMA_ROWS, plan.D), plan.dtype),
        "key": swizzled((plan.stages, plan.T, plan.D), plan.dtype),
        "value": swizzled((plan.stages, plan.T, plan.Dv), plan.dtype),
        "accumulator": swizzled((plan.warpgroups, _WGMMA_ROWS, plan.Dv), jnp.float32),
        "maximum": statistics,
        "denominator": statistics,
        "query_full": query_barrier(),
        "query_free": query_barrier(num_arrivals=plan.warpgroups),
        "key_full": barrier(),
        "key_free": barrier(),
        "value_full": barrier(),
        "value_free": barrier(),
    }


def _query_tiles(plan: _Plan, query: jax.Array) -> jax.Array:
    """[B, Q, Hq, D] to [tiles, rows, D]; a bitcast for one query a row of up to 8 heads."""
    x = query.reshape(plan.B, plan.Q, plan.Hkv, plan.G, plan.D).transpose(0, 2, 1, 3, 4)
    x = x.reshape(plan.B, plan.Hkv, plan.rows, plan.D)
    if plan.rows > _SWIZZLE_ROWS:
        padded = plan.row_tiles * plan.tile_rows
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - plan.rows), (0, 0)))
        x = x.reshape(plan.B, plan.Hkv, plan.row_tiles, plan.tile_rows, plan.D)
        x = x.transpose(0, 2, 1, 3, 4)
    return x.reshape(plan.tiles, -1, plan.D)


def _run(
    plan: _Plan,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    interpret: Any = None,
) -> Arrays3:
    schedule = _schedule(plan, lengths, starts)
    statistics = jax.ShapeDtypeStruct((plan.partials, plan.tile_rows), jnp.float32)
    partials = plgpu.kernel(
        functools.partial(_attend, plan),
        out_type=[
            jax.ShapeDtypeStruct(
                (plan.partials, plan.tile_rows, plan.accumulator_columns), jnp.float32
            ),
            statistics,
            statistics,
        ],
        scratch_types=_scratch(plan),
        grid=(plan.ctas,),
        grid_names=("cta",),
        num_threads=plan.warpgroups + 1,
        thread_name="wg",
        kernel_name="ragged_attention",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )(
        schedule.groups,
        schedule.shares,
        schedule.low,
        schedule.high,
        _query_tiles(plan, query),
        key.reshape(plan.B * plan.S, plan.Hkv, plan.D),
        value.reshape(plan.B * plan.S, plan.Hkv, plan.Dv),
    )
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
    )(schedule.merges, *partials)
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
    plan = _plan(query, key, value, params, _MULTIPROCESSORS)
    return _run(plan, query, key, value, lengths, starts)
