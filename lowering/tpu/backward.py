"""The derivatives of ragged attention on TPU: the calls of `derivative_kernels`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ragged.lowering.contract import ByOperand, Residuals, Unsupported
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.sharding import result_type
from jax_ragged.lowering.tpu import block_size, derivative_kernels as kernels
from jax_ragged.lowering.tpu.call import Call, readings
from jax_ragged.lowering.tpu.chips import MIB, Chip
from jax_ragged.lowering.tpu.chunks import Plan
from jax_ragged.lowering.tpu.derivative_kernels import NOWHERE, Wrt
from jax_ragged.lowering.tpu.layout import LANES, CacheLayout
from jax_ragged.lowering.tpu.walk import Walk
from jax_ragged.lowering.tpu.work_list import SCALARS, WorkList

Arrays3 = tuple[jax.Array, jax.Array, jax.Array]
Optional3 = tuple[jax.Array | None, jax.Array | None, jax.Array | None]

# Keys and values of a step: it has more latency to hide than the forward's, of five products.
MIN_BYTES = MIB


@dataclasses.dataclass(frozen=True)
class Traffic(block_size.Problem):
    """What the block-size model depends on, for a kernel that does not just read keys and values.

    Attributes:
      keys: arrays of the size of the keys that are read or written.
      values: and of the size of the values.
      products: with blocks of them; the forward has two.
      accumulates: whether what is written is summed up in VMEM.
    """

    keys: int = 2
    values: int = 2
    products: int = 5
    accumulates: bool = False

    @property
    def registers(self) -> float:
        """As many as the forward would have for this work."""
        return super().registers * self.products / 2

    def cache_bytes(self, T: int) -> int:
        """Bytes that a step of T positions moves."""
        key, value = (x.block_bytes(T, self.dtype) for x in (self.key, self.value))
        return self.keys * key + self.values * value

    def is_short(self, T: int) -> bool:
        """Whether a block of T positions is smaller than it may be and than `MIN_BYTES`."""
        return T < self.S and super().cache_bytes(T) < MIN_BYTES

    def vmem_bytes(self, T: int, chunk: int) -> int:
        """Declared bytes: as in the forward, and float32 sums of what is written."""
        layouts = (self.key, self.value)
        sums = sum(x.block_bytes(T, jnp.float32) for x in layouts) if self.accumulates else 0
        return super().vmem_bytes(T, chunk) + sums


def by_lane(plan: Plan, x: jax.Array) -> jax.Array:
    """Statistics of rows [V, R] in the rows and columns of compact logits, [V, P, 128]."""
    heads = plan.key.heads
    blocks = x.reshape(x.shape[0], -1, plan.P)
    blocks = jnp.repeat(blocks, plan.P // plan.head_rows, axis=1)[:, :heads]
    return jnp.tile(blocks, (1, LANES // heads, 1)).swapaxes(1, 2)


def lanes_by_row(plan: Plan, x: jax.Array) -> jax.Array:
    """Running results as those of rows, to be combined, [n, V, R].

    They are [cores, V, P, 128] with neutral elements in the lanes of other heads, or, if the
    logits are not compact, [cores, V, 1, R].
    """
    if not plan.compact:
        return x[:, :, 0]
    cores, V = x.shape[:2]
    columns, heads = plan.key.columns, plan.key.heads
    x = x.reshape(cores, V, -1, plan.head_rows, LANES // columns, columns)[..., :heads]
    x = x.transpose(0, 2, 4, 1, 5, 3).reshape(-1, V, heads * plan.head_rows)
    return jnp.pad(x, ((0, 0), (0, 0), (0, plan.rows - x.shape[2])))


def _traffic(
    sizes: Call, keys: int, values: int, products: int, *, accumulates: bool = False
) -> Traffic:
    given = (sizes.key, sizes.value, sizes.dtype, sizes.rows, sizes.V, sizes.S)
    return Traffic(*given, keys, values, products, accumulates)


def jvp_traffic(sizes: Call, wrt: Wrt) -> Traffic:
    """What the kernel of the tangents moves, if those of (query, key, value) in wrt are given."""
    reads_value = wrt[0] or wrt[1]
    return _traffic(sizes, 1 + wrt[1], reads_value + wrt[2], 1 + sum(wrt) + reads_value)


def vjp_traffic(
    sizes: Call,
    wrt: Wrt,
    *,
    with_o_bar: bool = True,
    wide: tuple[bool, ...] = (False, False, False),
) -> Traffic:
    """What the kernel of the cotangents moves, if wrt asks for those of (query, key, value).

    One that is wider than its operand, in float32 of bfloat16, counts as two.
    """
    reads_value = with_o_bar and (wrt[0] or wrt[1])
    accumulates = sizes.tiles > 1 and (wrt[1] or wrt[2])
    products = 1 + sum(wrt) + reads_value
    keys, values = (wrt[i] * (1 + wide[i]) for i in (1, 2))
    return _traffic(sizes, 1 + keys, reads_value + values, products, accumulates=accumulates)


def maximum_traffic(sizes: Call) -> Traffic:
    """What the kernel of t* moves."""
    return _traffic(sizes, 1, 0, 1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the kernels of one call depend on, beside arrays.

    Attributes:
      readings: how they can read the cache. Only the first sums cotangents of it over tiles.
      chip: for which they are.
      params: of the operation.
    """

    readings: tuple[Call, ...]
    chip: Chip
    params: RaggedAttentionParams

    def choose(self, traffic_of: Callable[[Call], Traffic]) -> tuple[Call, block_size.Blocks] | str:
        """The reading that computes least in the forward, and its blocks, or why there is none."""
        chosen = [(x, traffic_of(x)) for x in self.readings]
        chosen = [x for i, x in enumerate(chosen) if i == 0 or not x[1].accumulates]
        blocks = [self._blocks(x) for _, x in chosen]
        possible = [
            (block_size.compute_cycles(sizes.problem, self.chip), i)
            for i, (sizes, _) in enumerate(chosen)
            if not isinstance(blocks[i], str)
        ]
        if not possible:
            return str(blocks[0])
        i = min(possible)[1]
        found = blocks[i]
        assert not isinstance(found, str)
        return chosen[i][0], found

    def _blocks(self, traffic: Traffic) -> block_size.Blocks | str:
        asked = self.params.block_size
        blocks = block_size.choose(traffic, self.chip, asked)
        while asked is None and not isinstance(blocks, str) and traffic.is_short(blocks.T):
            larger = block_size.choose(traffic, self.chip, 2 * blocks.T)
            if isinstance(larger, str):
                break
            blocks = larger
        return blocks


def choose(
    query: Any, key: Any, value: Any, params: RaggedAttentionParams, chip: Chip
) -> Problem | str:
    """The kernels of a call, or why there are none."""
    problem = Problem(readings(query, key, value), chip, params)
    largest = problem.choose(lambda x: vjp_traffic(x, (True, True, True)))
    return largest if isinstance(largest, str) else problem


class _Launch:
    """One kernel with its grid, over operands in the forms that the kernels know."""

    def __init__(
        self,
        problem: Problem,
        residuals: Residuals,
        traffic_of: Callable[[Call], Traffic],
        *,
        writes: bool = False,
    ) -> None:
        chosen = problem.choose(traffic_of)
        if isinstance(chosen, str):
            raise Unsupported(chosen)
        sizes, blocks = chosen
        lo = sizes.tile_windows(jnp.maximum(residuals.starts, 0))
        hi = sizes.tile_windows(jnp.minimum(residuals.lengths, residuals.key.shape[1]))
        count = -(-sizes.S // blocks.T)
        self.sizes = sizes
        self.plan = sizes.plan(blocks, problem.chip, problem.params)
        self.walk = Walk(self.plan, sizes.V, count, writes)
        self.work = WorkList.of(lo, hi, blocks.T, count, self.plan.cores)
        self._inputs: list[tuple[jax.Array, pl.BlockSpec]] = []
        self._outputs: list[tuple[Any, pl.BlockSpec]] = []
        self._scratch: list[Any] = []
        if self.plan.queries > 1:
            self.lanes(*(sizes.window_rows(x) for x in (lo, hi)))

    def _index(self, place: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """An index map from (core, row of the work list, block)."""

        def index(core: Any, step: Any, *scalars: Any) -> tuple[Any, ...]:
            row, block, _ = self.walk.place(core, step, WorkList(*scalars))
            return place(core, row, block)

        return index

    def rows(self, x: jax.Array) -> None:
        """Adds an operand [V, ...]."""
        zeros = (0,) * (x.ndim - 1)
        index = self._index(lambda core, row, block: (row, *zeros))
        self._inputs.append((x, pl.BlockSpec((1, *x.shape[1:]), index)))

    def lanes(self, *statistics: jax.Array) -> None:
        """Adds statistics [V, R] as an operand of `kernels.Lanes`."""
        plan = self.plan
        if plan.compact:
            self.rows(jnp.stack([by_lane(plan, x) for x in statistics], axis=1))
        else:
            self.rows(jnp.stack(statistics, axis=1))
            self.scratch(len(statistics), plan.P, LANES, dtype=statistics[0].dtype)

    def cache(self, x: jax.Array, layout: CacheLayout) -> None:
        """Adds an operand like a cache, [B, S, H, D]."""

        def index(core: Any, step: Any, *scalars: Any) -> tuple[Any, ...]:
            return layout.block_index(*self.walk.read(core, step, WorkList(*scalars)))

        view = layout.view(self.sizes.pad_cache(x))
        # Else XLA may fetch all of a small cache to VMEM ahead of the kernel, windows or not.
        view = pltpu.with_memory_space_constraint(view, pltpu.HBM)
        self._inputs.append((view, pl.BlockSpec(layout.block_shape(self.plan.blocks.T), index)))

    def by_core(self, *shape: int, dtype: Any = jnp.float32) -> None:
        """Adds a partial result of each core, [cores, V, *shape]."""
        zeros = (0,) * len(shape)
        index = self._index(lambda core, row, block: (core, row, *zeros))
        full = (self.walk.cores, self.walk.V, *shape)
        self._outputs.append((self._type(full, dtype), pl.BlockSpec((1, 1, *shape), index)))

    def lanes_by_core(self, dtype: Any = jnp.float32) -> None:
        """Adds a running result by lane and where it is written when a row ends."""
        plan = self.plan
        self.by_core(*((plan.P, LANES) if plan.compact else (1, plan.rows)), dtype=dtype)
        self.scratch(plan.P, LANES, dtype=dtype)

    def like_cache(self, layout: CacheLayout, dtype: Any) -> None:
        """Adds a result like the view of a cache."""
        row_of = self.walk.cache_row
        index = self._index(lambda core, row, block: layout.block_index(row_of(row), block))
        block = layout.block_shape(self.plan.blocks.T)
        full = layout.block_shape(self.sizes.S)
        self._outputs.append(
            (self._type((self.sizes.B, *full[1:]), dtype), pl.BlockSpec(block, index))
        )

    def _type(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return result_type(shape, dtype, self._inputs[-1][0])

    def scratch(self, *shape: int, dtype: Any = jnp.float32) -> None:
        self._scratch.append(pltpu.VMEM(shape, dtype))

    def run(self, kernel: Callable[..., None], name: str) -> list[jax.Array]:
        """The results in the order in which they were added."""
        first, last = SCALARS + len(self._inputs), -len(self._scratch) or None

        def body(*refs: Any) -> None:
            parts = (refs[SCALARS:first], refs[first:last], refs[last:] if last else ())
            kernel(WorkList(*refs[:SCALARS]), *map(iter, parts), self.walk)

        results: list[jax.Array] = pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=SCALARS,
                grid=(self.walk.cores, self.walk.steps(self.work)),
                in_specs=[spec for _, spec in self._inputs],
                out_specs=[spec for _, spec in self._outputs],
                scratch_shapes=self._scratch,
            ),
            out_shape=[shape for shape, _ in self._outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=self.plan.blocks.vmem_limit,
            ),
            name=name,
        )(*self.work, *(x for x, _ in self._inputs))
        return results

    def visited(self, x: jax.Array, neutral: float) -> jax.Array:
        """A partial result of each core, where it has one."""
        visited = self.walk.visited(self.work)
        return jnp.where(visited.reshape(*visited.shape, *(1,) * (x.ndim - 2)), x, neutral)


def jvp(problem: Problem, residuals: Residuals, tangents: Any) -> Arrays3:
    """As `lowering.reference.jvp`."""
    return _Derivatives(problem, residuals).jvp(tangents)


def vjp(
    problem: Problem, residuals: Residuals, cotangents: Optional3, wrt: ByOperand[Any]
) -> Optional3:
    """As `lowering.reference.vjp`."""
    return _Derivatives(problem, residuals).vjp(cotangents, wrt)


def _rows(sizes: Call, x: jax.Array) -> jax.Array:
    """[B, Q, Hq] to [V, R]."""
    return sizes.to_rows(x[..., None])[..., 0]


def _unrows(sizes: Call, x: jax.Array) -> jax.Array:
    """[V, R] to [B, Q, Hq]."""
    return sizes.from_rows(x[..., None])[..., 0]


def _first(launch: _Launch, m: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions of lanes [n, V, R], and the first [V, R] at which the maximum is."""
    m = lanes_by_row(launch.plan, launch.visited(m, -jnp.inf))
    at = lanes_by_row(launch.plan, launch.visited(at, NOWHERE))
    return at, jnp.where(m == m.max(axis=0, keepdims=True), at, NOWHERE).min(axis=0)


@dataclasses.dataclass(frozen=True)
class _Derivatives:
    """The derivatives of one call."""

    problem: Problem
    residuals: Residuals

    def _launch(self, traffic_of: Callable[[Call], Traffic], *, writes: bool = False) -> _Launch:
        return _Launch(self.problem, self.residuals, traffic_of, writes=writes)

    @property
    def _empty(self) -> jax.Array:
        """Which windows are empty, or have only logits of -inf: bool [B, Q, Hq]."""
        return self.residuals.denominator == 0

    def _of_windows(self, x: jax.Array) -> jax.Array:
        """Rows [B, Q, Hq, ...] with zeros for the empty windows, which may hold NaN."""
        empty = self._empty.reshape(*self._empty.shape, *(1,) * (x.ndim - 3))
        return jnp.where(empty, jnp.zeros((), x.dtype), x)

    @property
    def _inverse(self) -> jax.Array:
        """1 / denominator, and 0 for an empty window: [B, Q, Hq]."""
        return self._of_windows(1 / jnp.where(self._empty, 1, self.residuals.denominator))

    def _max_logits(self, launch: _Launch) -> jax.Array:
        """Over `Plan.unit`, [V, R]."""
        m = self._of_windows(self.residuals.max_logits)
        return _rows(launch.sizes, launch.plan.in_units(m))

    def first_maximum(self) -> jax.Array:
        """T*: int32 [B, Q, Hq]."""
        launch = self._launch(maximum_traffic)
        launch.rows(launch.sizes.to_rows(self.residuals.query))
        launch.cache(self.residuals.key, launch.sizes.key)
        launch.lanes_by_core()
        launch.lanes_by_core(jnp.int32)
        _, first = _first(launch, *launch.run(kernels.maximum_kernel, "ragged_attention_maximum"))
        return _unrows(launch.sizes, first)

    def vjp(self, cotangents: Optional3, wrt: ByOperand[Any]) -> Optional3:
        """As `lowering.reference.vjp`."""
        o_bar, m_bar, l_bar = cotangents
        asked_for = _given(wrt)
        kernel_wrt = (asked_for[0], asked_for[1], asked_for[2] and o_bar is not None)
        with_maximum = (m_bar is not None or l_bar is not None) and any(kernel_wrt[:2])
        at = self.first_maximum() if with_maximum else None
        passes = [kernel_wrt]
        if self.problem.readings[0].tiles > 1:
            # Sums over tiles and sums over blocks need grids of different order.
            passes = [(kernel_wrt[0], False, False), (False, *kernel_wrt[1:])]
        bars: list[jax.Array | None] = [None, None, None]
        for asked in passes:
            dtypes = ByOperand(*(d if x else None for d, x in zip(wrt[:3], asked, strict=True)))
            for i, x in zip(_where(asked), self._pass(cotangents, dtypes, at), strict=True):
                bars[i] = x
        if asked_for[2] and o_bar is None:
            bars[2] = jnp.zeros(self.residuals.value.shape, wrt.value)
        return bars[0], bars[1], bars[2]

    def _pass(
        self, cotangents: Optional3, dtypes: ByOperand[Any], at: jax.Array | None
    ) -> list[jax.Array]:
        """The cotangents of those of (query, key, value) that have a dtype, by one kernel."""
        wrt = _given(dtypes)
        if not any(wrt):
            return []
        query, key, value = self.residuals[:3]
        with_o_bar = cotangents[0] is not None
        wide = tuple(x is not None and x != query.dtype for x in dtypes)
        launch = self._launch(
            lambda x: vjp_traffic(x, wrt, with_o_bar=with_o_bar, wide=wide),
            writes=wrt[1] or wrt[2],
        )
        sizes, plan = launch.sizes, launch.plan
        if at is not None:
            launch.lanes(_rows(sizes, at))
        o_bar, u, a = self._of_rows(cotangents)
        launch.lanes(self._max_logits(launch), *(_rows(sizes, x) for x in (u, a)))
        launch.rows(sizes.to_rows(self._of_windows(query)))
        launch.cache(key, sizes.key)
        if o_bar is not None:
            launch.rows(sizes.to_rows(o_bar))
        if o_bar is not None and (wrt[0] or wrt[1]):
            launch.cache(value, sizes.value)
        if wrt[0]:
            partial = jnp.float32 if launch.walk.cores > 1 else dtypes.query
            launch.by_core(sizes.rows, sizes.D, dtype=partial)
            launch.scratch(*kernels.sum_shape(sizes.key, plan))
        for dtype, layout in ((dtypes.key, sizes.key), (dtypes.value, sizes.value)):
            if dtype is not None:
                launch.like_cache(layout, dtype)
                if sizes.tiles > 1:
                    launch.scratch(*layout.block_shape(plan.blocks.T))
        kernel = functools.partial(
            kernels.vjp_kernel, wrt=wrt, with_o_bar=with_o_bar, with_maximum=at is not None
        )
        results = iter(launch.run(kernel, "ragged_attention_vjp"))
        bars = []
        if wrt[0]:
            q_bar = launch.visited(next(results), 0).sum(axis=0)
            bars.append(self._of_windows(sizes.from_rows(q_bar.astype(dtypes.query))))
        for layout, asked in ((sizes.key, wrt[1]), (sizes.value, wrt[2])):
            if asked:
                bars.append(layout.unview(next(results), sizes.S)[:, : key.shape[1]])
        return bars

    def _of_rows(self, cotangents: Optional3) -> tuple[jax.Array | None, jax.Array, jax.Array]:
        """o_bar / l [B, Q, Hq, Dv] in the dtype of the cache, u and a [B, Q, Hq]."""
        o_bar, m_bar, l_bar = cotangents
        out, denominator = self.residuals.out, self.residuals.denominator
        u = a = jnp.zeros_like(denominator)
        if o_bar is not None:
            o_bar = self._of_windows(o_bar.astype(u.dtype) * self._inverse[..., None])
            # u cancels products of the values with o_bar / l, so it is taken from the same numbers.
            o_bar = o_bar.astype(self.residuals.value.dtype)
            u -= (o_bar.astype(u.dtype) * out).sum(axis=-1)
        if l_bar is not None:
            u += l_bar
            a -= l_bar * denominator
        if m_bar is not None:
            a += m_bar
        return o_bar, self._of_windows(u), self._of_windows(a)

    def jvp(self, tangents: Any) -> Arrays3:
        """As `lowering.reference.jvp`."""
        query, key, value = self.residuals[:3]
        q_dot, k_dot, v_dot, *_ = tangents
        wrt = (q_dot is not None, k_dot is not None, v_dot is not None)
        launch = self._launch(lambda x: jvp_traffic(x, wrt))
        sizes, plan = launch.sizes, launch.plan
        launch.lanes(self._max_logits(launch))
        launch.rows(sizes.to_rows(query))
        launch.cache(key, sizes.key)
        if wrt[0] or wrt[1]:
            launch.cache(value, sizes.value)
        if q_dot is not None:
            launch.rows(sizes.to_rows(q_dot))
        for x, layout in ((k_dot, sizes.key), (v_dot, sizes.value)):
            if x is not None:
                launch.cache(x, layout)
        launch.by_core(sizes.rows, sizes.Dv)
        launch.scratch(*kernels.sum_shape(sizes.value, plan))
        for dtype in (jnp.float32, jnp.float32, jnp.int32, jnp.float32):
            launch.lanes_by_core(dtype)
        kernel = functools.partial(kernels.jvp_kernel, wrt=wrt)
        o_sum, z_sum, m, at, m_dot = launch.run(kernel, "ragged_attention_jvp")
        at, first = _first(launch, m, at)
        z_sum, m_dot = (lanes_by_row(plan, launch.visited(x, 0)) for x in (z_sum, m_dot))
        m_dot = jnp.where(at == first[None], m_dot, 0).sum(axis=0)
        o_sum = sizes.from_rows(launch.visited(o_sum, 0).sum(axis=0)) * self._inverse[..., None]
        z_sum, m_dot = (_unrows(sizes, x) for x in (z_sum.sum(axis=0), m_dot))
        z_sum *= self._inverse
        out, denominator = self.residuals.out, self.residuals.denominator
        o_dot = o_sum - z_sum[..., None] * out.astype(jnp.float32)
        o_dot = o_dot.astype(self.problem.params.result_dtype(query.dtype))
        l_dot = denominator * (z_sum - m_dot)
        return self._of_windows(o_dot), self._of_windows(m_dot), self._of_windows(l_dot)


def _given(dtypes: ByOperand[Any]) -> Wrt:
    return dtypes.query is not None, dtypes.key is not None, dtypes.value is not None


def _where(marks: tuple[bool, ...]) -> list[int]:
    return [i for i, mark in enumerate(marks) if mark]
