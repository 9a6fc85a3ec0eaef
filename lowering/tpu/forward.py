"""The forward kernel: streaming softmax over the blocks that a tile's windows touch.

A step reads a block of T positions of keys and values, and walks it in chunks. For a chunk of which
p are the weights and v the values, with z the logits over `KernelPlan.unit` (`logits`), -inf
outside of a window, and m, l, o the statistics so far:

    m_new = max(m, max z)       r = exp(m - m_new)          p = exp(z - m_new)
    l_new = r l + sum p         o_new = r o + p v

         query [R, D]     block of keys        chunk 0 | chunk 1 | ...     block of values
              |                 |              z [C, 128] slices              |
              +---- products ---+----------> m, l [C, 128] -> p -> weights ---+--> o [R, Dv]

In the form TOKENS (`layout`) the columns are (token, piece, head): one product multiplies all heads
with all, the rows of other heads are masked, and their weights are 0. The matrix unit does this
idle work while it would wait for memory; nothing is moved to separate the heads. In the other forms
each head is a product of its own. The idle work grows with the rows, so for many of them the form
TOKENS is read so too, by loads that take the rows of one head.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ragged.lowering.cache import positions
from jax_ragged.lowering.contract import ByResult, Operands
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.tpu.chips import Chip
from jax_ragged.lowering.tpu.choice import (
    LOG2_E,
    Choice,
    KernelPlan,
    Sizes,
    choose,
    readings,
    with_advice,
)
from jax_ragged.lowering.tpu.chunks import (
    CacheBlock,
    Slices,
    WindowMask,
    join_pieces,
    own_head,
    sum_shape,
    to_lanes,
    weighted,
    weights_of,
)
from jax_ragged.lowering.tpu.cost import VMEM_MOST
from jax_ragged.lowering.tpu.grid import Results, Step, complete
from jax_ragged.lowering.tpu.launch import Launch, from_rows
from jax_ragged.lowering.tpu.layout import LANES
from jax_ragged.lowering.tpu.logits import Logits

# The maximum of nothing: finite, so that exp(-inf - LOWEST) is 0 and not NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class ForwardRefs:
    """The refs of the kernel."""

    query: Any  # [1, R, D]
    key: CacheBlock  # a block of keys: `CacheForm.block_shape`
    value: CacheBlock  # a block of values
    out: Any  # [1, R, Dv]
    statistics: Any  # float32 [1, 2, R], max_logits and denominator
    m: Any  # float32 [C, 128], in a lane the maximum of the head of its column
    l: Any  # float32 [C, 128], in a lane the sum of its own columns alone  # noqa: E741
    o: Any  # float32 [R, Dv], or [pieces R, 128]: `sum_shape`
    bounds: Any = None  # int32 [2, C, 128], the windows where queries have their own
    partial: Any = None  # float32 [1, R, Dv], out of the tile that two cores share


def _by_row(plan: KernelPlan, x: jax.Array) -> jax.Array:
    """Statistics by lane, [C, 128], to statistics by query row with equal lanes, [R, 128]."""
    if not plan.compact or plan.key.columns == 1:
        return x
    rows = [
        jnp.where(own_head(plan, plan.key, 0, first, plan.compact_rows), x, LOWEST)
        for first in range(0, plan.rows, plan.compact_rows)
    ]
    return jnp.concatenate(
        [jnp.broadcast_to(r.max(axis=1, keepdims=True), r.shape) for r in rows], axis=0
    )


def _across_lanes(plan: KernelPlan, x: jax.Array, combine: Any, reduce: Any) -> jax.Array:
    """Combines the columns of one head, and gives each of them the result: [C, 128]."""
    if not plan.compact or plan.key.columns == 1:
        return jnp.broadcast_to(reduce(x, axis=1, keepdims=True), x.shape)
    shift = LANES // 2
    while shift >= plan.key.columns:
        x = combine(x, pltpu.roll(x, shift, 1))
        shift //= 2
    return x


def _reset(refs: ForwardRefs) -> None:
    refs.m[...] = jnp.full(refs.m.shape, LOWEST, jnp.float32)
    refs.l[...] = jnp.zeros(refs.l.shape, jnp.float32)
    refs.o[...] = jnp.zeros(refs.o.shape, jnp.float32)


def _update(
    refs: ForwardRefs,
    plan: KernelPlan,
    logits: list[Logits],
    heads: range,
    mask: WindowMask | None,
) -> None:
    """The streaming softmax of some heads over more chunks."""
    rows = plan.rows_of(heads)
    exponent = plan.unit * LOG2_E
    largest = functools.reduce(jnp.maximum, [x for chunk in logits for x in chunk.z])
    m = refs.m[rows]
    m_new = jnp.maximum(m, _across_lanes(plan, largest, jnp.maximum, jnp.max))
    rescale = jnp.exp2((m - m_new) * exponent)
    p: list[Slices] = [chunk.weights(m_new) for chunk in logits]
    refs.m[rows] = m_new
    refs.l[rows] = refs.l[rows] * rescale + functools.reduce(
        jnp.add, [x for slices in p for x in slices]
    )
    by_piece = jnp.concatenate([_by_row(plan, rescale)] * plan.value.stacked, axis=0)
    o = refs.o[rows] * to_lanes(by_piece, refs.o.shape[1])
    for chunk, slices in zip(logits, p, strict=True):
        weights = weights_of(slices, refs.value, plan, chunk.j, mask, heads)
        o += weighted(weights, refs.value, plan, chunk.j, mask, heads)
    refs.o[rows] = o


def _results(refs: ForwardRefs, plan: KernelPlan) -> tuple[jax.Array, jax.Array]:
    """Out [R, Dv], max_logits and denominator [2, R] of a tile's windows, empty ones too."""
    m = _by_row(plan, refs.m[...])
    total = _by_row(plan, _across_lanes(plan, refs.l[...], jnp.add, jnp.sum))
    o = refs.o[...]
    empty = total == 0
    inverse = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, total))
    o = join_pieces(o, plan)
    # The product with the unit rounds m, at a logit of 1e4 by up to 5e-4. The derivatives start
    # from the rounded maximum, so the sum is relative to that, and their weights add up to 1.
    # Selections stand between the products and the difference: else XLA, in interpretation,
    # would fold the factors into one or fuse the last into the difference, without rounding.
    max_logits = jnp.where(empty, 0.0, m * plan.unit)
    if math.frexp(plan.unit)[0] != 0.5:
        shift = m - jnp.where(empty, m, plan.in_units(max_logits))
        total = total * jnp.exp2(shift * (plan.unit * LOG2_E))
    max_logits = jnp.where(empty, plan.params.mask_value, max_logits)
    statistics = jnp.concatenate([max_logits.T[:1], total.T[:1]], axis=0)
    return o * to_lanes(inverse, o.shape[1]), statistics


def _kernel(step: Step, refs: ForwardRefs, plan: KernelPlan) -> None:
    pl.when(step.first)(lambda: _reset(refs))

    def compute(chunks: list[Any], mask: WindowMask | None) -> None:
        # The logits of all heads before any update: one softmax hides under the next products.
        logits = [
            [Logits.of(refs.query[0], refs.key, plan, j, mask, heads) for j in chunks]
            for heads in plan.softmaxes
        ]
        for heads, of_chunks in zip(plan.softmaxes, logits, strict=True):
            _update(refs, plan, of_chunks, heads, mask)

    step.chunks(refs.bounds, compute)

    @pl.when(step.last)
    def _() -> None:
        out, refs.statistics[0] = _results(refs, plan)
        refs.out[0] = out.astype(refs.out.dtype)
        if refs.partial is not None:

            @pl.when(step.tile == step.cut)
            def _() -> None:
                refs.partial[0] = out


def forward_choice(operands: Operands, params: RaggedAttentionParams, chip: Chip) -> Choice:
    """How the forward kernel runs a call, of which only shapes and dtypes matter.

    Raises:
      Unsupported: if it cannot.
    """
    sizes = readings(operands, params, alike_columns=True)
    return choose(sizes, Sizes.work, chip, params, VMEM_MOST)


def forward(operands: Operands, params: RaggedAttentionParams, chip: Chip) -> ByResult[jax.Array]:
    """As `Lowering.forward`."""
    query, key, value = operands[:3]
    choice = with_advice(
        params,
        positions(operands, params),
        lambda asked: forward_choice(operands, asked, chip),
    )
    launch = Launch(choice, operands, ForwardRefs)
    sizes, plan = launch.sizes, launch.plan
    R, Dv = sizes.rows, sizes.Dv
    launch.rows("query", sizes.to_rows(query))
    launch.cache("key", key, sizes.key, operands.key_scale)
    launch.cache("value", value, sizes.value, operands.value_scale)
    launch.by_tile("out", R, Dv, dtype=params.result_dtype(query.dtype))
    launch.by_tile("statistics", 2, R)
    if plan.cores > 1:
        launch.of_core("partial", R, Dv)
    launch.scratch("m", plan.compact_rows, LANES)
    launch.scratch("l", plan.compact_rows, LANES)
    launch.scratch("o", *sum_shape(sizes.value, plan))
    # One kernel for both: a kernel of its own for MHA was not worth its lines.
    found = launch.run(_kernel, "ragged_attention_mha" if sizes.G == 1 else "ragged_attention_gqa")
    statistics = found["statistics"]
    results = Results(found["out"], statistics[:, 0], statistics[:, 1], found.get("partial"))
    out, max_logits, denominator = complete(results, launch.work, params.mask_value)
    return ByResult(
        sizes.from_rows(out), from_rows(sizes, max_logits), from_rows(sizes, denominator)
    )
