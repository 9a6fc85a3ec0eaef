"""The derivative kernel that owns positions of the cache: the gradients of key and value.

A CTA has 64 positions of one key head for each computing warpgroup:

    one warpgroup copies        key [64, D] and value [64, Dv] of each warpgroup, once
                                query [64, D], out_bar [64, Dv], statistics and windows of each
                                tile of query rows that touches them, for every head of the group
    two warpgroups compute      each its 64 positions, on every tile

The logits stand transposed, [64 positions, 64 query rows], so that p and s_bar are the left
operands of the products, from registers:

    s = key query.T          p_bar = value out_bar.T         (p, s_bar: `derivative_blocks`)
    value_bar += p out_bar   key_bar += s_bar query

The sums run over queries and heads in float32 and are rounded once. No product contracts over
positions, so a NaN outside the windows stays in its own position, where p and s_bar are selected
to be 0. Positions count along the cache with its rows joined, so a CTA may own the end of one row
and the start of the next: the tiles of both touch its positions, each inside its own windows.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.contract import ByOperand
from jax_ragged.lowering.gpu import derivative_blocks as blocks
from jax_ragged.lowering.gpu.chip import WGMMA_ROWS
from jax_ragged.lowering.gpu.derivative_plan import (
    HIGH,
    INNER_HIGH,
    INNER_LOW,
    LOW,
    SCALARS,
    DerivativePlan,
    statistics,
)
from jax_ragged.lowering.gpu.launch import Refs, launch, most_stages, shared_rows
from jax_ragged.lowering.gpu.softmax import COLUMNS


@dataclasses.dataclass(frozen=True)
class CacheTask:
    """What the kernel computes.

    Attributes:
      key, value: the dtype of each gradient, or None where it is not asked for.
      at_max: whether there are cotangents of the maximum.
      query: the dtype of the gradient of query, which `one_tile` alone makes here.
    """

    key: Any
    value: Any
    at_max: bool
    query: Any = None

    @property
    def results(self) -> dict[str, Any]:
        """The dtypes of the results, by name."""
        both = {"key": self.key, "value": self.value}
        return {name: dtype for name, dtype in both.items() if dtype is not None}

    @property
    def needs_key(self) -> bool:
        """Whether the cotangents of the logits are needed."""
        return self.key is not None or self.query is not None

    @property
    def tile(self) -> tuple[str, ...]:
        """Names of the arrays that a tile of query rows has."""
        return ("query", "out_bar", "windows", *self.statistics)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics [64] of a tile."""
        return statistics(self.at_max) if self.needs_key else ("log_sum",)

    def inputs(self, windows: jax.Array, operands: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The operands of the kernel, by name."""
        names = ("query", "out_bar", "key", "value", *self.statistics)
        return {"windows": windows} | {name: operands[name] for name in names}

    def scratch_of_statistics(self, *shape: int) -> dict[str, Any]:
        """Shared memory for the statistics, each [*shape, 64]."""
        return {
            f"{name}_tile": plgpu.SMEM(
                (*shape, WGMMA_ROWS), jnp.int32 if name == "t_star" else jnp.float32
            )
            for name in self.statistics
        }


def positions(plan: DerivativePlan) -> int:
    """Positions that a CTA owns."""
    return _warpgroups(plan) * WGMMA_ROWS


def _warpgroups(plan: DerivativePlan) -> int:
    """Computing warpgroups of a CTA: one where the operands of two do not fit."""
    return 1 if plan.wide else 2


def tasks(plan: DerivativePlan, wrt: ByOperand[Any], at_max: bool) -> list[CacheTask]:
    """One task, or one for each gradient where registers do not hold both accumulators."""
    if not plan.wide:
        return [CacheTask(wrt.key, wrt.value, at_max, wrt.query)]
    both = (CacheTask(wrt.key, None, at_max, wrt.query), CacheTask(None, wrt.value, at_max))
    return [task for task in both if task.results]


def _ctas_of_row(plan: DerivativePlan) -> int:
    """CTAs of one head for each row of the cache; they divide all positions evenly."""
    return -(-plan.positions // (plan.B * positions(plan)))


def spans(plan: DerivativePlan, windows: jax.Array) -> jax.Array:
    """The first tile that touches the positions of each CTA, and the one after the last.

    Tiles are counted through all rows. i32 [CTAs of one head, 2], from windows i32
    [B, tiles, 3, 64].
    """
    low, high = (windows[:, :, i].reshape(-1, WGMMA_ROWS) for i in (LOW, HIGH))
    first = jnp.where(high > low, low, plan.positions).min(axis=1)
    last = high.max(axis=1)
    own = positions(plan)
    begin = own * jnp.arange(_ctas_of_row(plan) * plan.B, dtype=jnp.int32)[:, None]
    touches = (first < begin + own) & (last > begin)
    tile = jnp.arange(plan.B * plan.tiles, dtype=jnp.int32)
    after = jnp.where(touches, tile + 1, 0).max(axis=1)
    return jnp.stack([jnp.where(touches, tile, tile.size).min(axis=1), after], axis=1)


def run(
    plan: DerivativePlan,
    task: CacheTask,
    windows: jax.Array,
    operands: Mapping[str, jax.Array],
    interpret: Any = None,
) -> dict[str, jax.Array]:
    """The gradients that the task asks for, [positions, Hkv, D or Dv], by name.

    Args:
      plan: of the call.
      task: what to compute.
      windows: i32 [B, tiles, 3, 64], of `derivative_plan.windows`.
      operands: by name, query of `shape_of_rows(D)`, out_bar of `shape_of_rows(Dv)`,
        key [positions, Hkv, D], value [positions, Hkv, Dv], and the statistics
        [B, H, tiles, 64] that the task has.
      interpret: for JAX's interpreter.
    """
    results = {
        f"{name}_bar": jax.ShapeDtypeStruct(operands[name].shape, dtype)
        for name, dtype in task.results.items()
    }
    made = launch(
        functools.partial(_kernel, plan, task),
        name="ragged_attention_cache_cotangents",
        ctas=_ctas_of_row(plan) * plan.B * plan.Hkv,
        warpgroups=_warpgroups(plan) + 1,
        inputs={"spans": spans(plan, windows)} | task.inputs(windows, operands),
        results=results,
        scratch=_scratch(plan, task, _stages(plan, task)),
        interpret=interpret,
    )
    return {name: made[f"{name}_bar"] for name in task.results}


def _stages(plan: DerivativePlan, task: CacheTask) -> int:
    """Tiles in flight."""
    return most_stages(functools.partial(_scratch, plan, task), 3)


def _scratch(plan: DerivativePlan, task: CacheTask, stages: int) -> dict[str, Any]:
    wgs = _warpgroups(plan)
    scratch = {
        "key_block": shared_rows((wgs, WGMMA_ROWS, plan.D), plan.dtype),
        "value_block": shared_rows((wgs, WGMMA_ROWS, plan.Dv), plan.dtype),
        "query_tile": shared_rows((stages, WGMMA_ROWS, plan.D), plan.dtype),
        "out_bar_tile": shared_rows((stages, WGMMA_ROWS, plan.Dv), plan.dtype),
        "windows_tile": plgpu.SMEM((stages, 3, WGMMA_ROWS), jnp.int32),
        **task.scratch_of_statistics(stages),
        "cache_full": plgpu.Barrier(num_arrivals=2, num_barriers=wgs),
        "tile_full": plgpu.Barrier(num_arrivals=len(task.tile), num_barriers=stages),
        "tile_free": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    }
    for name, dtype in task.results.items():
        # Each gradient of the same shape and dtype shares the first's staging.
        shape = (wgs, WGMMA_ROWS, plan.chunk(plan.width(name), dtype))
        scratch.setdefault(_staging(plan, task, name), shared_rows(shape, dtype))
    return scratch


def _staging(plan: DerivativePlan, task: CacheTask, name: str) -> str:
    """The name of the shared memory through which a gradient is stored."""
    same = plan.D == plan.Dv and task.key == task.value
    return "staging" if same else f"{name}_staging"


@dataclasses.dataclass(frozen=True)
class _CacheWork:
    """What a CTA has to do.

    Attributes:
      kv_head: the head of the cache.
      first: the first position.
      tile: the first tile that touches the positions, counted through all rows.
      tiles: how many tiles of each head do.
      count: of tiles of all heads of the group.
    """

    kv_head: Any
    first: Any
    tile: Any
    tiles: Any
    count: Any

    @classmethod
    def of(cls, plan: DerivativePlan, spans_ref: Any, cta: Any) -> "_CacheWork":
        """The first positions of each row come first: more causal windows reach them."""
        cta, kv_head = lax.div(cta, plan.Hkv), lax.rem(cta, plan.Hkv)
        number = lax.rem(cta, plan.B) * _ctas_of_row(plan) + lax.div(cta, plan.B)
        tile = spans_ref[number, 0]
        tiles = jnp.maximum(spans_ref[number, 1] - tile, 0)
        return cls(kv_head, number * positions(plan), tile, tiles, tiles * plan.group)


def _kernel(plan: DerivativePlan, task: CacheTask, refs: Refs) -> None:
    work = _CacheWork.of(plan, refs.spans, lax.axis_index("cta"))
    blocks.copy_and_compute(
        _warpgroups(plan),
        work.count > 0,
        functools.partial(_copy, plan, task, refs, work),
        functools.partial(_compute, plan, task, refs, work),
    )


def _copy(plan: DerivativePlan, task: CacheTask, refs: Refs, work: _CacheWork) -> None:
    """Starts the copies of the CTA's positions and then of the tiles."""
    for i in range(_warpgroups(plan)):
        rows = _rows(work.first + i * WGMMA_ROWS)
        for name in ("key", "value"):
            source, to = refs[name].at[rows, work.kv_head], refs[f"{name}_block"].at[i]
            plgpu.copy_gmem_to_smem(source, to, refs.cache_full.at[i])

    def start(i: Any, slot: Any, _: None) -> None:
        head = work.kv_head * plan.group + lax.div(i, work.tiles)
        tile = work.tile + lax.rem(i, work.tiles)
        b, tile = lax.div(tile, plan.tiles), lax.rem(tile, plan.tiles)
        copy_tile(plan, task, refs, (b, head, tile), refs.tile_full.at[slot], slot)

    blocks.copy_ahead(work.count, _stages(plan, task), [refs.tile_free], start)


def _rows(first: Any) -> Any:
    return pl.ds(pl.multiple_of(first, WGMMA_ROWS), WGMMA_ROWS)


def copy_tile(
    plan: DerivativePlan,
    task: CacheTask,
    refs: Refs,
    place: tuple[Any, Any, Any],
    full: Any,
    *slot: Any,
) -> None:
    """Starts the copies of a tile's arrays to the refs of `tile_refs`.

    Args:
      plan: of the call.
      task: what to compute.
      refs: of the kernel.
      place: the row of the cache, the head, and the number of the tile.
      full: the barrier at which each arrives.
      slot: which of several tiles in shared memory.
    """
    b, head, tile = place
    rows = plan.at(b, _rows(tile * WGMMA_ROWS), head)
    places = {"query": rows, "out_bar": rows, "windows": (b, tile)}
    for name, to in tile_refs(task, refs, *slot).items():
        plgpu.copy_gmem_to_smem(refs[name].at[places.get(name, place)], to, full)


def tile_refs(task: CacheTask, refs: Refs, *slot: Any) -> dict[str, Any]:
    """The arrays of a tile in shared memory, by name."""
    return {name: refs[f"{name}_tile"].at[slot] for name in task.tile}


def _compute(plan: DerivativePlan, task: CacheTask, refs: Refs, work: _CacheWork, wg: Any) -> None:
    first = work.first + wg * WGMMA_ROWS
    stages = _stages(plan, task)
    pl.when(work.count > 0)(lambda: plgpu.barrier_wait(refs.cache_full.at[wg]))

    def step(i: Any, state: Any) -> Any:
        slot = lax.rem(i, stages)
        plgpu.barrier_wait(refs.tile_full.at[slot])
        tile = tile_refs(task, refs, slot)
        key_ref, value_ref = refs.key_block.at[wg], refs.value_block.at[wg]
        left = weights(plan, task, key_ref, value_ref, tile, first)
        right = {"key": tile["query"], "value": tile["out_bar"]}
        terms = [(state[name], left[name], right[name]) for name in task.results]
        state = dict(zip(task.results, blocks.accumulate(*terms), strict=True))
        plgpu.barrier_arrive(refs.tile_free.at[slot])
        return state

    zeros = {
        name: blocks.accumulators(plan.width(name), plan.chunk(plan.width(name), dtype))
        for name, dtype in task.results.items()
    }
    sums = lax.fori_loop(0, work.count, step, zeros)
    for name, chunks in sums.items():
        if name == "key":
            chunks = tuple(x * plan.params.softmax_scale for x in chunks)
        ref = refs[f"{name}_bar"].at[_rows(first), work.kv_head]
        blocks.store(refs[_staging(plan, task, name)].at[wg], chunks, ref)
    plgpu.wait_smem_to_gmem(0)


def weights(
    plan: DerivativePlan,
    task: CacheTask,
    key_ref: Any,
    value_ref: Any,
    tile: Mapping[str, Any],
    first: Any,
) -> dict[str, jax.Array]:
    """The left operands [64 positions, 64 query rows] of the products for a block and a tile.

    Args:
      plan: of the call.
      task: what to compute.
      key_ref: [64, D] in shared memory.
      value_ref: [64, Dv] in shared memory.
      tile: refs of "query" [64, D], "out_bar" [64, Dv], "windows" [3, 64] and the task's
        statistics [64], in shared memory.
      first: the first position.

    Returns:
      p as "value" and s_bar / scale as "key", in the operands' dtype, those that the task needs.
    """

    def load(name: str, *at: int) -> jax.Array:
        ref = tile[name].at[at] if at else tile[name]
        # Query rows run along the columns of the logits.
        return mosaic_gpu_load(ref, layout=COLUMNS)

    pairs = [(key_ref, tile["query"])]
    if task.needs_key:
        pairs.append((value_ref, tile["out_bar"]))
    s, *rest = blocks.dots(*pairs)
    p, dz_ds = blocks.probabilities(plan, s, load("log_sum"), 1)
    wide = {"value": p} if task.value is not None else {}
    if task.needs_key:
        at_max = (load("t_star"), load("at_max_bar")) if task.at_max else None
        delta = load("delta")
        wide["key"] = blocks.logit_cotangents(p, dz_ds, rest[0], delta, at_max, first, 1)
    inner_low, inner_high = (tile["windows"][SCALARS, i] for i in (INNER_LOW, INNER_HIGH))
    selected = blocks.masked(
        (first < inner_low) | (first + WGMMA_ROWS > inner_high),
        first,
        functools.partial(load, "windows", LOW),
        functools.partial(load, "windows", HIGH),
        1,
        *((x, 0.0) for x in wide.values()),
    )
    return {name: x.astype(plan.dtype) for name, x in zip(wide, selected, strict=True)}
