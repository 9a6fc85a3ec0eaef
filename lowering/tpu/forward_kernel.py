"""The forward kernel: streaming softmax over the blocks that a row's windows touch.

A step reads a block of T positions of keys and values, and walks it in chunks. For a chunk, with
R rows of (head, query), the logits of all rows stand in registers [R, 128]:

    s = q k'                    z = s, or cap tanh(scale s / cap)        outside a window: -inf
    m' = max(m, max z)          a = exp(m - m')
    p = exp(z - m')             l = a l + sum p           o = a o + p v

In the form TOKENS (`layout`) the columns are (token, tile, head): one product multiplies all heads
with all, the rows of other heads are masked, and their probabilities are 0. The matrix unit does
this idle work while it would wait for memory; nothing is moved to separate the heads. Where the
lanes of a head are cut in tiles, the products of the tiles are rows of their own, and are brought
together by rotations of the lanes.

In the other forms each head is a product of its own. The idle work grows with the rows, so for
many of them the form TOKENS is read so too, by loads that take the rows of one head.

The unit of z is such that no multiplication is spent: `exp(z - m) = exp2((z - m) exponent)` and
`logit = z unit`.
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
from jax_ragged.lowering.sharding import result_type
from jax_ragged.lowering.tpu.block_size import Blocks
from jax_ragged.lowering.tpu.layout import LANES, SUBLANES, CacheLayout, Form
from jax_ragged.lowering.tpu.work_list import SCALARS, Results, WorkList, item_of_step

LOG2_E = math.log2(math.e)
# The maximum of nothing: finite, so that exp(-inf - LOWEST) is 0 and not NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)

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
        """Rows of the logits after `_compact`."""
        return self._compact_rows if self.compact else self.rows

    @property
    def unit(self) -> float:
        """Logit = z unit."""
        p = self.params
        return p.softmax_scale if p.logits_soft_cap is None and p.softmax_scale > 0 else 1.0

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


def _dot(x: jax.Array, y: jax.Array, *, transposed: bool = False) -> jax.Array:
    """X y, or x y', accumulated in float32; float32 operands are not rounded."""
    exact = lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        y,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def _slices(x: jax.Array) -> Slices:
    return [x[:, c : c + LANES] for c in range(0, x.shape[1], LANES)]


def _to_lanes(x: jax.Array, n: int) -> jax.Array:
    """[R, 128] with equal lanes to [R, n]."""
    if n % LANES != 0 or n > LANES:
        x = jnp.concatenate([x] * -(-n // LANES), axis=1)
    return x if x.shape[1] == n else x[:, :n]


def _quotient(x: jax.Array, n: int) -> jax.Array:
    """X // n of natural numbers."""
    return x >> (n.bit_length() - 1) if n & (n - 1) == 0 else lax.div(x, jnp.int32(n))


def _remainder(x: jax.Array, n: int) -> jax.Array:
    """X % n of natural numbers."""
    return x & (n - 1) if n & (n - 1) == 0 else lax.rem(x, jnp.int32(n))


def _column(rows: int, start: int, period: int) -> jax.Array:
    """The columns from start on, modulo period, by lane: [rows, 128].

    Where the period divides the lanes, all starts give one expression, computed once.
    """
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    return _remainder(lane + start % period, period)


def _token(rows: int, start: int, columns: int) -> jax.Array:
    """The tokens of the columns from start on, by lane: [rows, 128]."""
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    return _quotient(lane + start % columns, columns) + start // columns


class Windows:
    """The windows of the rows of one step, as masks over the columns of a layout."""

    def __init__(self, plan: Plan, lo: jax.Array, hi: jax.Array, block_start: jax.Array) -> None:
        """lo and hi are scalars, or [P, 128] where queries have windows of their own."""
        self._plan, self._lo, self._hi, self._start = plan, lo, hi, block_start

    def mask(self, layout: CacheLayout, j: jax.Array, index: int, rows: int) -> jax.Array:
        """Which columns of the index-th 128 of chunk j lie in the windows: bool [rows, 128].

        The rows are those of whole heads, of which all have the same windows.
        """
        token = _token(rows, index * LANES, layout.columns)
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
            token = _quotient(lax.broadcasted_iota(jnp.int32, v.shape, axis), layout.columns)
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
            parts.append(inside if axis == 1 else _to_lanes(inside.T, shape[1]))
        return jnp.concatenate(parts, axis=axis)


def _own_head(plan: Plan, index: int, first: int = 0, rows: int | None = None) -> jax.Array:
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
    head = _quotient(lax.broadcasted_iota(jnp.int32, shape, 0), plan.head_rows)
    head = head + first // plan.head_rows
    if plan.rows % plan.head_rows or plan.rows // plan.head_rows > layout.heads:
        # Of the rows that pad R, the head is none.
        head = jnp.where(head < layout.heads, head, layout.columns)
    return _column(shape[0], index * LANES, layout.columns) == head


def _compact(plan: Plan, x: jax.Array) -> jax.Array:
    """Brings together what of 128 columns is of the row's head: [R, 128] to [P, 128].

    A column is of one head alone, so in all rows but that head's its logits are of no use.
    Selecting the row blocks by column leaves R / P times less to mask, exponentiate and sum.
    """
    P, columns = plan.P, plan.key.columns
    heads = P // plan.head_rows
    column = _column(P, 0, columns)
    z = x[:P]
    for first in range(heads, plan.key.heads, heads):
        i = first // heads
        z = jnp.where(column >= first, x[i * P : (i + 1) * P], z)
    return z


def _spread(plan: Plan, p: jax.Array) -> jax.Array:
    """The inverse of `_compact`: [P, 128] to [R, 128], 0 where a column is of another head."""
    if not plan.compact or plan.key.columns == 1:
        return p
    return jnp.concatenate(
        [
            jnp.where(_own_head(plan, 0, first, plan.P), p, 0.0)
            for first in range(0, plan.rows, plan.P)
        ],
        axis=0,
    )


def _by_row(plan: Plan, x: jax.Array) -> jax.Array:
    """Statistics by lane, [P, 128], to statistics by row with equal lanes, [R, 128]."""
    if not plan.compact or plan.key.columns == 1:
        return x
    rows = [
        jnp.where(_own_head(plan, 0, first, plan.P), x, LOWEST)
        for first in range(0, plan.rows, plan.P)
    ]
    return jnp.concatenate(
        [jnp.broadcast_to(r.max(axis=1, keepdims=True), r.shape) for r in rows], axis=0
    )


def _across_lanes(plan: Plan, x: jax.Array, combine: Any, reduce: Any) -> jax.Array:
    """Combines the columns of one head, and gives each of them the result: [P, 128]."""
    if not plan.compact or plan.key.columns == 1:
        return jnp.broadcast_to(reduce(x, axis=1, keepdims=True), x.shape)
    shift = LANES // 2
    while shift >= plan.key.columns:
        x = combine(x, pltpu.roll(x, shift, 1))
        shift //= 2
    return x


def _token_rows(ref: Any, layout: CacheLayout, plan: Plan, j: jax.Array | int) -> jax.Array:
    """The rows of chunk j in the form TOKENS."""
    n = plan.blocks.chunk * layout.rows
    start = j * n if isinstance(j, int) else pl.multiple_of(j * n, n)
    rows: jax.Array = ref[0, pl.ds(start, n), :]
    return rows


def _head_block(
    ref: Any, layout: CacheLayout, plan: Plan, j: jax.Array | int, head: int
) -> jax.Array:
    """Chunk j of one head: [chunk, D], or [D, chunk] in the form SEQUENCE."""
    if layout.strided:
        return _strided_block(ref, layout, plan, j, head)
    n = plan.blocks.chunk
    tokens = pl.ds(j * n if isinstance(j, int) else pl.multiple_of(j * n, n), n)
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
        rows: jax.Array = pltpu.bitcast(_token_rows(ref, layout, plan, j), jnp.int32)
        return rows[word::stride]
    words = ref if layout.packing == 1 else ref.bitcast(jnp.int32)
    start = j * n * stride if isinstance(j, int) else pl.multiple_of(j * (n * stride), n * stride)
    chunk = words.at[0, pl.ds(start, n * stride), :]
    loaded: jax.Array = chunk[pl.ds(word, n, stride=stride), :]
    return loaded


def _rotate(x: jax.Array, by: int) -> jax.Array:
    """Moves columns up by a number of lanes; what is wrapped around is masked."""
    return pltpu.roll(x, by % LANES, 1) if by % LANES else x


def _products(q: jax.Array, k_ref: Any, plan: Plan, j: jax.Array | int, heads: range) -> Slices:
    """Q k' of chunk j and a part: [rows, 128] for each 128 columns."""
    key = plan.key
    if not key.interleaved:
        by_head = [
            _slices(
                _dot(
                    q[h * plan.head_rows : (h + 1) * plan.head_rows],
                    _head_block(k_ref, key, plan, j, h),
                    transposed=key.form is not Form.SEQUENCE,
                )
            )
            for h in heads
        ]
        return [jnp.concatenate(parts, axis=0) for parts in zip(*by_head, strict=True)]
    stacked = jnp.concatenate(_slices(q), axis=0) if key.tiles > 1 else q
    s = _slices(_dot(stacked, _token_rows(k_ref, key, plan, j), transposed=True))
    R = plan.rows
    return [
        functools.reduce(
            jnp.add,
            [_rotate(x[i * R : (i + 1) * R], -i * key.heads) for i in range(key.tiles)],
        )
        for x in s
    ]


def _logits(
    q: jax.Array,
    k_ref: Any,
    plan: Plan,
    j: jax.Array | int,
    heads: range,
    windows: Windows | None,
) -> Slices:
    """The logits of chunk j and a part, -inf where masked: [rows, 128] for each 128 columns."""
    p = plan.params
    z = _products(q, k_ref, plan, j, heads)
    if plan.compact:
        z = [_compact(plan, x) for x in z]
    if p.logits_soft_cap is not None:
        factor = p.softmax_scale / p.logits_soft_cap
        z = [p.logits_soft_cap * jnp.tanh(x * factor) for x in z]
    elif p.softmax_scale <= 0:
        z = [x * p.softmax_scale for x in z]
    return [_masked(x, plan, j, index, windows) for index, x in enumerate(z)]


def _masked(
    z: jax.Array, plan: Plan, j: jax.Array | int, index: int, windows: Windows | None
) -> jax.Array:
    key, masks = plan.key, []
    if not plan.compact and key.columns > 1:
        masks.append(_own_head(plan, index))
    if plan.compact and (plan.P > plan.head_rows or key.tiles > 1):
        heads = plan.P // plan.head_rows
        column = _column(plan.P, 0, key.columns)
        row = lax.broadcasted_iota(jnp.int32, z.shape, 0)
        own = _remainder(column, heads) == _quotient(row, plan.head_rows)
        masks.append(own & (column < key.heads) if key.tiles > 1 else own)
    if windows is not None:
        masks.append(windows.mask(key, jnp.asarray(j, jnp.int32), index, z.shape[0]))
    return jnp.where(functools.reduce(jnp.logical_and, masks), z, -jnp.inf) if masks else z


def _weighted_values(
    p: Slices,
    v_ref: Any,
    plan: Plan,
    j: jax.Array | int,
    heads: range,
    windows: Windows | None,
) -> jax.Array:
    """P v of chunk j and a part: [rows, Dv], or [tiles R, 128] where the values have tiles."""
    value = plan.value

    def valid(v: jax.Array) -> jax.Array:
        if windows is None:
            return v
        return windows.zero_outside(v, value, jnp.asarray(j, jnp.int32))

    if not value.interleaved:
        joined = jnp.concatenate(p, axis=1).astype(v_ref.dtype)
        return jnp.concatenate(
            [
                _dot(
                    joined[i * plan.head_rows : (i + 1) * plan.head_rows],
                    valid(_head_block(v_ref, value, plan, j, h)),
                    transposed=value.form is Form.SEQUENCE,
                )
                for i, h in enumerate(heads)
            ],
            axis=0,
        )
    v = valid(_token_rows(v_ref, value, plan, j))
    joined = jnp.concatenate([_spread(plan, x) for x in p], axis=1)
    if value.tiles > 1:
        joined = jnp.concatenate(
            [
                jnp.concatenate([_rotate(x, i * value.heads) for x in _slices(joined)], axis=1)
                for i in range(value.tiles)
            ],
            axis=0,
        )
    return _dot(joined.astype(v.dtype), v)


@dataclasses.dataclass(frozen=True)
class State:
    """The refs of the running statistics: m and l [P, 128], o as _weighted_values gives it.

    A lane of m holds the maximum of the head of its column; a lane of l the sum of its own
    columns alone.
    """

    m_ref: Any
    l_ref: Any
    o_ref: Any

    def reset(self) -> None:
        self.m_ref[...] = jnp.full(self.m_ref.shape, LOWEST, jnp.float32)
        self.l_ref[...] = jnp.zeros(self.l_ref.shape, jnp.float32)
        self.o_ref[...] = jnp.zeros(self.o_ref.shape, jnp.float32)

    def update(
        self,
        plan: Plan,
        z: list[Slices],
        v_ref: Any,
        chunks: list[Any],
        heads: range,
        windows: Windows | None,
    ) -> None:
        """The streaming softmax of a part over more chunks, whose logits are z."""
        rows = plan.rows_of(heads)
        exponent = plan.unit * LOG2_E
        largest = functools.reduce(jnp.maximum, [x for slices in z for x in slices])
        m = self.m_ref[rows]
        m_new = jnp.maximum(m, _across_lanes(plan, largest, jnp.maximum, jnp.max))
        rescale = jnp.exp2((m - m_new) * exponent)
        p = [[jnp.exp2((x - m_new) * exponent) for x in slices] for slices in z]
        self.m_ref[rows] = m_new
        self.l_ref[rows] = self.l_ref[rows] * rescale + functools.reduce(
            jnp.add, [x for slices in p for x in slices]
        )
        by_tile = jnp.concatenate([_by_row(plan, rescale)] * plan.value.stacked, axis=0)
        o = self.o_ref[rows] * _to_lanes(by_tile, self.o_ref.shape[1])
        for j, slices in zip(chunks, p, strict=True):
            o += _weighted_values(slices, v_ref, plan, j, heads, windows)
        self.o_ref[rows] = o

    def results(self, plan: Plan) -> tuple[jax.Array, jax.Array]:
        """Out [R, Dv], max_logits and denominator [2, R] of a row's windows, empty ones too."""
        m = _by_row(plan, self.m_ref[...])
        total = _by_row(plan, _across_lanes(plan, self.l_ref[...], jnp.add, jnp.sum))
        o = self.o_ref[...]
        empty = total == 0
        inverse = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, total))
        R, tiles = plan.rows, plan.value.stacked
        if tiles > 1:
            o = jnp.concatenate([o[i * R : (i + 1) * R] for i in range(tiles)], axis=1)
        max_logits = jnp.where(empty, plan.params.mask_value, m * plan.unit)
        statistics = jnp.concatenate([max_logits.T[:1], total.T[:1]], axis=0)
        return o * _to_lanes(inverse, o.shape[1]), statistics


def _inner_block(q: jax.Array, k_ref: Any, v_ref: Any, state: State, plan: Plan) -> None:
    """A block that lies in every window: no masks of positions, and one update."""
    chunks = list(range(plan.chunks))
    z = [[_logits(q, k_ref, plan, j, heads, None) for j in chunks] for heads in plan.parts]
    for heads, logits in zip(plan.parts, z, strict=True):
        state.update(plan, logits, v_ref, chunks, heads, None)


def _edge_block(
    q: jax.Array,
    k_ref: Any,
    v_ref: Any,
    state: State,
    plan: Plan,
    windows: Windows,
    first: jax.Array,
    last: jax.Array,
) -> None:
    """A block at the edge of a window: the chunks from first to last alone, masked."""

    def chunk(j: jax.Array, _: None) -> None:
        z = [_logits(q, k_ref, plan, j, heads, windows) for heads in plan.parts]
        for heads, logits in zip(plan.parts, z, strict=True):
            state.update(plan, [logits], v_ref, [j], heads, windows)

    lax.fori_loop(first, last, chunk, None)


def _kernel(*refs: Any, plan: Plan) -> None:
    work = WorkList(*refs[:SCALARS])
    rest = list(refs[SCALARS:])
    bounds_ref = rest.pop(0) if plan.queries > 1 else None
    q_ref, k_ref, v_ref, out_ref, statistics_ref, *rest = rest
    part_ref = rest.pop(0) if plan.cores > 1 else None
    state, *bound_refs = State(*rest[:3]), *rest[3:]
    core, step = pl.program_id(0), pl.program_id(1)
    items, steps = work.size[0], work.size[1]
    item = core * steps + step
    valid = item < items
    row = work.row[item]
    start = (work.offset[row] + item) * plan.blocks.T
    end = start + plan.blocks.T

    @pl.when(valid & ((step == 0) | (work.row[jnp.maximum(item - 1, 0)] != row)))
    def _() -> None:
        state.reset()
        if bounds_ref is not None:
            for ref, bound in zip(bound_refs, (0, 1), strict=True):
                spread = jnp.broadcast_to(bounds_ref[0, bound : bound + 1], (LANES, plan.P))
                ref[...] = spread.T

    inner = (work.all_start[row] <= start) & (work.all_end[row] >= end)

    @pl.when(valid & inner)
    def _() -> None:
        _inner_block(q_ref[0], k_ref, v_ref, state, plan)

    @pl.when(valid & jnp.logical_not(inner))
    def _() -> None:
        lo, hi = work.start[row], work.end[row]
        chunk = plan.blocks.chunk
        first = lax.div(jnp.maximum(lo - start, 0), chunk)
        last = lax.div(jnp.minimum(hi, end) - start + (chunk - 1), chunk)
        if bounds_ref is not None:
            lo, hi = (ref[...] for ref in bound_refs)
        windows = Windows(plan, lo, hi, start)
        _edge_block(q_ref[0], k_ref, v_ref, state, plan, windows, first, last)

    ends = (step == steps - 1) | (item == items - 1) | (work.row[item + 1] != row)

    @pl.when(valid & ends)
    def _() -> None:
        out, statistics_ref[0] = state.results(plan)
        out_ref[0] = out.astype(out_ref.dtype)
        if part_ref is not None:

            @pl.when(row == work.size[2])
            def _() -> None:
                part_ref[0] = out


def call(
    plan: Plan,
    work: WorkList,
    bounds: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    name: str,
) -> Results:
    """Runs the kernel.

    Args:
      plan: its static sizes.
      work: its work list.
      bounds: int32 [V, 2, P], start and end of the window of each row of the logits.
      query: [V, R, D].
      key: the view of the keys.
      value: the view of the values.
      name: of the kernel, in HLO and profiles.
    """
    V, R, D = query.shape
    P = plan.P
    Dv, T, cores = plan.value.head_dim, plan.blocks.T, plan.cores

    def row_of(core: Any, step: Any, scalars: Any) -> tuple[Any, Any]:
        work = WorkList(*scalars)
        item = item_of_step(core, step, work.size)
        return work.row[item], work.offset[work.row[item]] + item

    def by_row(rank: int) -> Any:
        return lambda c, i, *s: (row_of(c, i, s)[0], *(0,) * (rank - 1))

    def by_block(layout: CacheLayout) -> Any:
        def index(c: Any, i: Any, *s: Any) -> Any:
            row, block = row_of(c, i, s)
            return layout.block_index(lax.div(row, jnp.int32(plan.tiles)), block)

        return index

    def result(c: Any, i: Any, *s: Any) -> Any:
        return (row_of(c, i, s)[0] + (c if cores > 1 else 0), 0, 0)

    # Else XLA may fetch all of a small cache to VMEM ahead of the kernel, windows or not.
    key, value = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (key, value))
    per_query = plan.queries > 1
    stacked = plan.value.stacked
    scratch = [(P, LANES), (P, LANES), (stacked * R, Dv // stacked)]
    # Out; max_logits and denominator; the exact parts of the row that is cut.
    rows, parts = (V, 0) if cores == 1 else (V + 1, 1)
    out_specs = [pl.BlockSpec((1, *shape), result) for shape in ((R, Dv), (2, R))]
    out_specs += [pl.BlockSpec((1, R, Dv), lambda c, *_: (c, 0, 0))] * parts
    out_shape = [
        result_type((rows, R, Dv), query.dtype, query),
        result_type((rows, 2, R), jnp.float32, query),
    ]
    out_shape += [result_type((cores, R, Dv), jnp.float32, query)] * parts
    results = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=SCALARS,
            grid=(cores, work.size[1]),
            in_specs=[
                *([pl.BlockSpec((1, 2, P), by_row(3))] if per_query else []),
                pl.BlockSpec((1, R, D), by_row(3)),
                pl.BlockSpec(plan.key.block_shape(T), by_block(plan.key)),
                pl.BlockSpec(plan.value.block_shape(T), by_block(plan.value)),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                *(pltpu.VMEM(shape, jnp.float32) for shape in scratch),
                *([pltpu.VMEM((P, LANES), jnp.int32)] * 2 if per_query else []),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=plan.blocks.vmem_limit,
        ),
        name=name,
    )(*work, *([bounds] if per_query else []), query, key, value)
    out, statistics, *merged = results
    return Results(out, statistics[:, 0], statistics[:, 1], merged[0] if merged else None)
