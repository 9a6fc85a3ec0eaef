"""The TPU lowering: Pallas kernels that read the cache in place, in the order XLA keeps it.

A call passes through these modules, in this order:

    choice    sizes, the reading of the cache and the blocks, by the model in `cost` (`chips`)
    launch    grid, operands and results of one kernel; `grid` says which step does which block
    forward, tangents, cotangents, maximum    the kernels, each beside its call
    logits, chunks    the logits of a chunk; loads, masks and products, in the orders of `layout`

Every kernel walks tiles: the queries of one row of the cache that a step computes together.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_ragged.lowering.cache import is_dense, jvp_by_dense, vjp_by_dense
from jax_ragged.lowering.contract import (
    ByOperand,
    ByResult,
    Lowering,
    Operands,
    Residuals,
    Unsupported,
)
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.tpu import (
    cotangents as vjp_kernel,
    forward as forward_kernel,
    tangents as jvp_kernel,
)
from jax_ragged.lowering.tpu.chips import Chip, chip_of

MAX_HEAD_DIM = 512
# Mosaic does not broadcast, pack or compile bfloat16 registers of fewer rows.
MIN_BFLOAT16_HEAD_DIM = 5


def _checked(operands: Operands | Residuals, device_kind: str | None) -> Chip:
    """The chip; raises Unsupported for a call that no kernel takes, whatever the blocks."""
    query, value = operands.query, operands.value
    chip = chip_of(device_kind)
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        advice = "Pass bfloat16 or float32 operands." if query.dtype == jnp.float16 else None
        raise Unsupported(f"Mosaic, the TPU kernel compiler, does not take {query.dtype}", advice)
    if chip.reason is not None:
        raise Unsupported(f"{chip.reason}, and this is {device_kind}")
    largest, least = (f(query.shape[-1], value.shape[-1]) for f in (max, min))
    if largest > MAX_HEAD_DIM:
        raise Unsupported(
            f"its kernels take head dimensions up to {MAX_HEAD_DIM}, and this is {largest}"
        )
    if query.dtype == jnp.bfloat16 and least < MIN_BFLOAT16_HEAD_DIM:
        raise Unsupported(
            f"its kernels take head dimensions from {MIN_BFLOAT16_HEAD_DIM} on in bfloat16, and "
            f"this is {least}"
        )
    return chip


class _TPU(Lowering):
    """The kernels of `forward`, `tangents`, and `cotangents` with `maximum`.

    They take every form of cache. Gradients of pools, of quantised caches and of scales go through
    the dense cache.
    """

    dense_only = False

    def forward(
        self, operands: Operands, params: RaggedAttentionParams, device_kind: str | None
    ) -> ByResult[jax.Array]:
        return forward_kernel.forward(operands, params, _checked(operands, device_kind))

    def jvp(
        self,
        residuals: Residuals,
        tangents: ByOperand[jax.Array | None],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByResult[jax.Array]:
        chip = _checked(residuals, device_kind)
        jvp = functools.partial(jvp_kernel.jvp, chip=chip)
        if tangents.key_scale is not None or tangents.value_scale is not None:
            return jvp_by_dense(jvp, residuals, tangents, params)
        return jvp(residuals, tangents, params)

    def vjp(
        self,
        residuals: Residuals,
        cotangents: ByResult[jax.Array | None],
        wrt: ByOperand[Any],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByOperand[jax.Array | None]:
        chip = _checked(residuals, device_kind)
        vjp = functools.partial(vjp_kernel.vjp, chip=chip)
        of_cache = any(dtype is not None for dtype in wrt[1:])
        if of_cache and not is_dense(residuals, dataclasses.replace(params, cache_layout="BSHD")):
            return vjp_by_dense(vjp, residuals, cotangents, wrt, params)
        return vjp(residuals, cotangents, wrt, params)


LOWERING = _TPU()
