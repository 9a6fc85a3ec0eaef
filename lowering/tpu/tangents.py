"""The kernel of the tangents, over the blocks that a tile's windows touch.

With z the logits, s = <q, k>, p = exp(z - m), l = sum p and o = sum p v / l, a dot for a tangent:

    s_dot = <q_dot, k> + <q, k_dot>      z_dot = s_dot dz/ds      m_dot = z_dot[t*]
    l o_dot = sum (p z_dot v + p v_dot) - (sum p z_dot) o         l_dot = sum p z_dot - l m_dot

since the derivative of p_t / l is (p_t / l) (z_dot_t - sum_t' p_t' z_dot_t' / l): the maximum
cancels. The kernel has the sums; XLA combines lanes and cores, divides by l and subtracts.

    query, q_dot [R, D]    keys, k_dot (block)    values, v_dot (block)
            |                     |                       |
            +------ products -----+--> p, z_dot [C, 128] -+--> sum [R, Dv], z_sum, m, at, m_dot
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jax_ragged.lowering.cache import positions
from jax_ragged.lowering.contract import ByOperand, ByResult, Residuals
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.tpu.chips import Chip
from jax_ragged.lowering.tpu.choice import (
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
    products,
    sum_shape,
    weighted,
    weights_of,
)
from jax_ragged.lowering.tpu.cost import DERIVATIVE_BYTES, Work
from jax_ragged.lowering.tpu.grid import Step
from jax_ragged.lowering.tpu.launch import Launch, Saved, from_rows, lanes_by_row
from jax_ragged.lowering.tpu.logits import Logits, where_any
from jax_ragged.lowering.tpu.maximum import RunningMaximum, as_row


@dataclasses.dataclass(frozen=True)
class TangentRefs:
    """The refs of the kernel; results and scratch by lane are as in `MaximumRefs`."""

    m_in: Any  # float32 [1, C, 128], the maxima over KernelPlan.unit
    query: Any  # [1, R, D]
    key: CacheBlock  # a block of keys
    out: Any  # float32 [1, 1, R, Dv], sum p z_dot v + p v_dot
    z_sum: Any  # float32, sum p z_dot
    m: Any  # float32, the maximum
    at: Any  # int32, its position
    m_dot: Any  # float32, its tangent
    sum: Any  # float32 [R, Dv], or [pieces R, 128]: `sum_shape`
    z_sum_lanes: Any  # float32 [C, 128]
    m_lanes: Any  # float32 [C, 128]
    at_lanes: Any  # int32 [C, 128]
    m_dot_lanes: Any  # float32 [C, 128]
    value: CacheBlock | None = None  # a block of values
    query_dot: Any = None  # [1, R, D]
    key_dot: CacheBlock | None = None  # as key
    value_dot: CacheBlock | None = None  # as value
    bounds: Any = None  # int32 [2, C, 128], the windows where queries have their own


def _kernel(step: Step, refs: TangentRefs, plan: KernelPlan) -> None:
    maximum = RunningMaximum(refs.m_lanes, refs.at_lanes, refs.m_dot_lanes)

    @pl.when(step.first)
    def _() -> None:
        maximum.reset()
        for ref in (refs.z_sum_lanes, refs.sum):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def s_dot(j: Any, mask: WindowMask | None) -> Slices:
        terms = []
        if refs.query_dot is not None:
            terms.append(products(refs.query_dot[0], refs.key, plan, j, mask))
        if refs.key_dot is not None:
            terms.append(products(refs.query[0], refs.key_dot, plan, j, mask))
        return [functools.reduce(jnp.add, x) for x in zip(*terms, strict=True)]

    def sum_of(x: Slices, cache: CacheBlock, j: Any, mask: WindowMask | None) -> jax.Array:
        return weighted(weights_of(x, cache, plan, j, mask), cache, plan, j, mask)

    def compute(chunks: list[Any], mask: WindowMask | None) -> None:
        # Each kind of product for all chunks before the next: latencies hide behind each other.
        logits = [Logits.of(refs.query[0], refs.key, plan, j, mask) for j in chunks]
        p = [x.weights(refs.m_in[0]) for x in logits]
        total = refs.sum[...]
        if refs.value is not None:
            z_dot = [
                where_any(y, x.times_dz(s_dot(x.j, mask)), mask)
                for x, y in zip(logits, p, strict=True)
            ]
            pz_dot = [
                [a * b for a, b in zip(x, y, strict=True)] for x, y in zip(p, z_dot, strict=True)
            ]
            refs.z_sum_lanes[...] += functools.reduce(jnp.add, [y for x in pz_dot for y in x])
            maximum.update(logits, step.start, z_dot)
            for j, x in zip(chunks, pz_dot, strict=True):
                total += sum_of(x, refs.value, j, mask)
        if refs.value_dot is not None:
            for j, x in zip(chunks, p, strict=True):
                total += sum_of(x, refs.value_dot, j, mask)
        refs.sum[...] = total

    step.chunks(refs.bounds, compute)

    @pl.when(step.last)
    def _() -> None:
        refs.out[0, 0] = join_pieces(refs.sum[...], plan)
        z_sum = refs.z_sum_lanes[...]
        refs.z_sum[0, 0] = z_sum if plan.compact else as_row(z_sum.sum(axis=1, keepdims=True))
        maximum.finish(plan, refs.m, refs.at, refs.m_dot)


def jvp_work(sizes: Sizes, wrt: tuple[bool, bool, bool]) -> Work:
    """The work of the kernel, if the tangents of (query, key, value) in wrt are given."""
    reads_value = wrt[0] or wrt[1]
    return sizes.work(
        key_arrays=1 + wrt[1],
        value_arrays=reads_value + wrt[2],
        products=1 + sum(wrt) + reads_value,
        least_bytes=DERIVATIVE_BYTES,
    )


def jvp_choice(
    residuals: Residuals, wrt: tuple[bool, bool, bool], params: RaggedAttentionParams, chip: Chip
) -> Choice:
    """How the kernel runs a call, of which only shapes and dtypes matter.

    Raises:
      Unsupported: if it cannot.
    """
    sizes = readings(residuals, params)
    return choose(sizes, lambda x: jvp_work(x, wrt), chip, params)


def jvp(
    residuals: Residuals,
    tangents: ByOperand[jax.Array | None],
    params: RaggedAttentionParams,
    chip: Chip,
) -> ByResult[jax.Array]:
    """As `Lowering.jvp`."""
    query, key, value = residuals[:3]
    wrt = (tangents.query is not None, tangents.key is not None, tangents.value is not None)
    choice = with_advice(
        params,
        positions(residuals, params),
        lambda asked: jvp_choice(residuals, wrt, asked, chip),
    )
    launch = Launch(choice, residuals, TangentRefs)
    sizes, plan, saved = launch.sizes, launch.plan, Saved(residuals)
    launch.lanes("m_in", saved.max_logits(launch))
    launch.rows("query", sizes.to_rows(query))
    launch.cache("key", key, sizes.key, residuals.key_scale)
    if wrt[0] or wrt[1]:
        launch.cache("value", value, sizes.value, residuals.value_scale)
    if tangents.query is not None:
        launch.rows("query_dot", sizes.to_rows(tangents.query))
    if tangents.key is not None:
        launch.cache("key_dot", tangents.key, sizes.key, residuals.key_scale)
    if tangents.value is not None:
        launch.cache("value_dot", tangents.value, sizes.value, residuals.value_scale)
    launch.by_core("out", sizes.rows, sizes.Dv)
    launch.scratch("sum", *sum_shape(sizes.value, plan))
    for name in ("z_sum", "m", "at", "m_dot"):
        launch.lanes_by_core(name, jnp.int32 if name == "at" else jnp.float32)
    found = launch.run(_kernel, "ragged_attention_jvp")

    at, first = launch.first_maximum(found["m"], found["at"])
    z_sum, m_dot = (lanes_by_row(plan, launch.visited(found[x], 0)) for x in ("z_sum", "m_dot"))
    m_dot = from_rows(sizes, jnp.where(at == first[None], m_dot, 0).sum(axis=0))
    z_sum = from_rows(sizes, z_sum.sum(axis=0)) * saved.inverse
    o_sum = sizes.from_rows(launch.visited(found["out"], 0).sum(axis=0))
    o_dot = o_sum * saved.inverse[..., None] - z_sum[..., None] * residuals.out
    l_dot = residuals.denominator * (z_sum - m_dot)
    o_dot = o_dot.astype(params.result_dtype(query.dtype))
    return ByResult(*map(saved.of_windows, (o_dot, m_dot, l_dot)))
