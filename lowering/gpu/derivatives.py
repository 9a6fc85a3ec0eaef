"""The derivatives of ragged attention on Hopper GPUs, from `lowering.reference`'s formulas.

    operation              kernels
    vjp, query             cotangent (row kernel)
    vjp, key and value     cache cotangents (cache kernel), beside that of query; or, where one
                           tile holds all query rows of a key head and S is a multiple of 8, all
                           three from one kernel
    vjp with cotangents of max_logits or denominator: before them peaks (row kernel), for t*
    jvp                    tangents (row kernel)

All recompute the logits, from the forward's max_logits and denominator; none stores anything of
their size, and none adds in an order that differs between runs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ragged.lowering.contract import ByOperand, ByResult, Residuals, Unsupported
from jax_ragged.lowering.gpu import cache_kernels, one_tile, row_kernels
from jax_ragged.lowering.gpu.derivative_plan import (
    DerivativePlan,
    by_tile,
    fold,
    from_tiles,
    log_sum,
    make_plan,
    split_rows,
    unfold,
    windows,
)
from jax_ragged.lowering.params import RaggedAttentionParams

_BLOCK_SIZE = 64


def plan_of(residuals: Residuals, params: RaggedAttentionParams) -> DerivativePlan:
    """The plan of the kernels of a call.

    Raises:
      Unsupported: for a block size that they do not take. The caller has checked the rest.
    """
    if params.block_size not in (None, _BLOCK_SIZE):
        raise Unsupported(
            f"its derivative kernels read blocks of {_BLOCK_SIZE} positions, and block_size is "
            f"{params.block_size}",
            f"Pass block_size={_BLOCK_SIZE}, or None to let the lowering choose.",
        )
    return make_plan(residuals, params)


def vjp(
    plan: DerivativePlan,
    residuals: Residuals,
    cotangents: ByResult[jax.Array | None],
    wrt: ByOperand[Any],
    interpret: Any = None,
) -> ByOperand[jax.Array | None]:
    """As `Lowering.vjp`; the cache is dense if its gradients are asked for."""
    query, _, _, lengths, starts, out, max_logits, denominator, *_ = residuals
    out_bar = cotangents.out
    out_bar = jnp.zeros(out.shape, plan.dtype) if out_bar is None else out_bar.astype(plan.dtype)
    # delta = <o_bar, o> - l_bar l and c = m_bar - l_bar l, with o_bar as the kernels multiply it
    products = out_bar.astype(jnp.float32) * out
    # Tiles of few query rows are padded before the sum, which XLA then computes with the padding.
    # Those of many are summed where they lie.
    delta = (
        by_tile(plan, products).sum(axis=-1)
        if plan.packed
        else by_tile(plan, products.sum(axis=-1))
    )
    at_max_bar = cotangents.max_logits
    if cotangents.denominator is not None:
        shift = cotangents.denominator * denominator
        delta -= by_tile(plan, shift)
        at_max_bar = -shift if at_max_bar is None else at_max_bar - shift
    table = windows(plan, lengths, starts)
    operands = {
        "query": fold(plan, query),
        "out_bar": fold(plan, out_bar),
        "log_sum": by_tile(plan, log_sum(max_logits, denominator), jnp.inf),
        "delta": delta,
        **plan.form.inputs(residuals.operands),
    }
    at_max = at_max_bar is not None
    if at_max_bar is not None:
        operands["at_max_bar"] = by_tile(plan, at_max_bar)
        task = row_kernels.RowTask("peaks", ("query",), ("key",))
        operands["t_star"], _ = _first_peak(row_kernels.run(plan, task, table, operands, interpret))
    of_cache = wrt.key is not None or wrt.value is not None
    bars: dict[str, jax.Array] = {}
    if of_cache and one_tile.takes(plan):
        for each in cache_kernels.tasks(plan, wrt, at_max):
            bars |= one_tile.run(plan, each, table, operands, interpret)
    elif of_cache:
        for each in cache_kernels.tasks(plan, wrt._replace(query=None), at_max):
            bars |= cache_kernels.run(plan, each, table, operands, interpret)
    if wrt.query is not None and "query" not in bars:
        dtype = wrt.query if plan.partials == 1 else jnp.float32
        names = ("query", "out_bar"), ("key", "value")
        task = row_kernels.RowTask("cotangent", *names, at_max=at_max, dtype=dtype)
        bars["query"] = row_kernels.run(plan, task, table, operands, interpret)["result"]
    if "query" in bars:
        parts = bars["query"]
        total = parts[0] if plan.partials == 1 else parts.sum(axis=0)
        bars["query"] = unfold(plan, total).astype(wrt.query)
    for name in ("key", "value"):
        if name in bars:
            bars[name] = split_rows(plan, bars[name])
    return ByOperand(*(bars.get(name) for name in ByOperand._fields))


def _first_peak(results: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """T* and the number of the partial result that has it, [B, H, tiles, 64]."""
    best, t_star = results["statistics"][:, :, :, :, row_kernels.BEST], results["peak"]
    highest = best.max(axis=0)
    first = jnp.where(best == highest, t_star, jnp.iinfo(jnp.int32).max).min(axis=0)
    return first, jnp.argmax((best == highest) & (t_star == first), axis=0)


def jvp(
    plan: DerivativePlan,
    residuals: Residuals,
    tangents: ByOperand[jax.Array | None],
    interpret: Any = None,
) -> ByResult[jax.Array]:
    """As `Lowering.jvp`."""
    query, _, _, lengths, starts, out, max_logits, denominator, *_ = residuals
    queries = {"query": query, "query_dot": tangents.query}
    rows = {name: fold(plan, x) for name, x in queries.items() if x is not None}
    dots = {"key_dot": tangents.key, "value_dot": tangents.value}
    cache = {name: plan.form.array(x) for name, x in dots.items() if x is not None}
    task = row_kernels.RowTask("tangents", tuple(rows), ("key", "value", *cache))
    table = windows(plan, lengths, starts)
    operands = rows | cache | plan.form.inputs(residuals.operands)
    operands["log_sum"] = by_tile(plan, log_sum(max_logits, denominator), jnp.inf)
    results = row_kernels.run(plan, task, table, operands, interpret)
    _, at = _first_peak(results)
    of_rows = jnp.moveaxis(results["statistics"], 4, 0)  # [5, partials, B, H, tiles, 64]
    max_dots = of_rows[row_kernels.Z_DOT_AT_MAX]
    max_dot = jnp.take_along_axis(max_dots, at[None], axis=0)
    # l_dot / l = sum p (z_dot - m_dot), of partial sums with another m_dot each
    moved = (max_dots - max_dot) * of_rows[row_kernels.PROBABILITY]
    centred = (of_rows[row_kernels.CENTRED_SUM] + moved).sum(axis=0)
    rounded = from_tiles(plan, of_rows[row_kernels.ROUNDED_SUM].sum(axis=0))
    # The same weights in both terms: their rounding then multiplies v - o, which is small where
    # one weight is all.
    out_dot = unfold(plan, results["result"].sum(axis=0)) - rounded[..., None] * out
    out_dot = out_dot.astype(plan.params.result_dtype(query.dtype))
    denominator_dot = denominator * from_tiles(plan, centred)
    return ByResult(out_dot, from_tiles(plan, max_dot[0]), denominator_dot)
