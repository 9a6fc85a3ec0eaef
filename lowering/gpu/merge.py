"""The kernel that merges the partial results of each tile."""

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
    first_partial,
    share_of_parts,
)

# Partial results that are loaded at once: their loads do not wait for one another.
_TOGETHER = 8


def merge(plan: Plan, *refs: Any) -> None:
    """One row of the results, of the partials of its tile.

    m = max m_i        l = sum exp(m_i - m) l_i        o = sum exp(m_i - m) a_i / l
    """
    tables = Tables.of(refs[: plan.bounds], refs[plan.bounds])
    accumulator_ref, maximum_ref, denominator_ref, out_ref, max_logits_ref, total_ref = refs[-6:]
    index = lax.axis_index("row")
    b, query_head = lax.div(index, plan.Q * plan.Hq), lax.rem(index, plan.Q * plan.Hq)
    q, hq = lax.div(query_head, plan.Hq), lax.rem(query_head, plan.Hq)
    h = lax.div(hq, plan.G)
    r = q * plan.G + hq - h * plan.G
    column = Column.of(plan, h * plan.row_tiles + lax.div(r, WGMMA_ROWS))
    row = lax.rem(r, WGMMA_ROWS)

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
    partials = jnp.where(blocks > 0, last_part - first_part + 1, 0) * plan.warpgroups
    begin = first_partial(plan, column, b, first_part)
    columns = plan.accumulator_columns
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // 128)

    def add(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        accumulator, maximum, denominator = carry
        parts = []
        new_maximum = maximum
        for k in range(_TOGETHER):
            number = i * _TOGETHER + k
            partial = begin + jnp.minimum(number, partials - 1)
            m = jnp.where(number < partials, maximum_ref[partial, row], -jnp.inf)
            new_maximum = jnp.maximum(new_maximum, m)
            part = mosaic_gpu_load(accumulator_ref.at[partial, row], layout=layout)
            parts.append((m, denominator_ref[partial, row], part))
        shift = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)
        weight = jnp.exp2(maximum - shift)
        accumulator, denominator = accumulator * weight, denominator * weight
        for m, d, part in parts:
            weight = jnp.exp2(m - shift)
            accumulator, denominator = accumulator + part * weight, denominator + d * weight
        return accumulator, new_maximum, denominator

    zeros = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), layout)
    accumulator, maximum, denominator = lax.fori_loop(
        0,
        lax.div(partials + _TOGETHER - 1, _TOGETHER),
        add,
        (zeros, jnp.float32(-jnp.inf), jnp.float32(0)),
    )
    empty = denominator == 0
    inverse = 1 / jnp.where(empty, 1.0, denominator)
    out_ref[index] = (accumulator * inverse).astype(plan.dtype)
    mask_value = jnp.float32(plan.params.mask_value)
    max_logits_ref[index] = jnp.where(maximum == -jnp.inf, mask_value, maximum * math.log(2))
    total_ref[index] = denominator
