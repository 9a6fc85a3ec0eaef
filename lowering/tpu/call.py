"""The sizes of a call, and how its operands become those of the kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.tpu.block_size import Blocks, Problem
from jax_ragged.lowering.tpu.chips import Chip
from jax_ragged.lowering.tpu.chunks import Plan
from jax_ragged.lowering.tpu.layout import LANES, SUBLANES, CacheLayout, round_up

# Rows of (head, query) in one step; more queries are cut in tiles, each of which reads the cache.
MAX_ROWS = 512


def readings(query: Any, key: Any, value: Any) -> tuple["Call", ...]:
    """How kernels can read a cache in place: its heads together, or also each by itself."""
    together, by_head = (Call(query, key, value, by_head=x) for x in (False, True))
    separable = by_head.key.strided and by_head.value.strided
    return (together, by_head) if separable else (together,)


class Call:
    """The sizes of one call, and how its queries become rows of the kernel.

    Rows are (key head, query, head of the group), so that those of one key head stand together.
    With `by_head` each head of the cache is read by itself, in any form.
    """

    def __init__(self, query: Any, key: Any, value: Any, *, by_head: bool = False) -> None:
        self.B, self.Q, self.Hq, self.D = query.shape
        S, self.Hkv = key.shape[1:3]
        self.Dv = value.shape[3]
        self.G = self.Hq // self.Hkv
        self.dtype = query.dtype
        # XLA gives caches shorter than the lanes other layouts: they are padded, a small copy.
        self.S = max(S, LANES)
        layouts = (CacheLayout.of(self.S, self.Hkv, n, self.dtype) for n in (self.D, self.Dv))
        self.key, self.value = (x.by_head() if by_head else x for x in layouts)
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

    def plan(self, blocks: Blocks, chip: Chip, params: RaggedAttentionParams) -> Plan:
        return Plan(
            key=self.key,
            value=self.value,
            blocks=blocks,
            rows=self.rows,
            head_rows=self.head_rows,
            queries=self.queries,
            tiles=self.tiles,
            cores=chip.cores,
            params=params,
        )

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

    def to_rows(self, x: jax.Array) -> jax.Array:
        """[B, Q, Hq, n] to [V, R, n]."""
        missing = self.tiles * self.queries - self.Q
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x
        n = x.shape[3]
        x = x.reshape(self.V, self.queries, self.Hkv, self.G, n)
        x = x.transpose(0, 2, 1, 3, 4)
        return self._pad_rows(x.reshape(self.V, self.Hkv, self.queries * self.G, n))

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
