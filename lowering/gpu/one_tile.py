"""The derivative kernel for few query rows: all gradients from one pass over the cache.

Where one tile holds every query row of a key head, as in decode, the gradients of the keys and
values of a block are complete once that tile has seen it. So a CTA has a stretch of a row's
blocks, each of which it reads once and whose gradients it writes once:

    one warpgroup copies        the tile's operands, once
                                key [64, D] and value [64, Dv] of each block inside the hull
    two warpgroups compute      each every other block; zeros go to the blocks outside the hull

With the logits transposed as in `cache_kernels`, s_bar goes to shared memory besides, for

    query_bar += s_bar.T key

which the caller adds over warpgroups and stretches. A CTA writes whole blocks of its own row, so
rows of the cache must begin with a tile of the copy engine.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering.gpu import cache_kernels, derivative_blocks as blocks
from jax_ragged.lowering.gpu.cache_kernels import CacheTask
from jax_ragged.lowering.gpu.chip import SWIZZLE_ROWS, WGMMA_ROWS
from jax_ragged.lowering.gpu.derivative_plan import (
    HIGH,
    HULL_HIGH,
    HULL_LOW,
    LOW,
    SCALARS,
    SOLID,
    DerivativePlan,
    join_rows,
    split_rows,
)
from jax_ragged.lowering.gpu.launch import Refs, launch, most_stages, shared_rows

_BLOCK = WGMMA_ROWS


def takes(plan: DerivativePlan) -> bool:
    """Whether the kernel takes a call: one tile holds all query rows that share a key head."""
    one_tile = plan.group == 1 and not plan.tiles_apart
    return one_tile and plan.S % SWIZZLE_ROWS == 0


def run(
    plan: DerivativePlan,
    task: CacheTask,
    windows: jax.Array,
    operands: Mapping[str, jax.Array],
    interpret: Any = None,
) -> dict[str, jax.Array]:
    """The gradients that the task asks for, by name; as `cache_kernels.run` for one tile.

    That of query is float32 and partial, [partials, *shape_of_rows(D)].
    """
    # The copy engine ends at the end of a row, where the last block of a row may not.
    by_row = {name: split_rows(plan, operands[name]) for name in ("key", "value")}
    results = {
        f"{name}_bar": jax.ShapeDtypeStruct(by_row[name].shape, dtype)
        for name, dtype in task.results.items()
    }
    if task.query is not None:
        shape = (plan.partials, *plan.shape_of_rows(plan.D))
        results["query_bar"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    made = launch(
        functools.partial(_kernel, plan, task),
        name="ragged_attention_all_cotangents",
        ctas=plan.stretches * plan.B * plan.H,
        warpgroups=plan.warpgroups + 1,
        inputs=task.inputs(windows, dict(operands) | by_row),
        results=results,
        scratch=_scratch(plan, task, _stages(plan, task)),
        interpret=interpret,
    )
    bars = {name: join_rows(plan, made[f"{name}_bar"]) for name in task.results}
    return bars | ({} if task.query is None else {"query": made["query_bar"]})


def _chunk(plan: DerivativePlan, task: CacheTask, name: str) -> int:
    """Columns of a gradient that one product makes and that are stored at once."""
    if name == "query":
        return plan.chunk(plan.D, jnp.float32)
    return plan.chunk(plan.width(name), task.results[name])


def _stages(plan: DerivativePlan, task: CacheTask) -> int:
    """Blocks in flight."""
    # Each stage is always the same warpgroup's: both count its phases.
    return most_stages(functools.partial(_scratch, plan, task), 6, plan.warpgroups)


def _scratch(plan: DerivativePlan, task: CacheTask, stages: int) -> dict[str, Any]:
    wgs = plan.warpgroups
    scratch = {
        "query_tile": shared_rows((WGMMA_ROWS, plan.D), plan.dtype),
        "out_bar_tile": shared_rows((WGMMA_ROWS, plan.Dv), plan.dtype),
        "windows_tile": plgpu.SMEM((3, WGMMA_ROWS), jnp.int32),
        **task.scratch_of_statistics(),
        "tile_full": plgpu.Barrier(num_arrivals=len(task.tile)),
        "key_blocks": shared_rows((stages, _BLOCK, plan.D), plan.dtype),
        "value_blocks": shared_rows((stages, _BLOCK, plan.Dv), plan.dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": plgpu.Barrier(num_barriers=stages),
    }
    for name, dtype in task.results.items():
        shape = (wgs, _BLOCK, _chunk(plan, task, name))
        scratch[f"{name}_staging"] = shared_rows(shape, dtype)
    if task.query is not None:
        scratch["logit_bar"] = shared_rows((wgs, _BLOCK, WGMMA_ROWS), plan.dtype, like=plan.D)
        shape = (wgs, WGMMA_ROWS, _chunk(plan, task, "query"))
        scratch["query_staging"] = shared_rows(shape, jnp.float32)
    return scratch


class _Stretch:
    """What a CTA has to do.

    Attributes:
      b, head: the row of the cache and its head.
      stretch: the number of the stretch.
      position: where the row begins, in the joined cache.
      begin, end: the stretch's blocks of the row.
      first, last: of them, those inside the hull.
    """

    def __init__(self, plan: DerivativePlan, windows_ref: Any, cta: Any) -> None:
        cta, self.head = lax.div(cta, plan.H), lax.rem(cta, plan.H)
        self.b, self.stretch = lax.div(cta, plan.stretches), lax.rem(cta, plan.stretches)
        self.position = self.b * plan.S
        hull = (windows_ref[self.b, 0, SCALARS, i] for i in (HULL_LOW, HULL_HIGH))
        # Of an empty hull, the end is 0.
        low, high = (jnp.maximum(x - self.position, 0) for x in hull)
        self.begin = self.stretch * plan.stretch
        self.end = jnp.minimum(self.begin + plan.stretch, -(-plan.S // _BLOCK))
        self.first = jnp.clip(lax.div(low, _BLOCK), self.begin, self.end)
        self.last = jnp.clip(lax.div(high + (_BLOCK - 1), _BLOCK), self.first, self.end)


def _kernel(plan: DerivativePlan, task: CacheTask, refs: Refs) -> None:
    work = _Stretch(plan, refs.windows, lax.axis_index("cta"))
    blocks.copy_and_compute(
        plan.warpgroups,
        work.last > work.first,
        functools.partial(_copy, plan, task, refs, work),
        functools.partial(_compute, plan, task, refs, work),
    )


def _rows(block: Any) -> Any:
    return pl.ds(pl.multiple_of(block * _BLOCK, _BLOCK), _BLOCK)


def _only_tile(work: _Stretch) -> Any:
    """0, but not known to be: its 64 query rows may be more than the array has.

    The size would be checked while tracing; the copy engine skips the rest.
    """
    return jnp.minimum(work.stretch, 0)


def _copy(plan: DerivativePlan, task: CacheTask, refs: Refs, work: _Stretch) -> None:
    """Starts the copies of the tile and then of the blocks."""
    place = work.b, work.head, _only_tile(work)
    cache_kernels.copy_tile(plan, task, refs, place, refs.tile_full)

    def start(i: Any, slot: Any, _: None) -> None:
        for name in ("key", "value"):
            source = refs[name].at[work.b, _rows(work.first + i), work.head]
            to = refs[f"{name}_blocks"].at[slot]
            plgpu.copy_gmem_to_smem(source, to, refs.full.at[slot])

    blocks.copy_ahead(work.last - work.first, _stages(plan, task), [refs.free], start)


def _compute(plan: DerivativePlan, task: CacheTask, refs: Refs, work: _Stretch, wg: Any) -> None:
    stages = _stages(plan, task)
    tile = cache_kernels.tile_refs(task, refs)
    dealt = functools.partial(_dealt, plan, wg)
    pl.when(work.last > work.first)(lambda: plgpu.barrier_wait(refs.tile_full))

    def store(block: Any, name: str, chunks: tuple[jax.Array, ...]) -> None:
        ref = refs[f"{name}_bar"].at[work.b, _rows(block), work.head]
        blocks.store(refs[f"{name}_staging"].at[wg], chunks, ref)

    def step(i: Any, query_bar: Any) -> Any:
        slot = lax.rem(i, stages)
        block = work.first + i
        position = work.position + block * _BLOCK
        plgpu.barrier_wait(refs.full.at[slot])
        key, value = refs.key_blocks.at[slot], refs.value_blocks.at[slot]
        left = cache_kernels.weights(plan, task, key, value, tile, position)
        if task.query is not None:
            logit_bar = refs.logit_bar.at[wg]
            logit_bar[...] = left["key"]
            plgpu.commit_smem()
            _zero_outside(tile["windows"], key, position)
            term = (query_bar, logit_bar.transpose((1, 0)), key)
            (query_bar,) = blocks.accumulate(term)
        plgpu.barrier_arrive(refs.free.at[slot])
        # One after the other: registers hold the accumulators of query and of one more.
        right = {"key": tile["query"], "value": tile["out_bar"]}
        for name in task.results:
            term = (_zeros(plan, task, name), left[name], right[name])
            (chunks,) = blocks.accumulate(term)
            if name == "key":
                chunks = tuple(x * plan.params.softmax_scale for x in chunks)
            store(block, name, chunks)
        return query_bar

    def clear(block: Any, _: None) -> None:
        for name in task.results:
            store(block, name, _zeros(plan, task, name))

    initial = _zeros(plan, task, "query") if task.query is not None else ()
    query_bar = dealt(0, work.last - work.first, step, initial)
    dealt(work.begin, work.first, clear, None)
    dealt(work.last, work.end, clear, None)
    if task.query is not None:
        partial = work.stretch * plan.warpgroups + wg
        rows = pl.ds(pl.multiple_of(_only_tile(work), WGMMA_ROWS), WGMMA_ROWS)
        ref = refs.query_bar.at[(partial, *plan.at(work.b, rows, work.head))]
        chunks = tuple(x * plan.params.softmax_scale for x in query_bar)
        blocks.store(refs.query_staging.at[wg], chunks, ref)
    plgpu.wait_smem_to_gmem(0)


def _dealt(plan: DerivativePlan, wg: Any, begin: Any, end: Any, body: Any, initial: Any) -> Any:
    """A loop over every other number from begin to end, where there are two warpgroups."""
    count = lax.div(jnp.maximum(end - begin - wg, 0) + (plan.warpgroups - 1), plan.warpgroups)
    return lax.fori_loop(
        0, count, lambda i, state: body(begin + wg + i * plan.warpgroups, state), initial
    )


def _zeros(plan: DerivativePlan, task: CacheTask, name: str) -> tuple[jax.Array, ...]:
    """An accumulator [64, D or Dv] of a gradient, in chunks of the columns stored at once."""
    return blocks.accumulators(plan.width(name), _chunk(plan, task, name))


def _zero_outside(windows_ref: Any, key_ref: Any, first: Any) -> None:
    """Zeros the keys of a block outside every window, before a product contracts over them."""
    hull = tuple(windows_ref[SCALARS, i] for i in (HULL_LOW, HULL_HIGH, SOLID))
    blocks.zero_outside(
        key_ref, first, hull, WGMMA_ROWS, lambda i: (windows_ref[LOW, i], windows_ref[HIGH, i])
    )
