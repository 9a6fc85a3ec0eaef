"""What the kernels of the forward and of the derivatives share: logits in rows and columns.

Rows are pairs of a head and a query, columns are what a chunk of the cache has in the order of its
layout. Here stand a kernel's static sizes, the loads of a chunk or of one head of it, the masks of
windows and heads, and how the logits of all heads are brought together in fewer rows and back.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ragged.lowering._compat import interpret_mode
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.tpu.block_size import Blocks
from jax_ragged.lowering.tpu.layout import LANES, SUBLANES, CacheLayout, Form

LOG2_E = math.log2(math.e)

# What is wider than the lanes of a register, in pieces of 128 columns.
Slices = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static sizes of a kernel.

    Attributes:
      key: layout of the keys.
      value: layout of the values, with heads interleaved as those of the keys, or neither's are.
      blocks: T and the chunk.
      rows: R, a multiple of 8.
      head_rows: rows of one key head, (query, head of its group).
      queries: queries of a row of the work list.
      tiles: rows of the work list for one row of the cache.
      cores: between which the work list is split.
      params: of the operation.
    """

    key: CacheLayout
    value: CacheLayout
    blocks: Blocks
    rows: int
    head_rows: int
    queries: int
    tiles: int
    cores: int
    params: RaggedAttentionParams

    @property
    def compact(self) -> bool:
        """Whether the logits of the heads of a token are brought together in one row."""
        heads_fit = self.key.interleaved and LANES % self.key.columns == 0
        return heads_fit and self.rows % self._compact_rows == 0

    @property
    def _compact_rows(self) -> int:
        return math.lcm(SUBLANES, self.head_rows)

    @property
    def P(self) -> int:
        """Rows of the logits after `compact_heads`."""
        return self._compact_rows if self.compact else self.rows

    @property
    def unit(self) -> float:
        """Logit = z unit."""
        p = self.params
        return p.softmax_scale if p.logits_soft_cap is None and p.softmax_scale > 0 else 1.0

    def in_units(self, max_logits: jax.Array) -> jax.Array:
        """Maxima of logits as maxima of z: the same float32 in every kernel."""
        return max_logits if self.unit == 1 else max_logits * (1 / self.unit)

    @property
    def chunks(self) -> int:
        return self.blocks.T // self.blocks.chunk

    @property
    def parts(self) -> list[range]:
        """The heads of each softmax: all, where they share columns, else those that share words.

        The softmax of one part hides under the products of the next.
        """
        heads = self.key.heads
        if self.key.interleaved:
            return [range(heads)]
        together = max(x.packing if x.strided else 1 for x in (self.key, self.value))
        return [range(h, h + together) for h in range(0, heads, together)]

    def rows_of(self, heads: range) -> slice:
        """The rows of a part."""
        if len(heads) == self.key.heads:
            return slice(None)
        return slice(heads.start * self.head_rows, heads.stop * self.head_rows)


def dot(x: jax.Array, y: jax.Array, *, transposed: bool = False) -> jax.Array:
    """X y, or x y', accumulated in float32; float32 operands are not rounded."""
    exact = lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        y,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def lane_slices(x: jax.Array) -> Slices:
    return [x[:, c : c + LANES] for c in range(0, x.shape[1], LANES)]


def to_lanes(x: jax.Array, n: int) -> jax.Array:
    """[R, 128] with equal lanes to [R, n]."""
    if n % LANES != 0 or n > LANES:
        x = jnp.concatenate([x] * -(-n // LANES), axis=1)
    return x if x.shape[1] == n else x[:, :n]


def quotient(x: jax.Array, n: int) -> jax.Array:
    """X // n of natural numbers."""
    return x >> (n.bit_length() - 1) if n & (n - 1) == 0 else lax.div(x, jnp.int32(n))


def remainder(x: jax.Array, n: int) -> jax.Array:
    """X % n of natural numbers."""
    return x & (n - 1) if n & (n - 1) == 0 else lax.rem(x, jnp.int32(n))


def column_by_lane(rows: int, start: int, period: int) -> jax.Array:
    """The columns from start on, modulo period, by lane: [rows, 128].

    Where the period divides the lanes, all starts give one expression, computed once.
    """
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    return remainder(lane + start % period, period)


def token_by_lane(rows: int, start: int, columns: int) -> jax.Array:
    """The tokens of the columns from start on, by lane: [rows, 128]."""
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    return quotient(lane + start % columns, columns) + start // columns


def own_head(plan: Plan, index: int, first: int = 0, rows: int | None = None) -> jax.Array:
    """Which columns of the index-th 128 are of the row's head, in the first tile.

    Args:
      plan: of the kernel.
      index: of the 128 columns.
      first: the first row, a multiple of the rows of one head.
      rows: how many rows, R if None.

    Returns:
      bool [rows, 128].
    """
    layout = plan.key
    shape = (plan.rows if rows is None else rows, LANES)
    head = quotient(lax.broadcasted_iota(jnp.int32, shape, 0), plan.head_rows)
    head = head + first // plan.head_rows
    if plan.rows % plan.head_rows or plan.rows // plan.head_rows > layout.heads:
        # Of the rows that pad R, the head is none.
        head = jnp.where(head < layout.heads, head, layout.columns)
    return column_by_lane(shape[0], index * LANES, layout.columns) == head


class Windows:
    """The windows of the rows of one step, as masks over the columns of a layout."""

    def __init__(self, plan: Plan, lo: jax.Array, hi: jax.Array, block_start: jax.Array) -> None:
        """lo and hi are scalars, or [P, 128] where queries have windows of their own."""
        self._plan, self._lo, self._hi, self._start = plan, lo, hi, block_start

    def mask(self, layout: CacheLayout, j: jax.Array, index: int, rows: int) -> jax.Array:
        """Which columns of the index-th 128 of chunk j lie in the windows: bool [rows, 128].

        The rows are those of whole heads, of which all have the same windows.
        """
        token = token_by_lane(rows, index * LANES, layout.columns)
        base = self._start + j * self._plan.blocks.chunk
        lo, hi = (x[:rows] if x.ndim else x for x in (self._lo, self._hi))
        return (token >= lo - base) & (token < hi - base)

    def zero_outside(self, v: jax.Array, layout: CacheLayout, j: jax.Array) -> jax.Array:
        """Zeros what of the values of chunk j lies in no window: 0 NaN would be NaN.

        Args:
          v: [columns, lanes], or [Dv, columns] in the form SEQUENCE.
          layout: of v.
          j: the chunk.
        """
        axis = 1 if layout.form is Form.SEQUENCE else 0
        if self._plan.queries == 1:
            token = quotient(lax.broadcasted_iota(jnp.int32, v.shape, axis), layout.columns)
            base = self._start + j * self._plan.blocks.chunk
            inside = (token >= self._lo - base) & (token < self._hi - base)
        else:
            inside = self._any(layout, j, v.shape, axis) > 0
        return jnp.where(inside, v, jnp.zeros((), v.dtype))

    def _any(
        self, layout: CacheLayout, j: jax.Array, shape: tuple[int, ...], axis: int
    ) -> jax.Array:
        """1.0 where any row's window has the column, with columns along axis."""
        parts = []
        for index in range(shape[axis] // LANES):
            inside = jnp.where(self.mask(layout, j, index, self._plan.P), 1.0, 0.0)
            inside = inside.max(axis=0, keepdims=True)
            rows = shape[0] if axis == 1 else LANES
            inside = jnp.broadcast_to(inside, (rows, LANES))
            parts.append(inside if axis == 1 else to_lanes(inside.T, shape[1]))
        return jnp.concatenate(parts, axis=axis)


def compact_heads(plan: Plan, x: jax.Array) -> jax.Array:
    """Brings together what of 128 columns is of the row's head: [R, 128] to [P, 128].

    A column is of one head alone, so in all rows but that head's its logits are of no use.
    Selecting the row blocks by column leaves R / P times less to mask, exponentiate and sum.
    """
    P, columns = plan.P, plan.key.columns
    heads = P // plan.head_rows
    column = column_by_lane(P, 0, columns)
    z = x[:P]
    for first in range(heads, plan.key.heads, heads):
        i = first // heads
        z = jnp.where(column >= first, x[i * P : (i + 1) * P], z)
    return z


def spread_heads(plan: Plan, p: jax.Array) -> jax.Array:
    """The inverse of `compact_heads`: [P, 128] to [R, 128], 0 where a column is of another head."""
    if not plan.compact or plan.key.columns == 1:
        return p
    return jnp.concatenate(
        [
            jnp.where(own_head(plan, 0, first, plan.P), p, 0.0)
            for first in range(0, plan.rows, plan.P)
        ],
        axis=0,
    )


def mask_logits(
    z: jax.Array, plan: Plan, j: jax.Array | int, index: int, windows: Windows | None
) -> jax.Array:
    key, masks = plan.key, []
    if not plan.compact and key.columns > 1:
        masks.append(own_head(plan, index))
    if plan.compact and (plan.P > plan.head_rows or key.tiles > 1):
        heads = plan.P // plan.head_rows
        column = column_by_lane(plan.P, 0, key.columns)
        row = lax.broadcasted_iota(jnp.int32, z.shape, 0)
        own = remainder(column, heads) == quotient(row, plan.head_rows)
        masks.append(own & (column < key.heads) if key.tiles > 1 else own)
    if windows is not None:
        masks.append(windows.mask(key, jnp.asarray(j, jnp.int32), index, z.shape[0]))
    return jnp.where(functools.reduce(jnp.logical_and, masks), z, -jnp.inf) if masks else z


def split_tiles(rows: jax.Array, layout: CacheLayout) -> jax.Array:
    """[R, n] as rows of the form TOKENS: [tiles R, lanes]."""
    return jnp.concatenate(lane_slices(rows), axis=0) if layout.tiles > 1 else rows


def join_tiles(x: jax.Array, plan: Plan) -> jax.Array:
    """The inverse of `split_tiles`."""
    tiles = [x[i : i + plan.rows] for i in range(0, x.shape[0], plan.rows)]
    return jnp.concatenate(tiles, axis=1) if len(tiles) > 1 else x


def products_with_all(rows: jax.Array, block: jax.Array, layout: CacheLayout, plan: Plan) -> Slices:
    """Rows [R, n] times rows of the form TOKENS, all heads with all: [R, 128] for each 128."""
    R = plan.rows
    return [
        functools.reduce(
            jnp.add,
            [rotate(x[i * R : (i + 1) * R], -i * layout.heads) for i in range(layout.tiles)],
        )
        for x in lane_slices(dot(split_tiles(rows, layout), block, transposed=True))
    ]


def weights_of_tiles(x: jax.Array, layout: CacheLayout) -> jax.Array:
    """Weights [R, columns] of an interleaved cache, for each tile of lanes: [tiles R, columns]."""
    if layout.tiles == 1:
        return x
    slices = lane_slices(x)
    tiles = [
        jnp.concatenate([rotate(y, i * layout.heads) for y in slices], axis=1)
        for i in range(layout.tiles)
    ]
    return jnp.concatenate(tiles, axis=0)


def rotate(x: jax.Array, by: int) -> jax.Array:
    """Moves columns up by a number of lanes; what is wrapped around is masked."""
    return pltpu.roll(x, by % LANES, 1) if by % LANES else x


def rows_of_chunk(n: int, j: jax.Array | int) -> Any:
    """Those of chunk j, if it has n."""
    return pl.ds(j * n if isinstance(j, int) else pl.multiple_of(j * n, n), n)


def token_rows(ref: Any, layout: CacheLayout, plan: Plan, j: jax.Array | int) -> jax.Array:
    """The rows of chunk j in the form TOKENS."""
    rows: jax.Array = ref[0, rows_of_chunk(plan.blocks.chunk * layout.rows, j), :]
    return rows


def head_block(
    ref: Any, layout: CacheLayout, plan: Plan, j: jax.Array | int, head: int
) -> jax.Array:
    """Chunk j of one head: [chunk, D], or [D, chunk] in the form SEQUENCE."""
    if layout.strided:
        return _strided_block(ref, layout, plan, j, head)
    tokens = rows_of_chunk(plan.blocks.chunk, j)
    block: jax.Array = (
        ref[0, head, :, tokens] if layout.form is Form.SEQUENCE else ref[0, head, tokens, :]
    )
    return block


def _strided_block(
    ref: Any, layout: CacheLayout, plan: Plan, j: jax.Array | int, head: int
) -> jax.Array:
    """Chunk j of one head in the form TOKENS: [chunk, D].

    Sublanes are words of 32 bits, so two heads of bfloat16 come in one; with zeros in the other
    half, each is a float32 that rounding does not change.
    """
    tiles = []
    for tile in range(layout.tiles):
        word, half = divmod(layout.row(tile, head), layout.packing)
        x = _strided_words(ref, layout, plan, j, word)
        if layout.packing == 2:
            x = x & jnp.int32(-(2**16)) if half else x << 16
            x = lax.bitcast_convert_type(x, jnp.float32)
        tiles.append(x)
    return jnp.concatenate(tiles, axis=1).astype(ref.dtype)


def _strided_words(
    ref: Any, layout: CacheLayout, plan: Plan, j: jax.Array | int, word: int
) -> jax.Array:
    """One of the words of each token of chunk j: [chunk, lanes], int32 where elements share it."""
    n, stride = plan.blocks.chunk, layout.stride
    if layout.packing > 1 and interpret_mode() is not None:
        # The interpreter knows no views of a ref in another dtype.
        rows: jax.Array = pltpu.bitcast(token_rows(ref, layout, plan, j), jnp.int32)
        return rows[word::stride]
    words = ref if layout.packing == 1 else ref.bitcast(jnp.int32)
    chunk = words.at[0, rows_of_chunk(n * stride, j), :]
    loaded: jax.Array = chunk[pl.ds(word, n, stride=stride), :]
    return loaded
