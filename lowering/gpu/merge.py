"""The kernel that merges the partial results of each tile."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.gpu.plan import WGMMA_ROWS, Plan
from jax_ragged.lowering.gpu.schedule import (
    Column,
    Tables,
    count_of_blocks,
    place_of_partial,
    share_of_parts,
)

# Partial results that are loaded at once: their loads do not wait for one another.
_TOGETHER = 8


def rows_together(plan: Plan) -> int:
    """How many rows of the results a CTA makes: more where each has few partials to wait for."""
    partials = -(-(plan.B + plan.parts) // plan.B)
    return math.gcd(plan.G, max(1, _TOGETHER // partials))


def merge(plan: Plan, *refs: Any) -> None:
    """Some rows of the results, of one query and KV head, of the partials of their tile.

    m = max m_i        l = sum exp(m_i - m) l_i        o = sum exp(m_i - m) a_i / l
    """
    tables = Tables.of(refs[: plan.bounds], refs[plan.bounds])
    accumulator_ref, maximum_ref, denominator_ref, out_ref, max_logits_ref, total_ref = refs[-6:]
    rows = rows_together(plan)
    index = lax.axis_index("rows") * rows
    b, query_head = lax.div(index, plan.Q * plan.Hq), lax.rem(index, plan.Q * plan.Hq)
    q, hq = lax.div(query_head, plan.Hq), lax.rem(query_head, plan.Hq)
    h = lax.div(hq, plan.G)
    r = q * plan.G + hq - h * plan.G
    column = Column.of(plan, h * plan.row_tiles + lax.div(r, WGMMA_ROWS))
    row = lax.rem(r, WGMMA_ROWS)
    begin, partials = _partials(plan, tables, column, b)
    columns = plan.accumulator_columns
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // 128)

    def add(i: Any, state: tuple[_State, ...]) -> tuple[_State, ...]:
        together = _TOGETHER // rows
        numbers = [i * together + k for k in range(together)]

        def load(number: Any, row: Any) -> _State:
            partial = begin + jnp.minimum(number, partials - 1)
            part = mosaic_gpu_load(accumulator_ref.at[partial, row], layout=layout)
            m = jnp.where(number < partials, maximum_ref[partial, row], -jnp.inf)
            return part, m, denominator_ref[partial, row]

        loaded = [[load(number, row + k) for number in numbers] for k in range(rows)]
        return tuple(map(_merged, state, loaded))

    zeros = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), layout)
    state = lax.fori_loop(
        0,
        lax.div(partials + (_TOGETHER // rows - 1), _TOGETHER // rows),
        add,
        ((zeros, jnp.float32(-jnp.inf), jnp.float32(0)),) * rows,
    )
    mask_value = jnp.float32(plan.params.mask_value)
    for k, (accumulator, maximum, denominator) in enumerate(state):
        inverse = 1 / jnp.where(denominator == 0, 1.0, denominator)
        out_ref[index + k] = (accumulator * inverse).astype(plan.dtype)
        max_logit = jnp.where(maximum == -jnp.inf, mask_value, maximum * math.log(2))
        max_logits_ref[index + k] = max_logit
        total_ref[index + k] = denominator


# An accumulator [columns], a maximum and a denominator.
_State = tuple[Any, Any, Any]


def _merged(state: _State, parts: list[_State]) -> _State:
    accumulator, maximum, denominator = state
    highest = functools.reduce(jnp.maximum, (m for _, m, _ in parts), maximum)
    shift = jnp.where(highest == -jnp.inf, 0.0, highest)
    weight = jnp.exp2(maximum - shift)
    accumulator, denominator = accumulator * weight, denominator * weight
    for part, m, d in parts:
        weight = jnp.exp2(m - shift)
        accumulator, denominator = accumulator + part * weight, denominator + d * weight
    return accumulator, highest, denominator


def _partials(plan: Plan, tables: Tables, column: Column, b: Any) -> tuple[Any, Any]:
    """Where the partials of a row of the cache begin, and their number."""
    blocks = count_of_blocks(plan, *tables.hull(plan, column.line, b))
    share, longer = share_of_parts(plan, tables, column.line)
    blocks_of_longer = longer * (share + 1)

    def part_of(position: Any) -> Any:
        return jnp.where(
            position < blocks_of_longer,
            lax.div(position, share + 1),
            longer + lax.div(position - blocks_of_longer, jnp.maximum(share, 1)),
        )

    last = tables.blocks[column.line, b] - 1
    first_part, last_part = part_of(last - blocks + 1), part_of(last)
    begin = place_of_partial(plan, column, b, first_part)
    return begin, jnp.where(blocks > 0, last_part - first_part + 1, 0)
