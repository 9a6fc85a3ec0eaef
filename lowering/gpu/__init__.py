"""Ragged attention on Hopper GPUs: a Pallas Mosaic GPU kernel that reads only the windows.

A tile is what one row b of the cache has to do for one column: for a KV head h and up to 64 of
the queries and query heads (q, g) that share it, padded to the 64 rows of a wgmma. A tile's
window is the hull of its queries' windows, cut into blocks of T positions. The blocks of all
rows stand in one line, which is cut in a fixed number of parts of equal length, each with a
stream for every column: so few long rows fill the chip, and many short ones are balanced. A
stream is a warpgroup that copies and one that computes; a CTA has one or two. The streams of one
part read neighbouring heads of the same positions at the same time, which the memory likes. A
part falls into segments, one a row, and a segment gives partial results, unnormalised:

    m = max z_t        l = sum exp(z_t - m)        a = sum exp(z_t - m) v_t

A second kernel merges the partials of each tile in the order of its blocks. Logits are kept in
units of log 2.

Positions are counted in the cache with its rows joined, [B * S, Hkv, D]: a block starts at a
multiple of 8, as the copy engine's tiles do, which the start of a row need not be. What a block
holds outside of the windows is masked; what lies past the end of the array arrives as 0.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering.contract import ByResult, Lowering, Operands, Unsupported
from jax_ragged.lowering.gpu.attend import attend, scratch
from jax_ragged.lowering.gpu.merge import merge, rows_together
from jax_ragged.lowering.gpu.plan import SWIZZLE_ROWS, Plan, make_plan
from jax_ragged.lowering.gpu.schedule import count_blocks, schedule
from jax_ragged.lowering.params import RaggedAttentionParams

_HEAD_DIMS = (64, 128, 256)
_BLOCK_SIZE = 64
# What int32 holds, with room for a block past the end.
_MOST_POSITIONS = 2**31 - 1024
# Devices of compute capability 9.0, as JAX names their kind.
_HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")


def _check(
    query: Any, key: Any, value: Any, params: RaggedAttentionParams, device_kind: str | None
) -> None:
    """Raises Unsupported for a call that the kernel does not take."""
    if device_kind == "cpu":
        device_kind = None  # lowered on a CPU host, for a GPU to come
    if device_kind is None and params.implementation != "kernel":
        raise Unsupported("its kernel runs on Hopper GPUs only, and the device is not known")
    if device_kind is not None and not _HOPPER.search(device_kind):
        raise Unsupported(
            f"its kernel runs on Hopper GPUs (compute capability 9.0), and this is {device_kind}"
        )
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"its kernel takes bfloat16 and float16, and this is {query.dtype}")
    D, Dv = key.shape[3], value.shape[3]
    if D not in _HEAD_DIMS or Dv not in _HEAD_DIMS:
        raise Unsupported(
            f"its kernel takes head dimensions of {_HEAD_DIMS}, and these are {D} and {Dv}"
        )
    positions = key.shape[0] * key.shape[1]
    if positions % SWIZZLE_ROWS:
        raise Unsupported(
            f"B * S must be a multiple of {SWIZZLE_ROWS} for its kernel, and is {positions}"
        )
    if positions > _MOST_POSITIONS:
        raise Unsupported(
            f"its kernel counts up to {_MOST_POSITIONS} positions, and B * S is {positions}"
        )
    if params.block_size not in (None, _BLOCK_SIZE):
        raise Unsupported(
            f"its kernel reads blocks of {_BLOCK_SIZE} positions, and block_size is "
            f"{params.block_size}",
            f"Pass block_size={_BLOCK_SIZE}, or None to let the lowering choose.",
        )


def _query_tiles(plan: Plan, query: jax.Array) -> jax.Array:
    """[B, Q, Hq, D] to [B, columns, rows, D]; a bitcast for one query a row of up to 8 heads."""
    x = query.reshape(plan.B, plan.Q, plan.Hkv, plan.G, plan.D).transpose(0, 2, 1, 3, 4)
    x = x.reshape(plan.B, plan.Hkv, plan.rows, plan.D)
    if plan.rows > SWIZZLE_ROWS:
        padded = plan.row_tiles * plan.tile_rows
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - plan.rows), (0, 0)))
    return x.reshape(plan.B, plan.columns, -1, plan.D)


def run(
    plan: Plan,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    bounds, windows = schedule(plan, lengths, starts)
    scanned = plan.tables_in_shared_memory
    blocks = () if scanned else (count_blocks(plan, bounds),)
    statistics = jax.ShapeDtypeStruct((plan.partials, plan.tile_rows), jnp.float32)
    accumulators = (plan.partials, plan.tile_rows, plan.accumulator_columns)
    table = jax.ShapeDtypeStruct((plan.lines, plan.line_size), jnp.int32)
    results = plgpu.kernel(
        functools.partial(attend, plan),
        out_type=[
            jax.ShapeDtypeStruct(accumulators, jnp.float32),
            statistics,
            statistics,
            *([table] if scanned else []),
        ],
        scratch_types=scratch(plan),
        grid=(plan.ctas,),
        grid_names=("cta",),
        num_threads=2 * plan.streams,
        thread_name="wg",
        kernel_name="ragged_attention",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )(
        *bounds,
        *blocks,
        *windows,
        _query_tiles(plan, query),
        key.reshape(plan.B * plan.S, plan.Hkv, plan.D),
        value.reshape(plan.B * plan.S, plan.Hkv, plan.Dv),
    )
    partials, blocks = results[:3], blocks or results[3:]
    rows = plan.B * plan.Q * plan.Hq
    row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    out, max_logits, denominator = plgpu.kernel(
        functools.partial(merge, plan),
        out_type=[
            jax.ShapeDtypeStruct((rows, plan.accumulator_columns), plan.dtype),
            row,
            row,
        ],
        grid=(rows // rows_together(plan),),
        grid_names=("rows",),
        kernel_name="ragged_attention_merge",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )(*bounds, *blocks, *partials)
    out = out[:, : plan.Dv].reshape(plan.B, plan.Q, plan.Hq, plan.Dv)
    return (
        out,
        max_logits.reshape(plan.B, plan.Q, plan.Hq),
        denominator.reshape(plan.B, plan.Q, plan.Hq),
    )


class _GPU(Lowering):
    """The Hopper kernel of the forward."""

    def forward(
        self, operands: Operands, params: RaggedAttentionParams, device_kind: str | None
    ) -> ByResult[jax.Array]:
        query, key, value, lengths, starts, *_ = operands
        _check(query, key, value, params, device_kind)
        plan = make_plan(query, key, value, params)
        out, max_logits, denominator = run(plan, query, key, value, lengths, starts)
        return ByResult(out.astype(params.result_dtype(query.dtype)), max_logits, denominator)


LOWERING = _GPU()
