"""Launching a kernel: its grid, its operands and results by name, and combining cores.

A `Launch` collects operands, results and scratch under names. The kernel gets them as one object
whose attributes are refs of these names, each declared with its shape in the kernel's module; a
ref that is not launched is None.

    XLA      tiles [V, R, n]    bounds [V, 2, P]    cache [B, view]     results by core or tile
                  |                  |                   |                      ^
    specs      tile of step     tile of step     block of step, or the     tile of step
                  |                  |           nearest in the windows         |
    VMEM      [1, R, n]         [1, 2, P]           block_shape(T)          [1, 1, R, n]
"""

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ragged.lowering.contract import Operands, Residuals
from jax_ragged.lowering.sharding import result_type
from jax_ragged.lowering.tpu.choice import Choice, KernelPlan, Sizes
from jax_ragged.lowering.tpu.grid import SCALARS, Step, Walk, WorkList
from jax_ragged.lowering.tpu.layout import LANES, CacheForm

Refs = TypeVar("Refs")
# The position t* of a maximum that is nowhere.
NOWHERE = jnp.iinfo(jnp.int32).max


def by_lane(plan: KernelPlan, x: jax.Array) -> jax.Array:
    """Statistics of query rows [V, R] in the rows and columns of compact logits, [V, P, 128]."""
    heads = plan.key.heads
    blocks = x.reshape(x.shape[0], -1, plan.P)
    blocks = jnp.repeat(blocks, plan.P // plan.head_rows, axis=1)[:, :heads]
    return jnp.tile(blocks, (1, LANES // heads, 1)).swapaxes(1, 2)


def lanes_by_row(plan: KernelPlan, x: jax.Array) -> jax.Array:
    """Running results as results of query rows, to be combined, [n, V, R].

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


class Launch(Generic[Refs]):
    """One kernel over a call.

    Attributes:
      sizes: of the call.
      plan: static sizes of the kernel.
      walk: the grid.
      work: the work list.
    """

    def __init__(
        self,
        choice: Choice,
        operands: Operands | Residuals,
        refs: Callable[..., Refs],
        *,
        every: bool = False,
    ) -> None:
        """Begins with the scalars of the work list, and the bounds of the windows if they differ.

        Args:
          choice: how the kernel runs.
          operands: of the call.
          refs: the class of the kernel's refs. Its `bounds`, [2, P, 128], and what `lanes` adds,
            [n, P, 128], hold a query row's numbers in all of its lanes.
          every: whether every block of the cache has a step.
        """
        sizes, plan = choice.sizes, choice.plan
        lo = sizes.tile_windows(jnp.maximum(operands.starts, 0))
        hi = sizes.tile_windows(jnp.minimum(operands.lengths, operands.key.shape[1]))
        T = choice.blocks.T
        count = -(-sizes.S // T)
        self.sizes, self.plan, self._refs = sizes, plan, refs
        self.walk = Walk(plan, sizes.V, count, every)
        self.work = WorkList.of(lo, hi, T, count, plan.cores)
        self._inputs: dict[str, tuple[jax.Array, pl.BlockSpec]] = {}
        self._outputs: dict[str, tuple[Any, pl.BlockSpec]] = {}
        self._scratch: dict[str, Any] = {}
        self._spread: list[str] = []
        self._compact: list[str] = []
        if plan.queries > 1:
            # The window of a query row does not depend on the head, so P rows have all of them.
            bounds = [sizes.window_rows(x)[:, : plan.P] for x in (lo, hi)]
            self._spread_rows("bounds", jnp.stack(bounds, axis=1))

    def _index(self, place: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """An index map from (core, tile, block)."""

        def index(core: Any, step: Any, *scalars: Any) -> tuple[Any, ...]:
            tile, block, _ = self.walk.place(core, step, WorkList(*scalars))
            return place(core, tile, block)

        return index

    def rows(self, name: str, x: jax.Array) -> None:
        """Adds an operand of tiles, [V, ...]."""
        zeros = (0,) * (x.ndim - 1)
        index = self._index(lambda core, tile, block: (tile, *zeros))
        self._inputs[name] = x, pl.BlockSpec((1, *x.shape[1:]), index)

    def _spread_rows(self, name: str, x: jax.Array) -> None:
        """Adds numbers of query rows, [V, n, P], to spread to lanes when a tile begins."""
        self.rows(name, x)
        self.scratch(f"{name}_by_lane", x.shape[1], self.plan.P, LANES, dtype=x.dtype)
        self._spread.append(name)

    def lanes(self, name: str, *statistics: jax.Array) -> None:
        """Adds statistics of query rows, each [V, R], as a ref [n, P, 128]."""
        plan = self.plan
        if plan.compact:
            # A lane of the compact logits has the number of its column's head.
            self.rows(name, jnp.stack([by_lane(plan, x) for x in statistics], axis=1))
            self._compact.append(name)
        else:
            self._spread_rows(name, jnp.stack(statistics, axis=1))

    def cache(self, name: str, x: jax.Array, layout: CacheForm) -> None:
        """Adds an operand like a cache, [B, S, H, D]."""

        def index(core: Any, step: Any, *scalars: Any) -> tuple[Any, ...]:
            return layout.block_index(*self.walk.read(core, step, WorkList(*scalars)))

        view = layout.view(self.sizes.pad_cache(x))
        # Else XLA may fetch all of a small cache to VMEM ahead of the kernel, windows or not.
        view = pltpu.with_memory_space_constraint(view, pltpu.HBM)
        block = layout.block_shape(self.plan.blocks.T)
        self._inputs[name] = view, pl.BlockSpec(block, index)

    def _output(self, name: str, full: tuple[int, ...], dtype: Any, spec: pl.BlockSpec) -> None:
        like = next(iter(self._inputs.values()))[0]
        self._outputs[name] = result_type(full, dtype, like), spec

    def by_core(self, name: str, *shape: int, dtype: Any = jnp.float32) -> None:
        """Adds a partial result of each core, [cores, V, *shape]."""
        zeros = (0,) * len(shape)
        index = self._index(lambda core, tile, block: (core, tile, *zeros))
        full = (self.walk.cores, self.walk.V, *shape)
        self._output(name, full, dtype, pl.BlockSpec((1, 1, *shape), index))

    def lanes_by_core(self, name: str, dtype: Any = jnp.float32) -> None:
        """Adds a running result by lane, `NAME_lanes`, and where it is written when a tile ends."""
        plan = self.plan
        self.by_core(name, *((plan.P, LANES) if plan.compact else (1, plan.rows)), dtype=dtype)
        self.scratch(f"{name}_lanes", plan.P, LANES, dtype=dtype)

    def by_tile(self, name: str, *shape: int, dtype: Any = jnp.float32) -> None:
        """Adds a result of each tile, [V, *shape], or [V + 1, *shape] for two cores (`Results`)."""
        zeros, more = (0,) * len(shape), self.plan.cores - 1
        index = self._index(lambda core, tile, block: (tile + core if more else tile, *zeros))
        self._output(name, (self.walk.V + more, *shape), dtype, pl.BlockSpec((1, *shape), index))

    def of_core(self, name: str, *shape: int) -> None:
        """Adds one float32 result of each core, [cores, *shape]."""
        zeros = (0,) * len(shape)
        spec = pl.BlockSpec((1, *shape), lambda core, *_: (core, *zeros))
        self._output(name, (self.plan.cores, *shape), jnp.float32, spec)

    def like_cache(self, name: str, layout: CacheForm, dtype: Any) -> None:
        """Adds a result like the view of a cache."""
        row_of = self.walk.row_of
        index = self._index(lambda core, tile, block: layout.block_index(row_of(tile), block))
        full = (self.sizes.B, *layout.block_shape(self.sizes.S)[1:])
        spec = pl.BlockSpec(layout.block_shape(self.plan.blocks.T), index)
        self._output(name, full, dtype, spec)

    def scratch(self, name: str, *shape: int, dtype: Any = jnp.float32) -> None:
        """Adds an array that stays in VMEM."""
        self._scratch[name] = pltpu.VMEM(shape, dtype)

    def run(self, kernel: Callable[[Step, Refs, KernelPlan], None], name: str) -> dict[str, Any]:
        """Runs the kernel; the results by name."""
        names = [*self._inputs, *self._outputs, *self._scratch]

        def body(*refs: Any) -> None:
            work = WorkList(*refs[:SCALARS])
            named = dict(zip(names, refs[SCALARS:], strict=True))
            step = Step(self.walk, work)
            kernel(step, self._refs(**self._by_lane(step, named)), self.plan)

        results = pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=SCALARS,
                grid=(self.walk.cores, self.walk.steps(self.work)),
                in_specs=[spec for _, spec in self._inputs.values()],
                out_specs=[spec for _, spec in self._outputs.values()],
                scratch_shapes=[*self._scratch.values()],
            ),
            out_shape=[shape for shape, _ in self._outputs.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=self.plan.blocks.vmem_limit,
            ),
            name=name,
        )(*self.work, *(x for x, _ in self._inputs.values()))
        return dict(zip(self._outputs, results, strict=True))

    def _by_lane(self, step: Step, named: dict[str, Any]) -> dict[str, Any]:
        """The refs by name, with numbers of query rows spread to lanes when a tile begins."""
        for name in self._spread:
            ref, spread = named[name], named.pop(f"{name}_by_lane")

            @pl.when(step.first)
            def _(ref: Any = ref, spread: Any = spread) -> None:
                for i in range(ref.shape[1]):
                    spread[i] = jnp.broadcast_to(ref[0, i : i + 1], (LANES, self.plan.P)).T

            named[name] = spread
        return named | {name: named[name].at[0] for name in self._compact}

    def visited(self, x: jax.Array, neutral: float) -> jax.Array:
        """A partial result of each core, [cores, V, ...], and neutral where a core has none."""
        visited = self.walk.visited(self.work)
        return jnp.where(visited.reshape(*visited.shape, *(1,) * (x.ndim - 2)), x, neutral)

    def first_maximum(self, m: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns positions of lanes [n, V, R], and the first with the maximum [V, R]."""
        m = lanes_by_row(self.plan, self.visited(m, -jnp.inf))
        at = lanes_by_row(self.plan, self.visited(at, NOWHERE))
        return at, jnp.where(m == m.max(axis=0, keepdims=True), at, NOWHERE).min(axis=0)


class Saved:
    """The residuals of a call, as the kernels of the derivatives take them.

    A window is empty if its denominator is 0: it has no position, or all logits are -inf.
    """

    def __init__(self, residuals: Residuals) -> None:
        self.residuals = residuals
        self._empty = residuals.denominator == 0

    def of_windows(self, x: jax.Array) -> jax.Array:
        """Rows [B, Q, Hq, ...] with zeros for empty windows, whose queries may hold NaN."""
        empty = self._empty.reshape(*self._empty.shape, *(1,) * (x.ndim - 3))
        return jnp.where(empty, jnp.zeros((), x.dtype), x)

    @functools.cached_property
    def inverse(self) -> jax.Array:
        """1 / denominator, and 0 for an empty window: [B, Q, Hq]."""
        return self.of_windows(1 / jnp.where(self._empty, 1, self.residuals.denominator))

    def max_logits(self, launch: Launch[Any]) -> jax.Array:
        """The maxima over `KernelPlan.unit`, [V, R]."""
        m = launch.plan.in_units(self.of_windows(self.residuals.max_logits))
        return rows_of(launch.sizes, m)


def rows_of(sizes: Sizes, x: jax.Array) -> jax.Array:
    """[B, Q, Hq] to [V, R]."""
    return sizes.to_rows(x[..., None])[..., 0]


def from_rows(sizes: Sizes, x: jax.Array) -> jax.Array:
    """[V, R] to [B, Q, Hq]."""
    return sizes.from_rows(x[..., None])[..., 0]
