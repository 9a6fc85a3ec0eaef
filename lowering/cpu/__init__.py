"""Ragged attention on CPUs: loops over the blocks that the windows touch, in plain jax.lax."""

from typing import Any

import jax

from jax_ragged.lowering.contract import ByOperand, ByResult, Lowering, Operands, Residuals
from jax_ragged.lowering.cpu.derivatives import jvp, vjp
from jax_ragged.lowering.cpu.forward import forward
from jax_ragged.lowering.params import RaggedAttentionParams

__all__ = ["LOWERING"]


class _CPU(Lowering):
    """It takes every call, and every form of cache."""

    dense_only = False

    def forward(
        self, operands: Operands, params: RaggedAttentionParams, device_kind: str | None
    ) -> ByResult[jax.Array]:
        del device_kind
        return forward(operands, params)

    def jvp(
        self,
        residuals: Residuals,
        tangents: ByOperand[jax.Array | None],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByResult[jax.Array]:
        del device_kind
        return jvp(residuals, tangents, params)

    def vjp(
        self,
        residuals: Residuals,
        cotangents: ByResult[jax.Array | None],
        wrt: ByOperand[Any],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByOperand[jax.Array | None]:
        del device_kind
        return vjp(residuals, cotangents, wrt, params)


LOWERING = _CPU()
