"""The schedule for few queries: the cache is one line of blocks, cut in parts of equal length.

A tile is up to 64 rows of logits: the queries and query heads (q, g) that share a KV head. `down`
and `across` compute it. Its window is the hull of its queries' windows, cut into
blocks of T positions. The blocks of all rows of the cache follow one another in one line, which
is cut in parts of equal length: so few long rows fill the chip, and many short ones are balanced.

    rows of the cache  |------ row 0 ------|- row 1 -|------- row 2 -------|
    blocks ("line")    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16
    parts              |----- part 0 -----|------ part 1 -----|-- part 2 --|
    segments           (r0, p0)            (r0, p1)(r1, p1)(r2, p1)(r2, p2)

A *column* is a KV head and a tile of its queries. A *stream* is one part of one column, and the
pair of warpgroups that copies and computes it; a CTA has one or two. The streams of one part read
neighbouring heads of the same positions at the same time, so that DRAM sees contiguous reads.

A *segment* is a part's piece of one row. Where the part has the whole row, as of row 1 above, the
segment's results are the row's. The other segments leave partial results, which a second kernel
merges: the maximum m, the denominator l and the sum a of weighted values, unnormalised.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.gpu import attend, merge
from jax_ragged.lowering.gpu.launch import launch, padded
from jax_ragged.lowering.gpu.plan import Plan
from jax_ragged.lowering.gpu.schedule import count_blocks, make_bounds


def attend_along_line(
    plan: Plan,
    operands: Operands,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes out [B, Q, Hq, Dv], max_logits and denominator [B, Q, Hq].

    Args:
      plan: the plan.
      operands: of the forward.
      interpret: the parameters of JAX's interpreter, or None to run on a GPU.
    """
    bounds, windows = make_bounds(plan, operands.lengths, operands.starts)
    tables = {"bounds": bounds}
    if not plan.tables_in_shared_memory:
        tables["blocks"] = count_blocks(plan, bounds)
    f32 = jnp.float32
    statistic = jax.ShapeDtypeStruct((plan.B, plan.columns, plan.tile_rows), f32)
    partial_statistic = jax.ShapeDtypeStruct((plan.partials, plan.tile_rows), f32)
    sums = jax.ShapeDtypeStruct((plan.partials, plan.tile_rows, plan.accumulator_columns), f32)
    left = launch(
        functools.partial(attend.attend, plan),
        name="ragged_attention",
        ctas=plan.ctas,
        warpgroups=2 * plan.streams,
        inputs={
            **tables,
            **windows,
            "query": _to_tiles(plan, operands.query),
            **plan.form.inputs(operands),
        },
        results={
            "out": jax.ShapeDtypeStruct(
                (plan.B, plan.columns, plan.result_rows, plan.Dv), plan.out_dtype
            ),
            "max_logits": statistic,
            "denominator": statistic,
            "accumulators": sums,
            "maxima": partial_statistic,
            "denominators": partial_statistic,
            "splits": jax.ShapeDtypeStruct((2, plan.lines, plan.parts), jnp.int32),
        },
        scratch=attend.scratch_types(plan),
        interpret=interpret,
    )
    results = launch(
        functools.partial(merge.finish, plan),
        name="ragged_attention_merge",
        ctas=merge.ctas(plan),
        warpgroups=1,
        inputs={
            "bounds": bounds,
            **{name: left[name] for name in ("splits", "accumulators", "maxima", "denominators")},
        },
        results={},
        updated={name: left[name] for name in ("out", "max_logits", "denominator")},
        scratch=merge.scratch_types(plan),
        interpret=interpret,
    )
    return (
        _from_tiles(plan, results["out"]),
        _from_tiles(plan, results["max_logits"]),
        _from_tiles(plan, results["denominator"]),
    )


def _to_tiles(plan: Plan, query: jax.Array) -> jax.Array:
    """[B, Q, Hq, D] to [B, columns, result_rows, D]: a bitcast for one query and up to 8 heads."""
    x = query.reshape(plan.B, plan.Q, plan.Hkv, plan.G, plan.D).transpose(0, 2, 1, 3, 4)
    x = x.reshape(plan.B, plan.Hkv, plan.rows, plan.D)
    x = padded(x, 2, plan.row_tiles * plan.result_rows)
    return x.reshape(plan.B, plan.columns, plan.result_rows, plan.D)


def _from_tiles(plan: Plan, x: jax.Array) -> jax.Array:
    """The inverse of `_to_tiles`: [B, columns, rows, ...] to [B, Q, Hq, ...]."""
    x = x.reshape(plan.B, plan.Hkv, plan.row_tiles * x.shape[2], *x.shape[3:])[:, :, : plan.rows]
    x = x.reshape(plan.B, plan.Hkv, plan.Q, plan.G, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(plan.B, plan.Q, plan.Hq, *x.shape[4:])
