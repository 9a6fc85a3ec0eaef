"""The derivatives of ragged attention on TPU, each over the blocks of the cache in place.

The grid is (rows, passes, blocks). A block outside of a row's windows is not read: its index map
stays at the nearest one inside. The cotangents of key and value are written once, with zeros
where no window is. Formulas and names are those of `lowering.reference`.

A view (see `_View`) makes `heads` separate problems of R rows, queries times heads, and C columns,
positions of a block, in which the rows and columns of different heads are masked.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.reference import Arrays3, Optional3, Residuals, inverse
from jax_ragged.lowering.sharding import result_type
from jax_ragged.lowering.tpu.chips import MIB, Chip
from jax_ragged.lowering.tpu.layout import LANES, SUBLANES, Form, physical_form, round_up

# Of the VMEM of a core, for what is declared below; the rest is for what the compiler spills.
_VMEM_SHARE = 0.7
_BLOCK_BYTES = MIB // 2
# Arrays [R, C] in float32 that a step holds: z, p, their cotangents or tangents, masks.
_LOGITS = 8


@dataclasses.dataclass(frozen=True)
class _View:
    """The cache in the order in which XLA keeps it, which makes the view free.

    TOKENS: a block is one matrix [T * Hkv, D] for all heads at once, and a row of logits is
    masked where a column belongs to another head. HEADS and SEQUENCE: every head has a matrix of
    its own, [T, D] or [D, T].
    """

    form: Form
    S: int
    Hkv: int
    D: int

    @property
    def transposed(self) -> bool:
        return self.form is Form.SEQUENCE

    @property
    def interleaved(self) -> bool:
        return self.form is Form.TOKENS

    @property
    def _order(self) -> tuple[int, ...]:
        return {
            Form.TOKENS: (0, 1, 2, 3),
            Form.HEADS: (0, 2, 1, 3),
            Form.SEQUENCE: (0, 2, 3, 1),
        }[self.form]

    @property
    def _flat(self) -> bool:
        """Whether [S * Hkv, D] is the same order, so that a block needs no reshape in VMEM."""
        return self.interleaved and (self.Hkv % SUBLANES == 0 or self.D == LANES)

    def _sizes(self, positions: int) -> tuple[int, ...]:
        """Of so many positions in physical order."""
        if self._flat:
            return (positions * self.Hkv, self.D)
        sizes = (positions, self.Hkv, self.D)
        return tuple(sizes[i - 1] for i in self._order[1:])

    def arrange(self, cache: jax.Array) -> jax.Array:
        """[B, S, Hkv, D] in physical order."""
        return cache.transpose(self._order).reshape(self.shape(cache.shape[0]))

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of arrange."""
        sizes = (x.shape[0], self.S, self.Hkv, self.D)
        x = x.reshape([sizes[i] for i in self._order])
        return x.transpose([self._order.index(i) for i in range(4)])

    def shape(self, B: int) -> tuple[int, ...]:
        return (B, *self._sizes(self.S))

    def spec(self, T: int, block: Callable[..., Any]) -> pl.BlockSpec:
        """The block of T positions at (row, position block) = block(*grid indices, *scalars)."""
        axis = 0 if self._flat else self._order.index(1) - 1

        def index(*args: Any) -> tuple[Any, ...]:
            b, t = block(*args)
            return (b, *(t if i == axis else 0 for i in range(len(self._sizes(T)))))

        return pl.BlockSpec((None, *self._sizes(T)), index)

    def positions(self, T: int, axis: int) -> jax.Array:
        """The position in the block of each column, along an axis of a [1, C] or [C, 1] array."""
        C = T * self.Hkv if self.interleaved else T
        column = lax.broadcasted_iota(jnp.int32, (1, C) if axis else (C, 1), axis)
        return lax.div(column, self.Hkv) if self.interleaved else column

    def load(
        self, ref: Any, head: int, T: int, inside: Callable[[jax.Array], jax.Array] | None
    ) -> jax.Array:
        """The matrix of one problem, with zeros at the block's positions that are not inside."""
        x: jax.Array = ref[...].reshape(-1, self.D) if self.interleaved else ref[head]
        if inside is None:
            return x
        position = self.positions(T, int(self.transposed))
        return jnp.where(inside(position), x, jnp.zeros_like(x))

    def store(self, ref: Any, head: int, x: jax.Array) -> None:
        if self.interleaved:
            ref[...] = x.astype(ref.dtype).reshape(ref.shape)
        else:
            ref[head] = x.astype(ref.dtype)

    def rows_times(self, rows: jax.Array, matrix: jax.Array) -> jax.Array:
        """[R, D] and the matrix to [R, C]."""
        return _dot(rows, matrix, ((1,), (0,)) if self.transposed else ((1,), (1,)))

    def columns_times(self, columns: jax.Array, matrix: jax.Array) -> jax.Array:
        """[R, C] and the matrix to [R, D]."""
        return _dot(columns, matrix, ((1,), (1,)) if self.transposed else ((1,), (0,)))

    def outer(self, columns: jax.Array, rows: jax.Array) -> jax.Array:
        """[R, C] and [R, D] to the shape of the matrix, summed over R."""
        left, right = (rows, columns) if self.transposed else (columns, rows)
        return _dot(left, right, ((0,), (0,)))


def _dot(x: jax.Array, y: jax.Array, contract: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """Contracts in y's dtype, float32 without rounding on the way, with float32 results."""
    wide = y.dtype == jnp.float32
    return lax.dot_general(
        x.astype(y.dtype),
        y,
        (contract, ((), ())),
        precision=lax.Precision.HIGHEST if wide else None,
        preferred_element_type=jnp.float32,
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static sizes of one call, and its views of key and value."""

    key: _View
    value: _View
    B: int
    Q: int
    Hq: int
    T: int
    itemsize: int
    params: RaggedAttentionParams

    @classmethod
    def of(
        cls, query: Any, key: Any, value: Any, T: int, params: RaggedAttentionParams
    ) -> "Problem":
        B, Q, Hq, _ = query.shape
        S, Hkv = key.shape[1:3]
        forms = [physical_form(S, Hkv, x.shape[3], x.dtype) for x in (key, value)]
        if Hkv == 1 or set(forms) != {Form.TOKENS}:
            # The problems of key and value must be the same; for one head all orders are rows.
            forms = [Form.HEADS if form is Form.TOKENS else form for form in forms]
        k_view, v_view = (
            _View(form, S, Hkv, x.shape[3]) for form, x in zip(forms, (key, value), strict=True)
        )
        return cls(k_view, v_view, B, Q, Hq, T, key.dtype.itemsize, params)

    @property
    def heads(self) -> int:
        return 1 if self.key.interleaved else self.key.Hkv

    @property
    def R(self) -> int:
        return self.Q * self.Hq // self.heads

    @property
    def C(self) -> int:
        return self.T * self.key.Hkv // self.heads

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.key.S, self.T)

    @property
    def granule(self) -> int:
        """The fewest positions of a block: whole lanes, or whole sublanes of any dtype."""
        return LANES if self.key.transposed or self.value.transposed else 32

    def key_bytes(self) -> int:
        return self.T * self.key.Hkv * round_up(self.key.D, LANES) * self.itemsize

    def vmem_bytes(self) -> int:
        """Double-buffered blocks of four caches, their matrices of one head, and the logits."""
        wide = round_up(self.key.D, LANES) + round_up(self.value.D, LANES)
        blocks = 2 * 2 * self.T * self.key.Hkv * wide * self.itemsize
        # Heads that do not fill the sublanes do so once a block is one matrix.
        heads = round_up(self.key.Hkv, SUBLANES) if self.key.interleaved else 1
        matrices = self.T * heads * wide * (4 + self.itemsize)
        logits = _LOGITS * round_up(self.R, SUBLANES) * round_up(self.C, LANES) * 4
        rows = self.heads * round_up(self.R, SUBLANES) * (4 * wide + 6 * LANES) * 4
        return blocks + matrices + logits + rows

    @property
    def vmem_limit(self) -> int:
        """What the compiler may use: a third more than declared, for what it spills."""
        return max(self.vmem_bytes() * 4 // 3 + MIB, 8 * MIB)

    def rows(self, x: jax.Array) -> jax.Array:
        """[B, Q, Hq, ...] to [B, heads, R, ...]."""
        tail = x.shape[3:]
        x = x.reshape(self.B, self.Q, self.heads, self.Hq // self.heads, *tail)
        return jnp.moveaxis(x, 2, 1).reshape(self.B, self.heads, self.R, *tail)

    def unrows(self, x: jax.Array) -> jax.Array:
        """[B, heads, R, ...] to [B, Q, Hq, ...]."""
        tail = x.shape[3:]
        x = x.reshape(self.B, self.heads, self.Q, self.Hq // self.heads, *tail)
        return jnp.moveaxis(x, 1, 2).reshape(self.B, self.Q, self.Hq, *tail)

    def rows_spec(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.heads, self.R, width), lambda b, *_: (b, 0, 0, 0))

    def same_head(self) -> jax.Array | None:
        """[R, C]: whether row and column belong together; None where all do."""
        if not self.key.interleaved:
            return None
        shape = (self.R, self.C)
        head = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 0), self.Hq)
        return lax.div(head, self.Hq // self.key.Hkv) == lax.rem(
            lax.broadcasted_iota(jnp.int32, shape, 1), self.key.Hkv
        )

    def windows(self, lengths: jax.Array, starts: jax.Array) -> Arrays3:
        """First position and end of every window, and which blocks touch one.

        Returns int32 [B, heads, R, 2] for the rows, [B, 2 * Q] for scalar reads, and [B, 4]:
        the first and the last block, 0 and -1 where every window of the batch row is empty, and
        the first position and the end of what lies in every window.
        """
        S, T = self.key.S, self.T
        first, end = jnp.maximum(starts, 0), jnp.minimum(lengths, S)
        bounds = jnp.stack([first, end], axis=-1)
        rows = jnp.broadcast_to(bounds[:, :, None], (self.B, self.Q, self.Hq, 2))
        valid = first < end
        low = jnp.where(valid, first, S).min(axis=1)
        high = jnp.where(valid, end, 0).max(axis=1)
        blocks = jnp.stack([low // T, jnp.maximum(high - 1, 0) // T], axis=-1)
        blocks = jnp.where((low < high)[:, None], blocks, jnp.array([0, -1], jnp.int32))
        inner = jnp.stack([first.max(axis=1), end.min(axis=1)], axis=-1)
        blocks = jnp.concatenate([blocks, inner], axis=-1)
        return self.rows(rows), bounds.reshape(self.B, 2 * self.Q), blocks


def choose(
    query: Any, key: Any, value: Any, params: RaggedAttentionParams, chip: Chip
) -> Problem | str:
    """The problem with its block size, or why the kernels cannot run it.

    The largest block that VMEM holds, up to `_BLOCK_BYTES` of key: a larger one hides no more.
    """
    S = key.shape[1]
    problem = Problem.of(query, key, value, S, params)
    granule = problem.granule
    if params.block_size is not None:
        if params.block_size % granule != 0 and params.block_size < S:
            return f"block_size={params.block_size} is no multiple of {granule}"
        T = min(params.block_size, round_up(S, granule))
        problem = dataclasses.replace(problem, T=T)
        if problem.vmem_bytes() > chip.vmem:
            return f"the derivatives of blocks of {T} positions do not fit in VMEM"
        return problem
    T = granule
    while T < S and dataclasses.replace(problem, T=2 * T).key_bytes() <= _BLOCK_BYTES:
        T *= 2
    while granule <= T:
        problem = dataclasses.replace(problem, T=T)
        if problem.vmem_bytes() <= _VMEM_SHARE * chip.vmem:
            return problem
        T //= 2
    return (
        f"the derivatives of {problem.Q} queries of {problem.Hq} heads do not fit in VMEM, "
        "even in the smallest blocks"
    )


def _cap(s: jax.Array, params: RaggedAttentionParams) -> tuple[jax.Array, jax.Array]:
    """The capped logits z of unscaled products <q, k>, and dz / d<q, k>."""
    scale, cap = params.softmax_scale, params.logits_soft_cap
    if cap is None:
        return s * scale, jnp.full((), scale, s.dtype)
    tanh = jnp.tanh(s * (scale / cap))
    return cap * tanh, scale * (1 - tanh * tanh)


@dataclasses.dataclass(frozen=True)
class _Block:
    """One block: where it lies, which products count.

    One that is not at an edge lies in every window of its row, and needs no masks of position.
    """

    problem: Problem
    index: jax.Array
    windows_ref: Any
    bounds_ref: Any
    edge: bool

    def inside(self, position: jax.Array) -> jax.Array:
        """Which positions of the block lie in a window of any query."""
        row = pl.program_id(0)
        position = position + self.index * self.problem.T

        def of(query: Any) -> jax.Array:
            first, end = self.windows_ref[row, 2 * query], self.windows_ref[row, 2 * query + 1]
            inside: jax.Array = (position >= first) & (position < end)
            return inside

        # Mosaic carries no vectors of booleans through a loop.
        count: jax.Array = lax.fori_loop(
            0,
            self.problem.Q,
            lambda i, count: count + of(i).astype(jnp.int32),
            jnp.zeros(position.shape, jnp.int32),
        )
        return count > 0

    def key(self, ref: Any, head: int) -> jax.Array:
        inside = self.inside if self.edge else None
        return self.problem.key.load(ref, head, self.problem.T, inside)

    def value(self, ref: Any, head: int) -> jax.Array:
        inside = self.inside if self.edge else None
        return self.problem.value.load(ref, head, self.problem.T, inside)

    def position(self) -> jax.Array:
        """[1, C]: the position in the cache of each column."""
        return self.problem.key.positions(self.problem.T, 1) + self.index * self.problem.T

    def mask(self, head: int) -> jax.Array | None:
        """[R, C]: whether the column lies in the window of the row and belongs to its head."""
        same_head = self.problem.same_head()
        if not self.edge:
            return same_head
        bounds = self.bounds_ref[head]
        position = self.position()
        mask: jax.Array = (position >= bounds[:, :1]) & (position < bounds[:, 1:])
        return mask if same_head is None else mask & same_head


def _where(mask: jax.Array | None, x: jax.Array, y: Any) -> jax.Array:
    return x if mask is None else jnp.where(mask, x, y)


def _find_first_maximum(
    block: _Block, head: int, mask: jax.Array | None, z: jax.Array, max_ref: Any, at_ref: Any
) -> jax.Array:
    """Updates the running maximum and its position; returns which rows [R, 1] have moved."""
    z = _where(mask, z, -jnp.inf)
    block_max = z.max(axis=1, keepdims=True)
    # A row without a valid column has -inf for its maximum, which moves nothing.
    here = jnp.where(z == block_max, block.position(), jnp.iinfo(jnp.int32).max)
    moved: jax.Array = block_max > max_ref[head]
    max_ref[head] = jnp.where(moved, block_max, max_ref[head])
    at_ref[head] = jnp.where(moved, here.min(axis=1, keepdims=True), at_ref[head])
    return moved


def _place(problem: Problem, row: Any, index: Any, blocks_ref: Any) -> tuple[Any, Any]:
    """Whether a block touches a window of the row, and whether it leaves some window."""
    touched = (index >= blocks_ref[row, 0]) & (index <= blocks_ref[row, 1])
    start = index * problem.T
    edge = (start < blocks_ref[row, 2]) | (start + problem.T > blocks_ref[row, 3])
    return touched, edge


def _maximum_scratch(problem: Problem) -> list[Any]:
    shape = (problem.heads, problem.R, 1)
    return [pltpu.VMEM(shape, jnp.float32), pltpu.VMEM(shape, jnp.int32)]


# Columns of the statistics that the kernel of the cotangents reads, float32 [B, heads, R, 4].
# With w = 1 / l, u = l' - <o', o> / l and a = m' - l' l:
#     z_t' = p_t (w <o', v_t> + u) + a [t = t*]
_M, _W, _U, _A = range(4)


def _vjp_kernel(
    blocks_ref: Any,
    windows_ref: Any,
    bounds_ref: Any,
    stats_ref: Any,
    q_ref: Any,
    o_bar_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    problem: Problem,
    wrt: tuple[bool, bool, bool],
    with_o_bar: bool,
    with_maximum: bool,
) -> None:
    outputs = iter(refs)
    q_bar_ref, k_bar_ref, v_bar_ref = (next(outputs) if w else None for w in wrt)
    sum_ref = next(outputs) if wrt[0] else None
    max_ref, at_ref = outputs if with_maximum else (None, None)
    row, passage, index = (pl.program_id(i) for i in range(3))
    touched, edge = _place(problem, row, index, blocks_ref)
    last_passage = passage == int(with_maximum)

    @pl.when((passage == 0) & (index == 0))
    def _start() -> None:
        if sum_ref is not None:
            sum_ref[...] = jnp.zeros_like(sum_ref)
        if max_ref is not None and at_ref is not None:
            max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
            at_ref[...] = jnp.full_like(at_ref, -1)

    def maximum(block: _Block) -> None:
        for head in range(problem.heads):
            s = problem.key.rows_times(q_ref[head], block.key(k_ref, head))
            z, _ = _cap(s, problem.params)
            _find_first_maximum(block, head, block.mask(head), z, max_ref, at_ref)

    def cotangents(block: _Block) -> None:
        for head in range(problem.heads):
            q, k = q_ref[head], block.key(k_ref, head)
            z, dz = _cap(problem.key.rows_times(q, k), problem.params)
            mask = block.mask(head)
            stat = [stats_ref[head, :, i : i + 1] for i in range(4)]
            p = jnp.exp(_where(mask, z - stat[_M], -jnp.inf))
            z_bar = p * stat[_U]
            if with_o_bar:
                o_bar = o_bar_ref[head]
                p_normal = p * stat[_W]
                if wrt[0] or wrt[1]:
                    v = block.value(v_ref, head)
                    z_bar += p_normal * problem.value.rows_times(o_bar, v)
                if v_bar_ref is not None:
                    problem.value.store(v_bar_ref, head, problem.value.outer(p_normal, o_bar))
            elif v_bar_ref is not None:
                v_bar_ref[...] = jnp.zeros_like(v_bar_ref)
            if at_ref is not None:
                at_max = block.position() == at_ref[head]
                z_bar += _where(mask, jnp.where(at_max, stat[_A], 0), 0)
            s_bar = z_bar * dz
            if sum_ref is not None:
                sum_ref[head] += problem.key.columns_times(s_bar, k)
            if k_bar_ref is not None:
                problem.key.store(k_bar_ref, head, problem.key.outer(s_bar, q))

    for at_edge in (False, True):
        block = _Block(problem, index, windows_ref, bounds_ref, at_edge)
        here = touched & (edge if at_edge else jnp.logical_not(edge))
        if with_maximum:
            pl.when(here & (passage == 0))(functools.partial(maximum, block))
        pl.when(here & last_passage)(functools.partial(cotangents, block))

    @pl.when(jnp.logical_not(touched) & last_passage)
    def _zeros() -> None:
        for ref in (k_bar_ref, v_bar_ref):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)

    if q_bar_ref is not None and sum_ref is not None:

        @pl.when(last_passage & (index == problem.blocks - 1))
        def _finish() -> None:
            q_bar_ref[...] = sum_ref[...].astype(q_bar_ref.dtype)


def _read_block(
    b: Any, passage: Any, index: Any, blocks_ref: Any, _: Any = None
) -> tuple[Any, Any]:
    """The block that a step reads: its own, or the nearest that touches a window."""
    del passage
    return b, jnp.clip(index, blocks_ref[b, 0], jnp.maximum(blocks_ref[b, 1], blocks_ref[b, 0]))


def vjp(
    problem: Problem,
    residuals: Residuals,
    cotangents: Optional3,
    wrt: tuple[bool, bool, bool],
) -> Optional3:
    """`lowering.reference.vjp` for the problem that `choose` made of its arguments."""
    query, key, value, lengths, starts, out, max_logits, denominator = residuals
    o_bar, m_bar, l_bar = cotangents
    with_maximum = (m_bar is not None or l_bar is not None) and (wrt[0] or wrt[1])
    zero = jnp.zeros_like(max_logits)
    w = inverse(denominator)
    delta = zero if o_bar is None else (o_bar.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    u = (zero if l_bar is None else l_bar) - delta * w
    a = (zero if m_bar is None else m_bar) - (zero if l_bar is None else l_bar * denominator)
    stats = jnp.stack([max_logits, w, u, a], axis=-1)
    bounds, windows, blocks = problem.windows(lengths, starts)
    if o_bar is None:
        o_bar = jnp.zeros_like(out)

    def write_block(
        b: Any, passage: Any, index: Any, blocks_ref: Any, _: Any = None
    ) -> tuple[Any, Any]:
        del blocks_ref
        return b, index * passage if with_maximum else index

    def v_block(
        b: Any, passage: Any, index: Any, blocks_ref: Any, _: Any = None
    ) -> tuple[Any, Any]:
        ahead = index * passage if with_maximum else index
        return _read_block(b, passage, ahead, blocks_ref)

    B, T, R = problem.B, problem.T, problem.R
    D, Dv = problem.key.D, problem.value.D
    results = [
        (result_type((B, problem.heads, R, D), query.dtype, query), problem.rows_spec(D)),
        (
            result_type(problem.key.shape(B), key.dtype, query),
            problem.key.spec(T, write_block),
        ),
        (
            result_type(problem.value.shape(B), value.dtype, query),
            problem.value.spec(T, write_block),
        ),
    ]
    asked = [r for r, is_asked in zip(results, wrt, strict=True) if is_asked]
    sums = [pltpu.VMEM((problem.heads, R, D), jnp.float32)] if wrt[0] else []
    grads = pl.pallas_call(
        functools.partial(
            _vjp_kernel,
            problem=problem,
            wrt=wrt,
            with_o_bar=cotangents[0] is not None,
            with_maximum=with_maximum,
        ),
        out_shape=[shape for shape, _ in asked],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, 1 + with_maximum, problem.blocks),
            in_specs=[
                problem.rows_spec(2),
                problem.rows_spec(4),
                problem.rows_spec(D),
                problem.rows_spec(Dv),
                problem.key.spec(T, _read_block),
                problem.value.spec(T, v_block),
            ],
            out_specs=[spec for _, spec in asked],
            scratch_shapes=sums + (_maximum_scratch(problem) if with_maximum else []),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=problem.vmem_limit,
        ),
        name="ragged_attention_vjp",
    )(
        blocks,
        windows,
        bounds,
        problem.rows(stats),
        problem.rows(query),
        problem.rows(o_bar),
        problem.key.arrange(key),
        problem.value.arrange(value),
    )
    restore = (problem.unrows, problem.key.restore, problem.value.restore)
    rest = iter(grads)
    q_bar, k_bar, v_bar = (f(next(rest)) if w else None for f, w in zip(restore, wrt, strict=True))
    return q_bar, k_bar, v_bar


def _jvp_kernel(
    blocks_ref: Any,
    windows_ref: Any,
    bounds_ref: Any,
    m_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    problem: Problem,
    wrt: tuple[bool, bool, bool],
) -> None:
    rest = iter(refs)
    q_dot_ref, k_dot_ref, v_dot_ref = (next(rest) if w else None for w in wrt)
    o_sum_ref, z_sum_ref, m_dot_ref, max_ref, at_ref = rest
    row, index = pl.program_id(0), pl.program_id(1)
    touched, edge = _place(problem, row, index, blocks_ref)

    @pl.when(index == 0)
    def _start() -> None:
        for ref in (o_sum_ref, z_sum_ref, m_dot_ref):
            ref[...] = jnp.zeros_like(ref)
        max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
        at_ref[...] = jnp.full_like(at_ref, -1)

    def accumulate(block: _Block) -> None:
        for head in range(problem.heads):
            q, k = q_ref[head], block.key(k_ref, head)
            z, dz = _cap(problem.key.rows_times(q, k), problem.params)
            mask = block.mask(head)
            p = jnp.exp(_where(mask, z - m_ref[head], -jnp.inf))
            if v_dot_ref is not None:
                v_dot = block.value(v_dot_ref, head)
                o_sum_ref[head] += problem.value.columns_times(p, v_dot)
            if q_dot_ref is None and k_dot_ref is None:
                continue
            s_dot = jnp.zeros_like(z)
            if q_dot_ref is not None:
                s_dot += problem.key.rows_times(q_dot_ref[head], k)
            if k_dot_ref is not None:
                s_dot += problem.key.rows_times(q, block.key(k_dot_ref, head))
            z_dot = s_dot * dz
            pz_dot = p * z_dot
            o_sum_ref[head] += problem.value.columns_times(pz_dot, block.value(v_ref, head))
            z_sum_ref[head] += pz_dot.sum(axis=1, keepdims=True)
            moved = _find_first_maximum(block, head, mask, z, max_ref, at_ref)
            at_max = block.position() == at_ref[head]
            here = _where(mask, jnp.where(at_max, z_dot, 0), 0).sum(axis=1, keepdims=True)
            m_dot_ref[head] = jnp.where(moved, here, m_dot_ref[head])

    for at_edge in (False, True):
        block = _Block(problem, index, windows_ref, bounds_ref, at_edge)
        here = touched & (edge if at_edge else jnp.logical_not(edge))
        pl.when(here)(functools.partial(accumulate, block))


def jvp(
    problem: Problem,
    residuals: Residuals,
    tangents: Optional3,
) -> Arrays3:
    """`lowering.reference.jvp` for the problem that `choose` made of its arguments."""
    query, key, value, lengths, starts, out, max_logits, denominator = residuals
    B, T, R = problem.B, problem.T, problem.R
    D, Dv = problem.key.D, problem.value.D
    bounds, windows, blocks = problem.windows(lengths, starts)
    q_dot, k_dot, v_dot = tangents
    wrt = (q_dot is not None, k_dot is not None, v_dot is not None)

    def block(b: Any, index: Any, blocks_ref: Any, _: Any = None) -> tuple[Any, Any]:
        return _read_block(b, 0, index, blocks_ref)

    k_spec, v_spec = problem.key.spec(T, block), problem.value.spec(T, block)
    tangent_specs = [problem.rows_spec(D), k_spec, v_spec]
    arranged = [
        arrange(t)
        for arrange, t in zip(
            (problem.rows, problem.key.arrange, problem.value.arrange), tangents, strict=True
        )
        if t is not None
    ]
    column = result_type((B, problem.heads, R, 1), jnp.float32, query)
    o_sum, z_sum, m_dot = pl.pallas_call(
        functools.partial(_jvp_kernel, problem=problem, wrt=wrt),
        out_shape=[result_type((B, problem.heads, R, Dv), jnp.float32, query), column, column],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, problem.blocks),
            in_specs=[
                problem.rows_spec(2),
                problem.rows_spec(1),
                problem.rows_spec(D),
                k_spec,
                v_spec,
                *(spec for spec, w in zip(tangent_specs, wrt, strict=True) if w),
            ],
            out_specs=[problem.rows_spec(Dv), problem.rows_spec(1), problem.rows_spec(1)],
            scratch_shapes=_maximum_scratch(problem),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=problem.vmem_limit,
        ),
        name="ragged_attention_jvp",
    )(
        blocks,
        windows,
        bounds,
        problem.rows(max_logits[..., None]),
        problem.rows(query),
        problem.key.arrange(key),
        problem.value.arrange(value),
        *arranged,
    )
    o_sum, z_sum, m_dot = map(problem.unrows, (o_sum, z_sum, m_dot))
    z_sum, m_dot = z_sum[..., 0], m_dot[..., 0]
    w = inverse(denominator)
    o_dot = (o_sum - z_sum[..., None] * out.astype(jnp.float32)) * w[..., None]
    return o_dot.astype(out.dtype), m_dot, z_sum - denominator * m_dot
