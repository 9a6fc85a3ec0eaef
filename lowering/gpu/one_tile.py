"""The derivative kernel for few query rows: all gradients from one pass over the cache.

Where one tile holds every query row of a key head, as in decode, the gradients of the keys and
values of a block are complete once that tile has seen it. So a CTA has a stretch of a row's
blocks, each of which it reads once and whose gradients it writes once:

    one warpgroup copies        the tile's operands, once
                                key [64, D] and value [64, Dv] of each block inside the hull
    two warpgroups compute      each every other block; zeros go to the blocks outside the hull

With the logits transposed as in `cache_kernels`, s_bar goes to shared memory besides, for

    query_bar += s_bar.T key

which the caller adds over warpgroups and stretches.
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
from jax_ragged.lowering.gpu.derivative_plan import (
    HIGH,
    HULL_HIGH,
    HULL_LOW,
    LOW,
    SCALARS,
    SOLID,
    DerivativePlan,
)
from jax_ragged.lowering.gpu.plan import WGMMA_ROWS

_BLOCK = WGMMA_ROWS
_SHARED_MEMORY = 220 * 1024


def run(
    plan: DerivativePlan,
    task: CacheTask,
    windows: jax.Array,
    operands: Mapping[str, jax.Array],
    interpret: Any = None,
) -> dict[str, jax.Array]:
    """The gradients that the task asks for, by name; as `cache_kernels.run` for one tile.

    That of query is float32 and partial, [partials, B, R, H, D].
    """
    inputs = task.inputs(windows, operands)
    results = {
        name: jax.ShapeDtypeStruct(operands[name].shape, dtype)
        for name, dtype in task.results.items()
    }
    if task.query is not None:
        shape = (plan.partials, plan.B, plan.R, plan.H, plan.D)
        results["query"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    names = (*inputs, *(f"{name}_bar" for name in results))
    outputs = plgpu.kernel(
        lambda *refs, **scratch: _kernel(
            plan, task, dict(zip(names, refs, strict=True)), **scratch
        ),
        out_type=list(results.values()),
        scratch_types=_scratch(plan, task),
        grid=(plan.stretches * plan.B * plan.H,),
        grid_names=("cta",),
        num_threads=plan.warpgroups + 1,
        thread_name="wg",
        kernel_name="ragged_attention_all_cotangents",
        compiler_params=blocks.COMPILER_PARAMS,
        interpret=interpret,
    )(*inputs.values())
    return dict(zip(results, outputs, strict=True))


def _chunk(plan: DerivativePlan, task: CacheTask, name: str) -> int:
    """Columns of a gradient that one product makes and that are stored at once."""
    if name == "query":
        return plan.chunk(plan.D, jnp.float32)
    return plan.chunk(plan.D if name == "key" else plan.Dv, task.results[name])


def _used(plan: DerivativePlan, task: CacheTask) -> tuple[int, int]:
    """Bytes of shared memory: of what a CTA keeps, and of one stage."""
    row = (plan.D + plan.Dv) * plan.dtype.itemsize
    staged = sum(
        _chunk(plan, task, name) * jnp.dtype(dtype).itemsize for name, dtype in task.results.items()
    )
    if task.query is not None:
        staged += WGMMA_ROWS * plan.dtype.itemsize + _chunk(plan, task, "query") * 4
    return WGMMA_ROWS * (row + plan.warpgroups * staged), _BLOCK * row


def _stages(plan: DerivativePlan, task: CacheTask) -> int:
    """Blocks in flight."""
    kept, stage = _used(plan, task)
    stages = min((_SHARED_MEMORY - kept) // stage, 6)
    # Each stage is always the same warpgroup's: both count its phases.
    return int(stages // plan.warpgroups * plan.warpgroups)


def _scratch(plan: DerivativePlan, task: CacheTask) -> dict[str, Any]:
    stages, wgs = _stages(plan, task), plan.warpgroups
    scratch = {
        "query": blocks.swizzled((WGMMA_ROWS, plan.D), plan.dtype),
        "out_bar": blocks.swizzled((WGMMA_ROWS, plan.Dv), plan.dtype),
        "windows": plgpu.SMEM((3, WGMMA_ROWS), jnp.int32),
        **task.scratch_of_statistics(),
        "tile_full": plgpu.Barrier(num_arrivals=len(task.tile)),
        "key": blocks.swizzled((stages, _BLOCK, plan.D), plan.dtype),
        "value": blocks.swizzled((stages, _BLOCK, plan.Dv), plan.dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": plgpu.Barrier(num_barriers=stages),
    }
    for name, dtype in task.results.items():
        shape = (wgs, _BLOCK, _chunk(plan, task, name))
        scratch[f"{name}_staging"] = blocks.swizzled(shape, dtype)
    if task.query is not None:
        scratch["logit_bar"] = blocks.swizzled((wgs, _BLOCK, WGMMA_ROWS), plan.dtype, like=plan.D)
        shape = (wgs, WGMMA_ROWS, _chunk(plan, task, "query"))
        scratch["query_staging"] = blocks.swizzled(shape, jnp.float32)
    return scratch


class _Stretch:
    """What a CTA has to do.

    Attributes:
      b, head: the row of the cache and its head.
      stretch: the number of the stretch.
      begin, end: its blocks.
      first, last: of them, those inside the hull.
    """

    def __init__(self, plan: DerivativePlan, windows_ref: Any, cta: Any) -> None:
        cta, self.head = lax.div(cta, plan.H), lax.rem(cta, plan.H)
        self.b, self.stretch = lax.div(cta, plan.stretches), lax.rem(cta, plan.stretches)
        low, high = (windows_ref[self.b, 0, SCALARS, i] for i in (HULL_LOW, HULL_HIGH))
        self.begin = self.stretch * plan.stretch
        self.end = jnp.minimum(self.begin + plan.stretch, -(-plan.S // _BLOCK))
        self.first = jnp.clip(lax.div(low, _BLOCK), self.begin, self.end)
        self.last = jnp.clip(lax.div(high + (_BLOCK - 1), _BLOCK), self.first, self.end)


def _kernel(plan: DerivativePlan, task: CacheTask, refs: Mapping[str, Any], **scratch: Any) -> None:
    work = _Stretch(plan, refs["windows"], lax.axis_index("cta"))
    wg = lax.axis_index("wg")

    @pl.when(wg == plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        pl.when(work.last > work.first)(functools.partial(_copy, plan, task, refs, work, scratch))

    @pl.when(wg < plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        _compute(plan, task, refs, work, wg, scratch)


def _rows(block: Any) -> Any:
    return pl.ds(pl.multiple_of(block * _BLOCK, _BLOCK), _BLOCK)


def _rows_of_tile(work: _Stretch) -> Any:
    """The first 64 query rows, more than the array may have: the copy engine skips the rest.

    The first is 0, but not known to be, else the size would be checked while tracing.
    """
    return pl.ds(pl.multiple_of(jnp.minimum(work.stretch, 0), WGMMA_ROWS), WGMMA_ROWS)


def _copy(
    plan: DerivativePlan,
    task: CacheTask,
    refs: Mapping[str, Any],
    work: _Stretch,
    scratch: Mapping[str, Any],
) -> None:
    """Starts the copies of the tile and then of the blocks."""
    rows = _rows_of_tile(work)
    places = {
        "query": (work.b, rows, work.head),
        "out_bar": (work.b, rows, work.head),
        "windows": (work.b, 0),
    }
    for name in task.tile:
        source = refs[name].at[places.get(name, (work.b, work.head, 0))]
        plgpu.copy_gmem_to_smem(source, scratch[name], scratch["tile_full"])

    def start(i: Any, slot: Any) -> None:
        for name in ("key", "value"):
            source = refs[name].at[work.b, _rows(work.first + i), work.head]
            plgpu.copy_gmem_to_smem(source, scratch[name].at[slot], scratch["full"].at[slot])

    blocks.copy_ahead(work.last - work.first, _stages(plan, task), [scratch["free"]], start)


def _compute(
    plan: DerivativePlan,
    task: CacheTask,
    refs: Mapping[str, Any],
    work: _Stretch,
    wg: Any,
    scratch: Mapping[str, Any],
) -> None:
    stages = _stages(plan, task)
    tile = {name: scratch[name] for name in task.tile}
    dealt = functools.partial(_dealt, plan, wg)
    pl.when(work.last > work.first)(lambda: plgpu.barrier_wait(scratch["tile_full"]))

    def store(block: Any, name: str, chunks: tuple[jax.Array, ...]) -> None:
        ref = refs[f"{name}_bar"].at[work.b, _rows(block), work.head]
        blocks.store(scratch[f"{name}_staging"].at[wg], chunks, ref)

    def step(i: Any, query_bar: Any) -> Any:
        slot = lax.rem(i, stages)
        block = work.first + i
        plgpu.barrier_wait(scratch["full"].at[slot])
        key, value = (scratch[name].at[slot] for name in ("key", "value"))
        left = cache_kernels.weights(plan, task, key, value, tile, block * _BLOCK)
        if task.query is not None:
            logit_bar = scratch["logit_bar"].at[wg]
            logit_bar[...] = left["key"]
            plgpu.commit_smem()
            _zero_outside(tile["windows"], key, block * _BLOCK)
            term = (query_bar, logit_bar.transpose((1, 0)), key)
            (query_bar,) = blocks.accumulate(term)
        plgpu.barrier_arrive(scratch["free"].at[slot])
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
        ref = refs["query_bar"].at[partial, work.b, _rows_of_tile(work), work.head]
        chunks = tuple(x * plan.params.softmax_scale for x in query_bar)
        blocks.store(scratch["query_staging"].at[wg], chunks, ref)
    plgpu.wait_smem_to_gmem(0)


def _dealt(plan: DerivativePlan, wg: Any, begin: Any, end: Any, body: Any, initial: Any) -> Any:
    """A loop over every other number from begin to end, where there are two warpgroups."""
    count = lax.div(jnp.maximum(end - begin - wg, 0) + (plan.warpgroups - 1), plan.warpgroups)
    return lax.fori_loop(
        0, count, lambda i, state: body(begin + wg + i * plan.warpgroups, state), initial
    )


def _zeros(plan: DerivativePlan, task: CacheTask, name: str) -> tuple[jax.Array, ...]:
    """An accumulator [64, D or Dv] of a gradient, in chunks of the columns stored at once."""
    columns = plan.Dv if name == "value" else plan.D
    return blocks.accumulators(columns, _chunk(plan, task, name))


def _zero_outside(windows_ref: Any, key_ref: Any, first: Any) -> None:
    """Zeros the keys of a block outside every window, before a product contracts over them."""
    hull = tuple(windows_ref[SCALARS, i] for i in (HULL_LOW, HULL_HIGH, SOLID))
    blocks.zero_outside(
        key_ref, first, hull, WGMMA_ROWS, lambda i: (windows_ref[LOW, i], windows_ref[HIGH, i])
    )
