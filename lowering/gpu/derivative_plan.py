"""How the derivative kernels see a call: query rows, tiles, windows and statistics.

A *query row* is one row of the logits: one query and one query head. With many queries, the
kernels take the operands as they are: the query rows of one query head, [B, Q, Hq, D]. With few,
the G query heads that share a key head become G queries of that key head, [B, Hkv, Q * G, D], so
that one tile holds them all ("packed"); with one query that moves nothing. After that step both are
the same problem: R query rows of H heads, of which every `group` heads share a key head.

Positions are counted in the joined cache, as `forms` says. The row kernels read every form of
cache; kernels that write gradients of the cache take dense ones in the dtype of query.

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ragged.lowering.contract import Residuals
from jax_ragged.lowering.gpu.call import Call
from jax_ragged.lowering.gpu.chip import MULTIPROCESSORS, SWIZZLE_ROWS, WGMMA_ROWS, ceil_to
from jax_ragged.lowering.gpu.launch import padded, swizzle_columns
from jax_ragged.lowering.gpu.softmax import LOG2_E
from jax_ragged.lowering.params import RaggedAttentionParams

# Head dimensions of key and value, added, up to which two computing warpgroups fit in a CTA.
_TWO_TILES = 256
# Calls with fewer queries are packed.
_FEW_QUERIES = WGMMA_ROWS


@dataclasses.dataclass(frozen=True)
class DerivativePlan(Call):
    """Everything static about the derivatives of one call.

    Attributes:
      block: positions of the cache that a row kernel reads in one step.
      warpgroups: computing warpgroups of a CTA.
      stretch: blocks of a tile's hull that one CTA of a row kernel reads at most.
      stretches: CTAs among which the hull of a tile is divided.
    """

    block: int
    warpgroups: int
    stretch: int
    stretches: int

    @property
    def piece(self) -> int:
        """Positions of a block that a row kernel copies together: they lie in one page."""
        return self.form.piece(self.block)

    @property
    def unit(self) -> int:
        """A row kernel's first block begins at a multiple of this.

        Dense rows are joined, and any multiple of a block is a place to begin. Pages, and rows of
        heads-first caches, begin at other positions.
        """
        return self.block if self.form.page_size is None else self.form.unit(self.piece)

    @property
    def packed(self) -> bool:
        """Whether the query heads that share a key head are queries of one head."""
        return self.Q < _FEW_QUERIES

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
        """Query rows of one head in whole tiles of the copy engine, or fewer than one has."""
        return self.rows if self.rows < SWIZZLE_ROWS else ceil_to(self.rows, SWIZZLE_ROWS)

    def shape_of_rows(self, columns: int) -> tuple[int, ...]:
        """Of operands of query rows: [B, H, R, columns] if packed, else [B, R, H, columns]."""
        rows = (self.H, self.R) if self.packed else (self.R, self.H)
        return (self.B, *rows, columns)

    def at(self, b: Any, rows: Any, head: Any) -> tuple[Any, Any, Any]:
        """The place of query rows in such an operand."""
        return (b, head, rows) if self.packed else (b, rows, head)

    def width(self, name: str) -> int:
        """The head dimension of an operand, of its tangent and of its gradient."""
        return self.Dv if name in ("value", "value_dot", "out_bar") else self.D

    @property
    def positions(self) -> int:
        """Positions of the joined cache, in whole tiles of the copy engine."""
        return ceil_to(self.B * self.form.stride, SWIZZLE_ROWS)

    @property
    def wide(self) -> bool:
        """Whether the head dimensions leave room for one computing warpgroup only."""
        return self.D + self.Dv > _TWO_TILES

    def chunk(self, columns: int, dtype: Any) -> int:
        """Columns of a result in dtype that one product makes, and that are stored at once.

        They are whole tiles of the operand in shared memory that they are multiplied from.
        """
        most = 64 if self.wide or jnp.dtype(dtype).itemsize > 2 else 128
        tile = swizzle_columns(columns, self.dtype) if columns else 1
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


def make_plan(residuals: Residuals, params: RaggedAttentionParams) -> DerivativePlan:
    """The plan of a call."""
    call = Call.of(residuals, params)
    block = WGMMA_ROWS
    blocks = -(-call.S // block) + 1
    warpgroups = 2 if call.D + call.Dv <= _TWO_TILES else 1
    plan = DerivativePlan(
        **vars(call), block=block, warpgroups=warpgroups, stretch=blocks, stretches=1
    )
    # CTAs that find nothing to do cost little, and several a multiprocessor balance the rest.
    wanted = -(-4 * MULTIPROCESSORS // (plan.B * plan.H * plan.tile_groups))
    stretch = max(-(-blocks // wanted), 8)
    if wanted < 3 or stretch >= blocks:
        return plan
    return dataclasses.replace(plan, stretch=stretch, stretches=-(-blocks // stretch))


def fold(plan: DerivativePlan, x: jax.Array) -> jax.Array:
    """[B, Q, Hq, n] to the kernels' [B, R, H, n] or [B, H, R, n], padded with zeros."""
    return padded(_packed(plan, x), 2 if plan.packed else 1, plan.R)


def _packed(plan: DerivativePlan, x: jax.Array) -> jax.Array:
    """[B, Q, Hq, ...] to [B, H, Q * G, ...] if packed."""
    if not plan.packed:
        return x
    x = x.reshape(plan.B, plan.Q, plan.Hkv, plan.G, *x.shape[3:])
    return jnp.swapaxes(x, 1, 2).reshape(plan.B, plan.H, plan.rows, *x.shape[4:])


def unfold(plan: DerivativePlan, x: jax.Array) -> jax.Array:
    """The kernels' layout, with R or more query rows, to [B, Q, Hq, ...]."""
    if not plan.packed:
        return x[:, : plan.rows]
    x = x[:, :, : plan.rows].reshape(plan.B, plan.Hkv, plan.Q, plan.G, *x.shape[3:])
    return jnp.swapaxes(x, 1, 2).reshape(plan.B, plan.Q, plan.Hq, *x.shape[4:])


def join_rows(plan: DerivativePlan, x: jax.Array) -> jax.Array:
    """[B, S, Hkv, n] to [positions, Hkv, n]: a copy only if B * S is no multiple of 8."""
    return padded(x.reshape(-1, *x.shape[2:]), 0, plan.positions)


def split_rows(plan: DerivativePlan, x: jax.Array) -> jax.Array:
    """The inverse of `join_rows`."""
    return x[: plan.B * plan.S].reshape(plan.B, plan.S, *x.shape[1:])


# Lines of the table of windows of a tile, i32 [3, 64], and places in the last of them.
LOW, HIGH, SCALARS = range(3)
HULL_LOW, HULL_HIGH, INNER_LOW, INNER_HIGH, SOLID = range(5)


def windows(plan: DerivativePlan, lengths: jax.Array, starts: jax.Array) -> jax.Array:
    """The windows of each tile, i32 [B, tiles, 3, 64]: see LOW and HULL_LOW.

    An empty window is (0, 0). The hull is that of all tiles that a CTA of a row kernel has.
    """
    row = plan.form.stride * jnp.arange(plan.B, dtype=jnp.int32)[:, None]
    low, high = jnp.maximum(starts, 0), jnp.minimum(lengths, plan.S)
    filled = high > low
    low, high = (jnp.where(filled, x + row, 0) for x in (low, high))
    return _same_windows(plan, low, high) if plan.Q == 1 else _windows(plan, low, high)


def _same_windows(plan: DerivativePlan, low: jax.Array, high: jax.Array) -> jax.Array:
    """The table where all query rows of a tile have one window: one operation for XLA."""
    source = np.full((3, WGMMA_ROWS), LOW)
    source[HIGH] = source[SCALARS, [HULL_HIGH, INNER_HIGH]] = HIGH
    source[SCALARS, SOLID] = -1
    low, high = (x[:, :, None, None] for x in (low, high))
    table = jnp.where(source == LOW, low, jnp.where(source == HIGH, high, 1))
    return jnp.broadcast_to(table, (plan.B, plan.tiles, 3, WGMMA_ROWS))


def _windows(plan: DerivativePlan, low: jax.Array, high: jax.Array) -> jax.Array:
    shape = (plan.B, plan.tiles, WGMMA_ROWS)

    def of_rows(x: jax.Array) -> jax.Array:
        x = jnp.repeat(x, plan.rows // plan.Q, axis=1)
        # Query rows past the last repeat it.
        return padded(x, 1, plan.tiles * WGMMA_ROWS, "edge").reshape(shape)

    low, high = of_rows(low), of_rows(high)
    together = (plan.B, plan.tile_groups, plan.tiles // plan.tile_groups, WGMMA_ROWS)

    def of_group(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[:, :, None], together[:3]).reshape(plan.B, plan.tiles)

    first = jnp.where(high > low, low, plan.positions).reshape(together).min(axis=(2, 3))
    last = high.reshape(together).max(axis=(2, 3))
    # Windows that each touch the next have no gap. Others may have none too, but look as if.
    ends = [x.reshape(*together[:2], -1) for x in (low, high)]
    touches = (ends[0][..., 1:] <= ends[1][..., :-1]) & (ends[0][..., :-1] <= ends[1][..., 1:])
    solid = touches.all(axis=2).astype(jnp.int32)
    scalars = [of_group(first), of_group(last), low.max(axis=2), high.min(axis=2), of_group(solid)]
    line = padded(jnp.stack(scalars, axis=2), 2, WGMMA_ROWS)
    return jnp.stack([low, high, line], axis=2)


def by_tile(plan: DerivativePlan, x: jax.Array, value: float = 0) -> jax.Array:
    """[B, Q, Hq, ...] to [B, H, tiles, 64, ...], padded with a value."""
    x = _packed(plan, x)
    x = x if plan.packed else jnp.swapaxes(x, 1, 2)
    widths = [(0, 0)] * x.ndim
    widths[2] = (0, plan.tiles * WGMMA_ROWS - plan.rows)
    x = jnp.pad(x, widths, constant_values=value)
    return x.reshape(plan.B, plan.H, plan.tiles, WGMMA_ROWS, *x.shape[3:])


def from_tiles(plan: DerivativePlan, x: jax.Array) -> jax.Array:
    """[B, H, tiles, 64] to [B, Q, Hq]."""
    x = x.reshape(plan.B, plan.H, plan.tiles * WGMMA_ROWS)
    return unfold(plan, x if plan.packed else jnp.swapaxes(x, 1, 2))


def log_sum(max_logits: jax.Array, denominator: jax.Array) -> jax.Array:
    """log2 sum exp z, so that 2 ** (z / log 2 - log_sum) = exp(z - m) / l; 0 for none.

    It is infinite for an empty window.
    """
    empty = denominator == 0
    positive = jnp.where(empty, 1, denominator)
    return jnp.where(empty, jnp.inf, max_logits * LOG2_E + jnp.log2(positive))


def statistics(at_max: bool) -> tuple[str, ...]:
    """Names of the statistics [B, H, tiles, 64] from which cotangents of logits are computed."""
    return ("log_sum", "delta", "t_star", "at_max_bar") if at_max else ("log_sum", "delta")
