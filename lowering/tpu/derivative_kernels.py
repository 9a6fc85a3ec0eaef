"""The kernels of the derivatives, each over the blocks of the cache in place.

Formulas are those of `lowering.reference`, with the softmax normalised: for the logits z of the
columns of a chunk, in the rows and columns of the forward kernel (`chunks`),

    p = exp(z - m)        o" = o' / l        u = l' - <o", o>        a = m' - l l'

    z' = p (<o", v> + u) + a [t = t*]        q' = s' k        k' = s' q        v' = p o"
    z. = s. dz/ds        l o. = sum p z. v + p v. - (sum p z.) o        m. = z.[t*]

with s' = z' dz/ds. Statistics come by lane, [P, 128]: in the lane of a column stands that of its
head. Running results stay by lane too; XLA combines them after the kernel.

Tangents, the cotangent of the query and t* take a grid step for each block that a window touches,
as the forward (`work_list`). Cotangents of the cache are written once, zeros where no window is:
their grid has all blocks, of which those outside of the windows are not read.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ragged.lowering._compat import interpret_mode
from jax_ragged.lowering.tpu.chunks import (
    LOG2_E,
    Plan,
    Slices,
    Windows,
    column_by_lane,
    compact_heads,
    dot,
    head_block,
    join_tiles,
    lane_slices,
    mask_logits,
    products_with_all,
    quotient,
    remainder,
    rows_of_chunk,
    split_tiles,
    spread_heads,
    token_by_lane,
    token_rows,
    weights_of_tiles,
)
from jax_ragged.lowering.tpu.layout import LANES, CacheLayout, Form, alike
from jax_ragged.lowering.tpu.walk import Step, Walk
from jax_ragged.lowering.tpu.work_list import WorkList

# Of t* where there is none.
NOWHERE = jnp.iinfo(jnp.int32).max

Wrt = tuple[bool, bool, bool]


def _of(plan: Plan, layout: CacheLayout) -> Plan:
    """The plan of logits in the columns of a cache."""
    return dataclasses.replace(plan, key=layout)


def _loaded(
    ref: Any, layout: CacheLayout, plan: Plan, j: Any, windows: Windows | None, head: int = 0
) -> jax.Array:
    """Chunk j of a cache, or of one head of it, with zeros outside of the windows."""
    if layout.interleaved:
        x = token_rows(ref, layout, plan, j)
    else:
        x = head_block(ref, layout, plan, j, head)
    return x if windows is None else windows.zero_outside(x, layout, jnp.asarray(j, jnp.int32))


def _heads(layout: CacheLayout, plan: Plan) -> Iterator[slice]:
    return (slice(h * plan.head_rows, (h + 1) * plan.head_rows) for h in range(layout.heads))


def _all_products(
    rows: jax.Array, ref: Any, layout: CacheLayout, plan: Plan, j: Any, windows: Windows | None
) -> Slices:
    """Rows [R, n] times chunk j of a cache: [R, 128] for each 128 columns."""
    if not layout.interleaved:
        by_head = [
            dot(
                rows[head],
                _loaded(ref, layout, plan, j, windows, h),
                transposed=layout.form is not Form.SEQUENCE,
            )
            for h, head in enumerate(_heads(layout, plan))
        ]
        return lane_slices(jnp.concatenate(by_head, axis=0))
    return products_with_all(rows, _loaded(ref, layout, plan, j, windows), layout, plan)


def _products(
    rows: jax.Array, ref: Any, layout: CacheLayout, plan: Plan, j: Any, windows: Windows | None
) -> Slices:
    """Rows [R, n] times chunk j of a cache, in the rows and columns of the logits."""
    own = _of(plan, layout)
    same = alike(layout, plan.key)
    # What brings columns to others sums with zeros; else masks follow.
    x = _all_products(rows, ref, layout, plan, j, None if same else windows)
    x = [compact_heads(own, y) for y in x] if own.compact else x
    if same:
        return x
    x = lane_slices(_in_columns(x, own, plan.key, ref.dtype).astype(jnp.float32))
    return [compact_heads(plan, y) for y in x] if plan.compact else x


def _selection(layout: CacheLayout, chunk: int, dtype: Any, *, tokens_first: bool) -> jax.Array:
    """1 where a column is of a token: [columns, tokens], or [tokens, columns]."""
    shape = (chunk * layout.columns, chunk)
    shape = shape[::-1] if tokens_first else shape
    column = lax.broadcasted_iota(jnp.int32, shape, 1 if tokens_first else 0)
    token = lax.broadcasted_iota(jnp.int32, shape, 0 if tokens_first else 1)
    same = quotient(column, layout.columns) == token
    return jnp.where(same, 1.0, 0.0).astype(dtype)


def _in_columns(x: Slices, plan: Plan, layout: CacheLayout, dtype: Any) -> jax.Array:
    """Logits or weights in the columns of a cache: [R, columns].

    What the matrices select are sums of one term, so nothing is lost.
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


def _own(x: jax.Array, plan: Plan, layout: CacheLayout, index: int) -> jax.Array:
    """The index-th 128 columns, 0 in those of other heads than the row's: [R, 128]."""
    column = column_by_lane(x.shape[0], index * LANES, layout.columns)
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    own = (column == quotient(row, plan.head_rows)) & (column < layout.heads)
    return jnp.where(own, x, 0.0)


def _weights(x: Slices, layout: CacheLayout, plan: Plan, dtype: Any) -> jax.Array:
    """Weights of the columns of the logits as those of a cache: [R, columns], or [tiles R, ...]."""
    joined = _in_columns(x, plan, layout, dtype)
    if layout.interleaved:
        joined = weights_of_tiles(joined, layout)
    return joined.astype(dtype)


def _weighted(
    weights: jax.Array, ref: Any, layout: CacheLayout, plan: Plan, j: Any, windows: Windows | None
) -> jax.Array:
    """The sum of chunk j of a cache by `_weights`: [R, n], or [tiles R, 128]."""
    if layout.interleaved:
        return dot(weights, _loaded(ref, layout, plan, j, windows))
    sums = [
        dot(
            weights[head],
            _loaded(ref, layout, plan, j, windows, h),
            transposed=layout.form is Form.SEQUENCE,
        )
        for h, head in enumerate(_heads(layout, plan))
    ]
    return jnp.concatenate(sums, axis=0)


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """X' y, as `dot`."""
    exact = lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, (((0,), (0,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A block of the cotangent of a cache: weights of rows [R, n], written or added to ref."""

    ref: Any
    layout: CacheLayout
    weights: jax.Array
    rows: jax.Array

    def factors(self, plan: Plan) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Those whose product is a part of the block: one, or one for each head."""
        if self.layout.interleaved:
            yield self.weights, split_tiles(self.rows, self.layout)
            return
        for head in _heads(self.layout, plan):
            weights, rows = self.weights[head], self.rows[head]
            yield (rows, weights) if self.layout.form is Form.SEQUENCE else (weights, rows)

    @property
    def together(self) -> int:
        """Parts that are stored at once: of strided heads, those that share words."""
        return self.layout.packing if self.layout.strided else 1

    @classmethod
    def of(cls, ref: Any, layout: CacheLayout, weights: jax.Array, rows: jax.Array) -> Self:
        """The sum in the dtype of ref, which is wider than the cache's where sums follow."""
        packing = 4 // ref.dtype.itemsize
        return cls(ref, dataclasses.replace(layout, packing=packing), weights, rows)

    def store(self, part: int, products: Slices, plan: Plan, j: Any, *, add: bool) -> None:
        """The products from a part on, of chunk j."""
        layout = self.layout
        if layout.strided:
            for tile in range(layout.tiles):
                word = layout.row(tile, part) // layout.packing
                words = _packed([lane_slices(x)[tile] for x in products])
                _store_words(self.ref, layout, plan, j, word, words)
            return
        (x,) = products
        chunk = rows_of_chunk(plan.blocks.chunk * layout.columns, j)
        index: tuple[Any, ...] = (0, chunk) if layout.interleaved else (0, part, chunk)
        if layout.form is Form.SEQUENCE:
            index = (0, part, slice(None), chunk)
        self.ref[index] = self.ref[index] + x if add else x.astype(self.ref.dtype)


def _packed(x: Slices) -> jax.Array:
    """One float32, or two as the bfloat16 that share words of 32 bits."""
    if len(x) == 1:
        return x[0]
    even, odd = (
        lax.bitcast_convert_type(y.astype(jnp.bfloat16).astype(jnp.float32), jnp.int32) for y in x
    )
    return odd | lax.shift_right_logical(even, jnp.int32(16))


def _store_words(
    ref: Any, layout: CacheLayout, plan: Plan, j: Any, word: int, x: jax.Array
) -> None:
    """Writes one of the words of each token of chunk j, the inverse of how `chunks` reads them."""
    n, stride = plan.blocks.chunk, layout.stride
    if layout.packing > 1 and interpret_mode() is not None:
        # The interpreter knows no views of a ref in another dtype.
        rows = pltpu.bitcast(token_rows(ref, layout, plan, j), jnp.int32)
        spread = jnp.broadcast_to(x[:, None], (n, stride, x.shape[1])).reshape(rows.shape)
        place = remainder(lax.broadcasted_iota(jnp.int32, rows.shape, 0), stride)
        rows = jnp.where(place == word, spread, rows)
        ref[0, rows_of_chunk(n * layout.rows, j)] = pltpu.bitcast(rows, ref.dtype)
        return
    words = ref if layout.packing == 1 else ref.bitcast(jnp.int32)
    words.at[0, rows_of_chunk(n * stride, j), :][pl.ds(word, n, stride=stride), :] = x


def _outers(factors: Sequence[tuple[jax.Array, jax.Array]]) -> Sequence[jax.Array]:
    """The products X' y; two alike side by side, for a matrix unit that is wide enough."""
    alike = len({(x.shape, y.shape) for x, y in factors}) == 1
    if len(factors) != 2 or not alike or factors[0][1].shape[1] % LANES:
        return [_outer(x, y) for x, y in factors]
    (x, y), (x2, y2) = factors
    zero = jnp.zeros_like(y)
    rows = [jnp.concatenate(r, axis=1) for r in ((y, zero), (zero, y2))]
    product = _outer(jnp.concatenate([x, x2], axis=0), jnp.concatenate(rows, axis=0))
    return jnp.split(product, 2, axis=1)


def _store(sums: list[_Sum], plan: Plan, j: Any, *, add: bool) -> None:
    """What chunk j gives."""
    parts = [list(x.factors(plan)) for x in sums]
    alike = len({(len(x), y.together) for x, y in zip(parts, sums, strict=True)}) == 1
    for group in [range(len(sums))] if alike else [[i] for i in range(len(sums))]:
        step = sums[group[0]].together
        for first in range(0, len(parts[group[0]]), step):
            factors = zip(*(parts[i][first : first + step] for i in group), strict=True)
            products = [_outers(x) for x in factors]
            for i, of_one in zip(group, zip(*products, strict=True), strict=True):
                sums[i].store(first, list(of_one), plan, j, add=add)


def sum_shape(layout: CacheLayout, plan: Plan) -> tuple[int, int]:
    """Of what `_weighted` gives."""
    if layout.interleaved:
        return layout.tiles * plan.rows, layout.lanes
    return plan.rows, layout.head_dim


@dataclasses.dataclass(frozen=True)
class _Logits:
    """Of a chunk, [P, 128] for each 128 columns.

    Attributes:
      z: the logits over `Plan.unit`, -inf where masked.
      dz: the derivatives by <q, k>, or a number.
      position: of the columns in the cache.
    """

    z: Slices
    dz: Slices | float
    position: Slices

    @classmethod
    def of(
        cls, q: jax.Array, k_ref: Any, plan: Plan, start: Any, j: Any, windows: Windows | None
    ) -> "_Logits":
        p = plan.params
        z = _products(q, k_ref, plan.key, plan, j, windows)
        dz: Slices | float = p.softmax_scale
        if p.logits_soft_cap is not None:
            tanh = [jnp.tanh(x * (p.softmax_scale / p.logits_soft_cap)) for x in z]
            z = [p.logits_soft_cap * x for x in tanh]
            dz = [p.softmax_scale * (1 - x * x) for x in tanh]
        elif p.softmax_scale <= 0:
            z = [x * p.softmax_scale for x in z]
        z = [mask_logits(x, plan, j, index, windows) for index, x in enumerate(z)]
        base = start + j * plan.blocks.chunk
        position = [
            token_by_lane(plan.P, index * LANES, plan.key.columns) + base for index in range(len(z))
        ]
        return cls(z, dz, position)

    def weights(self, plan: Plan, m: jax.Array) -> Slices:
        """exp(z - m) for m over `Plan.unit`: as in the forward, to the bit.

        Rows and sums are divided by l outside of the kernel. exp(z - (m + log l)) would lose the
        digits that log l has below the last one of m.
        """
        return [jnp.exp2((z - m) * (plan.unit * LOG2_E)) for z in self.z]

    def times_dz(self, x: Slices) -> Slices:
        """By dz/ds."""
        if isinstance(self.dz, list):
            return [y * dz for y, dz in zip(x, self.dz, strict=True)]
        return x if self.dz == 1 else [y * self.dz for y in x]


def _where_any(p: Slices, x: Slices, windows: Windows | None) -> Slices:
    """X, and 0 where it has the garbage of what lies in no window."""
    if windows is None:
        return x
    return [jnp.where(y > 0, z, 0.0) for y, z in zip(p, x, strict=True)]


Refs = Iterator[Any]


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Statistics of the rows of a step, by lane: [P, 128] each."""

    plan: Plan
    ref: Any

    @classmethod
    def of(cls, plan: Plan, inputs: Refs, scratch: Refs, step: Step) -> Self:
        """The next operand, [1, n, P, 128]; or [1, n, R], which is spread when a row begins."""
        ref = next(inputs)
        if plan.compact:
            return cls(plan, ref.at[0])
        spread = next(scratch)

        @pl.when(step.first)
        def _() -> None:
            for i in range(ref.shape[1]):
                spread[i] = jnp.broadcast_to(ref[0, i : i + 1], (LANES, plan.P)).T

        return cls(plan, spread)

    def __getitem__(self, index: int) -> jax.Array:
        x: jax.Array = self.ref[index]
        return x


def vjp_kernel(
    work: WorkList,
    inputs: Refs,
    outputs: Refs,
    scratch: Refs,
    walk: Walk,
    *,
    wrt: Wrt,
    with_o_bar: bool,
    with_maximum: bool,
) -> None:
    """The cotangents of (query, key, value) in wrt."""
    plan = walk.plan
    step = Step(walk, work)
    bounds = Lanes.of(plan, inputs, scratch, step) if plan.queries > 1 else None
    at = Lanes.of(plan, inputs, scratch, step) if with_maximum else None
    stats = Lanes.of(plan, inputs, scratch, step)
    q_ref, k_ref = next(inputs), next(inputs)
    o_bar_ref = next(inputs) if with_o_bar else None
    v_ref = next(inputs) if with_o_bar and (wrt[0] or wrt[1]) else None
    q_bar_ref, *bar_refs = (next(outputs) if w else None for w in wrt)
    sum_ref = next(scratch) if wrt[0] else None
    accumulates = plan.tiles > 1
    sum_refs = [next(scratch) if accumulates and ref is not None else ref for ref in bar_refs]
    k_bar_ref, v_bar_ref = sum_refs

    if sum_ref is not None:

        @pl.when(step.first)
        def _() -> None:
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    starts = step.valid & (remainder(step.row, plan.tiles) == 0)
    whole = step.touched & step.inner if not accumulates else False

    @pl.when(starts & jnp.logical_not(whole))
    def _() -> None:
        for ref in sum_refs:
            if ref is not None:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

    def p_bar(j: Any, windows: Windows | None, count: int) -> Slices:
        u = stats[1]
        if v_ref is None or o_bar_ref is None:
            return [u] * count
        return [x + u for x in _products(o_bar_ref[0], v_ref, plan.value, plan, j, windows)]

    def weights(j: Any, windows: Windows | None) -> tuple[Slices, Slices]:
        """P and s' of chunk j."""
        logits = _Logits.of(q_ref[0], k_ref, plan, step.start, j, windows)
        p = logits.weights(plan, stats[0])
        if not (wrt[0] or wrt[1]):
            return p, []
        z_bar = [x * y for x, y in zip(p, p_bar(j, windows, len(p)), strict=True)]
        if at is not None:
            # At the maximum p is 1; it is 0 in the columns of other heads.
            z_bar = [
                x + jnp.where((t == at[0]) & (y > 0), stats[2], 0.0)
                for x, y, t in zip(z_bar, p, logits.position, strict=True)
            ]
        return p, _where_any(p, logits.times_dz(z_bar), windows)

    def compute(chunks: list[Any], windows: Windows | None) -> None:
        # All of one kind before the next: the latency of one chunk hides behind the others.
        pairs = [weights(j, windows) for j in chunks]
        sums: list[list[_Sum]] = [[] for _ in chunks]
        if wrt[0] or wrt[1]:
            s_weights = [_weights(s_bar, plan.key, plan, k_ref.dtype) for _, s_bar in pairs]
            if sum_ref is not None:
                total = sum_ref[...]
                for j, x in zip(chunks, s_weights, strict=True):
                    total += _weighted(x, k_ref, plan.key, plan, j, windows)
                sum_ref[...] = total
            if k_bar_ref is not None:
                for of_chunk, x in zip(sums, s_weights, strict=True):
                    of_chunk.append(_Sum.of(k_bar_ref, plan.key, x, q_ref[0]))
        if v_bar_ref is not None and o_bar_ref is not None:
            for of_chunk, (p, _) in zip(sums, pairs, strict=True):
                x = _weights(p, plan.value, plan, k_ref.dtype)
                of_chunk.append(_Sum.of(v_bar_ref, plan.value, x, o_bar_ref[0]))
        for j, of_chunk in zip(chunks, sums, strict=True):
            if of_chunk:
                _store(of_chunk, plan, j, add=accumulates)

    step.chunks(plan, bounds, compute)

    if accumulates:

        @pl.when(step.valid & (remainder(step.row, plan.tiles) == plan.tiles - 1))
        def _write_sums() -> None:
            for ref, total in zip(bar_refs, sum_refs, strict=True):
                if ref is not None and total is not None:
                    ref[...] = total[...].astype(ref.dtype)

    if q_bar_ref is not None and sum_ref is not None:

        @pl.when(step.last)
        def _write_query() -> None:
            total = join_tiles(sum_ref[...], plan)
            q_bar_ref[0, 0] = total.astype(q_bar_ref.dtype)


class _Maximum:
    """The running maximum of each lane, its first position, and its tangent."""

    def __init__(self, m_ref: Any, at_ref: Any, dot_ref: Any = None) -> None:
        self.m_ref, self.at_ref = m_ref, at_ref
        self.dot_ref: Any = dot_ref

    def reset(self) -> None:
        self.m_ref[...] = jnp.full(self.m_ref.shape, -jnp.inf, jnp.float32)
        self.at_ref[...] = jnp.full(self.at_ref.shape, NOWHERE, jnp.int32)
        if self.dot_ref is not None:
            self.dot_ref[...] = jnp.zeros(self.dot_ref.shape, jnp.float32)

    def update(self, logits: list[_Logits], z_dot: list[Slices] | None = None) -> None:
        """By chunks in order."""
        m, at = self.m_ref[...], self.at_ref[...]
        tangent = None if z_dot is None else self.dot_ref[...]
        z = [x for chunk in logits for x in chunk.z]
        position = [x for chunk in logits for x in chunk.position]
        tangents = [None] * len(z) if z_dot is None else [x for chunk in z_dot for x in chunk]
        for x, t, x_dot in zip(z, position, tangents, strict=True):
            moved = x > m
            m, at = jnp.where(moved, x, m), jnp.where(moved, t, at)
            if x_dot is not None and tangent is not None:
                tangent = jnp.where(moved, x_dot, tangent)
        self.m_ref[...], self.at_ref[...] = m, at
        if tangent is not None:
            self.dot_ref[...] = tangent

    def finish(self, plan: Plan, m_out: Any, at_out: Any, dot_out: Any = None) -> None:
        """Writes the results by lane, or by row, if a row has a row of lanes to itself."""
        m, at = self.m_ref[...], self.at_ref[...]
        tangent = None if dot_out is None else self.dot_ref[...]
        if not plan.compact:
            largest = m.max(axis=1, keepdims=True)
            first = jnp.where(m == largest, at, NOWHERE).min(axis=1, keepdims=True)
            if tangent is not None:
                tangent = _as_row(jnp.where(at == first, tangent, 0).sum(axis=1, keepdims=True))
            m, at = _as_row(largest), _as_row(first)
        m_out[0, 0], at_out[0, 0] = m, at
        if dot_out is not None:
            dot_out[0, 0] = tangent


def _as_row(x: jax.Array) -> jax.Array:
    """[P, 1] to [1, P]."""
    return jnp.broadcast_to(x, (x.shape[0], LANES)).T[:1]


def maximum_kernel(work: WorkList, inputs: Refs, outputs: Refs, scratch: Refs, walk: Walk) -> None:
    """T* of each row."""
    plan = walk.plan
    step = Step(walk, work)
    bounds = Lanes.of(plan, inputs, scratch, step) if plan.queries > 1 else None
    q_ref, k_ref = inputs
    maximum = _Maximum(*scratch)
    pl.when(step.first)(maximum.reset)

    def compute(chunks: list[Any], windows: Windows | None) -> None:
        logits = [_Logits.of(q_ref[0], k_ref, plan, step.start, j, windows) for j in chunks]
        maximum.update(logits)

    step.chunks(plan, bounds, compute)
    pl.when(step.last)(lambda: maximum.finish(plan, *outputs))


def jvp_kernel(
    work: WorkList, inputs: Refs, outputs: Refs, scratch: Refs, walk: Walk, *, wrt: Wrt
) -> None:
    """The sums of o., of p z., m. and t*, for the tangents of (query, key, value) in wrt."""
    plan = walk.plan
    step = Step(walk, work)
    bounds = Lanes.of(plan, inputs, scratch, step) if plan.queries > 1 else None
    stats = Lanes.of(plan, inputs, scratch, step)
    q_ref, k_ref = next(inputs), next(inputs)
    v_ref = next(inputs) if wrt[0] or wrt[1] else None
    q_dot_ref, k_dot_ref, v_dot_ref = (next(inputs) if w else None for w in wrt)
    sum_ref, z_sum_ref, *running = scratch
    maximum = _Maximum(*running)

    @pl.when(step.first)
    def _() -> None:
        maximum.reset()
        for ref in (z_sum_ref, sum_ref):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def s_dot(j: Any, windows: Windows | None) -> Slices:
        terms = []
        if q_dot_ref is not None:
            terms.append(_products(q_dot_ref[0], k_ref, plan.key, plan, j, windows))
        if k_dot_ref is not None:
            terms.append(_products(q_ref[0], k_dot_ref, plan.key, plan, j, windows))
        return [functools.reduce(jnp.add, x) for x in zip(*terms, strict=True)]

    def weighted(weights: Slices, ref: Any, j: Any, windows: Windows | None) -> jax.Array:
        joined = _weights(weights, plan.value, plan, k_ref.dtype)
        return _weighted(joined, ref, plan.value, plan, j, windows)

    def compute(chunks: list[Any], windows: Windows | None) -> None:
        logits = [_Logits.of(q_ref[0], k_ref, plan, step.start, j, windows) for j in chunks]
        p = [x.weights(plan, stats[0]) for x in logits]
        total = sum_ref[...]
        if wrt[0] or wrt[1]:
            z_dot = [
                _where_any(y, x.times_dz(s_dot(j, windows)), windows)
                for j, x, y in zip(chunks, logits, p, strict=True)
            ]
            pz_dot = [
                [a * b for a, b in zip(x, y, strict=True)] for x, y in zip(p, z_dot, strict=True)
            ]
            z_sum_ref[...] += functools.reduce(jnp.add, [y for x in pz_dot for y in x])
            maximum.update(logits, z_dot)
            for j, x in zip(chunks, pz_dot, strict=True):
                total += weighted(x, v_ref, j, windows)
        if v_dot_ref is not None:
            for j, x in zip(chunks, p, strict=True):
                total += weighted(x, v_dot_ref, j, windows)
        sum_ref[...] = total

    step.chunks(plan, bounds, compute)

    @pl.when(step.last)
    def _() -> None:
        o_ref, z_sum_out, *rest = outputs
        o_ref[0, 0] = join_tiles(sum_ref[...], plan)
        z_sum = z_sum_ref[...]
        z_sum_out[0, 0] = z_sum if plan.compact else _as_row(z_sum.sum(axis=1, keepdims=True))
        maximum.finish(plan, *rest)
