"""Chunks of a block in registers: loads, masks, and the products with query rows.

A *row* here is a row of logits: one of the R query rows, pairs of a head and a query. The rows of
one key head stand together, `head_rows` of them. A *column* is a column of logits: an entry of a
chunk, in the order of the chunk's layout. A *token* is a position of the cache. Where heads are
interleaved, one product multiplies all heads with all, and a column is of use to its own head only:

                  columns (token, head)
                  t0h0 t0h1 t1h0 t1h1 ..                        t0h0 t0h1 t1h0 t1h1
    rows of h0  [  x    .    x    .   ..]   compact_heads    [   x    x    x    x  ..]   C rows
    rows of h1  [  .    x    .    x   ..]   ------------->       h0   h1   h0   h1
                                            <-------------
                     R rows                  spread_heads

A head dimension of several registers is cut in *pieces* of 128 lanes, which are rows of their own
in the view of the cache (`layout`); the products of the pieces are brought together by rotations
of the lanes.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jax_ragged.lowering._compat import interpret_mode
from jax_ragged.lowering.tpu.choice import KernelPlan
from jax_ragged.lowering.tpu.layout import LANES, SUBLANES, CacheForm, Form, alike

# An array that is wider than the lanes of a register, in slices of 128 columns.
Slices = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class CacheBlock:
    """A block of a cache.

    Attributes:
      ref: `CacheForm.block_shape`.
      layout: of the cache.
      dtype: of queries, in which products are taken.
      scale: float32 [1, heads, T], the factors of its entries, or None for 1. It has 1 head for
        heads that share them, and 128 equal lanes for positions that do.
    """

    ref: Any
    layout: CacheForm
    dtype: DTypeLike
    scale: Any = None


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """Contracts an axis of x with one of y, summed in float32; float32 operands are not rounded."""
    exact = lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        y,
        (((axes[0],), (axes[1],)), ((), ())),
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
    """Returns x // n for natural numbers."""
    return x >> (n.bit_length() - 1) if n & (n - 1) == 0 else lax.div(x, jnp.int32(n))


def remainder(x: jax.Array, n: int) -> jax.Array:
    """Returns x % n for natural numbers."""
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


def own_head(
    plan: KernelPlan, layout: CacheForm, index: int, first: int = 0, rows: int | None = None
) -> jax.Array:
    """Which columns of the index-th 128 are of the query row's head, in the first piece.

    Args:
      plan: of the kernel.
      layout: that the columns have.
      index: of the 128 columns.
      first: the first query row, a multiple of the rows of one head.
      rows: how many query rows, R if None.

    Returns:
      bool [rows, 128].
    """
    shape = (plan.rows if rows is None else rows, LANES)
    head = quotient(lax.broadcasted_iota(jnp.int32, shape, 0), plan.head_rows)
    head = head + first // plan.head_rows
    if plan.rows % plan.head_rows or plan.rows // plan.head_rows > layout.heads:
        # The query rows that pad R have no head.
        head = jnp.where(head < layout.heads, head, layout.columns)
    return column_by_lane(shape[0], index * LANES, layout.columns) == head


class WindowMask:
    """The windows of the query rows of one step, as masks over the columns of a layout."""

    def __init__(
        self, plan: KernelPlan, lo: jax.Array, hi: jax.Array, block_start: jax.Array
    ) -> None:
        """Takes lo and hi as scalars, or [C, 128] where queries have windows of their own."""
        self._plan, self._lo, self._hi, self._start = plan, lo, hi, block_start

    def mask(self, layout: CacheForm, j: jax.Array, index: int, rows: int) -> jax.Array:
        """Which columns of the index-th 128 of chunk j lie in the windows: bool [rows, 128].

        The rows are the rows of whole heads, which all have the same windows.
        """
        token = token_by_lane(rows, index * LANES, layout.columns)
        base = self._start + j * self._plan.blocks.chunk
        lo, hi = (x[:rows] if x.ndim else x for x in (self._lo, self._hi))
        return (token >= lo - base) & (token < hi - base)

    def zero_outside(self, v: jax.Array, layout: CacheForm, j: jax.Array) -> jax.Array:
        """Zeros the entries of chunk j that lie in no window: 0 NaN would be NaN.

        Args:
          v: [columns, lanes], or [D, columns] in the form SEQUENCE.
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

    def _any(self, layout: CacheForm, j: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
        """1.0 where any row's window has the column, with columns along axis."""
        found = []
        for index in range(shape[axis] // LANES):
            inside = jnp.where(self.mask(layout, j, index, self._plan.compact_rows), 1.0, 0.0)
            inside = inside.max(axis=0, keepdims=True)
            rows = shape[0] if axis == 1 else LANES
            inside = jnp.broadcast_to(inside, (rows, LANES))
            found.append(inside if axis == 1 else to_lanes(inside.T, shape[1]))
        return jnp.concatenate(found, axis=axis)


def compact_heads(plan: KernelPlan, x: jax.Array) -> jax.Array:
    """Selects the logits of each column's own head: [R, 128] to [C, 128].

    A column is of one head alone, so in the rows of all other heads its logits are of no use.
    The R rows are cut into sets of C rows, and each column is taken from the set of its head. That
    leaves R / C times less to mask, exponentiate and sum.
    """
    rows, columns = plan.compact_rows, plan.key.columns
    heads = rows // plan.head_rows
    column = column_by_lane(rows, 0, columns)
    z = x[:rows]
    for first in range(heads, plan.key.heads, heads):
        i = first // heads
        z = jnp.where(column >= first, x[i * rows : (i + 1) * rows], z)
    return z


def spread_heads(plan: KernelPlan, p: jax.Array) -> jax.Array:
    """The inverse of `compact_heads`: [C, 128] to [R, 128], 0 where a column is of another head."""
    if not plan.compact or plan.key.columns == 1:
        return p
    return jnp.concatenate(
        [
            jnp.where(own_head(plan, plan.key, 0, first, plan.compact_rows), p, 0.0)
            for first in range(0, plan.rows, plan.compact_rows)
        ],
        axis=0,
    )


def mask_logits(
    z: jax.Array, plan: KernelPlan, j: jax.Array | int, index: int, mask: WindowMask | None
) -> jax.Array:
    key, masks = plan.key, []
    if not plan.compact and key.columns > 1:
        masks.append(own_head(plan, key, index))
    if plan.compact and (plan.compact_rows > plan.head_rows or key.pieces > 1):
        # The compact rows have the n heads of each set, so their i-th hold the heads i, i + n, ...
        heads = plan.compact_rows // plan.head_rows
        column = column_by_lane(plan.compact_rows, 0, key.columns)
        row = lax.broadcasted_iota(jnp.int32, z.shape, 0)
        own = remainder(column, heads) == quotient(row, plan.head_rows)
        masks.append(own & (column < key.heads) if key.pieces > 1 else own)
    if mask is not None:
        masks.append(mask.mask(key, jnp.asarray(j, jnp.int32), index, z.shape[0]))
    return jnp.where(functools.reduce(jnp.logical_and, masks), z, -jnp.inf) if masks else z


def split_pieces(rows: jax.Array, layout: CacheForm) -> jax.Array:
    """[R, n] as rows of the form TOKENS: [pieces R, lanes]."""
    return jnp.concatenate(lane_slices(rows), axis=0) if layout.pieces > 1 else rows


def join_pieces(x: jax.Array, plan: KernelPlan) -> jax.Array:
    """The inverse of `split_pieces`."""
    pieces = [x[i : i + plan.rows] for i in range(0, x.shape[0], plan.rows)]
    return jnp.concatenate(pieces, axis=1) if len(pieces) > 1 else x


def heads_of(layout: CacheForm, plan: KernelPlan) -> Iterator[slice]:
    """The query rows of each head."""
    return (slice(h * plan.head_rows, (h + 1) * plan.head_rows) for h in range(layout.heads))


def _all_products(
    rows: jax.Array,
    cache: CacheBlock,
    plan: KernelPlan,
    j: Any,
    mask: WindowMask | None,
    heads: range,
) -> Slices:
    """Query rows [R, n] times chunk j of a cache: [rows of heads, 128] for each 128 columns."""
    layout = cache.layout
    if not layout.interleaved:
        axes = (1, 0 if layout.form is Form.SEQUENCE else 1)
        of_heads = list(heads_of(layout, plan))
        by_head = [
            lane_slices(dot(rows[of_heads[h]], load(cache, plan, j, mask, h), axes)) for h in heads
        ]
        return [jnp.concatenate(x, axis=0) for x in zip(*by_head, strict=True)]
    R, block = plan.rows, load(cache, plan, j, mask)
    return [
        functools.reduce(
            jnp.add,
            [rotate(x[i * R : (i + 1) * R], -i * layout.heads) for i in range(layout.pieces)],
        )
        for x in lane_slices(dot(split_pieces(rows, layout), block, (1, 1)))
    ]


def products(
    rows: jax.Array,
    cache: CacheBlock,
    plan: KernelPlan,
    j: Any,
    mask: WindowMask | None,
    heads: range | None = None,
) -> Slices:
    """Query rows [R, n] times chunk j of a cache, in the rows and columns of the logits.

    Args:
      rows: [R, n].
      cache: a block, n wide.
      plan: of the kernel.
      j: the chunk.
      mask: the windows, at their edges.
      heads: those whose query rows are taken, None for all.

    Returns:
      [C, 128] for each 128 columns, or [rows of heads, 128].
    """
    layout = cache.layout
    own = dataclasses.replace(plan, key=layout)
    same = alike(layout, plan.key)
    # Bringing columns to others sums with zeros, so NaN must go before; else masks follow.
    heads = range(layout.heads) if heads is None else heads
    x = _all_products(rows, cache, plan, j, None if same else mask, heads)
    x = [compact_heads(own, y) for y in x] if own.compact else x
    if not same:
        x = lane_slices(_in_columns(x, own, plan.key, cache.dtype).astype(jnp.float32))
        x = [compact_heads(plan, y) for y in x] if plan.compact else x
    return scaled(x, cache, plan, j, mask, heads)


def scaled(
    x: Slices,
    cache: CacheBlock,
    plan: KernelPlan,
    j: Any,
    mask: WindowMask | None,
    heads: range | None = None,
) -> Slices:
    """Logits or weights of chunk j times the scale of a cache, 0 times outside of the windows."""
    if cache.scale is None:
        return x
    by_token = cache.scale.shape[2] == plan.blocks.T
    chunk = rows_of_chunk(plan.blocks.chunk, j) if by_token else slice(None)
    scale = cache.scale[0, :, chunk]
    if by_token and mask is not None:
        by_lane = CacheForm(Form.SEQUENCE, 1, scale.shape[0], scale.dtype)
        scale = mask.zero_outside(scale, by_lane, jnp.asarray(j, jnp.int32))
    if plan.key.columns == 1:
        tokens = [_scale_by_row(y, plan, heads) for y in lane_slices(scale)]
        return [y * tokens[i % len(tokens)] for i, y in enumerate(x)]
    factors = _scale_by_column(scale, plan, len(x), by_token=by_token)
    return [y * factor for y, factor in zip(x, factors, strict=True)]


def _scale_by_row(scale: jax.Array, plan: KernelPlan, heads: range | None) -> jax.Array:
    """Scales [heads, 128] of 128 tokens for the rows of logits of some heads, or [1, 128]."""
    if scale.shape[0] == 1:
        return scale
    shape = (plan.head_rows, LANES)
    heads = range(plan.key.heads) if heads is None else heads
    return jnp.concatenate([jnp.broadcast_to(scale[h : h + 1], shape) for h in heads], axis=0)


def _scale_by_column(scale: jax.Array, plan: KernelPlan, n: int, *, by_token: bool) -> Slices:
    """The scales of the tokens and heads of n times 128 columns: [C, 128] or [1, 128] each.

    A gather moves lanes within sublanes, and costs most here. So eight heads stand in the sublanes,
    and others in lanes between them, so that one gather finds the scales of all heads:

        scale        lane: token                       sublane: head
        eight heads  lane: (token, head // 8)          sublane: head % 8
        columns      lane: (token, piece, head)        sublane: head % 8, of use to head alone

    Args:
      scale: [heads, tokens], or [heads, 128] for all tokens.
      plan: of the kernel.
      n: number of slices.
      by_token: whether tokens have their own.
    """
    columns, heads = plan.key.columns, scale.shape[0]
    scale = jnp.concatenate([scale] * -(-SUBLANES // heads), axis=0)
    eights = [lane_slices(scale[i : i + SUBLANES]) for i in range(0, scale.shape[0], SUBLANES)]
    count = len(eights)
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)

    def at(x: jax.Array, lanes: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, lanes, axis=1)

    def of_eights(x: Slices, eight: jax.Array) -> jax.Array:
        found = x[0]
        for i, y in enumerate(x[1:], 1):
            found = jnp.where(eight == i, y, found)
        return found

    @functools.cache
    def interleaved(i: int) -> jax.Array:
        """The i-th 128 / count tokens, with lanes (token, head // 8)."""
        if count == 1:
            return eights[0][i]
        token = quotient(lane, count) + i % count * (LANES // count)
        return of_eights([at(y[i // count], token) for y in eights], remainder(lane, count))

    def by_sublane(start: int, column: jax.Array) -> jax.Array:
        """The scales of 128 columns from start on, each in the sublane head % 8."""
        eight = quotient(column, SUBLANES)
        if not by_token:
            return of_eights([y[0] for y in eights], eight)
        token = token_by_lane(SUBLANES, start, columns)
        if LANES % count:
            i = start // columns // LANES
            return of_eights([at(y[i], token - i * LANES) for y in eights], eight)
        i = start // columns // (LANES // count)
        lanes = (token - i * (LANES // count)) * count
        return at(interleaved(i), lanes + eight if count > 1 else lanes)

    found: Slices = []
    for start in range(0, n * LANES, LANES):
        column = column_by_lane(SUBLANES, start, columns)
        x = by_sublane(start, column)
        if heads == 1:
            x = x[:1]
        elif not plan.compact or plan.head_rows > 1:
            own = remainder(column, SUBLANES) if count > 1 else column
            own = own == lax.broadcasted_iota(jnp.int32, x.shape, 0)
            x = jnp.where(own, x, 0.0).sum(axis=0, keepdims=True)
        found.append(x)
    return found


def _selection(layout: CacheForm, chunk: int, dtype: Any, *, tokens_first: bool) -> jax.Array:
    """A matrix of 1 where a column is of a token: [columns, tokens], or [tokens, columns]."""
    shape = (chunk * layout.columns, chunk)
    shape = shape[::-1] if tokens_first else shape
    column = lax.broadcasted_iota(jnp.int32, shape, 1 if tokens_first else 0)
    token = lax.broadcasted_iota(jnp.int32, shape, 0 if tokens_first else 1)
    same = quotient(column, layout.columns) == token
    return jnp.where(same, 1.0, 0.0).astype(dtype)


def _in_columns(x: Slices, plan: KernelPlan, layout: CacheForm, dtype: Any) -> jax.Array:
    """Logits or weights in the columns of a cache: [R, columns].

    The matrices select sums of one term, so nothing is lost.
    """
    source, chunk = plan.key, plan.blocks.chunk
    same = alike(source, layout)
    spread = [spread_heads(plan, y) for y in x]
    if not plan.compact and source.columns > 1 and not same:
        spread = [_own(y, plan, source, i) for i, y in enumerate(spread)]
    joined = jnp.concatenate(spread, axis=1)
    if same:
        return joined
    joined = joined.astype(dtype)
    if source.columns > 1:
        select = _selection(source, chunk, dtype, tokens_first=False)
        joined = dot(joined, select).astype(dtype)
    if layout.columns == 1:
        return joined
    select = _selection(layout, chunk, dtype, tokens_first=True)
    columns = lane_slices(dot(joined, select))
    return jnp.concatenate([_own(y, plan, layout, i) for i, y in enumerate(columns)], axis=1)


def _own(x: jax.Array, plan: KernelPlan, layout: CacheForm, index: int) -> jax.Array:
    """The index-th 128 columns, 0 in columns of other heads than the row's: [R, 128]."""
    return jnp.where(own_head(plan, layout, index), x, 0.0)


def weights_of(
    x: Slices,
    cache: CacheBlock,
    plan: KernelPlan,
    j: Any,
    mask: WindowMask | None,
    heads: range | None = None,
) -> jax.Array:
    """Weights of the columns of the logits, as weights of the entries of chunk j of a cache.

    Returns:
      [rows, columns], or [pieces R, columns] where heads are interleaved.
    """
    layout, x = cache.layout, scaled(x, cache, plan, j, mask, heads)
    joined = _in_columns(x, plan, layout, cache.dtype)
    if layout.interleaved and layout.pieces > 1:
        slices = lane_slices(joined)
        pieces = [
            jnp.concatenate([rotate(y, i * layout.heads) for y in slices], axis=1)
            for i in range(layout.pieces)
        ]
        joined = jnp.concatenate(pieces, axis=0)
    return joined.astype(cache.dtype)


def weighted(
    weights: jax.Array,
    cache: CacheBlock,
    plan: KernelPlan,
    j: Any,
    mask: WindowMask | None,
    heads: range | None = None,
) -> jax.Array:
    """The sum of chunk j of a cache by `weights_of`, for the query rows of heads.

    Returns:
      [rows, n], or [pieces R, 128] where heads are interleaved (`sum_shape`).
    """
    layout = cache.layout
    if layout.interleaved:
        return dot(weights, load(cache, plan, j, mask))
    axes = (1, 1 if layout.form is Form.SEQUENCE else 0)
    heads = range(layout.heads) if heads is None else heads
    sums = [
        dot(weights[rows], load(cache, plan, j, mask, h), axes)
        for rows, h in zip(heads_of(layout, plan), heads, strict=False)
    ]
    return jnp.concatenate(sums, axis=0)


def sum_shape(layout: CacheForm, plan: KernelPlan) -> tuple[int, int]:
    """The shape of `weighted` for all heads."""
    if layout.interleaved:
        return layout.pieces * plan.rows, layout.lanes
    return plan.rows, layout.head_dim


def rotate(x: jax.Array, by: int) -> jax.Array:
    """Moves columns up by a number of lanes; masks follow for columns that wrap around."""
    return pltpu.roll(x, by % LANES, 1) if by % LANES else x


def rows_of_chunk(n: int, j: jax.Array | int) -> Any:
    """The index of the rows of chunk j, if a chunk has n."""
    return pl.ds(j * n if isinstance(j, int) else pl.multiple_of(j * n, n), n)


def token_rows(ref: Any, layout: CacheForm, plan: KernelPlan, j: jax.Array | int) -> jax.Array:
    """The rows of chunk j in the form TOKENS.

    Bytes are loaded as words: XLA keeps 8 rows of bytes together, a quarter of a register, and
    Mosaic would load and widen each quarter by itself.
    """
    n = plan.blocks.chunk * layout.rows_per_token
    if layout.packing == 4 and interpret_mode() is None:
        words = ref.bitcast(jnp.int32)[0, rows_of_chunk(n // layout.packing, j), :]
        return pltpu.bitcast(words, ref.dtype)
    rows: jax.Array = ref[0, rows_of_chunk(n, j), :]
    return rows


def load(
    cache: CacheBlock, plan: KernelPlan, j: Any, mask: WindowMask | None, head: int = 0
) -> jax.Array:
    """Chunk j of a cache, or of one head of it, with zeros outside of the windows."""
    layout = cache.layout
    if layout.interleaved:
        x = token_rows(cache.ref, layout, plan, j)
    else:
        x = head_block(cache.ref, layout, plan, j, head)
    x = x.astype(cache.dtype)
    return x if mask is None else mask.zero_outside(x, layout, jnp.asarray(j, jnp.int32))


def head_block(
    ref: Any, layout: CacheForm, plan: KernelPlan, j: jax.Array | int, head: int
) -> jax.Array:
    """Chunk j of one head: [chunk, D], or [D, chunk] in the form SEQUENCE; float32 of words."""
    if layout.strided:
        return _strided_block(ref, layout, plan, j, head)
    tokens = rows_of_chunk(plan.blocks.chunk, j)
    block: jax.Array = (
        ref[0, head, :, tokens] if layout.form is Form.SEQUENCE else ref[0, head, tokens, :]
    )
    return block


def _strided_block(
    ref: Any, layout: CacheForm, plan: KernelPlan, j: jax.Array | int, head: int
) -> jax.Array:
    """Chunk j of one head in the form TOKENS: [chunk, D].

    Sublanes are words of 32 bits, so two heads of bfloat16 come in one; with zeros in the other
    half, each is a float32 that rounding does not change. Of four heads of int8 one is moved up to
    the sign, and back.
    """
    pieces = []
    for piece in range(layout.pieces):
        word, half = divmod(layout.place(piece, head), layout.packing)
        x = _strided_words(ref, layout, plan, j, word)
        if layout.packing == 2:
            x = x & jnp.int32(-(2**16)) if half else x << 16
            x = lax.bitcast_convert_type(x, jnp.float32)
        elif layout.packing == 4:
            x = ((x << (24 - 8 * half)) >> 24).astype(jnp.float32)
        pieces.append(x)
    return jnp.concatenate(pieces, axis=1)


def _strided_words(
    ref: Any, layout: CacheForm, plan: KernelPlan, j: jax.Array | int, word: int
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
