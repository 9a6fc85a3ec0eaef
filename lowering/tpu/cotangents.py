"""The kernel of the cotangents, in one or two passes over the cache.

A bar is a cotangent. With z the logits, s = <q, k>, p = exp(z - m), l = sum p, o = sum p v / l, and
t* the position of the maximum m, a loss changes with z_t through o, l and m by

    z_bar_t = (p_t / l) (<o_bar, v_t> - <o_bar, o>) + l_bar p_t + (m_bar - l l_bar) [t = t*]

since dl/dz_t = p_t at a fixed m, and dl/dm = -l. One division by l, outside of the kernel,

    o_bar / l -> o_bar        u = l_bar - <o_bar, o>        a = m_bar - l l_bar

leaves  z_bar = p (<o_bar, v> + u) + a [t = t*],  and with  s_bar = z_bar dz/ds

    q_bar = s_bar @ k         k_bar = s_bar.T @ q           v_bar = p.T @ o_bar

    query, o_bar [R, n]   keys, values (block)
          |                     |
          +----- products ------+--> p, z_bar -> s_bar [C, 128]
                                       |            |
                     q_bar [R, D] <- sums over blocks
                     k_bar, v_bar (block) <- sums over query rows, heads and tiles

q_bar alone takes a step for each block that a window touches, as the forward. Cotangents of the
cache are written once, with zeros outside of the windows: their grid has all blocks, of which only
blocks that a window touches are read.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ragged.lowering._compat import interpret_mode
from jax_ragged.lowering.cache import positions
from jax_ragged.lowering.contract import ByOperand, ByResult, Residuals
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.tpu.chips import Chip
from jax_ragged.lowering.tpu.choice import (
    Choice,
    KernelPlan,
    Sizes,
    choose,
    readings,
    with_advice,
)
from jax_ragged.lowering.tpu.chunks import (
    CacheBlock,
    Slices,
    WindowMask,
    dot,
    heads_of,
    join_pieces,
    lane_slices,
    products,
    remainder,
    rows_of_chunk,
    split_pieces,
    sum_shape,
    token_rows,
    weighted,
    weights_of,
)
from jax_ragged.lowering.tpu.cost import DERIVATIVE_BYTES, Work
from jax_ragged.lowering.tpu.grid import Step
from jax_ragged.lowering.tpu.launch import Launch, Saved, rows_of
from jax_ragged.lowering.tpu.layout import LANES, CacheForm, Form
from jax_ragged.lowering.tpu.logits import Logits, where_any
from jax_ragged.lowering.tpu.maximum import first_maximum, maximum_work


@dataclasses.dataclass(frozen=True)
class CotangentRefs:
    """The refs of the kernel; a cotangent that is not asked for is None."""

    statistics: Any  # float32 [3, C, 128]: the maxima over KernelPlan.unit, u, and a
    query: Any  # [1, R, D]
    key: CacheBlock  # a block of keys
    value: CacheBlock | None = None  # a block of values, if s_bar is needed
    out_bar: Any = None  # [1, R, Dv], o_bar / l in the dtype of query
    at: Any = None  # int32 [1, C, 128], the positions t*
    query_bar: Any = None  # [1, 1, R, D]
    query_sum: Any = None  # float32 [R, D], or [pieces R, 128]: `sum_shape`
    key_bar: Any = None  # as key.ref, in the dtype that is asked for
    key_sum: Any = None  # float32, as key_bar, if a row has several tiles
    value_bar: Any = None  # as value.ref, in the dtype that is asked for
    value_sum: Any = None  # float32, as value_bar, if a row has several tiles
    bounds: Any = None  # int32 [2, C, 128], the windows where queries have their own


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A block of the cotangent of a cache, weights.T @ rows, written or added to ref."""

    ref: Any  # a block of the view of the cotangent
    layout: CacheForm
    weights: jax.Array  # [R, columns], or [pieces R, columns]
    rows: jax.Array  # [R, n]

    def factors(self, plan: KernelPlan) -> Iterator[tuple[jax.Array, jax.Array]]:
        """The pairs x, y of which x.T @ y is a block, or one head of it."""
        if self.layout.interleaved:
            yield self.weights, split_pieces(self.rows, self.layout)
            return
        for head in heads_of(self.layout, plan):
            weights, rows = self.weights[head], self.rows[head]
            yield (rows, weights) if self.layout.form is Form.SEQUENCE else (weights, rows)

    @property
    def together(self) -> int:
        """Heads that are stored at once: strided heads that share words."""
        return self.layout.packing if self.layout.strided else 1

    @classmethod
    def of(cls, ref: Any, layout: CacheForm, weights: jax.Array, rows: jax.Array) -> Self:
        """The sum in the dtype of ref, which is wider than the cache's where sums follow."""
        return cls(ref, dataclasses.replace(layout, dtype=ref.dtype), weights, rows)

    def store(self, head: int, products: Slices, plan: KernelPlan, j: Any, *, add: bool) -> None:
        """Stores the products of chunk j, from a head on."""
        layout = self.layout
        if layout.strided:
            for piece in range(layout.pieces):
                word = layout.place(piece, head) // layout.packing
                words = _packed([lane_slices(x)[piece] for x in products])
                _store_words(self.ref, layout, plan, j, word, words)
            return
        (x,) = products
        chunk = rows_of_chunk(plan.blocks.chunk * layout.columns, j)
        index: tuple[Any, ...] = (0, chunk) if layout.interleaved else (0, head, chunk)
        if layout.form is Form.SEQUENCE:
            index = (0, head, slice(None), chunk)
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
    ref: Any, layout: CacheForm, plan: KernelPlan, j: Any, word: int, x: jax.Array
) -> None:
    """Writes one of the words of each token of chunk j, the inverse of how `chunks` reads them."""
    n, stride = plan.blocks.chunk, layout.stride
    if layout.packing > 1 and interpret_mode() is not None:
        # The interpreter knows no views of a ref in another dtype.
        rows = pltpu.bitcast(token_rows(ref, layout, plan, j), jnp.int32)
        spread = jnp.broadcast_to(x[:, None], (n, stride, x.shape[1])).reshape(rows.shape)
        place = remainder(lax.broadcasted_iota(jnp.int32, rows.shape, 0), stride)
        rows = jnp.where(place == word, spread, rows)
        ref[0, rows_of_chunk(n * layout.rows_per_token, j)] = pltpu.bitcast(rows, ref.dtype)
        return
    words = ref if layout.packing == 1 else ref.bitcast(jnp.int32)
    words.at[0, rows_of_chunk(n * stride, j), :][pl.ds(word, n, stride=stride), :] = x


def _outers(factors: Sequence[tuple[jax.Array, jax.Array]]) -> Sequence[jax.Array]:
    """The products x.T @ y; two alike side by side, for a matrix unit that is wide enough."""
    alike = len({(x.shape, y.shape) for x, y in factors}) == 1
    if len(factors) != 2 or not alike or factors[0][1].shape[1] % LANES:
        return [dot(x, y, (0, 0)) for x, y in factors]
    (x, y), (x2, y2) = factors
    zero = jnp.zeros_like(y)
    rows = [jnp.concatenate(r, axis=1) for r in ((y, zero), (zero, y2))]
    product = dot(jnp.concatenate([x, x2], axis=0), jnp.concatenate(rows, axis=0), (0, 0))
    return jnp.split(product, 2, axis=1)


def _store(sums: list[_Sum], plan: KernelPlan, j: Any, *, add: bool) -> None:
    """Stores the sums of chunk j; those that are alike share products."""
    pairs = [list(x.factors(plan)) for x in sums]
    alike = len({(len(x), y.together) for x, y in zip(pairs, sums, strict=True)}) == 1
    for group in [range(len(sums))] if alike else [[i] for i in range(len(sums))]:
        step = sums[group[0]].together
        for first in range(0, len(pairs[group[0]]), step):
            factors = zip(*(pairs[i][first : first + step] for i in group), strict=True)
            products = [_outers(x) for x in factors]
            for i, of_one in zip(group, zip(*products, strict=True), strict=True):
                sums[i].store(first, list(of_one), plan, j, add=add)


def _kernel(step: Step, refs: CotangentRefs, plan: KernelPlan) -> None:
    # Blocks of the cache's cotangents are written at once, or summed over the tiles of a row.
    summed = plan.tiles > 1
    key_bar, value_bar = (
        (refs.key_sum, refs.value_sum) if summed else (refs.key_bar, refs.value_bar)
    )
    for_logits = refs.query_bar is not None or refs.key_bar is not None
    tile = remainder(step.tile, plan.tiles)

    if refs.query_sum is not None:

        @pl.when(step.first)
        def _() -> None:
            refs.query_sum[...] = jnp.zeros(refs.query_sum.shape, jnp.float32)

    # A block inside the windows is written whole by its one tile; all others begin with zeros.
    whole = False if summed else step.touched & step.inner

    @pl.when(step.valid & (tile == 0) & jnp.logical_not(whole))
    def _() -> None:
        for ref in (key_bar, value_bar):
            if ref is not None:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

    def p_bar(j: Any, mask: WindowMask | None, count: int) -> Slices:
        u = refs.statistics[1]
        if refs.value is None:
            return [u] * count
        return [x + u for x in products(refs.out_bar[0], refs.value, plan, j, mask)]

    def weights(j: Any, mask: WindowMask | None) -> tuple[Slices, Slices]:
        """Returns p and s_bar of chunk j."""
        logits = Logits.of(refs.query[0], refs.key, plan, j, mask)
        p = logits.weights(refs.statistics[0])
        if not for_logits:
            return p, []
        z_bar = [x * y for x, y in zip(p, p_bar(j, mask, len(p)), strict=True)]
        if refs.at is not None:
            # At the maximum p is 1; it is 0 in the columns of other heads.
            z_bar = [
                x + jnp.where((t == refs.at[0]) & (y > 0), refs.statistics[2], 0.0)
                for x, y, t in zip(z_bar, p, logits.positions(step.start), strict=True)
            ]
        return p, where_any(p, logits.times_dz(z_bar), mask)

    def compute(chunks: list[Any], mask: WindowMask | None) -> None:
        # The weights of all chunks before the sums, and these before the stores: the latency of
        # one chunk hides behind the others.
        pairs = [weights(j, mask) for j in chunks]
        sums: list[list[_Sum]] = [[] for _ in chunks]
        if for_logits:
            s_weights = [
                weights_of(s_bar, refs.key, plan, j, mask)
                for j, (_, s_bar) in zip(chunks, pairs, strict=True)
            ]
            if refs.query_sum is not None:
                total = refs.query_sum[...]
                for j, x in zip(chunks, s_weights, strict=True):
                    total += weighted(x, refs.key, plan, j, mask)
                refs.query_sum[...] = total
            if key_bar is not None:
                for of_chunk, x in zip(sums, s_weights, strict=True):
                    of_chunk.append(_Sum.of(key_bar, plan.key, x, refs.query[0]))
        if value_bar is not None:
            as_value = CacheBlock(value_bar, plan.value, refs.key.dtype)
            for j, of_chunk, (p, _) in zip(chunks, sums, pairs, strict=True):
                x = weights_of(p, as_value, plan, j, mask)
                of_chunk.append(_Sum.of(value_bar, plan.value, x, refs.out_bar[0]))
        for j, of_chunk in zip(chunks, sums, strict=True):
            if of_chunk:
                _store(of_chunk, plan, j, add=summed)

    step.chunks(refs.bounds, compute)

    if summed:

        @pl.when(step.valid & (tile == plan.tiles - 1))
        def _write_sums() -> None:
            for ref, total in ((refs.key_bar, key_bar), (refs.value_bar, value_bar)):
                if ref is not None and total is not None:
                    ref[...] = total[...].astype(ref.dtype)

    if refs.query_bar is not None:

        @pl.when(step.last)
        def _write_query() -> None:
            total = join_pieces(refs.query_sum[...], plan)
            refs.query_bar[0, 0] = total.astype(refs.query_bar.dtype)


def vjp_work(
    sizes: Sizes,
    wrt: tuple[bool, bool, bool],
    *,
    with_o_bar: bool = True,
    wide: tuple[bool, ...] = (False, False, False),
) -> Work:
    """The work of the kernel for the cotangents of the operands (query, key, value) in wrt.

    `wide` says which of them are float32 while the operands are bfloat16.
    """
    reads_value = with_o_bar and (wrt[0] or wrt[1])
    keys, values = (wrt[i] * (1 + wide[i]) for i in (1, 2))
    return sizes.work(
        key_arrays=1 + keys,
        value_arrays=reads_value + values,
        products=1 + sum(wrt) + reads_value,
        summed=sizes.tiles > 1 and (wrt[1] or wrt[2]),
        least_bytes=DERIVATIVE_BYTES,
    )


class VjpPlan(NamedTuple):
    """The kernels of the cotangents of one call.

    Attributes:
      maximum: how the kernel of t* runs, or None.
      passes: the dtypes of the cotangents that each of the others gives, and how it runs.
    """

    maximum: Choice | None
    passes: list[tuple[ByOperand[Any], Choice]]


def _given(dtypes: ByOperand[Any]) -> tuple[bool, bool, bool]:
    return dtypes.query is not None, dtypes.key is not None, dtypes.value is not None


def vjp_plan(
    residuals: Residuals,
    cotangents: ByResult[Any],
    wrt: ByOperand[Any],
    params: RaggedAttentionParams,
    chip: Chip,
) -> VjpPlan:
    """How the kernels run a call, of which only shapes and dtypes matter.

    Raises:
      Unsupported: if one of them cannot.
    """
    sizes = readings(residuals, params)
    with_o_bar = cotangents.out is not None
    asked = wrt if with_o_bar else wrt._replace(value=None)
    passes = [asked]
    if sizes[0].tiles > 1:
        # Sums over tiles and sums over blocks need grids of different order.
        passes = [asked._replace(key=None, value=None), asked._replace(query=None)]
    chosen = []
    for dtypes in passes:
        marks = _given(dtypes)
        if any(marks):
            wide = tuple(x is not None and x != residuals.query.dtype for x in dtypes)
            work_of = functools.partial(vjp_work, wrt=marks, with_o_bar=with_o_bar, wide=wide)
            chosen.append((dtypes, choose(sizes, work_of, chip, params)))
    of_maximum = cotangents.max_logits is not None or cotangents.denominator is not None
    at_maximum = of_maximum and any(_given(asked)[:2])
    maximum = choose(sizes, maximum_work, chip, params) if at_maximum else None
    return VjpPlan(maximum, chosen)


def vjp(
    residuals: Residuals,
    cotangents: ByResult[jax.Array | None],
    wrt: ByOperand[Any],
    params: RaggedAttentionParams,
    chip: Chip,
) -> ByOperand[jax.Array | None]:
    """As `Lowering.vjp`."""
    plan = with_advice(
        params,
        positions(residuals, params),
        lambda asked: vjp_plan(residuals, cotangents, wrt, asked, chip),
    )
    at = None if plan.maximum is None else first_maximum(residuals, plan.maximum)
    bars: dict[str, jax.Array] = {}
    for dtypes, choice in plan.passes:
        bars |= _pass(Saved(residuals), cotangents, dtypes, choice, at)
    if wrt.value is not None and "value" not in bars:
        bars["value"] = jnp.zeros(residuals.value.shape, wrt.value)
    return ByOperand(*map(bars.get, ByOperand._fields))


def _pass(
    saved: Saved,
    cotangents: ByResult[jax.Array | None],
    dtypes: ByOperand[Any],
    choice: Choice,
    at: jax.Array | None,
) -> dict[str, jax.Array]:
    """The cotangents that have a dtype, by one kernel."""
    for_query, for_key, for_value = _given(dtypes)
    query, key, value = saved.residuals[:3]
    launch = Launch(choice, saved.residuals, CotangentRefs, every=for_key or for_value)
    sizes, plan = launch.sizes, launch.plan
    o_bar, u, a = _of_rows(saved, cotangents)
    if at is not None and (for_query or for_key):
        launch.lanes("at", rows_of(sizes, at))
    launch.lanes("statistics", saved.max_logits(launch), rows_of(sizes, u), rows_of(sizes, a))
    launch.rows("query", sizes.to_rows(saved.of_windows(query)))
    launch.cache("key", key, sizes.key, saved.residuals.key_scale)
    if o_bar is not None:
        launch.rows("out_bar", sizes.to_rows(o_bar))
        if for_query or for_key:
            launch.cache("value", value, sizes.value, saved.residuals.value_scale)
    if for_query:
        # The sums of two cores are added first, and rounded then.
        dtype = jnp.float32 if launch.walk.cores > 1 else dtypes.query
        launch.by_core("query_bar", sizes.rows, sizes.D, dtype=dtype)
        launch.scratch("query_sum", *sum_shape(sizes.key, plan))
    for name, layout in (("key", sizes.key), ("value", sizes.value)):
        dtype = getattr(dtypes, name)
        if dtype is not None:
            launch.like_cache(f"{name}_bar", layout, dtype)
            if sizes.tiles > 1:
                launch.scratch(f"{name}_sum", *layout.block_shape(plan.blocks.T))
    found = launch.run(_kernel, "ragged_attention_vjp")
    bars = {}
    if for_query:
        q_bar = launch.visited(found["query_bar"], 0).sum(axis=0).astype(dtypes.query)
        bars["query"] = saved.of_windows(sizes.from_rows(q_bar))
    for name, layout in (("key", sizes.key), ("value", sizes.value)):
        if f"{name}_bar" in found:
            bar = layout.unview(found[f"{name}_bar"], sizes.S)
            bars[name] = sizes.from_positions_first(bar)
    return bars


def _of_rows(
    saved: Saved, cotangents: ByResult[jax.Array | None]
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Returns o_bar / l [B, Q, Hq, Dv] in the dtype of query, and u and a [B, Q, Hq]."""
    o_bar, m_bar, l_bar = cotangents
    query, out, denominator = (getattr(saved.residuals, x) for x in ("query", "out", "denominator"))
    u = a = jnp.zeros_like(denominator)
    if o_bar is not None:
        o_bar = saved.of_windows(o_bar.astype(u.dtype) * saved.inverse[..., None])
        # u cancels products of the values with o_bar / l, so it is taken from the same numbers.
        o_bar = o_bar.astype(query.dtype)
        u -= (o_bar.astype(u.dtype) * out).sum(axis=-1)
    if l_bar is not None:
        u += l_bar
        a -= l_bar * denominator
    if m_bar is not None:
        a += m_bar
    return o_bar, saved.of_windows(u), saved.of_windows(a)
