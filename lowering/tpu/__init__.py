"""Pallas kernels for TPU: `forward_kernel` says how they compute, `layout` what they read."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.reference import Arrays3, Optional3, Residuals
from jax_ragged.lowering.tpu import backward, block_size, forward_kernel as kernel, work_list
from jax_ragged.lowering.tpu.block_size import Blocks, Problem
from jax_ragged.lowering.tpu.chips import Chip, chip_of
from jax_ragged.lowering.tpu.layout import LANES, SUBLANES, CacheLayout, round_up

# The dispatcher passes device_kind to the operations too.
BY_DEVICE_KIND = True

MAX_HEAD_DIM = 512
# Rows of (head, query) in one step; more queries are cut in tiles, each of which reads the cache.
MAX_ROWS = 512


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
      NotImplementedError: for a chip or a head dimension that no kernel takes.
    """
    sizes = (*query.shape, *key.shape, *value.shape)
    if not all(isinstance(n, int) for n in sizes):
        return "a Pallas kernel needs static shapes, and these are symbolic"
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"Mosaic, the TPU kernel compiler, does not take {query.dtype}"
    chip = chip_of(device_kind)
    advice = "Pass implementation='reference'."
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
    chosen = (
        _Call(query, key, value).blocks(chip, params)
        if operation == "forward"
        else backward.choose(query, key, value, params, chip)
    )
    return chosen if isinstance(chosen, str) else None


def step_bytes(
    query: Any, key: Any, value: Any, params: RaggedAttentionParams, device_kind: str | None
) -> int:
    """Bytes of the cache that one grid step of the forward kernel reads, for benchmarks."""
    call = _Call(query, key, value)
    blocks = call.blocks(chip_of(device_kind), params)
    if isinstance(blocks, str):
        raise NotImplementedError(f"ragged_attention: {blocks}.")
    return call.problem.cache_bytes(blocks.T)


class _Call:
    """The sizes of one call, and how its queries become rows of the kernel.

    Rows are (key head, query, head of the group), so that those of one key head stand together.
    """

    def __init__(self, query: Any, key: Any, value: Any) -> None:
        self.B, self.Q, self.Hq, self.D = query.shape
        S, self.Hkv = key.shape[1:3]
        self.Dv = value.shape[3]
        self.G = self.Hq // self.Hkv
        self.dtype = query.dtype
        # XLA gives caches shorter than the lanes other layouts: they are padded, a small copy.
        self.S = max(S, LANES)
        self.key = CacheLayout.of(self.S, self.Hkv, self.D, self.dtype)
        self.value = CacheLayout.of(self.S, self.Hkv, self.Dv, self.dtype)
        self.tiles = -(-self.Q * self.Hq // MAX_ROWS)
        self.queries = -(-self.Q // self.tiles)
        self.tiles = -(-self.Q // self.queries)
        interleaved = self.key.interleaved and self.value.interleaved
        rows = self.queries * self.G
        # A product of one head reads whole registers of its rows.
        self.head_rows = rows if interleaved else round_up(rows, SUBLANES)
        self.rows = round_up(self.Hkv * self.head_rows, SUBLANES)
        self.V = self.B * self.tiles

    @property
    def problem(self) -> Problem:
        return Problem(self.key, self.value, self.dtype, self.rows, self.V, self.S)

    def blocks(self, chip: Chip, params: RaggedAttentionParams) -> Blocks | str:
        return block_size.choose(self.problem, chip, params.block_size)

    def pad_cache(self, x: jax.Array) -> jax.Array:
        missing = self.S - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x

    def tile_windows(self, x: jax.Array) -> jax.Array:
        """[B, Q] to [V, queries]; the last window again for what pads Q."""
        missing = self.tiles * self.queries - self.Q
        x = jnp.pad(x, ((0, 0), (0, missing)), mode="edge") if missing else x
        return x.reshape(self.V, self.queries)

    def window_rows(self, x: jax.Array) -> jax.Array:
        """[V, queries] to the bound of each row, [V, R]."""
        x = jnp.broadcast_to(x[:, None, :, None], (self.V, self.Hkv, self.queries, self.G)).reshape(
            self.V, self.Hkv, -1
        )
        return self._pad_rows(x[..., None])[..., 0]

    def to_rows(self, query: jax.Array) -> jax.Array:
        """[B, Q, Hq, D] to [V, R, D]."""
        missing = self.tiles * self.queries - self.Q
        query = jnp.pad(query, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else query
        x = query.reshape(self.V, self.queries, self.Hkv, self.G, self.D)
        x = x.transpose(0, 2, 1, 3, 4)
        return self._pad_rows(x.reshape(self.V, self.Hkv, self.queries * self.G, self.D))

    def _pad_rows(self, x: jax.Array) -> jax.Array:
        """[V, Hkv, queries * G, n] to [V, R, n]."""
        rows = x.shape[2]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.head_rows - rows), (0, 0)))
        x = x.reshape(self.V, self.Hkv * self.head_rows, x.shape[3])
        return jnp.pad(x, ((0, 0), (0, self.rows - x.shape[1]), (0, 0)))

    def from_rows(self, x: jax.Array) -> jax.Array:
        """[V, R, n] to [B, Q, Hq, n]."""
        n = x.shape[2]
        x = x[:, : self.Hkv * self.head_rows].reshape(self.V, self.Hkv, self.head_rows, n)
        x = x[:, :, : self.queries * self.G]
        x = x.reshape(self.B, self.tiles, self.Hkv, self.queries, self.G, n)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(self.B, self.tiles * self.queries, self.Hq, n)[:, : self.Q]


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
    call = _Call(query, key, value)
    blocks = call.blocks(chip, params)
    if isinstance(blocks, str):
        raise NotImplementedError(f"ragged_attention: {blocks}. Pass block_size=None.")
    plan = kernel.Plan(
        key=call.key,
        value=call.value,
        blocks=blocks,
        rows=call.rows,
        head_rows=call.head_rows,
        queries=call.queries,
        tiles=call.tiles,
        cores=chip.cores,
        params=params,
    )
    lo = call.tile_windows(jnp.maximum(starts, 0))
    hi = call.tile_windows(jnp.minimum(lengths, key.shape[1]))
    work = work_list.WorkList.of(lo, hi, blocks.T, -(-call.S // blocks.T), plan.cores)
    outs, max_logits, denominators = kernel.call(
        plan,
        work,
        jnp.stack([call.window_rows(x)[:, : plan.P] for x in (lo, hi)], axis=1),
        call.to_rows(query),
        call.key.view(call.pad_cache(key)),
        call.value.view(call.pad_cache(value)),
        name="ragged_attention_mha" if call.G == 1 else "ragged_attention_gqa",
    )
    out, max_logit, denominator = work_list.merge(
        outs,
        max_logits[:, :, 0],
        denominators[:, :, 0],
        work.touched(blocks.T, plan.cores),
        params.mask_value,
    )
    return (
        call.from_rows(out).astype(query.dtype),
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
