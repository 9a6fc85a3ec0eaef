"""Derivative kernels that own query rows: peaks, the gradient of query, and the tangents.

A CTA has a set of tiles of one head and a stretch of the blocks in their hull:

    one warpgroup copies        query [64, D] ... of each tile, once
                                key [T, D], value [T, Dv] ... of each block, as far ahead as fits
    two warpgroups compute      each a tile, on every block; or, where there is one tile, each on
                                every other block

For a tile and a block, with s = q k.T [64, T] and p the normalised probabilities:

    peaks       t*, the first position that attains the maximum of z, and that maximum
    cotangent   q_bar += s_bar k          with s_bar of `derivative_blocks.logit_cotangents`
    tangents    o_dot += (p z_dot) v + p v_dot, and sums of p and of p z_dot, and z_dot at t*

Quantised keys and values are widened: each warpgroup converts the block to 16 bits in shared memory
of its own. The scales of keys multiply s and s_bar, those of values p_bar = out_bar v.T.

The results of a stretch (and, where blocks are dealt, of a warpgroup) are partial, and the
caller adds them. Which positions lie outside every window is decided before a product contracts
over positions: key, value and value_dot are zeroed there in shared memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.gpu import derivative_blocks as blocks
from jax_ragged.lowering.gpu.chip import WGMMA_ROWS
from jax_ragged.lowering.gpu.derivative_plan import (
    HIGH,
    HULL_HIGH,
    HULL_LOW,
    INNER_HIGH,
    INNER_LOW,
    LOW,
    SCALARS,
    SOLID,
    DerivativePlan,
    statistics,
)
from jax_ragged.lowering.gpu.forms import Pages, Place, scales_of_positions, widened
from jax_ragged.lowering.gpu.launch import Refs, launch, most_stages, shared_rows
from jax_ragged.lowering.gpu.plan import chunk
from jax_ragged.lowering.gpu.softmax import COLUMNS, ROWS, TILE, along


@dataclasses.dataclass(frozen=True)
class RowTask:
    """What a row kernel computes.

    Attributes:
      name: "peaks", "cotangent" or "tangents".
      rows: names of the operands of query rows, of `shape_of_rows(D or Dv)`.
      cache: names of the operands of the cache, arrays of `Form.array`.
      at_max: whether there are cotangents of the maximum (cotangent).
      dtype: of the result, of `shape_of_rows(columns)`.
    """

    name: str
    rows: tuple[str, ...]
    cache: tuple[str, ...]
    at_max: bool = False
    dtype: Any = jnp.float32

    def columns(self, plan: DerivativePlan) -> int:
        """Columns of the accumulator; 0 for none."""
        return {"peaks": 0, "cotangent": plan.D, "tangents": plan.Dv}[self.name]

    @property
    def statistics(self) -> int:
        """Statistics of query rows among the results, float32; t* ("peak") comes besides."""
        return {"peaks": 1, "cotangent": 0, "tangents": 5}[self.name]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the statistics [B, H, tiles, 64] of query rows among the operands."""
        if self.name == "peaks":
            return ()
        return ("log_sum",) if self.name == "tangents" else statistics(self.at_max)

    @property
    def zeroed(self) -> tuple[str, ...]:
        """Operands of the cache with which a product contracts over positions."""
        names = {"peaks": (), "cotangent": ("key",), "tangents": ("value", "value_dot")}[self.name]
        return tuple(name for name in names if name in self.cache)


def run(
    plan: DerivativePlan,
    task: RowTask,
    windows: jax.Array,
    operands: Mapping[str, jax.Array],
    interpret: Any = None,
) -> dict[str, jax.Array]:
    """Runs a task.

    Args:
      plan: of the call.
      task: what to compute.
      windows: i32 [B, tiles, 3, 64], of `derivative_plan.windows`.
      operands: arrays by the names in the task, page_table and scales if there are any, and
        perhaps others.
      interpret: for JAX's interpreter.

    Returns:
      "result" [partials, *shape_of_rows(columns)], "statistics" f32 [partials, B, H, tiles, n, 64]
      and "peak" i32 [partials, B, H, tiles, 64], those that the task has.
    """
    names_of_inputs = (*task.inputs, *task.rows, *task.cache)
    inputs = {"windows": windows} | {name: operands[name] for name in names_of_inputs}
    for name in ("page_table", *(f"{name}_scale" for name in task.cache)):
        if name in operands:
            inputs[name] = operands[name]
    results: dict[str, jax.ShapeDtypeStruct] = {}
    tiles = (plan.partials, plan.B, plan.H, plan.tiles)
    if columns := task.columns(plan):
        shape = (plan.partials, *plan.shape_of_rows(columns))
        results["result"] = jax.ShapeDtypeStruct(shape, task.dtype)
    if task.statistics:
        shape = (*tiles, task.statistics, WGMMA_ROWS)
        results["statistics"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        results["peak"] = jax.ShapeDtypeStruct((*tiles, WGMMA_ROWS), jnp.int32)
    return launch(
        functools.partial(_kernel, plan, task),
        name=f"ragged_attention_{task.name}",
        ctas=plan.tile_groups * plan.stretches * plan.B * plan.H,
        warpgroups=plan.warpgroups + 1,
        inputs=inputs,
        results=results,
        scratch=_scratch(plan, task, _stages(plan, task)),
        interpret=interpret,
    )


def _stages(plan: DerivativePlan, task: RowTask) -> int:
    """Blocks of each operand of the cache in flight."""
    # Where blocks are dealt, each stage is always the same warpgroup's: both count its phases.
    dealt_to = 1 if plan.tiles_apart else plan.warpgroups
    return most_stages(functools.partial(_scratch, plan, task), 6, dealt_to)


def _quantised(plan: DerivativePlan, task: RowTask) -> tuple[str, ...]:
    """The operands of the cache that are quantised."""
    return tuple(name for name in task.cache if plan.form.stored(name).narrow is not None)


def _tiles_of_cta(plan: DerivativePlan) -> int:
    return plan.warpgroups if plan.tiles_apart else 1


def _scratch(plan: DerivativePlan, task: RowTask, stages: int) -> dict[str, Any]:
    tiles = _tiles_of_cta(plan)
    scratch: dict[str, Any] = {
        f"{name}_tiles": shared_rows((tiles, WGMMA_ROWS, plan.width(name)), plan.dtype)
        for name in task.rows
    }
    # A block is of both warpgroups, or of one.
    arrivals = plan.warpgroups if plan.tiles_apart else 1
    for name in task.cache:
        stored, block = plan.form.stored(name), (plan.block, plan.width(name))
        scratch[f"{name}_blocks"] = shared_rows((stages, *block), stored.narrow or plan.dtype)
        copies = plan.form.arrivals(name, plan.block // plan.piece)
        scratch[f"{name}_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        scratch[f"{name}_free"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
        if stored.narrow is not None:
            scratch[f"{name}_wide"] = shared_rows((plan.warpgroups, *block), plan.dtype)
        scratch |= plan.form.scales_scratch(name, stages, plan.block)
        if stored.scale == "position":
            scratch[f"{name}_units"] = plgpu.SMEM((plan.warpgroups, plan.block), jnp.float32)
    scratch["rows_full"] = plgpu.Barrier(num_arrivals=len(task.rows) * tiles)
    if task.columns(plan):
        shape = (plan.warpgroups, WGMMA_ROWS, plan.chunk(task.columns(plan), task.dtype))
        scratch["staging"] = shared_rows(shape, task.dtype)
    if task.statistics:
        shape = (plan.warpgroups, task.statistics, WGMMA_ROWS)
        scratch["out_statistics"] = plgpu.SMEM(shape, jnp.float32)
        scratch["out_t_star"] = plgpu.SMEM((plan.warpgroups, WGMMA_ROWS), jnp.int32)
    return scratch


@dataclasses.dataclass(frozen=True)
class _RowWork:
    """What a CTA has to do.

    Attributes:
      b, head: the row of the cache and the head.
      group: the set of tiles.
      stretch: the number of the stretch.
      low, high: the hull, in positions.
      first: the first position of the first block.
      count: of blocks.
    """

    b: Any
    head: Any
    group: Any
    stretch: Any
    low: Any
    high: Any
    first: Any
    count: Any

    @classmethod
    def of(cls, plan: DerivativePlan, windows_ref: Any, cta: Any) -> "_RowWork":
        """The last tiles come first: those of causal windows have most to do."""
        cta, head = lax.div(cta, plan.H), lax.rem(cta, plan.H)
        cta, b = lax.div(cta, plan.B), lax.rem(cta, plan.B)
        group = plan.tile_groups - 1 - lax.div(cta, plan.stretches)
        stretch = lax.rem(cta, plan.stretches)
        tile = group * _tiles_of_cta(plan)
        low, high = (windows_ref[b, tile, SCALARS, i] for i in (HULL_LOW, HULL_HIGH))
        first = lax.div(low, plan.unit) * plan.unit + stretch * (plan.stretch * plan.block)
        count = jnp.clip(lax.div(high - first + (plan.block - 1), plan.block), 0, plan.stretch)
        return cls(b, head, group, stretch, low, high, first, count)


def _kernel(plan: DerivativePlan, task: RowTask, refs: Refs) -> None:
    work = _RowWork.of(plan, refs.windows, lax.axis_index("cta"))
    blocks.copy_and_compute(
        plan.warpgroups,
        work.count > 0,
        functools.partial(_copy, plan, task, refs, work),
        functools.partial(_compute, plan, task, refs, work),
    )


def _copy(plan: DerivativePlan, task: RowTask, refs: Refs, work: _RowWork) -> None:
    """Starts the copies of the tiles and then of the blocks."""
    for i in range(_tiles_of_cta(plan)):
        rows = pl.ds((work.group * _tiles_of_cta(plan) + i) * WGMMA_ROWS, WGMMA_ROWS)
        for name in task.rows:
            source = refs[name].at[plan.at(work.b, rows, work.head)]
            plgpu.copy_gmem_to_smem(source, refs[f"{name}_tiles"].at[i], refs.rows_full)
    place = Place(work.b, lax.div(work.head, plan.group), work.high, plan.piece)

    def pages_of(i: Any) -> Pages:
        return plan.form.pages(refs, place, work.first + i * plan.block, plan.block)

    def start(i: Any, slot: Any, pages: Pages) -> None:
        for name in task.cache:
            plan.form.copy_block(refs, name, slot, place, work.first + i * plan.block, pages)

    free = [refs[f"{name}_free"] for name in task.cache]
    blocks.copy_ahead(work.count, _stages(plan, task), free, start, pages_of)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A warpgroup's tile, its scalars, and its statistics where they are in registers [64].

    Attributes:
      number: of the tile, among those of the head.
      slot: where its operands are in shared memory.
    """

    number: Any
    slot: Any
    inner_low: Any
    inner_high: Any
    solid: Any
    low: Callable[[], jax.Array]
    high: Callable[[], jax.Array]
    log_sum: jax.Array | None
    delta: jax.Array | None
    at_max: tuple[jax.Array, jax.Array] | None


def _tile(plan: DerivativePlan, task: RowTask, refs: Refs, work: _RowWork, wg: Any) -> _Tile:
    slot = wg if plan.tiles_apart else 0
    number = work.group * _tiles_of_cta(plan) + slot
    windows_ref = refs.windows.at[work.b, number]

    def load(ref: Any) -> jax.Array:
        return mosaic_gpu_load(ref, layout=ROWS, optimized=False)

    of_rows = {name: load(refs[name].at[work.b, work.head, number]) for name in task.inputs}
    at_max = (of_rows["t_star"], of_rows["at_max_bar"]) if task.at_max else None
    return _Tile(
        number=number,
        slot=slot,
        inner_low=windows_ref[SCALARS, INNER_LOW],
        inner_high=windows_ref[SCALARS, INNER_HIGH],
        solid=windows_ref[SCALARS, SOLID],
        low=functools.partial(load, windows_ref.at[LOW]),
        high=functools.partial(load, windows_ref.at[HIGH]),
        log_sum=of_rows.get("log_sum"),
        delta=of_rows.get("delta"),
        at_max=at_max,
    )


def _compute(plan: DerivativePlan, task: RowTask, refs: Refs, work: _RowWork, wg: Any) -> None:
    tile = _tile(plan, task, refs, work, wg)
    stages = _stages(plan, task)
    step = {"peaks": _peaks, "cotangent": _cotangent, "tangents": _tangents}[task.name]
    quantised, head = _quantised(plan, task), lax.div(work.head, plan.group)
    units = {name: plan.form.scale_of_row(refs, name, work.b, head) for name in task.cache}
    pl.when(work.count > 0)(lambda: plgpu.barrier_wait(refs.rows_full))

    def block(i: Any, state: Any) -> Any:
        # Its number in the stretch, where blocks are dealt to the warpgroups.
        i = i if plan.tiles_apart else i * plan.warpgroups + wg
        slot = lax.rem(i, stages)
        first = work.first + i * plan.block
        operands = {name: refs[f"{name}_blocks"].at[slot] for name in task.cache}
        operands |= {name: refs[f"{name}_tiles"].at[tile.slot] for name in task.rows}
        for name in task.cache:
            plgpu.barrier_wait(refs[f"{name}_full"].at[slot])
        for name in quantised:
            operands[name] = _widen(plan, refs, name, slot, head, wg)
        if quantised:
            # For the products, and before the copy engine writes to the slot again.
            plgpu.commit_smem()
        for name in task.cache:
            operands[f"{name}_unit"] = functools.partial(_unit, plan, refs, name, units[name], wg)
        for name in task.zeroed:
            _zero_outside(plan, refs, work, tile, operands[name], first)
        state = step(plan, tile, operands, first, state)
        for name in task.cache:
            plgpu.barrier_arrive(refs[f"{name}_free"].at[slot])
        return state

    count = work.count
    if not plan.tiles_apart:
        count = lax.div(count + (plan.warpgroups - 1 - wg), plan.warpgroups)
    state = lax.fori_loop(0, count, block, _initial_state(plan, task))
    _store(plan, task, refs, work, tile, wg, state)


def _widen(plan: DerivativePlan, refs: Refs, name: str, slot: Any, head: Any, wg: Any) -> Any:
    """Writes a quantised block in 16 bits to shared memory, and the scales of its positions.

    Returns:
      The ref of the block [T, columns] in 16 bits.
    """
    ref, wide_ref = refs[f"{name}_blocks"].at[slot], refs[f"{name}_wide"].at[wg]
    size = chunk(ref.shape[1], ref.dtype)
    for column in range(0, ref.shape[1], size):
        columns = pl.ds(column, size)
        x = widened(mosaic_gpu_load(ref.at[:, columns], layout=TILE), plan.dtype)
        wide_ref.at[:, columns][...] = x
    if plan.form.stored(name).scale == "position":
        refs[f"{name}_units"].at[wg][...] = scales_of_positions(refs, name, slot, head)
    return wide_ref


def _unit(plan: DerivativePlan, refs: Refs, name: str, of_row: Any, wg: Any) -> Any:
    """The scale of a block of key or value: a number, one for each position [T], or None.

    Those of positions are in registers of a tile's rows where `_widen` has them. They come from
    shared memory to those of its columns.
    """
    if plan.form.stored(name).scale != "position":
        return of_row
    return mosaic_gpu_load(refs[f"{name}_units"].at[wg], layout=COLUMNS, optimized=False)


def _scaled(x: jax.Array, unit: Any) -> jax.Array:
    """Multiplies x [64, T] by a scale of `_unit`."""
    if unit is None:
        return x
    return x * (along(unit, x.shape, 1) if unit.ndim else unit)


def _zero_outside(
    plan: DerivativePlan, refs: Refs, work: _RowWork, tile: _Tile, ref: Any, first: Any
) -> None:
    """Zeros the positions of a block that lie outside every window of the CTA's tiles."""
    tiles = _tiles_of_cta(plan)

    def window(i: Any) -> tuple[Any, Any]:
        number = work.group * tiles + lax.div(i, WGMMA_ROWS)
        windows_ref, r = refs.windows.at[work.b, number], lax.rem(i, WGMMA_ROWS)
        return windows_ref[LOW, r], windows_ref[HIGH, r]

    hull = work.low, work.high, tile.solid
    blocks.zero_outside(ref, first, hull, tiles * WGMMA_ROWS, window)


def _initial_state(plan: DerivativePlan, task: RowTask) -> Any:
    zero = blocks.zeros((WGMMA_ROWS,))
    sums = (
        blocks.accumulators(task.columns(plan), plan.chunk(task.columns(plan), task.dtype))
        if task.columns(plan)
        else ()
    )
    if task.name == "cotangent":
        return sums
    lowest = plgpu.layout_cast(jnp.full((WGMMA_ROWS,), -jnp.inf, jnp.float32), ROWS)
    nowhere = plgpu.layout_cast(jnp.full((WGMMA_ROWS,), -1, jnp.int32), ROWS)
    if task.name == "peaks":
        return lowest, nowhere
    return sums, lowest, nowhere, zero, zero, zero, zero


def _masked(
    plan: DerivativePlan, tile: _Tile, first: Any, *arrays: tuple[jax.Array, float]
) -> list[jax.Array]:
    """Fills arrays [64, T] outside the windows of the tile's query rows."""
    edge = (first < tile.inner_low) | (first + plan.block > tile.inner_high)
    return blocks.masked(edge, first, tile.low, tile.high, 0, *arrays)


def _higher(
    plan: DerivativePlan, z: jax.Array, first: Any, best: jax.Array, t_star: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Takes a block of logits [64, T] into the maximum of each row and the first position of it.

    Returns:
      Both; whether they are of this block [64]; and where the block attains its own maximum first
      [64, T].
    """
    highest = z.max(axis=1)
    # Positions from each on to the end of the block, exact in float32: the most is the first.
    left = plan.block - plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=TILE)
    left = left.astype(jnp.float32)
    most = jnp.where(z == along(highest, z.shape, 0), left, 0.0).max(axis=1)
    better = highest > best
    t_star = jnp.where(better, first + plan.block - most.astype(jnp.int32), t_star)
    peak = left == along(most, z.shape, 0)
    return jnp.where(better, highest, best), t_star, better, peak


def _peaks(
    plan: DerivativePlan, tile: _Tile, operands: Mapping[str, Any], first: Any, state: Any
) -> Any:
    """One block's part of the peaks."""
    (s,) = blocks.dots((operands["query"], operands["key"]))
    s = _scaled(s, operands["key_unit"]())
    (z,) = _masked(plan, tile, first, (blocks.logits(plan, s)[0], -math.inf))
    return _higher(plan, z, first, *state)[:2]


def _cotangent(
    plan: DerivativePlan, tile: _Tile, operands: Mapping[str, Any], first: Any, state: Any
) -> Any:
    """One block's part of q_bar / scale."""
    assert tile.log_sum is not None
    assert tile.delta is not None
    s, p_bar = blocks.dots(
        (operands["query"], operands["key"]), (operands["out_bar"], operands["value"])
    )
    key_unit = operands["key_unit"]()
    s, p_bar = _scaled(s, key_unit), _scaled(p_bar, operands["value_unit"]())
    p, dz_ds = blocks.probabilities(plan, s, tile.log_sum, 0)
    s_bar = blocks.logit_cotangents(p, dz_ds, p_bar, tile.delta, tile.at_max, first, 0)
    (s_bar,) = _masked(plan, tile, first, (_scaled(s_bar, key_unit), 0.0))
    (state,) = blocks.accumulate((state, s_bar.astype(plan.dtype), operands["key"]))
    return state


def _tangents(
    plan: DerivativePlan, tile: _Tile, operands: Mapping[str, Any], first: Any, state: Any
) -> Any:
    """One block's part of sum p z_dot v + sum p v_dot, and the statistics.

    With d = z_dot at t*, l_dot / l = sum p (z_dot - d), which cancels nothing where one p is
    nearly 1. The sum so far is moved to another d by sum p times the difference.
    """
    assert tile.log_sum is not None
    sums, best, t_star, before, probability, centred, rounded = state
    pairs = [(operands["query"], operands["key"])]
    if "query_dot" in operands:
        pairs.append((operands["query_dot"], operands["key"]))
    if "key_dot" in operands:
        pairs.append((operands["query"], operands["key_dot"]))
    s, *parts = blocks.dots(*pairs)
    z, dz_ds = blocks.logits(plan, s)
    p = jnp.exp2(z - along(tile.log_sum, z.shape, 0))
    z_dot = functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(z)
    z_dot = z_dot * plan.params.softmax_scale
    z_dot = z_dot if dz_ds is None else z_dot * dz_ds
    z, p, z_dot = _masked(plan, tile, first, (z, -math.inf), (p, 0.0), (z_dot, 0.0))
    best, t_star, better, peak = _higher(plan, z, first, best, t_star)
    at_max = jnp.where(better, jnp.where(peak, z_dot, 0.0).sum(axis=1), before)
    distance = p * (z_dot - along(at_max, z.shape, 0))
    centred += (before - at_max) * probability + distance.sum(axis=1)
    probability += p.sum(axis=1)
    weights = (p * z_dot).astype(plan.dtype)
    rounded += weights.astype(jnp.float32).sum(axis=1)
    if parts:
        (sums,) = blocks.accumulate((sums, weights, operands["value"]))
    if "value_dot" in operands:
        (sums,) = blocks.accumulate((sums, p.astype(plan.dtype), operands["value_dot"]))
    return sums, best, t_star, at_max, probability, centred, rounded


# Lines of the statistics of the task "tangents"; that of "peaks" is the first.
BEST, Z_DOT_AT_MAX, PROBABILITY, CENTRED_SUM, ROUNDED_SUM = range(5)


def _store(
    plan: DerivativePlan,
    task: RowTask,
    refs: Refs,
    work: _RowWork,
    tile: _Tile,
    wg: Any,
    state: Any,
) -> None:
    """Copies a warpgroup's results to global memory."""
    partial = work.stretch if plan.tiles_apart else work.stretch * plan.warpgroups + wg
    sums: tuple[jax.Array, ...] = ()
    if task.name == "cotangent":
        sums = tuple(x * plan.params.softmax_scale for x in state)
    if task.statistics:
        best, t_star, *rest = state if task.name == "peaks" else state[1:]
        sums = () if task.name == "peaks" else state[0]
        for line, x in enumerate((best, *rest)):
            refs.out_statistics[wg, line] = x
        refs.out_t_star[wg] = t_star
        plgpu.commit_smem()
        at = (partial, work.b, work.head, tile.number)
        plgpu.copy_smem_to_gmem(refs.out_statistics.at[wg], refs.statistics.at[at])
        plgpu.copy_smem_to_gmem(refs.out_t_star.at[wg], refs.peak.at[at])
    if sums:
        rows = pl.ds(tile.number * WGMMA_ROWS, WGMMA_ROWS)
        ref = refs.result.at[(partial, *plan.at(work.b, rows, work.head))]
        blocks.store(refs.staging.at[wg], sums, ref)
    plgpu.wait_smem_to_gmem(0)
