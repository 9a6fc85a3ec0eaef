"""The derivatives of ragged attention on TPU: the calls of `derivative_kernels`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.reference import Arrays3, Optional3, Residuals
from jax_ragged.lowering.sharding import result_type
from jax_ragged.lowering.tpu import block_size, derivative_kernels as kernels
from jax_ragged.lowering.tpu.call import Call
from jax_ragged.lowering.tpu.chips import Chip
from jax_ragged.lowering.tpu.derivative_kernels import NOWHERE, Wrt
from jax_ragged.lowering.tpu.forward_kernel import Plan
from jax_ragged.lowering.tpu.layout import LANES, CacheLayout, Form
from jax_ragged.lowering.tpu.walk import Walk
from jax_ragged.lowering.tpu.work_list import SCALARS, WorkList


@dataclasses.dataclass(frozen=True)
class Traffic(block_size.Problem):
    """What the block-size model depends on, for a kernel that moves more than keys and values.

    Attributes:
      keys: arrays of the size of the keys that are read or written.
      values: and of the size of the values.
      accumulators: how many of them are summed up in VMEM.
    """

    keys: int = 2
    values: int = 2
    accumulates: bool = False

    def cache_bytes(self, T: int) -> int:
        """Bytes that a step of T positions moves."""
        key, value = (x.block_bytes(T, self.dtype) for x in (self.key, self.value))
        return self.keys * key + self.values * value

    def vmem_bytes(self, T: int, chunk: int) -> int:
        """As of the forward, with the logits' tangents or cotangents and the sums."""
        declared = super().vmem_bytes(T, chunk)
        sums = self.key.block_bytes(T, jnp.float32) + self.value.block_bytes(T, jnp.float32)
        return declared + (sums if self.accumulates else 0)


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


def unview(layout: CacheLayout, x: jax.Array, S: int) -> jax.Array:
    """The inverse of `CacheLayout.view`: [B, S, H, D]."""
    if layout.form is Form.HEADS:
        return x.transpose(0, 2, 1, 3)
    if layout.form is Form.SEQUENCE:
        return x.transpose(0, 3, 1, 2)
    shape = (x.shape[0], S, layout.heads, layout.head_dim)
    x = x.reshape(-1, S, layout.tiles, layout.heads, layout.lanes).transpose(0, 1, 3, 2, 4)
    return x.reshape(shape)


def _traffic(sizes: Call, keys: int, values: int, *, accumulates: bool = False) -> Traffic:
    return Traffic(
        sizes.key, sizes.value, sizes.dtype, sizes.rows, sizes.V, sizes.S, keys, values, accumulates
    )


def jvp_traffic(sizes: Call, wrt: Wrt) -> Traffic:
    """What the kernel of the tangents moves, if those of (query, key, value) in wrt are given."""
    reads_value = wrt[0] or wrt[1]
    return _traffic(sizes, keys=1 + wrt[1], values=reads_value + wrt[2])


def vjp_traffic(sizes: Call, wrt: Wrt, *, with_o_bar: bool = True) -> Traffic:
    """What the kernel of the cotangents moves, if wrt asks for those of (query, key, value)."""
    reads_value = with_o_bar and (wrt[0] or wrt[1])
    accumulates = sizes.tiles > 1 and (wrt[1] or wrt[2])
    return _traffic(sizes, keys=1 + wrt[1], values=reads_value + wrt[2], accumulates=accumulates)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the kernels of one call depend on, beside arrays."""

    sizes: Call
    chip: Chip
    params: RaggedAttentionParams


def choose(
    query: Any, key: Any, value: Any, params: RaggedAttentionParams, chip: Chip
) -> Problem | str:
    """The kernels of a call, or why there are none."""
    sizes = Call(query, key, value)
    largest = vjp_traffic(sizes, (True, True, True))
    blocks = block_size.choose(largest, chip, params.block_size)
    return blocks if isinstance(blocks, str) else Problem(sizes, chip, params)


class _Launch:
    """One kernel with its grid, over operands in the forms that the kernels know."""

    def __init__(
        self, problem: Problem, traffic: Traffic, lo: jax.Array, hi: jax.Array, *, every: bool
    ) -> None:
        sizes, chip, params = problem.sizes, problem.chip, problem.params
        blocks = block_size.choose(traffic, chip, params.block_size)
        if isinstance(blocks, str):
            raise NotImplementedError(f"ragged_attention: {blocks}. Pass block_size=None.")
        count = -(-sizes.S // blocks.T)
        self.sizes = sizes
        self.plan = sizes.plan(blocks, chip, params)
        self.walk = Walk(self.plan, sizes.V, count, every)
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


def jvp(problem: Problem, residuals: Residuals, tangents: Optional3) -> Arrays3:
    """As `lowering.reference.jvp`."""
    return _Derivatives(problem, residuals).jvp(tangents)


def vjp(problem: Problem, residuals: Residuals, cotangents: Optional3, wrt: Wrt) -> Optional3:
    """As `lowering.reference.vjp`."""
    return _Derivatives(problem, residuals).vjp(cotangents, wrt)


def _rows(sizes: Call, x: jax.Array) -> jax.Array:
    """[B, Q, Hq] to [V, R]."""
    return sizes.to_rows(x[..., None])[..., 0]


def _lse(plan: Plan, m: jax.Array, denominator: jax.Array) -> jax.Array:
    """Over `Plan.unit`; 0 for an empty window."""
    empty = denominator == 0
    return jnp.where(empty, 0, m + jnp.log(jnp.where(empty, 1, denominator))) / plan.unit


def _first(launch: _Launch, m: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions of lanes [n, V, R], and the first [V, R] at which the maximum is."""
    m = lanes_by_row(launch.plan, launch.visited(m, -jnp.inf))
    at = lanes_by_row(launch.plan, launch.visited(at, NOWHERE))
    return at, jnp.where(m == m.max(axis=0), at, NOWHERE).min(axis=0)


@dataclasses.dataclass(frozen=True)
class _Derivatives:
    """The derivatives of one call."""

    problem: Problem
    residuals: Residuals

    @property
    def sizes(self) -> Call:
        return self.problem.sizes

    def _launch(self, traffic: Traffic, *, every: bool = False) -> _Launch:
        lengths, starts = self.residuals.lengths, self.residuals.starts
        lo = self.sizes.tile_windows(jnp.maximum(starts, 0))
        hi = self.sizes.tile_windows(jnp.minimum(lengths, self.residuals.key.shape[1]))
        return _Launch(self.problem, traffic, lo, hi, every=every)

    def _lse(self, plan: Plan) -> jax.Array:
        m, denominator = self.residuals.max_logits, self.residuals.denominator
        return _lse(plan, _rows(self.sizes, m), _rows(self.sizes, denominator))

    def first_maximum(self) -> jax.Array:
        """T* of each row: int32 [V, R]."""
        launch = self._launch(_traffic(self.sizes, keys=1, values=0))
        launch.rows(self.sizes.to_rows(self.residuals.query))
        launch.cache(self.residuals.key, self.sizes.key)
        launch.lanes_by_core()
        launch.lanes_by_core(jnp.int32)
        _, first = _first(launch, *launch.run(kernels.maximum_kernel, "ragged_attention_maximum"))
        return first

    def vjp(self, cotangents: Optional3, wrt: Wrt) -> Optional3:
        """As `lowering.reference.vjp`."""
        o_bar, m_bar, l_bar = cotangents
        kernel_wrt = (wrt[0], wrt[1], wrt[2] and o_bar is not None)
        with_maximum = (m_bar is not None or l_bar is not None) and (wrt[0] or wrt[1])
        at = self.first_maximum() if with_maximum else None
        passes = [kernel_wrt]
        if self.sizes.tiles > 1:
            # Sums over tiles and sums over blocks need grids of different order.
            passes = [(kernel_wrt[0], False, False), (False, *kernel_wrt[1:])]
        bars: list[jax.Array | None] = [None, None, None]
        for asked in passes:
            for i, x in zip(_where(asked), self._pass(cotangents, asked, at), strict=True):
                bars[i] = x
        if wrt[2] and o_bar is None:
            bars[2] = jnp.zeros_like(self.residuals.value)
        return bars[0], bars[1], bars[2]

    def _pass(self, cotangents: Optional3, wrt: Wrt, at: jax.Array | None) -> list[jax.Array]:
        """The cotangents of those of (query, key, value) that wrt asks for, by one kernel."""
        if not any(wrt):
            return []
        sizes, (query, key, value) = self.sizes, self.residuals[:3]
        o_bar = cotangents[0]
        every = wrt[1] or wrt[2]
        traffic = vjp_traffic(sizes, wrt, with_o_bar=o_bar is not None)
        launch = self._launch(traffic, every=every)
        plan = launch.plan
        if at is not None:
            launch.lanes(at)
        launch.lanes(self._lse(plan), *self._cotangents_by_row(cotangents))
        launch.rows(sizes.to_rows(query))
        launch.cache(key, sizes.key)
        if o_bar is not None:
            launch.rows(sizes.to_rows(o_bar.astype(value.dtype)))
        if o_bar is not None and (wrt[0] or wrt[1]):
            launch.cache(value, sizes.value)
        if wrt[0]:
            partial = jnp.float32 if launch.walk.cores > 1 else query.dtype
            launch.by_core(sizes.rows, sizes.D, dtype=partial)
            launch.scratch(*kernels.sum_shape(sizes.key, plan))
        for x, layout, asked in ((key, sizes.key, wrt[1]), (value, sizes.value, wrt[2])):
            if asked:
                launch.like_cache(layout, x.dtype)
                if sizes.tiles > 1:
                    launch.scratch(*layout.block_shape(plan.blocks.T))
        kernel = functools.partial(
            kernels.vjp_kernel, wrt=wrt, with_o_bar=o_bar is not None, with_maximum=at is not None
        )
        results = iter(launch.run(kernel, "ragged_attention_vjp"))
        bars = []
        if wrt[0]:
            q_bar = launch.visited(next(results), 0).sum(axis=0)
            bars.append(sizes.from_rows(q_bar.astype(query.dtype)))
        for layout, asked in ((sizes.key, wrt[1]), (sizes.value, wrt[2])):
            if asked:
                bars.append(unview(layout, next(results), sizes.S)[:, : key.shape[1]])
        return bars

    def _cotangents_by_row(self, cotangents: Optional3) -> tuple[jax.Array, jax.Array]:
        """U and a, [V, R]."""
        o_bar, m_bar, l_bar = cotangents
        out, denominator = self.residuals.out, self.residuals.denominator
        u = a = jnp.zeros_like(denominator)
        if o_bar is not None:
            u -= (o_bar.astype(u.dtype) * out.astype(u.dtype)).sum(axis=-1)
        if l_bar is not None:
            u += l_bar * denominator
            a -= l_bar * denominator
        if m_bar is not None:
            a += m_bar
        return _rows(self.sizes, u), _rows(self.sizes, a)

    def jvp(self, tangents: Optional3) -> Arrays3:
        """As `lowering.reference.jvp`."""
        sizes, (query, key, value) = self.sizes, self.residuals[:3]
        q_dot, k_dot, v_dot = tangents
        wrt = (q_dot is not None, k_dot is not None, v_dot is not None)
        launch = self._launch(jvp_traffic(sizes, wrt))
        plan = launch.plan
        launch.lanes(self._lse(plan))
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
        m_dot = jnp.where(at == first, m_dot, 0).sum(axis=0)
        o_sum = sizes.from_rows(launch.visited(o_sum, 0).sum(axis=0))
        z_sum, m_dot = (sizes.from_rows(x[..., None])[..., 0] for x in (z_sum.sum(axis=0), m_dot))
        out, denominator = self.residuals.out, self.residuals.denominator
        o_dot = o_sum - z_sum[..., None] * out.astype(jnp.float32)
        return o_dot.astype(out.dtype), m_dot, denominator * (z_sum - m_dot)


def _where(marks: tuple[bool, ...]) -> list[int]:
    return [i for i, mark in enumerate(marks) if mark]
