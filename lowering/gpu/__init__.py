"""Ragged attention on Hopper GPUs: Pallas Mosaic GPU kernels that read only the windows.

Two schedules share the same parts. For few queries, reading the cache is the limit: `line` splits
the cache evenly among all multiprocessors, however long its rows are, and merges what the parts
leave. For many queries, the matrix products are the limit: `teams` gives each multiprocessor
tiles of queries that share the blocks they read, and needs no merging.

    line   plan, schedule (who reads which blocks), attend (the kernel), merge (the second one)
    teams  team_plan (who computes which queries), teams (the kernel)
    both   call (what each plan knows of a call), launch (refs by name), forms (where the cache's
           positions lie in memory), softmax (the streaming softmax in registers)

Positions are counted in the cache with its rows joined: a block starts at a multiple of 8, as the
copy engine's tiles do, which the start of a row need not be. Positions of a block outside of the
windows are masked; positions past the end of the array arrive as 0.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from jax_ragged.lowering.cache import positions, positions_axis, vjp_by_dense
from jax_ragged.lowering.contract import (
    ByOperand,
    ByResult,
    Lowering,
    Operands,
    Residuals,
    Unsupported,
)
from jax_ragged.lowering.gpu import derivatives
from jax_ragged.lowering.gpu.line import attend_along_line
from jax_ragged.lowering.gpu.plan import COPIED, make_plan
from jax_ragged.lowering.gpu.team_plan import make_team_plan
from jax_ragged.lowering.gpu.teams import attend_in_teams
from jax_ragged.lowering.params import RaggedAttentionParams

# The unit of head dimensions, and their limit: what registers and shared memory hold.
_HEAD_DIM_UNIT, _MOST_HEAD_DIM = 16, 256
_NARROW_UNIT = 32
# The block size of the schedule for few queries.
_BLOCK_SIZE = 64
# What int32 holds, with room for a block past the end.
_MOST_POSITIONS = 2**31 - 1024
# Devices of compute capability 9.0, as JAX names their kind.
_HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")


def _check(
    operands: Operands | Residuals, params: RaggedAttentionParams, device_kind: str | None
) -> None:
    """Raises Unsupported for a call that no kernel takes."""
    query, key, value = operands[:3]
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
    for name, x in (("query and key", key), ("value", value)):
        if x.shape[3] % _HEAD_DIM_UNIT or x.shape[3] > _MOST_HEAD_DIM:
            raise Unsupported(
                f"its kernel takes head dimensions that are multiples of {_HEAD_DIM_UNIT} up to "
                f"{_MOST_HEAD_DIM}, and that of {name} is {x.shape[3]}"
            )
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype and x.shape[3] % _NARROW_UNIT:
            raise Unsupported(
                f"its kernel takes quantised caches with head dimensions that are multiples of "
                f"{_NARROW_UNIT}, and that of {name} is {x.shape[3]}"
            )
    page_size = key.shape[positions_axis(params)]
    if params.paged and page_size % COPIED:
        raise Unsupported(
            f"its kernel takes pages that are multiples of {COPIED} positions, and these have "
            f"{page_size}",
            f"Allocate pages of a multiple of {COPIED} positions.",
        )
    for name, count in (
        ("B * S", query.shape[0] * positions(operands, params)),
        ("P * T", key.shape[0] * page_size),
    ):
        if count > _MOST_POSITIONS:
            raise Unsupported(
                f"its kernel counts up to {_MOST_POSITIONS} positions, and {name} is {count}"
            )


def _check_derivative(
    residuals: Residuals,
    params: RaggedAttentionParams,
    device_kind: str | None,
    of_query: bool = False,
) -> None:
    """Raises Unsupported for derivatives that no kernel takes; `of_query`: of query alone."""
    _check(residuals, params, device_kind)
    own = residuals.query.dtype
    for name, x in (("key", residuals.key), ("value", residuals.value)):
        if x.dtype != own and not of_query:
            raise Unsupported(
                "its kernels for derivatives other than the gradient of query alone take caches "
                f"in the dtype of query, and {name} is {x.dtype}"
            )
    # Cotangents of logits times scales may be too small for float16.
    if own != jnp.bfloat16 and residuals.key_scale is not None:
        raise Unsupported(
            "its kernel for the gradient of query takes keys with scales beside a query in "
            f"bfloat16, and this is {own}"
        )


class _GPU(Lowering):
    """The Hopper kernels of the forward and of `derivatives`.

    They read every form of cache in place, with two exceptions: for gradients of key or value,
    pages and heads-first caches are made dense; and derivatives of quantised caches have a kernel
    for the gradient of query only, in a call that asks for no other.
    """

    dense_only = False

    def forward(
        self, operands: Operands, params: RaggedAttentionParams, device_kind: str | None
    ) -> ByResult[jax.Array]:
        _check(operands, params, device_kind)
        # The kernels write what their arithmetic gives: 16 bits, or float32 for wider results.
        asked = params.result_dtype(operands.query.dtype)
        out_dtype = asked if asked.itemsize == 2 else jnp.dtype(jnp.float32)
        teams = make_team_plan(operands, params, out_dtype)
        if teams is None and params.block_size not in (None, _BLOCK_SIZE):
            raise Unsupported(
                f"its kernel for few queries reads blocks of {_BLOCK_SIZE} positions, and "
                f"block_size is {params.block_size}",
                f"Pass block_size={_BLOCK_SIZE}, or None to let the lowering choose.",
            )
        if teams is not None:
            results = attend_in_teams(teams, operands)
        else:
            results = attend_along_line(make_plan(operands, params, out_dtype), operands)
        out, max_logits, denominator = results
        return ByResult(out.astype(asked), max_logits, denominator)

    def jvp(
        self,
        residuals: Residuals,
        tangents: ByOperand[jax.Array | None],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByResult[jax.Array]:
        _check_derivative(residuals, params, device_kind)
        return derivatives.jvp(derivatives.plan_of(residuals, params), residuals, tangents)

    def vjp(
        self,
        residuals: Residuals,
        cotangents: ByResult[jax.Array | None],
        wrt: ByOperand[Any],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByOperand[jax.Array | None]:
        of_cache = any(dtype is not None for dtype in wrt[1:])
        _check_derivative(residuals, params, device_kind, of_query=not of_cache)
        if not of_cache:
            plan = derivatives.plan_of(residuals, params)
            return derivatives.vjp(plan, residuals, cotangents, wrt)
        own = residuals.query.dtype

        def vjp(dense: Residuals, bars: Any, wrt: Any, params: Any) -> ByOperand[Any]:
            # A dense cache that was made of another form is wider than the kernels multiply.
            cast = {name: getattr(dense, name).astype(own) for name in ("query", "key", "value")}
            dense = dense._replace(**cast)
            return derivatives.vjp(derivatives.plan_of(dense, params), dense, bars, wrt)

        return vjp_by_dense(vjp, residuals, cotangents, wrt, params)


LOWERING = _GPU()
