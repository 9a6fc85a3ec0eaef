"""The blocks of the cache that windows touch, the loop over them, and their heads in order.

The loop is one of XLA's while loops, which runs its steps one after another. A step handles all
heads of a block that is small enough to stay in a core's cache from one operation to the next.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jax_ragged.lowering._compat import (
    CPU_THREADS_DOTS,
    CPU_UPDATES_BFLOAT16,
    pcast_to_varying,
    varying_axes,
)
from jax_ragged.lowering.cache import positions, positions_axis
from jax_ragged.lowering.contract import Operands, Residuals
from jax_ragged.lowering.params import RaggedAttentionParams, statistics_dtype

_State = TypeVar("_State")
_RowState = TypeVar("_RowState")

# Positions of a block, and bounds to the elements of its keys, such that no step is tiny, and
# the result of one operation is still in a core's cache when the next reads it.
_POSITIONS = 32
_LEAST_ELEMENTS, _MOST_ELEMENTS = 1 << 13, 1 << 16
_FLOAT8 = (jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2"))
# Up to so many pages of a block are sliced one by one, more are gathered.
_PIECES = 8
# Positions that are worth waking threads for.
_THREADED_POSITIONS = 128
# Up to so many rows that share a key head, products of each row with the block are faster than a
# dot that wakes threads.
_ROWS_APART = 8 if CPU_THREADS_DOTS else 1
# Up to so many rows that share a key head, sums of products are faster than a dot of short rows.
_ROWS_UNROLLED = 16


class Block(NamedTuple):
    """One block of one row.

    Attributes:
      row: of the cache.
      start: its first position, such that it lies within the cache.
      position: [T], the positions.
      inside: bool [1 or Q * G, T]: which are new and in the window of each query.
      used: bool [T]: which are inside for any query.
    """

    row: jax.Array
    start: jax.Array
    position: jax.Array
    inside: jax.Array
    used: jax.Array


class Windows(NamedTuple):
    """Windows lo <= t < hi within the cache, [B, Q], and the blocks that they touch.

    Attributes:
      lo, hi: the windows.
      start: [B], the first position of each row's first block.
      blocks: [B], the number of the row's blocks of T positions.
      T: positions of a block.
      S: positions of the cache.
      aligned: whether blocks start at multiples of T, as blocks of pages do. Others start with
        the windows, and the last one of a cache ends with the cache.
    """

    lo: jax.Array
    hi: jax.Array
    start: jax.Array
    blocks: jax.Array
    T: int
    S: int
    aligned: bool

    @classmethod
    def of(cls, operands: Operands | Residuals, params: RaggedAttentionParams) -> "Windows":
        S, T = positions(operands, params), _block_size(operands, params)
        lo, hi = jnp.maximum(operands.starts, 0), jnp.minimum(operands.lengths, S)
        empty = lo >= hi
        start = jnp.where(empty, S, lo).min(axis=1)
        end = jnp.where(empty, 0, hi).max(axis=1)
        step = jnp.int32(T)
        if params.paged:
            start = lax.div(start, step) * step
        span = jnp.maximum(end - start, 0)
        count = lax.div(span, step) + (lax.rem(span, step) > 0).astype(jnp.int32)
        return cls(lo, hi, start, count, T, S, params.paged)

    def fold(
        self,
        state: _State,
        G: int,
        begin_row: Callable[[jax.Array, _State], _RowState],
        block: Callable[[Block, _RowState], _RowState],
        end_row: Callable[[jax.Array, _State, _RowState], _State],
    ) -> _State:
        """Runs through the rows and the blocks of each, the last first.

        G query heads share a key head.
        """

        def row(b: jax.Array, state: _State) -> _State:
            def step(j: jax.Array, row_state: _RowState) -> _RowState:
                return block(self._block(b, count - 1 - j, G), row_state)

            count = self.blocks[b]
            row_state = lax.fori_loop(jnp.zeros_like(count), count, step, begin_row(b, state))
            return end_row(b, state, row_state)

        folded: _State = lax.fori_loop(jnp.int32(0), jnp.int32(self.start.size), row, state)
        return folded

    def _block(self, b: jax.Array, j: jax.Array, G: int) -> Block:
        at = self.start[b] + j * self.T
        start = at if self.aligned else jnp.minimum(at, self.S - self.T)
        position = start + lax.iota(jnp.int32, self.T)
        lo, hi = self.lo[b][:, None], self.hi[b][:, None]
        inside = (position[None] >= jnp.maximum(lo, at)) & (position[None] < hi)
        used = inside.any(axis=0)
        Q = inside.shape[0]
        if Q > 1:
            rows = jnp.broadcast_to(inside[:, None], (Q, G, self.T))
            inside = rows.reshape(Q * G, self.T)
        return Block(b, start, position, inside, used)


def _block_size(operands: Operands | Residuals, params: RaggedAttentionParams) -> int:
    """Positions of a block: as asked, or by elements of a position and rows of a key head."""
    S = positions(operands, params)
    wanted: int = params.block_size or _default_block_size(operands, params)
    if not params.paged:
        return int(min(S, wanted))
    page: int = operands.key.shape[positions_axis(params)]
    parts = [n for n in range(1, page + 1) if page % n == 0]
    whole = [page * n for n in range(1, max(wanted // page, 1) + 1)]
    # A part of a page or several pages: the nearest to the wanted size, as a ratio.
    return min([*parts, *whole], key=lambda T: max(T, wanted) / min(T, wanted))


def _default_block_size(operands: Operands | Residuals, params: RaggedAttentionParams) -> int:
    query, key, value = operands[:3]
    Hkv, D = key.shape[3 - positions_axis(params)], key.shape[3]
    if CPU_THREADS_DOTS and query.shape[1] * query.shape[2] // Hkv > _ROWS_APART:
        return _THREADED_POSITIONS
    elements = Hkv * max(D, value.shape[3])
    T = min(_POSITIONS, _MOST_ELEMENTS // elements)
    if CPU_THREADS_DOTS:  # Before, twice the positions are enough for XLA to wake threads.
        T = T * 4 // key.dtype.itemsize
    return max(16, min(128, max(T, _LEAST_ELEMENTS // elements)))


class Taken(NamedTuple):
    """One block of a cache, widened and by head; 0 where not used.

    Attributes:
      x: [Hkv, T, D].
      scale: [Hkv, T], the factor of each position's x, or None for 1.
    """

    x: jax.Array
    scale: jax.Array | None


class Cache(NamedTuple):
    """Keys or values in any form, or tangents of them, from which blocks are taken.

    Attributes:
      x: [B, S, Hkv, D], or as `params` says: see `Operands`.
      scale: its scale, or None.
      page_table: [B, W], or None.
      params: the static parameters.
    """

    x: jax.Array
    scale: jax.Array | None
    page_table: jax.Array | None
    params: RaggedAttentionParams

    @classmethod
    def pair(
        cls, operands: Operands | Residuals, params: RaggedAttentionParams
    ) -> tuple["Cache", "Cache"]:
        """The keys and the values."""
        table = operands.page_table
        return (
            cls(operands.key, operands.key_scale, table, params),
            cls(operands.value, operands.value_scale, table, params),
        )

    @property
    def heads(self) -> int:
        """Hkv."""
        return int(self.x.shape[3 - positions_axis(self.params)])

    def take(self, block: Block) -> Taken:
        """One block."""
        used = block.used[None, :, None]
        by_head = jnp.where(used, _widened(self.x, self._at(block), self._read), 0)
        if not CPU_THREADS_DOTS:
            # Without the barrier, XLA before 0.11 leaves the heads interleaved, and a dot takes
            # thrice as long; with it, XLA since then writes the block twice.
            by_head = lax.optimization_barrier(by_head)
        if self.scale is None:
            return Taken(by_head, None)
        scale = jnp.where(used, self._read(self.scale[..., None], self._at(block)), 0)
        return Taken(by_head, scale[..., 0])

    def _at(self, block: Block) -> "_Place":
        T = block.position.size
        if self.page_table is None:
            return _Place(block.row[None], block.start, T)
        page = self.x.shape[positions_axis(self.params)]
        first = lax.div(block.start, jnp.int32(page))
        pages = first + lax.iota(jnp.int32, max(T // page, 1))
        pages = self.page_table[block.row, jnp.minimum(pages, self.page_table.shape[1] - 1)]
        return _Place(pages, lax.rem(block.start, jnp.int32(page)), min(T, page))

    def _read(self, x: jax.Array, at: "_Place") -> jax.Array:
        """The place's positions of x, which may have 1 for a dimension, [Hkv, T, D]."""
        axis = positions_axis(self.params)
        sizes = [1, *x.shape[1:]]
        sizes[axis] = min(at.positions, x.shape[axis])
        zero = jnp.int32(0)

        def piece(row: jax.Array) -> jax.Array:
            start = [zero] * 4
            start[0] = zero if x.shape[0] == 1 else row
            start[axis] = zero if x.shape[axis] == 1 else at.start
            return lax.dynamic_slice(x, start, sizes)[0]

        if at.rows.size > _PIECES and x.shape[0] > 1:
            pieces = x.at[at.rows].get(mode="promise_in_bounds")
            pieces = pieces if axis == 2 else pieces.swapaxes(1, 2)
        else:
            read = jnp.stack([piece(at.rows[i]) for i in range(at.rows.size)])
            pieces = read if axis == 2 else read.swapaxes(1, 2)
        full = (at.rows.size, self.heads, at.positions, x.shape[3])
        pieces = jnp.broadcast_to(pieces, full).swapaxes(0, 1)
        return pieces.reshape(self.heads, at.rows.size * at.positions, x.shape[3])

    def gather(self, t: jax.Array) -> jax.Array:
        """The elements at positions t [B, Hkv, R], [B, Hkv, R, D], widened."""
        row, head = (lax.broadcasted_iota(jnp.int32, t.shape, i) for i in (0, 1))
        if self.page_table is not None:
            page = jnp.int32(self.x.shape[positions_axis(self.params)])
            row, t = self.page_table[row, lax.div(t, page)], lax.rem(t, page)

        def at(x: jax.Array) -> jax.Array:
            places = (row, t, head) if positions_axis(self.params) == 1 else (row, head, t)
            index = tuple(0 if n == 1 else i for i, n in zip(places, x.shape, strict=False))
            return x.at[index].get(mode="promise_in_bounds")

        found = at(self.x).astype(statistics_dtype(self.x.dtype))
        if self.scale is not None:
            found = found * at(self.scale[..., None])
        return found


class _Place(NamedTuple):
    """The place of a block: `positions` positions from start on, of each of some rows or pages.

    Attributes:
      rows: [n], of the array's first dimension.
      start: the first position in each.
      positions: their number in each.
    """

    rows: jax.Array
    start: jax.Array
    positions: int


def _widened(x: jax.Array, at: _Place, read: Callable[[jax.Array, _Place], jax.Array]) -> jax.Array:
    """A block of x, widened.

    XLA would rather widen a narrow cache as a whole, ahead of the loops. It cannot if the cache
    comes by way of a value that changes with every step, and, for bfloat16, as bits. Its own
    conversion of 8-bit floats takes several times as long as the products do.
    """
    wide = statistics_dtype(x.dtype)
    if x.dtype == wide:
        return read(x, at)
    x, rows, start = lax.optimization_barrier((x, at.rows, at.start))
    at = at._replace(rows=rows, start=start)
    if x.dtype == jnp.bfloat16:
        bits = read(lax.bitcast_convert_type(x, jnp.uint16), at)
        return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    if x.dtype in _FLOAT8:
        return _float8(read(lax.bitcast_convert_type(x, jnp.int8), at), x.dtype).astype(wide)
    return read(x, at).astype(wide)


def _float8(bits: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The float32 that int8 holds the bits of, exactly.

    float16 has 5 bits of exponent and 10 of mantissa. float8_e5m2 is its upper half. float8_e4m3fn
    has one bit of exponent less and 3 of mantissa: moved to the place of float16's, with the sign
    before them, it is 2**-8 of its value, numbers below the least normal one included. All bits
    set but the sign's, then 480, stand for NaN.
    """
    half = bits.astype(jnp.int16)
    if dtype == jnp.float8_e5m2:
        return lax.bitcast_convert_type(half << 8, jnp.float16).astype(jnp.float32)
    # Behind the 7 moved bits come two signs.
    half = (half << 7) & jnp.int16(-(1 << 14) - 1)
    x = lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256
    return jnp.where(jnp.abs(x) == 480, jnp.nan, x)


def zero_cache(shape: tuple[int, ...], dtype: DTypeLike, tie: jax.Array) -> jax.Array:
    """Zeros to put blocks in; bits of bfloat16 where XLA cannot update it.

    XLA would make a constant once, and copy it on one core for each use but one. So the zero is
    computed from `tie`, in a way that XLA does not see through.
    """
    if dtype == jnp.bfloat16 and not CPU_UPDATES_BFLOAT16:
        dtype = jnp.uint16
    zero = (jnp.abs(tie[(0,) * tie.ndim]) < -1).astype(dtype)
    return jnp.broadcast_to(zero, shape)


def written_cache(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The array in dtype whose blocks were put in x, a zero_cache."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def put_block(x: jax.Array, block: Block, new: jax.Array) -> jax.Array:
    """Writes [T, Hkv, D] over a block of x [B, S, Hkv, D], a zero_cache; 0 where not used.

    A row's last block may overlap the one before it, which is written later and overwrites it.
    """
    at = tuple(map(jnp.int32, (block.row, block.start, 0, 0)))
    new = jnp.where(block.used[:, None, None], new, 0)
    if x.dtype == jnp.uint16:
        new = lax.bitcast_convert_type(new.astype(jnp.bfloat16), jnp.uint16)
    return lax.dynamic_update_slice(x, new.astype(x.dtype)[None], at)


def varying_like(like: jax.Array, x: jax.Array) -> jax.Array:
    """The array x, as the initial value of a loop whose body makes values that vary like `like`."""
    return pcast_to_varying(x, varying_axes(like))


def by_key_head(x: jax.Array, Hkv: int) -> jax.Array:
    """[B, Q, Hq, ...] to [B, Hkv, Q * G, ...]: the rows that share a key head."""
    B, Q, Hq = x.shape[:3]
    x = x.reshape(B, Q, Hkv, Hq // Hkv, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(B, Hkv, Q * (Hq // Hkv), *x.shape[4:])


def by_query(x: jax.Array, Q: int) -> jax.Array:
    """[B, Hkv, Q * G, ...] to [B, Q, Hq, ...]: the inverse of by_key_head."""
    B, Hkv, R = x.shape[:3]
    x = x.reshape(B, Hkv, Q, R // Q, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(B, Q, Hkv * (R // Q), *x.shape[4:])


def pick(x: jax.Array, i: jax.Array) -> jax.Array:
    """x[i], i within bounds."""
    picked: jax.Array = lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
    return picked


def put(x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
    """The array x with x[i] replaced."""
    replaced: jax.Array = lax.dynamic_update_index_in_dim(x, part, i, 0)
    return replaced


def _dot(contract: tuple[int, int], x: jax.Array, y: jax.Array) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(x, y, dims, precision=lax.Precision.HIGHEST)


def along_features(x: jax.Array, y: Taken) -> jax.Array:
    """Products of x [Hkv, R, D] with each position of a block, [Hkv, R, T]."""
    products = _by_row(2, x, y.x)
    return products if y.scale is None else products * y.scale[:, None]


def along_positions(x: jax.Array, y: Taken) -> jax.Array:
    """The sum over a block's positions, each weighted by x [Hkv, R, T], [Hkv, R, D]."""
    return _by_row(1, x if y.scale is None else x * y.scale[:, None], y.x)


def _by_row(axis: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums of x [Hkv, R, n] with y [Hkv, T, D] along n, which is y's axis 1 or 2."""
    R = x.shape[1]
    if R > _ROWS_APART:
        return _dot((2, axis), x, y)
    return jnp.stack([_dot((1, axis), x[:, r], y) for r in range(R)], axis=1)


def along_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """[Hkv, R, T] x [Hkv, R, D] to [T, Hkv, D], as the cache has it."""
    R = x.shape[1]
    if R > _ROWS_UNROLLED:
        return _dot((1, 1), x, y).transpose(1, 0, 2)
    return functools.reduce(jnp.add, (x[:, r].T[..., None] * y[None, :, r] for r in range(R)))


def scaled_query(query: jax.Array, Hkv: int, params: RaggedAttentionParams) -> jax.Array:
    """Query [B, Q, Hq, D], widened and times softmax_scale, by key head: [B, Hkv, Q * G, D]."""
    wide = statistics_dtype(query.dtype)
    return by_key_head(query.astype(wide) * jnp.asarray(params.softmax_scale, wide), Hkv)


def logits(
    q: jax.Array, k: Taken, at: Block, params: RaggedAttentionParams
) -> tuple[jax.Array, jax.Array | float]:
    """A block's logits z, -inf outside of the windows, and dz / ds.

    All passes take logits from here, with one order of operations. The weights that a derivative
    makes of them and of the forward's statistics then sum to 1: a logit of 1e4 has a unit in the
    last place of 1e-3, so another order would move a weight by that much.

    Args:
      q: [Hkv, R, D], as scaled_query gives it.
      k: the block's keys.
      at: the block.
      params: the static parameters.

    Returns:
      z [Hkv, R, T], and its slope in the same shape, or 1.0 without a soft cap.
    """
    s, cap = along_features(q, k), params.logits_soft_cap
    z = s if cap is None else cap * jnp.tanh(s / cap)
    return jnp.where(at.inside[None], z, -jnp.inf), soft_cap_slope(z, params)


def soft_cap_slope(z: jax.Array, params: RaggedAttentionParams) -> jax.Array | float:
    """dz / ds at z."""
    cap = params.logits_soft_cap
    return 1.0 if cap is None else 1 - jnp.square(z / cap)
