"""Pallas kernels for TPU: `forward_kernel` says how they compute, `layout` what they read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.reference import Arrays3, Optional3, Residuals
from jax_ragged.lowering.tpu import backward, block_size, forward_kernel as kernel, work_list
from jax_ragged.lowering.tpu.block_size import VMEM_MOST, Blocks
from jax_ragged.lowering.tpu.call import Call, readings
from jax_ragged.lowering.tpu.chips import Chip, chip_of
from jax_ragged.lowering.tpu.layout import LANES, alike, round_up

# The dispatcher passes device_kind to the operations too.
BY_DEVICE_KIND = True

MAX_HEAD_DIM = 512


def unsupported(
    operation: str,
    query: Any,
    key: Any,
    value: Any,
    params: RaggedAttentionParams,
    device_kind: str | None,
) -> str | None:
    """Why a call is left to the reference, or None.

    Raises:
      NotImplementedError: for a chip, a dtype or a head dimension that no kernel takes, and for a
        block size that alone stands in the way.
    """
    sizes = (*query.shape, *key.shape, *value.shape)
    if not all(isinstance(n, int) for n in sizes):
        return "a Pallas kernel needs static shapes, and these are symbolic"
    if query.dtype == jnp.float64:
        return "Mosaic, the TPU kernel compiler, does not take float64"
    chip = chip_of(device_kind)
    advice = "Pass implementation='reference'."
    if query.dtype == jnp.float16:
        raise NotImplementedError(
            "ragged_attention: Mosaic, the TPU kernel compiler, does not take float16. "
            "Pass bfloat16 or float32 operands, or implementation='reference'."
        )
    if chip.reason is not None:
        raise NotImplementedError(f"ragged_attention: {chip.reason}; got {device_kind}. {advice}")
    largest = max(query.shape[-1], value.shape[-1])
    if largest > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"ragged_attention: the TPU kernels take head dimensions up to {MAX_HEAD_DIM}; "
            f"got {largest}. {advice}"
        )
    if 0 in sizes:
        return "there is nothing to compute"

    def refused(block_size: int | None) -> str | None:
        asked = dataclasses.replace(params, block_size=block_size)
        chosen = (
            _choose(query, key, value, chip, asked)
            if operation == "forward"
            else backward.choose(query, key, value, asked, chip)
        )
        return chosen if isinstance(chosen, str) else None

    reason = refused(params.block_size)
    if reason is not None and params.block_size is not None and refused(None) is None:
        nearest = _nearest(params.block_size, key.shape[1], lambda n: refused(n) is None)
        raise NotImplementedError(
            f"ragged_attention: {reason} on a TPU. Pass block_size="
            f"{' or '.join(map(str, nearest))}, None to let the lowering choose, or "
            "implementation='reference'."
        )
    return reason


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


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    *,
    params: RaggedAttentionParams,
    device_kind: str | None = None,
) -> Arrays3:
    """As `reference.forward`, for what `unsupported` does not refuse."""
    chip = chip_of(device_kind)
    chosen = _choose(query, key, value, chip, params)
    if isinstance(chosen, str):
        raise NotImplementedError(f"ragged_attention: {chosen}. Pass block_size=None.")
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
    return (
        call.from_rows(out),
        call.from_rows(max_logit[..., None])[..., 0],
        call.from_rows(denominator[..., None])[..., 0],
    )


def jvp(
    residuals: Residuals,
    tangents: Optional3,
    *,
    params: RaggedAttentionParams,
    device_kind: str | None = None,
) -> Arrays3:
    """As `reference.jvp`, for what `unsupported` does not refuse."""
    return backward.jvp(_derivative(residuals, params, device_kind), residuals, tangents)


def vjp(
    residuals: Residuals,
    cotangents: Optional3,
    wrt: tuple[bool, bool, bool],
    *,
    params: RaggedAttentionParams,
    device_kind: str | None = None,
) -> Optional3:
    """As `reference.vjp`, for what `unsupported` does not refuse."""
    return backward.vjp(_derivative(residuals, params, device_kind), residuals, cotangents, wrt)


def _derivative(
    residuals: Residuals, params: RaggedAttentionParams, device_kind: str | None
) -> backward.Problem:
    problem = backward.choose(*residuals[:3], params, chip_of(device_kind))
    if isinstance(problem, str):
        raise NotImplementedError(f"ragged_attention: {problem}. Pass block_size=None.")
    return problem
