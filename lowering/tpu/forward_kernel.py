"""The forward kernel: streaming softmax over the blocks that a row's windows touch.

A step reads a block of T positions of keys and values, and walks it in chunks. For a chunk, with
R rows of (head, query), the logits of all rows stand in registers [R, 128]:

    s = q k'                    z = s, or cap tanh(scale s / cap)        outside a window: -inf
    m' = max(m, max z)          a = exp(m - m')
    p = exp(z - m')             l = a l + sum p           o = a o + p v

In the form TOKENS (`layout`) the columns are (token, tile, head): one product multiplies all heads
with all, the rows of other heads are masked, and their probabilities are 0. The matrix unit does
this idle work while it would wait for memory; nothing is moved to separate the heads. Where the
lanes of a head are cut in tiles, the products of the tiles are rows of their own, and are brought
together by rotations of the lanes.

In the other forms each head is a product of its own. The idle work grows with the rows, so for
many of them the form TOKENS is read so too, by loads that take the rows of one head.

The unit of z is such that no multiplication is spent: `exp(z - m) = exp2((z - m) exponent)` and
`logit = z unit`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ragged.lowering.sharding import result_type
from jax_ragged.lowering.tpu.chunks import (
    LOG2_E,
    Plan,
    Slices,
    Windows,
    compact_heads,
    dot,
    head_block,
    join_tiles,
    lane_slices,
    mask_logits,
    own_head,
    products_with_all,
    spread_heads,
    to_lanes,
    token_rows,
    weights_of_tiles,
)
from jax_ragged.lowering.tpu.layout import LANES, CacheLayout, Form
from jax_ragged.lowering.tpu.work_list import SCALARS, Results, WorkList, item_of_step

# The maximum of nothing: finite, so that exp(-inf - LOWEST) is 0 and not NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


def _by_row(plan: Plan, x: jax.Array) -> jax.Array:
    """Statistics by lane, [P, 128], to statistics by row with equal lanes, [R, 128]."""
    if not plan.compact or plan.key.columns == 1:
        return x
    rows = [
        jnp.where(own_head(plan, 0, first, plan.P), x, LOWEST)
        for first in range(0, plan.rows, plan.P)
    ]
    return jnp.concatenate(
        [jnp.broadcast_to(r.max(axis=1, keepdims=True), r.shape) for r in rows], axis=0
    )


def _across_lanes(plan: Plan, x: jax.Array, combine: Any, reduce: Any) -> jax.Array:
    """Combines the columns of one head, and gives each of them the result: [P, 128]."""
    if not plan.compact or plan.key.columns == 1:
        return jnp.broadcast_to(reduce(x, axis=1, keepdims=True), x.shape)
    shift = LANES // 2
    while shift >= plan.key.columns:
        x = combine(x, pltpu.roll(x, shift, 1))
        shift //= 2
    return x


def _products(q: jax.Array, k_ref: Any, plan: Plan, j: jax.Array | int, heads: range) -> Slices:
    """Q k' of chunk j and a part: [rows, 128] for each 128 columns."""
    key = plan.key
    if not key.interleaved:
        by_head = [
            lane_slices(
                dot(
                    q[h * plan.head_rows : (h + 1) * plan.head_rows],
                    head_block(k_ref, key, plan, j, h),
                    transposed=key.form is not Form.SEQUENCE,
                )
            )
            for h in heads
        ]
        return [jnp.concatenate(parts, axis=0) for parts in zip(*by_head, strict=True)]
    return products_with_all(q, token_rows(k_ref, key, plan, j), key, plan)


def _logits(
    q: jax.Array,
    k_ref: Any,
    plan: Plan,
    j: jax.Array | int,
    heads: range,
    windows: Windows | None,
) -> Slices:
    """The logits of chunk j and a part, -inf where masked: [rows, 128] for each 128 columns."""
    p = plan.params
    z = _products(q, k_ref, plan, j, heads)
    if plan.compact:
        z = [compact_heads(plan, x) for x in z]
    if p.logits_soft_cap is not None:
        factor = p.softmax_scale / p.logits_soft_cap
        z = [p.logits_soft_cap * jnp.tanh(x * factor) for x in z]
    elif p.softmax_scale <= 0:
        z = [x * p.softmax_scale for x in z]
    return [mask_logits(x, plan, j, index, windows) for index, x in enumerate(z)]


def _weighted_values(
    p: Slices,
    v_ref: Any,
    plan: Plan,
    j: jax.Array | int,
    heads: range,
    windows: Windows | None,
) -> jax.Array:
    """P v of chunk j and a part: [rows, Dv], or [tiles R, 128] where the values have tiles."""
    value = plan.value

    def valid(v: jax.Array) -> jax.Array:
        if windows is None:
            return v
        return windows.zero_outside(v, value, jnp.asarray(j, jnp.int32))

    if not value.interleaved:
        joined = jnp.concatenate(p, axis=1).astype(v_ref.dtype)
        return jnp.concatenate(
            [
                dot(
                    joined[i * plan.head_rows : (i + 1) * plan.head_rows],
                    valid(head_block(v_ref, value, plan, j, h)),
                    transposed=value.form is Form.SEQUENCE,
                )
                for i, h in enumerate(heads)
            ],
            axis=0,
        )
    v = valid(token_rows(v_ref, value, plan, j))
    joined = jnp.concatenate([spread_heads(plan, x) for x in p], axis=1)
    return dot(weights_of_tiles(joined, value).astype(v.dtype), v)


@dataclasses.dataclass(frozen=True)
class State:
    """The refs of the running statistics: m and l [P, 128], o as _weighted_values gives it.

    A lane of m holds the maximum of the head of its column; a lane of l the sum of its own
    columns alone.
    """

    m_ref: Any
    l_ref: Any
    o_ref: Any

    def reset(self) -> None:
        self.m_ref[...] = jnp.full(self.m_ref.shape, LOWEST, jnp.float32)
        self.l_ref[...] = jnp.zeros(self.l_ref.shape, jnp.float32)
        self.o_ref[...] = jnp.zeros(self.o_ref.shape, jnp.float32)

    def update(
        self,
        plan: Plan,
        z: list[Slices],
        v_ref: Any,
        chunks: list[Any],
        heads: range,
        windows: Windows | None,
    ) -> None:
        """The streaming softmax of a part over more chunks, whose logits are z."""
        rows = plan.rows_of(heads)
        exponent = plan.unit * LOG2_E
        largest = functools.reduce(jnp.maximum, [x for slices in z for x in slices])
        m = self.m_ref[rows]
        m_new = jnp.maximum(m, _across_lanes(plan, largest, jnp.maximum, jnp.max))
        rescale = jnp.exp2((m - m_new) * exponent)
        p = [[jnp.exp2((x - m_new) * exponent) for x in slices] for slices in z]
        self.m_ref[rows] = m_new
        self.l_ref[rows] = self.l_ref[rows] * rescale + functools.reduce(
            jnp.add, [x for slices in p for x in slices]
        )
        by_tile = jnp.concatenate([_by_row(plan, rescale)] * plan.value.stacked, axis=0)
        o = self.o_ref[rows] * to_lanes(by_tile, self.o_ref.shape[1])
        for j, slices in zip(chunks, p, strict=True):
            o += _weighted_values(slices, v_ref, plan, j, heads, windows)
        self.o_ref[rows] = o

    def results(self, plan: Plan) -> tuple[jax.Array, jax.Array]:
        """Out [R, Dv], max_logits and denominator [2, R] of a row's windows, empty ones too."""
        m = _by_row(plan, self.m_ref[...])
        total = _by_row(plan, _across_lanes(plan, self.l_ref[...], jnp.add, jnp.sum))
        o = self.o_ref[...]
        empty = total == 0
        inverse = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, total))
        o = join_tiles(o, plan)
        # The product with the unit rounds m, at a logit of 1e4 by up to 5e-4. The derivatives start
        # from the rounded maximum, so the sum is relative to that, and their weights add up to 1.
        # Selections stand between the products and the difference: else XLA, in interpretation,
        # would fold the factors into one or fuse the last into the difference, without rounding.
        max_logits = jnp.where(empty, 0.0, m * plan.unit)
        if math.frexp(plan.unit)[0] != 0.5:
            shift = m - jnp.where(empty, m, plan.in_units(max_logits))
            total = total * jnp.exp2(shift * (plan.unit * LOG2_E))
        max_logits = jnp.where(empty, plan.params.mask_value, max_logits)
        statistics = jnp.concatenate([max_logits.T[:1], total.T[:1]], axis=0)
        return o * to_lanes(inverse, o.shape[1]), statistics


def _inner_block(q: jax.Array, k_ref: Any, v_ref: Any, state: State, plan: Plan) -> None:
    """A block that lies in every window: no masks of positions, and one update."""
    chunks = list(range(plan.chunks))
    z = [[_logits(q, k_ref, plan, j, heads, None) for j in chunks] for heads in plan.parts]
    for heads, logits in zip(plan.parts, z, strict=True):
        state.update(plan, logits, v_ref, chunks, heads, None)


def _edge_block(
    q: jax.Array,
    k_ref: Any,
    v_ref: Any,
    state: State,
    plan: Plan,
    windows: Windows,
    first: jax.Array,
    last: jax.Array,
) -> None:
    """A block at the edge of a window: the chunks from first to last alone, masked."""

    def chunk(j: jax.Array, _: None) -> None:
        z = [_logits(q, k_ref, plan, j, heads, windows) for heads in plan.parts]
        for heads, logits in zip(plan.parts, z, strict=True):
            state.update(plan, [logits], v_ref, [j], heads, windows)

    lax.fori_loop(first, last, chunk, None)


def _kernel(*refs: Any, plan: Plan) -> None:
    work = WorkList(*refs[:SCALARS])
    rest = list(refs[SCALARS:])
    bounds_ref = rest.pop(0) if plan.queries > 1 else None
    q_ref, k_ref, v_ref, out_ref, statistics_ref, *rest = rest
    part_refs = [rest.pop(0)] if plan.cores > 1 else []
    state, *bound_refs = State(*rest[:3]), *rest[3:]
    core, step = pl.program_id(0), pl.program_id(1)
    items, steps = work.size[0], work.size[1]
    item = core * steps + step
    valid = item < items
    row = work.row[item]
    start = (work.offset[row] + item) * plan.blocks.T
    end = start + plan.blocks.T

    @pl.when(valid & ((step == 0) | (work.row[jnp.maximum(item - 1, 0)] != row)))
    def _() -> None:
        state.reset()
        if bounds_ref is not None:
            for ref, bound in zip(bound_refs, (0, 1), strict=True):
                spread = jnp.broadcast_to(bounds_ref[0, bound : bound + 1], (LANES, plan.P))
                ref[...] = spread.T

    inner = (work.all_start[row] <= start) & (work.all_end[row] >= end)

    @pl.when(valid & inner)
    def _() -> None:
        _inner_block(q_ref[0], k_ref, v_ref, state, plan)

    @pl.when(valid & jnp.logical_not(inner))
    def _() -> None:
        lo, hi = work.start[row], work.end[row]
        chunk = plan.blocks.chunk
        first = lax.div(jnp.maximum(lo - start, 0), chunk)
        last = lax.div(jnp.minimum(hi, end) - start + (chunk - 1), chunk)
        if bounds_ref is not None:
            lo, hi = (ref[...] for ref in bound_refs)
        windows = Windows(plan, lo, hi, start)
        _edge_block(q_ref[0], k_ref, v_ref, state, plan, windows, first, last)

    ends = (step == steps - 1) | (item == items - 1) | (work.row[item + 1] != row)

    @pl.when(valid & ends)
    def _() -> None:
        out, statistics_ref[0] = state.results(plan)
        out_ref[0] = out.astype(out_ref.dtype)
        if plan.cores > 1:

            @pl.when(row == work.size[2])
            def _() -> None:
                part_refs[0][0] = out


def call(
    plan: Plan,
    work: WorkList,
    bounds: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    name: str,
) -> Results:
    """Runs the kernel.

    Args:
      plan: its static sizes.
      work: its work list.
      bounds: int32 [V, 2, P], start and end of the window of each row of the logits.
      query: [V, R, D].
      key: the view of the keys.
      value: the view of the values.
      name: of the kernel, in HLO and profiles.
    """
    V, R, D = query.shape
    P = plan.P
    Dv, T, cores = plan.value.head_dim, plan.blocks.T, plan.cores

    def row_of(core: Any, step: Any, scalars: Any) -> tuple[Any, Any]:
        work = WorkList(*scalars)
        item = item_of_step(core, step, work.size)
        return work.row[item], work.offset[work.row[item]] + item

    def by_row(rank: int) -> Any:
        return lambda c, i, *s: (row_of(c, i, s)[0], *(0,) * (rank - 1))

    def by_block(layout: CacheLayout) -> Any:
        def index(c: Any, i: Any, *s: Any) -> Any:
            row, block = row_of(c, i, s)
            return layout.block_index(lax.div(row, jnp.int32(plan.tiles)), block)

        return index

    def result(c: Any, i: Any, *s: Any) -> Any:
        return (row_of(c, i, s)[0] + (c if cores > 1 else 0), 0, 0)

    # Else XLA may fetch all of a small cache to VMEM ahead of the kernel, windows or not.
    key, value = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (key, value))
    per_query = plan.queries > 1
    stacked = plan.value.stacked
    scratch = [(P, LANES), (P, LANES), (stacked * R, Dv // stacked)]
    # Out; max_logits and denominator; the exact parts of the row that is cut.
    rows, parts = (V, 0) if cores == 1 else (V + 1, 1)
    out_specs = [pl.BlockSpec((1, *shape), result) for shape in ((R, Dv), (2, R))]
    out_specs += [pl.BlockSpec((1, R, Dv), lambda c, *_: (c, 0, 0))] * parts
    out_shape = [
        result_type((rows, R, Dv), plan.params.result_dtype(query.dtype), query),
        result_type((rows, 2, R), jnp.float32, query),
    ]
    out_shape += [result_type((cores, R, Dv), jnp.float32, query)] * parts
    results = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=SCALARS,
            grid=(cores, work.size[1]),
            in_specs=[
                *([pl.BlockSpec((1, 2, P), by_row(3))] if per_query else []),
                pl.BlockSpec((1, R, D), by_row(3)),
                pl.BlockSpec(plan.key.block_shape(T), by_block(plan.key)),
                pl.BlockSpec(plan.value.block_shape(T), by_block(plan.value)),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                *(pltpu.VMEM(shape, jnp.float32) for shape in scratch),
                *([pltpu.VMEM((P, LANES), jnp.int32)] * 2 if per_query else []),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=plan.blocks.vmem_limit,
        ),
        name=name,
    )(*work, *([bounds] if per_query else []), query, key, value)
    out, statistics, *merged = results
    return Results(out, statistics[:, 0], statistics[:, 1], merged[0] if merged else None)
