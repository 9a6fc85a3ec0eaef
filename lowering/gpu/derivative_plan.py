"""How the derivative kernels see a call: query rows, tiles, windows and statistics.

A *query row* is one row of the logits: one query and one query head. With many queries, the
kernels take the operands as they are: the query rows of one query head, [B, Q, Hq, D]. With few,
the G query heads that share a key head become G queries of that key head, [B, Q * G, Hkv, D], so
that one tile holds them all ("packed"). After that step both are the same problem: R query rows
of H heads, of which every `group` heads share a key head.

                     positions of the cache, in blocks
                  +-----+-----+-----+-----+-----+
    tile of       |     | ### | ### | #   |     |   #: inside the window of a query row
    64 query rows |     |   # | ### | ### |     |
                  +-----+-----+-----+-----+-----+
                          hull: the blocks from the first to the last window of the tile

A *tile* is 64 consecutive query rows of one head, the rows of a warpgroup's matrix product. Its
*hull* is the range from its first window's start to its last window's end, and its *inner* range
is where all its windows overlap. A hull is *solid* if no position in it lies outside every window.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_ragged.lowering.gpu.plan import SWIZZLE_ROWS, WGMMA_ROWS, ceil_to
from jax_ragged.lowering.params import RaggedAttentionParams

LOG2_E = math.log2(math.e)
# Head dimensions of key and value, added, up to which two computing warpgroups fit in a CTA.
_TWO_TILES = 256
# Multiprocessors of an H100 or H200; any number is right.
MULTIPROCESSORS = 132
# Calls with fewer queries are packed.
_FEW_QUERIES = WGMMA_ROWS


def tile_bytes(columns: int, itemsize: int) -> int:
    """The bytes of a row of a tile of shared memory: the widest of which whole ones fit."""
    return max(n for n in (32, 64, 128) if columns * itemsize % n == 0)


@dataclasses.dataclass(frozen=True)
class DerivativePlan:
    """Everything static about the derivatives of one call.

    Attributes:
      S: positions of a row of the cache, in whole tiles of the copy engine.
      block: positions of the cache that a row kernel reads in one step.
      warpgroups: computing warpgroups of a CTA.
      stretch: blocks of a tile's hull that one CTA of a row kernel reads at most.
      stretches: CTAs among which the hull of a tile is divided.
    """

    B: int
    Q: int
    Hq: int
    Hkv: int
    S: int
    D: int
    Dv: int
    dtype: Any
    params: RaggedAttentionParams
    block: int
    warpgroups: int
    stretch: int
    stretches: int

    @property
    def packed(self) -> bool:
        """Whether the query heads that share a key head are queries of one head."""
        return self.Q < _FEW_QUERIES

    @property
    def G(self) -> int:
        """Query heads per key head, before packing."""
        return self.Hq // self.Hkv

    @property
    def group(self) -> int:
        """Heads of the kernels' query that share a key head."""
        return 1 if self.packed else self.G

    @property
    def H(self) -> int:
        """Heads of the kernels' query."""
        return self.Hkv * self.group

    @property
    def rows(self) -> int:
        """Query rows of one head."""
        return self.Q * (self.Hq // self.H)

    @property
    def R(self) -> int:
        """Query rows of one head, in whole tiles of the copy engine."""
        return ceil_to(self.rows, SWIZZLE_ROWS)

    @property
    def wide(self) -> bool:
        """Whether the head dimensions leave room for one computing warpgroup only."""
        return self.D + self.Dv > _TWO_TILES

    def chunk(self, columns: int, dtype: Any) -> int:
        """Columns of a result in dtype that one product makes, and that are stored at once.

        They are whole tiles of the operand in shared memory that they are multiplied from.
        """
        most = 64 if self.wide or jnp.dtype(dtype).itemsize > 2 else 128
        itemsize = self.dtype.itemsize
        tile = tile_bytes(columns, itemsize) // itemsize
        sizes = (n for n in range(tile, most + 1, tile) if columns % n == 0)
        return max(sizes, default=0)

    @property
    def tiles_apart(self) -> bool:
        """Whether each warpgroup of a CTA has a tile of its own, and all read the same blocks.

        Else there is one tile, and its blocks are dealt to the warpgroups in turn.
        """
        return self.rows > WGMMA_ROWS

    @property
    def tiles(self) -> int:
        """Tiles of one head; a whole number for each CTA of a row kernel."""
        tiles = -(-self.rows // WGMMA_ROWS)
        return ceil_to(tiles, self.warpgroups) if self.tiles_apart else tiles

    @property
    def tile_groups(self) -> int:
        """Sets of tiles that a CTA of a row kernel computes, of one head."""
        return self.tiles // self.warpgroups if self.tiles_apart else 1

    @property
    def partials(self) -> int:
        """Partial results of each tile that a row kernel makes."""
        return self.stretches * (1 if self.tiles_apart else self.warpgroups)


def make_plan(
    query: jax.Array, key: jax.Array, value: jax.Array, params: RaggedAttentionParams
) -> DerivativePlan:
    """The plan for query [B, Q, Hq, D], key [B, S, Hkv, D] and value [B, S, Hkv, Dv]."""
    B, Q, Hq, D = query.shape
    S, Hkv, Dv = ceil_to(key.shape[1], SWIZZLE_ROWS), key.shape[2], value.shape[3]
    block = WGMMA_ROWS
    blocks = -(-S // block) + 1
    warpgroups = 2 if D + Dv <= _TWO_TILES else 1
    plan = DerivativePlan(
        B, Q, Hq, Hkv, S, D, Dv, jnp.dtype(query.dtype), params,
        block, warpgroups, blocks, 1,
    )  # fmt: skip
    # CTAs that find nothing to do cost little, and several a multiprocessor balance the rest.
    wanted = -(-4 * MULTIPROCESSORS // (B * plan.H * plan.tile_groups))
    stretch = max(-(-blocks // wanted), 8)
    if wanted < 3 or stretch >= blocks:
        return plan
    return dataclasses.replace(plan, stretch=stretch, stretches=-(-blocks // stretch))


def fold(plan: DerivativePlan, x: jax.Array) -> jax.Array:
    """[B, Q, Hq, ...] to the kernels' [B, R, H, ...], padded with zeros."""
    if plan.packed and plan.G > 1:
        x = x.reshape(plan.B, plan.Q, plan.Hkv, plan.G, *x.shape[3:])
        x = jnp.swapaxes(x, 2, 3).reshape(plan.B, plan.rows, plan.H, *x.shape[4:])
    return _pad_rows(x, 1, plan.R)


def pad_cache(plan: DerivativePlan, x: jax.Array) -> jax.Array:
    """[B, S, Hkv, ...] with S rounded up to whole tiles: a copy, only where it is not whole."""
    return _pad_rows(x, 1, plan.S)


def unfold(plan: DerivativePlan, x: jax.Array) -> jax.Array:
    """The kernels' [B, R or more, H, ...] to [B, Q, Hq, ...]."""
    x = x[:, : plan.rows]
    if plan.packed and plan.G > 1:
        x = x.reshape(plan.B, plan.Q, plan.G, plan.Hkv, *x.shape[3:])
        x = jnp.swapaxes(x, 2, 3).reshape(plan.B, plan.Q, plan.Hq, *x.shape[4:])
    return x


def _pad_rows(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    """Pads one axis to a size."""
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


# Lines of the table of windows of a tile, i32 [3, 64], and places in the last of them.
LOW, HIGH, SCALARS = range(3)
HULL_LOW, HULL_HIGH, INNER_LOW, INNER_HIGH, SOLID = range(5)


def windows(plan: DerivativePlan, lengths: jax.Array, starts: jax.Array) -> jax.Array:
    """The windows of each tile, i32 [B, tiles, 3, 64]: see LOW and HULL_LOW.

    An empty window is (0, 0). The hull is that of all tiles that a CTA of a row kernel has.
    """
    shape = (plan.B, plan.tiles, WGMMA_ROWS)

    def of_rows(x: jax.Array) -> jax.Array:
        x = jnp.repeat(x, plan.rows // plan.Q, axis=1)
        # Query rows past the last repeat it.
        rest = plan.tiles * WGMMA_ROWS - plan.rows
        return jnp.pad(x, ((0, 0), (0, rest)), mode="edge") if rest else x

    low, high = (of_rows(x).reshape(shape) for x in (starts, lengths))
    low, high = jnp.maximum(low, 0), jnp.minimum(high, plan.S)
    filled = high > low
    low, high = jnp.where(filled, low, 0), jnp.where(filled, high, 0)
    together = (plan.B, plan.tile_groups, plan.tiles // plan.tile_groups, WGMMA_ROWS)

    def of_group(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[:, :, None], together[:3]).reshape(plan.B, plan.tiles)

    first = jnp.where(filled, low, plan.S).reshape(together).min(axis=(2, 3))
    last = high.reshape(together).max(axis=(2, 3))
    # Windows that each touch the next have no gap. Others may have none too, but look as if.
    ends = [x.reshape(*together[:2], -1) for x in (low, high)]
    touches = (ends[0][..., 1:] <= ends[1][..., :-1]) & (ends[0][..., :-1] <= ends[1][..., 1:])
    solid = touches.all(axis=2).astype(jnp.int32)
    scalars = [of_group(first), of_group(last), low.max(axis=2), high.min(axis=2), of_group(solid)]
    line = _pad_rows(jnp.stack(scalars, axis=2), 2, WGMMA_ROWS)
    return jnp.stack([low, high, line], axis=2)


def by_tile(plan: DerivativePlan, x: jax.Array, value: float = 0) -> jax.Array:
    """[B, Q, Hq] to [B, H, tiles, 64], padded with a value."""
    x = _pad_rows(fold(plan, x)[:, : plan.rows], 1, plan.tiles * WGMMA_ROWS, value)
    return jnp.swapaxes(x, 1, 2).reshape(plan.B, plan.H, plan.tiles, WGMMA_ROWS)


def from_tiles(plan: DerivativePlan, x: jax.Array) -> jax.Array:
    """[B, H, tiles, 64] to [B, Q, Hq]."""
    x = x.reshape(plan.B, plan.H, plan.tiles * WGMMA_ROWS)
    return unfold(plan, jnp.swapaxes(x, 1, 2))


def log_sum(max_logits: jax.Array, denominator: jax.Array) -> jax.Array:
    """log2 sum exp z, so that 2 ** (z / log 2 - log_sum) = exp(z - m) / l; 0 for none.

    It is infinite for an empty window.
    """
    empty = denominator == 0
    positive = jnp.where(empty, 1, denominator)
    return jnp.where(empty, jnp.inf, max_logits * LOG2_E + jnp.log2(positive))
