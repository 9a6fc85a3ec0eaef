"""The kernel that finishes the tiles whose results no part has whole.

A tile that is cut by the borders of parts gets its results from its segments' partial ones,
in the order of its blocks:

    m = max m_i        l = sum 2^(m_i - m) l_i        o = sum 2^(m_i - m) a_i / l

A tile without blocks gets those of empty windows.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.gpu.launch import Refs
from jax_ragged.lowering.gpu.plan import Plan
from jax_ragged.lowering.gpu.schedule import (
    Column,
    Tables,
    count_of_blocks,
    place_of_partial,
)
from jax_ragged.lowering.gpu.softmax import inverse, max_logits

# Partial results that a CTA loads at once: their loads do not wait for one another.
_TOGETHER = 8

# The weighted sum [columns] of a row, its maximum in units of log 2 and its denominator.
_State = tuple[Any, Any, Any]


def _rows_together(plan: Plan) -> int:
    """The rows of a tile that a CTA merges: more where each has few segments to wait for."""
    segments = -(-(plan.B + plan.parts) // plan.B)
    return math.gcd(plan.tile_rows, 1 << max(1, _TOGETHER // segments).bit_length() - 1)


def _groups(plan: Plan) -> int:
    return plan.tile_rows // _rows_together(plan)


def _borders(plan: Plan) -> int:
    """The CTAs that merge: one for each border of parts, column and group of rows."""
    return (plan.parts - 1) * plan.columns * _groups(plan)


def ctas(plan: Plan) -> int:
    """The CTAs: those that merge, and one for each row of the cache."""
    return _borders(plan) + plan.B


def scratch_types(plan: Plan) -> dict[str, Any]:
    """The shared memory of the kernel."""
    return {
        "out_rows": plgpu.SMEM((_rows_together(plan), plan.accumulator_columns), plan.out_dtype),
        "max_logits_rows": plgpu.SMEM((plan.tile_rows,), jnp.float32),
        "denominator_rows": plgpu.SMEM((plan.tile_rows,), jnp.float32),
    }


def finish(plan: Plan, refs: Refs) -> None:
    """The kernel.

    Refs:
      bounds: int32 [bounds, lines, line_size]: `schedule.make_bounds`.
      splits, accumulators, maxima, denominators: as `attend.attend` leaves them.
      out: [B, columns, result_rows, Dv], max_logits, denominator: [B, columns, tile_rows].
      the others: `scratch_types`.
    """
    cta = lax.axis_index("cta")

    @pl.when(cta < _borders(plan))
    def _() -> None:
        group, rest = lax.rem(cta, _groups(plan)), lax.div(cta, _groups(plan))
        column = Column.of(plan, lax.rem(rest, plan.columns))
        part = lax.div(rest, plan.columns)  # the part before the border
        row = refs.splits[0, column.line, part + 1]
        segments = refs.splits[1, column.line, part + 1]
        pl.when(row >= 0)(functools.partial(_merge, plan, refs, column, part, row, segments, group))

    @pl.when(cta >= _borders(plan))
    def _() -> None:
        _clear(plan, refs, cta - _borders(plan))


def _merge(
    plan: Plan,
    refs: Refs,
    column: Column,
    part: Any,
    row: Any,
    segments: Any,
    group: Any,
) -> None:
    """Merges some rows of a tile, whose first segment is in the given part."""
    rows = _rows_together(plan)
    first = group * rows
    begin = place_of_partial(plan, column, row, part)
    columns = plan.accumulator_columns
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // 128)
    together = _TOGETHER // rows

    def add(i: Any, state: tuple[_State, ...]) -> tuple[_State, ...]:
        numbers = [i * together + k for k in range(together)]

        def load(number: Any, r: Any) -> _State:
            partial = begin + jnp.minimum(number, segments - 1)
            total = mosaic_gpu_load(refs.accumulators.at[partial, r], layout=layout)
            m = jnp.where(number < segments, refs.maxima[partial, r], -jnp.inf)
            return total, m, refs.denominators[partial, r]

        loaded = [[load(number, first + k) for number in numbers] for k in range(rows)]
        return tuple(map(_merged, state, loaded))

    zeros = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), layout)
    state = lax.fori_loop(
        0,
        lax.div(segments + (together - 1), together),
        add,
        ((zeros, jnp.float32(-jnp.inf), jnp.float32(0)),) * rows,
    )
    for k, (total, maximum, denominator) in enumerate(state):
        refs.out_rows[k] = (total * inverse(denominator)).astype(plan.out_dtype)
        refs.max_logits[row, column.number, first + k] = max_logits(maximum, plan.params.mask_value)
        refs.denominator[row, column.number, first + k] = denominator
    plgpu.commit_smem()
    for k in range(rows):
        _copy_row(plan, refs, k, row, column.number, first + k)
    plgpu.wait_smem_to_gmem(0)


def _copy_row(plan: Plan, refs: Refs, k: int, row: Any, column: Any, r: Any) -> None:
    """Copies row k in shared memory to row r of a tile, if that is not padding."""

    def copy() -> None:
        plgpu.copy_smem_to_gmem(refs.out_rows.at[k, pl.ds(0, plan.Dv)], refs.out.at[row, column, r])

    if plan.result_rows == plan.tile_rows:
        copy()
    else:
        pl.when(r < plan.result_rows)(copy)


def _merged(state: _State, parts: list[_State]) -> _State:
    total, maximum, denominator = state
    highest = functools.reduce(jnp.maximum, (m for _, m, _ in parts), maximum)
    shift = jnp.where(highest == -jnp.inf, 0.0, highest)
    weight = jnp.exp2(maximum - shift)
    total, denominator = total * weight, denominator * weight
    for part, m, d in parts:
        weight = jnp.exp2(m - shift)
        total, denominator = total + part * weight, denominator + d * weight
    return total, highest, denominator


def _clear(plan: Plan, refs: Refs, row: Any) -> None:
    """Writes the results of empty windows for the tiles of a row that have no blocks."""
    tables = Tables.of(plan, refs.bounds)

    def clear(number: Any) -> None:
        _fill(plan, refs)
        for r in range(plan.result_rows):
            plgpu.copy_smem_to_gmem(
                refs.out_rows.at[0, pl.ds(0, plan.Dv)], refs.out.at[row, number, r]
            )
        plgpu.copy_smem_to_gmem(refs.max_logits_rows, refs.max_logits.at[row, number])
        plgpu.copy_smem_to_gmem(refs.denominator_rows, refs.denominator.at[row, number])
        plgpu.wait_smem_to_gmem(0)

    def look(number: Any, _: None) -> None:
        hull = tables.hull(plan, Column.of(plan, number).line, row)
        pl.when(count_of_blocks(plan, *hull) == 0)(functools.partial(clear, number))

    lax.fori_loop(0, plan.columns, look, None)


def _fill(plan: Plan, refs: Refs) -> None:
    """Fills shared memory with a row of zeros, and the statistics of empty windows."""
    layout = plgpu.Layout.WG_STRIDED((plan.accumulator_columns,), vec_size=1)
    zeros = jnp.zeros((plan.accumulator_columns,), plan.out_dtype)
    refs.out_rows[0] = plgpu.layout_cast(zeros, layout)
    for ref, value in (
        (refs.max_logits_rows, plan.params.mask_value),
        (refs.denominator_rows, 0.0),
    ):
        for r in range(plan.tile_rows):
            ref[r] = jnp.float32(value)
    plgpu.commit_smem()
