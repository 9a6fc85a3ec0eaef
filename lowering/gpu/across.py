"""A tile of many rows: its logits [64, T] have the rows down and the positions across.

Rows of a matrix product that a tile does not have are padding. The weights stay in registers, as
the first factor of the product with the values:

    queries [64, D] times keys.T [D, T]         products with each key
    weights [64, T] times values [T, Dv]        the weighted sum of values
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering.gpu import tile
from jax_ragged.lowering.gpu.chip import WGMMA_ROWS
from jax_ragged.lowering.gpu.launch import Refs
from jax_ragged.lowering.gpu.plan import Plan
from jax_ragged.lowering.gpu.softmax import ROWS, TILE, Softmax, along, logits, masked, update
from jax_ragged.lowering.gpu.tile import BlockPlace, State, Windows

# Registers of a value for each row of logits.
ROW_VALUES = ROWS


def initial_state(plan: Plan) -> State:
    """The state before the first block: sums are [64, chunk] each, the others [64]."""
    zeros = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, plan.chunk), jnp.float32), TILE)
    return State((zeros,) * (plan.value_columns // plan.chunk), *Softmax.empty(WGMMA_ROWS))


def prepare(plan: Plan, refs: Refs, stream: Any) -> None:
    """Queries are multiplied as they are."""


def block(
    plan: Plan, refs: Refs, windows: Windows, place: BlockPlace, key_unit: Any, state: State
) -> State:
    """Takes one block into the state: a step of the streaming softmax."""
    assert key_unit is None
    stream, slot, first = place.stream, place.slot, place.first
    edge = windows.cut(first, plan.T)

    plgpu.barrier_wait(refs.key_full.at[slot])
    factors = refs.query_tiles.at[stream], refs.key_blocks.at[slot].transpose((1, 0))
    products, _ = tile.product((WGMMA_ROWS, plan.T), factors)
    plgpu.barrier_arrive(refs.key_free.at[slot])
    pl.when(place.last)(lambda: plgpu.barrier_arrive(refs.query_free.at[stream]))

    z = logits(plan.params, products)
    z = lax.cond(edge, lambda z: masked(z, first, windows.low, windows.high), lambda z: z, z)
    softmax = Softmax(state.maximum, state.denominators)
    softmax, correction, p = update(plan.params, softmax, z, scaled=True)

    plgpu.barrier_wait(refs.value_full.at[slot])
    pl.when(edge)(functools.partial(tile.zero_outside, plan, refs, windows, slot, first))
    p = p.astype(plan.dtype)

    def of_values(i: int) -> jax.Array:
        columns = pl.ds(i * plan.chunk, plan.chunk)
        values = refs.value_blocks.at[slot, :, columns]
        return tile.product((WGMMA_ROWS, plan.chunk), (p, values))[0]

    sums = tuple(times(x, correction) + of_values(i) for i, x in enumerate(state.sums))
    plgpu.barrier_arrive(refs.value_free.at[slot])
    return State(sums, *softmax)


def denominator(plan: Plan, refs: Refs, stream: Any, state: State) -> jax.Array:
    """The denominator of each row, [64]."""
    return state.denominators


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies sums [64, chunk] by a factor for each row of logits."""
    return x * along(factor, x.shape, 0)


def write(plan: Plan, staging: Any, sums: tuple[jax.Array, ...], column: int) -> Any:
    """Writes the staged columns of sums [64, chunk] to shared memory [64, staged].

    Returns:
      The ref of the tile's rows there.
    """
    number, offset = divmod(column, plan.chunk)
    staging[...] = sums[number][:, offset : offset + plan.staged].astype(staging.dtype)
    return staging.at[pl.ds(0, plan.tile_rows)]


def scratch_types(plan: Plan) -> dict[str, Any]:
    """The shared memory that only this way of computing needs."""
    return {}
