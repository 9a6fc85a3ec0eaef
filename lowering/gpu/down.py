"""A tile of few rows: its logits [T, tile_rows] have the positions down and the rows across.

A matrix product has 64 rows of results, and this way they are positions, of which a block has 64 at
least: no row is padding, and 8 columns are enough for the query heads of one query. Keys and values
are the first factors of products, which may come from registers, so quantised ones are widened
there:

    keys [T, D] times queries [D, tile_rows]            products with each key
    values.T [Dv, T] times weights [T, tile_rows]       the weighted sum of values, transposed

Four warps share the positions of a column. They exchange logits in shared memory to find the
maximum, and each sums the weights of its own positions.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.gpu import tile
from jax_ragged.lowering.gpu.chip import WGMMA_ROWS
from jax_ragged.lowering.gpu.forms import scales_of_positions, widened
from jax_ragged.lowering.gpu.launch import Refs, shared_rows
from jax_ragged.lowering.gpu.plan import Plan, chunk
from jax_ragged.lowering.gpu.softmax import COLUMNS, ROWS, TILE, along, logits, masked, raised
from jax_ragged.lowering.gpu.tile import BlockPlace, State, Windows, windows_around

# A number of at most 2^22 is rounded by adding and subtracting this, whose unit is 1.
_ROUNDING = 1.5 * 2.0**23
# As `TILE`, but each pair of neighbouring rows' elements is in one register, for stores of 16 bits
# to the transpose.
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
# Every warp has all rows of a tile; each thread the columns that it has in `TILE`.
_IN_EVERY_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 8), (2,))),
    warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
# Registers of a value for each row of logits.
ROW_VALUES = COLUMNS


def initial_state(plan: Plan) -> State:
    """The state before the first block.

    Sums are [chunk, tile_rows] each, the maximum [tile_rows], and denominators [64, tile_rows]: the
    sums over every 64th position.
    """

    def zeros(rows: int) -> jax.Array:
        x: jax.Array = plgpu.layout_cast(jnp.zeros((rows, plan.tile_rows), jnp.float32), TILE)
        return x

    maximum = plgpu.layout_cast(jnp.full((plan.tile_rows,), -jnp.inf, jnp.float32), COLUMNS)
    sums = (zeros(plan.chunk),) * (plan.value_columns // plan.chunk)
    return State(sums, maximum, zeros(WGMMA_ROWS))


def block(
    plan: Plan, refs: Refs, windows: Windows, place: BlockPlace, key_unit: Any, state: State
) -> State:
    """Takes one block into the state: a step of the streaming softmax, see `softmax`."""
    stream, slot, first = place.stream, place.slot, place.first
    edge = windows.cut(first, plan.T)

    plgpu.barrier_wait(refs.key_full.at[slot])
    early = plan.form.value.narrow is not None
    values = functools.partial(_values, plan, refs, windows, place, edge)
    products, x = _key_products(plan, refs, place, values if early else lambda: None)
    if plan.form.key.scale == "position":
        key_unit = scales_of_positions(refs, "key", place.slot, place.head)
    if plan.keys_in_registers or plan.form.key.scale == "position":
        # What has been loaded from the slot is, before the copy engine writes there again.
        plgpu.commit_smem()
    plgpu.barrier_arrive(refs.key_free.at[slot])
    pl.when(place.last)(lambda: plgpu.barrier_arrive(refs.query_free.at[stream]))

    z = logits(plan.params, products, key_unit)
    z = lax.cond(edge, lambda z: masked(z, first, windows.low, windows.high, 1), lambda z: z, z)
    highest = _over_positions(refs, stream, z, jnp.max)
    maximum, shift, correction = raised(state.maximum, highest)
    p = jnp.exp2(z - along(shift, z.shape, 1))
    denominators = state.denominators * along(correction, state.denominators.shape, 1)
    for i in range(0, plan.T, WGMMA_ROWS):
        denominators += p[i : i + WGMMA_ROWS]

    chunks = x if early else values()
    if plan.form.value.scale == "position":
        unit = scales_of_positions(refs, "value", place.slot, place.head)
        unit = lax.cond(edge, functools.partial(_zeroed, plan, windows, first), lambda x: x, unit)
        p *= along(unit, p.shape, 0)
    for i in range(plan.weight_parts):
        part = p.astype(plan.value_dtype)
        p -= part.astype(jnp.float32)
        weights = refs.weights.at[stream, pl.ds(i * plan.tile_rows, plan.tile_rows)]
        weights.transpose((1, 0))[...] = plgpu.layout_cast(part, _TRANSPOSED)
    if plan.form.value.narrow is None:
        pl.when(edge)(functools.partial(tile.zero_outside, plan, refs, windows, slot, first))
    plgpu.commit_smem()
    weights = refs.weights.at[stream].transpose((1, 0))

    def of_values(values: Any) -> jax.Array:
        shape = (plan.chunk, plan.weight_parts * plan.tile_rows)
        total, _ = tile.product(shape, (values, weights))
        return functools.reduce(jnp.add, _column_groups(plan, total))

    sums = tuple(
        times(x, correction) + of_values(values)
        for x, values in zip(state.sums, chunks, strict=True)
    )
    plgpu.barrier_arrive(refs.value_free.at[slot])
    return State(sums, maximum, denominators)


def _column_groups(plan: Plan, x: jax.Array) -> tuple[jax.Array, ...]:
    """Cuts a tile with several columns for each row of logits: [rows, tile_rows] each."""
    return tuple(x[:, i : i + plan.tile_rows] for i in range(0, x.shape[1], plan.tile_rows))


def _over_positions(
    refs: Refs, stream: Any, x: jax.Array, reduction: Callable[..., jax.Array]
) -> jax.Array:
    """Reduces a tile [multiple of 64, tile_rows] over its rows, which are in four warps.

    The warps exchange their parts in shared memory.
    """
    tiles = [x[i : i + WGMMA_ROWS] for i in range(0, x.shape[0], WGMMA_ROWS)]
    combine = jnp.maximum if reduction is jnp.max else jnp.add
    refs.exchange[stream] = functools.reduce(combine, tiles)
    everything = mosaic_gpu_load(refs.exchange.at[stream], layout=_IN_EVERY_WARP, optimized=False)
    return reduction(everything, axis=0)


def prepare(plan: Plan, refs: Refs, stream: Any) -> None:
    """Splits a tile's queries into integers, if the units for integers multiply int8 keys.

    They take the keys as they are. With s the power of two that is not smaller than any element of
    a query, and at least 2^-106, an element is

        q = s 2^-20 (2^14 h + 2^7 m + l)    with integers h, m, l of -64 to 64

    up to s 2^-21. Elements of at least s 2^-13 in bfloat16, or s 2^-10 in float16, are exact. The
    sums of products with h, with m and with l are exact, and their sum is rounded to float32.
    """
    if not plan.integer_products:
        return
    query = mosaic_gpu_load(refs.query_tiles.at[stream], layout=_IN_EVERY_WARP, optimized=False)
    query = query.astype(jnp.float32)
    largest = jnp.abs(query).max(axis=1)
    # In the bits of a float32, the exponent stands above 23 bits of fraction: rounded up, less 20,
    # and at least the smallest normal number's. 254 less it is the exponent of the inverse.
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    bits = jnp.maximum(((bits + 0x7FFFFF) & 0x7F800000) - (20 << 23), 1 << 23)
    unit_of_query = lax.bitcast_convert_type(bits, jnp.float32)
    inverse_of_unit = lax.bitcast_convert_type((254 << 23) - bits, jnp.float32)
    rest = query * along(inverse_of_unit, query.shape, 0)
    for i, unit in enumerate((2.0**14, 2.0**7, 1.0)):
        digit = (rest * (1 / unit) + _ROUNDING) - _ROUNDING
        rest -= digit * unit
        rows = pl.ds(i * plan.tile_rows, plan.tile_rows)
        refs.query_digits[stream, rows] = digit.astype(jnp.int32).astype(jnp.int8)
    # An infinity or NaN makes its row of logits NaN.
    refs.query_units[stream] = jnp.where(largest < jnp.inf, unit_of_query, jnp.nan)
    plgpu.commit_smem()


def _key_products(
    plan: Plan, refs: Refs, place: BlockPlace, meanwhile: Callable[[], Any]
) -> tuple[jax.Array, Any]:
    """Products <k, q> of a block's keys with the tile's queries, [T, tile_rows]."""
    keys, query = refs.key_blocks.at[place.slot], refs.query_tiles.at[place.stream]
    shape = (plan.T, plan.tile_rows)
    narrow = plan.form.key.narrow
    if plan.integer_products:
        digits = refs.query_digits.at[place.stream].transpose((1, 0))
        of_digits = (plan.T, 3 * plan.tile_rows)
        sums, done = tile.product(of_digits, (keys, digits), dtype=jnp.int32, meanwhile=meanwhile)
        high, middle, low = _column_groups(plan, sums)
        rest = (middle * 2**7 + low).astype(jnp.float32)
        products = high.astype(jnp.float32) * 2.0**14 + rest
        units = mosaic_gpu_load(refs.query_units.at[place.stream], layout=COLUMNS, optimized=False)
        return products * along(units, shape, 1), done
    if narrow is None:
        return tile.product(shape, (keys, query.transpose((1, 0))), meanwhile=meanwhile)
    step = chunk(plan.D, narrow)
    terms = []
    for column in range(0, plan.D, step):
        columns = pl.ds(column, step)
        x = widened(mosaic_gpu_load(keys.at[:, columns], layout=TILE), plan.dtype)
        terms.append((x, query.at[:, columns].transpose((1, 0))))
    return tile.product(shape, *terms, meanwhile=meanwhile)


def _values(
    plan: Plan, refs: Refs, windows: Windows, place: BlockPlace, edge: Any
) -> tuple[Any, ...]:
    """The values of a block, transposed, in chunks [chunk, T]: the first factors of products.

    Quantised values are in registers, in 16 bits; the others in shared memory.
    """
    narrow = plan.form.value.narrow
    plgpu.barrier_wait(refs.value_full.at[place.slot])

    def zeroed(x: jax.Array) -> jax.Array:
        windows_there = windows_around(plan, windows, place.first, COLUMNS)
        return jnp.where(along(windows_there, x.shape, 1) > 0, x, jnp.zeros((), x.dtype))

    chunks = []
    for column in range(0, plan.value_columns, plan.chunk):
        columns = pl.ds(column, plan.chunk)
        x = refs.value_blocks.at[place.slot, :, columns].transpose((1, 0))
        if narrow is not None:
            wide = widened(mosaic_gpu_load(x, layout=_TRANSPOSED), plan.value_dtype)
            x = plgpu.layout_cast(wide, TILE)
            if jnp.issubdtype(narrow, jnp.floating):
                x = lax.cond(edge, zeroed, lambda x: x, x)
        chunks.append(x)
    return tuple(chunks)


def write(plan: Plan, staging: Any, sums: tuple[jax.Array, ...], column: int) -> Any:
    """Writes the staged columns of sums [chunk, tile_rows] to shared memory, transposed.

    Returns:
      The ref of the tile's rows there, [tile_rows, staged].
    """
    for offset in range(0, plan.staged, WGMMA_ROWS):
        number, row = divmod(column + offset, plan.chunk)
        x = sums[number][row : row + WGMMA_ROWS].astype(staging.dtype)
        part = staging.at[:, pl.ds(offset, WGMMA_ROWS)]
        part.transpose((1, 0))[...] = plgpu.layout_cast(x, _TRANSPOSED)
    return staging


def _zeroed(plan: Plan, windows: Windows, first: Any, unit: jax.Array) -> jax.Array:
    """Zeros the scales [T] of positions that lie in no window: 0 * NaN is NaN."""
    return jnp.where(windows_around(plan, windows, first, ROWS) > 0, unit, 0.0)


def denominator(plan: Plan, refs: Refs, stream: Any, state: State) -> jax.Array:
    """The denominator of each row, [tile_rows]."""
    return _over_positions(refs, stream, state.denominators, jnp.sum)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies sums [chunk, tile_rows] by a factor for each row of logits."""
    return x * along(factor, x.shape, 1)


def scratch_types(plan: Plan) -> dict[str, Any]:
    """The shared memory that only this way of computing needs."""
    rows = plan.tile_rows
    weights = (plan.streams, plan.weight_parts * rows, plan.T)
    scratch = {
        "exchange": shared_rows((plan.streams, WGMMA_ROWS, rows), jnp.float32),
        "weights": shared_rows(weights, plan.value_dtype, like=plan.Dv),
    }
    if plan.integer_products:
        digits = (plan.streams, 3 * rows, plan.D)
        scratch["query_digits"] = shared_rows(digits, jnp.int8)
        scratch["query_units"] = plgpu.SMEM((plan.streams, rows), jnp.float32)
    return scratch
