"""Pallas kernels for TPU: `forward_kernel` says how they compute, `layout` what they read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_ragged.lowering.contract import (
    ByOperand,
    ByResult,
    Lowering,
    Operands,
    Residuals,
    Unsupported,
)
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.tpu import backward, block_size, forward_kernel as kernel, work_list
from jax_ragged.lowering.tpu.block_size import VMEM_MOST, Blocks
from jax_ragged.lowering.tpu.call import Call, readings
from jax_ragged.lowering.tpu.chips import Chip, chip_of
from jax_ragged.lowering.tpu.layout import LANES, alike, round_up

MAX_HEAD_DIM = 512
# Mosaic does not broadcast, pack or compile bfloat16 registers of fewer rows.
MIN_BFLOAT16_HEAD_DIM = 5


def _check(
    operation: str,
    query: Any,
    key: Any,
    value: Any,
    params: RaggedAttentionParams,
    device_kind: str | None,
) -> None:
    """Raises Unsupported for a call that the kernels do not take."""
    chip = chip_of(device_kind)
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        advice = "Pass bfloat16 or float32 operands." if query.dtype == jnp.float16 else None
        raise Unsupported(f"Mosaic, the TPU kernel compiler, does not take {query.dtype}", advice)
    if chip.reason is not None:
        raise Unsupported(f"{chip.reason}, and this is {device_kind}")
    largest = max(query.shape[-1], value.shape[-1])
    if largest > MAX_HEAD_DIM:
        raise Unsupported(
            f"its kernels take head dimensions up to {MAX_HEAD_DIM}, and this is {largest}"
        )

    least = min(query.shape[-1], value.shape[-1])
    if query.dtype == jnp.bfloat16 and least < MIN_BFLOAT16_HEAD_DIM:
        raise Unsupported(
            f"its kernels take head dimensions from {MIN_BFLOAT16_HEAD_DIM} on in bfloat16, and "
            f"this is {least}"
        )

    def refused(block_size: int | None) -> str | None:
        asked = dataclasses.replace(params, block_size=block_size)
        chosen = (
            _choose(query, key, value, chip, asked)
            if operation == "forward"
            else backward.choose(query, key, value, asked, chip)
        )
        return chosen if isinstance(chosen, str) else None

    reason = refused(params.block_size)
    if reason is not None:
        advice = None
        if params.block_size is not None and refused(None) is None:
            nearest = _nearest(params.block_size, key.shape[1], lambda n: refused(n) is None)
            sizes = " or ".join(map(str, nearest))
            advice = f"Pass block_size={sizes}, or None to let the lowering choose."
        raise Unsupported(reason, advice)


def _nearest(size: int, S: int, works: Callable[[int], bool]) -> list[int]:
    """The next smaller and the next larger block size that work, of multiples of powers of two."""
    multiples = [2**i for i in range(LANES.bit_length())]
    while multiples[-1] < S:
        multiples.append(2 * multiples[-1])
    sizes = sorted({n for m in multiples for n in (size // m * m, round_up(size, m))} - {0})
    working = [n for n in sizes if works(n)]
    below = [n for n in working if n < size][-1:]
    return below + [n for n in working if n > size][:1]


def step_bytes(
    query: Any, key: Any, value: Any, params: RaggedAttentionParams, device_kind: str | None
) -> int:
    """Bytes of the cache that one grid step of the forward kernel reads, for benchmarks."""
    chosen = _choose(query, key, value, chip_of(device_kind), params)
    if isinstance(chosen, str):
        raise NotImplementedError(f"ragged_attention: {chosen}.")
    call, blocks = chosen
    return call.problem.cache_bytes(blocks.T)


def _calls(query: Any, key: Any, value: Any) -> tuple[Call, ...]:
    """The readings of the forward kernel, whose keys and values have the same columns."""
    calls = readings(query, key, value)
    if alike(calls[0].key, calls[0].value):
        return calls
    return (Call(query, key, value, by_head=True),)


def _choose(
    query: Any, key: Any, value: Any, chip: Chip, params: RaggedAttentionParams
) -> tuple[Call, Blocks] | str:
    """How the forward kernel reads the cache, with the least compute, or why it cannot."""
    chosen = [
        (call, block_size.choose(call.problem, chip, params.block_size, VMEM_MOST))
        for call in _calls(query, key, value)
    ]
    possible = [(call, blocks) for call, blocks in chosen if not isinstance(blocks, str)]
    if not possible:
        return str(chosen[0][1])
    return min(possible, key=lambda x: block_size.compute_cycles(x[0].problem, chip))


class _TPU(Lowering):
    """The kernels of `forward_kernel` and `derivative_kernels`."""

    def forward(
        self, operands: Operands, params: RaggedAttentionParams, device_kind: str | None
    ) -> ByResult[jax.Array]:
        query, key, value, lengths, starts, *_ = operands
        _check("forward", query, key, value, params, device_kind)
        chip = chip_of(device_kind)
        chosen = _choose(query, key, value, chip, params)
        if isinstance(chosen, str):
            raise Unsupported(chosen)
        call, blocks = chosen
        plan = call.plan(blocks, chip, params)
        lo = call.tile_windows(jnp.maximum(starts, 0))
        hi = call.tile_windows(jnp.minimum(lengths, key.shape[1]))
        work = work_list.WorkList.of(lo, hi, blocks.T, -(-call.S // blocks.T), plan.cores)
        results = kernel.call(
            plan,
            work,
            jnp.stack([call.window_rows(x)[:, : plan.P] for x in (lo, hi)], axis=1),
            call.to_rows(query),
            call.key.view(call.pad_cache(key)),
            call.value.view(call.pad_cache(value)),
            name="ragged_attention_mha" if call.G == 1 else "ragged_attention_gqa",
        )
        out, max_logit, denominator = work_list.complete(results, work, params.mask_value)
        return ByResult(
            call.from_rows(out),
            call.from_rows(max_logit[..., None])[..., 0],
            call.from_rows(denominator[..., None])[..., 0],
        )

    def jvp(
        self,
        residuals: Residuals,
        tangents: ByOperand[jax.Array | None],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByResult[jax.Array]:
        problem = _derivative("jvp", residuals, params, device_kind)
        return ByResult(*backward.jvp(problem, residuals, tangents))

    def vjp(
        self,
        residuals: Residuals,
        cotangents: ByResult[jax.Array | None],
        wrt: ByOperand[Any],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByOperand[jax.Array | None]:
        problem = _derivative("vjp", residuals, params, device_kind)
        return ByOperand(*backward.vjp(problem, residuals, cotangents, wrt))


def _derivative(
    operation: str, residuals: Residuals, params: RaggedAttentionParams, device_kind: str | None
) -> backward.Problem:
    _check(operation, *residuals[:3], params, device_kind)
    problem = backward.choose(*residuals[:3], params, chip_of(device_kind))
    if isinstance(problem, str):
        raise Unsupported(problem)
    return problem


LOWERING = _TPU()
