"""Launching a kernel: its grid, its operands and results by name, and combining cores.

A `Launch` collects operands, results and scratch under names. The kernel gets them as one object
whose attributes are refs of these names, each declared with its shape in the kernel's module; a
ref that is not launched is None.

    XLA      tiles [V, R, n]    bounds [V, 2, C]    cache [B, view]     results by core or tile
                  |                  |                   |                      ^
    specs      tile of step     tile of step     block of step, or the     tile of step
                  |                  |           nearest in the windows         |
    VMEM      [1, R, n]         [1, 2, C]           block_shape(T)          [1, 1, R, n]

A block of a pool is a part of a page, whose number the spec finds in the page table; or it is
several pages, which a step copies beside each other for the next step, while it computes its own.
"""

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ragged.lowering.contract import Operands, Residuals
from jax_ragged.lowering.sharding import result_type
from jax_ragged.lowering.tpu.choice import Choice, KernelPlan, Sizes
from jax_ragged.lowering.tpu.chunks import CacheBlock, quotient, remainder
from jax_ragged.lowering.tpu.grid import SCALARS, Step, Walk, WorkList
from jax_ragged.lowering.tpu.layout import LANES, CacheForm, tokens_in_lanes

Refs = TypeVar("Refs")
# Pages of a block up to which their copies stand one after the other in the kernel's code.
MOST_UNROLLED = 128
# The position t* of a maximum that is nowhere.
NOWHERE = jnp.iinfo(jnp.int32).max


def by_lane(plan: KernelPlan, x: jax.Array) -> jax.Array:
    """Statistics of query rows [V, R] in the rows and columns of compact logits, [V, C, 128]."""
    heads = plan.key.heads
    blocks = x.reshape(x.shape[0], -1, plan.compact_rows)
    blocks = jnp.repeat(blocks, plan.compact_rows // plan.head_rows, axis=1)[:, :heads]
    return jnp.tile(blocks, (1, LANES // heads, 1)).swapaxes(1, 2)


def lanes_by_row(plan: KernelPlan, x: jax.Array) -> jax.Array:
    """Running results as results of query rows, to be combined, [n, V, R].

    They are [cores, V, C, 128] with neutral elements in the lanes of other heads, or, if the
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
          refs: the class of the kernel's refs. Its `bounds`, [2, C, 128], and the refs of `lanes`,
            [n, C, 128], hold a query row's numbers in all of its lanes.
          every: whether every block of the cache has a step.
        """
        sizes, plan = choice.sizes, choice.plan
        lo = sizes.tile_windows(jnp.maximum(operands.starts, 0))
        hi = sizes.tile_windows(jnp.minimum(operands.lengths, sizes.positions))
        T = choice.blocks.T
        count = -(-sizes.S // T)
        self.sizes, self.plan, self._refs = sizes, plan, refs
        self.walk = Walk(plan, sizes.V, count, every)
        self.work = WorkList.of(lo, hi, T, count, plan.cores)
        self._inputs: dict[str, tuple[jax.Array, pl.BlockSpec]] = {}
        self._outputs: dict[str, tuple[Any, pl.BlockSpec]] = {}
        self._scratch: dict[str, Any] = {}
        self._caches: dict[str, CacheForm] = {}
        self._copied: dict[str, Callable[..., Any]] = {}
        self._table = operands.page_table
        self._scalars = [*self.work, *([] if self._table is None else [self._table.reshape(-1)])]
        self._spread: list[str] = []
        self._compact: list[str] = []
        if plan.queries > 1:
            # The window of a query row does not depend on the head, so C rows have all of them.
            bounds = [sizes.window_rows(x)[:, : plan.compact_rows] for x in (lo, hi)]
            self._spread_rows("bounds", jnp.stack(bounds, axis=1))

    def _index(self, place: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """An index map from (core, tile, block)."""

        def index(core: Any, step: Any, *scalars: Any) -> tuple[Any, ...]:
            tile, block, _ = self.walk.place(core, step, WorkList(*scalars[:SCALARS]))
            return place(core, tile, block)

        return index

    def rows(self, name: str, x: jax.Array) -> None:
        """Adds an operand of tiles, [V, ...]."""
        zeros = (0,) * (x.ndim - 1)
        index = self._index(lambda core, tile, block: (tile, *zeros))
        self._inputs[name] = x, pl.BlockSpec((1, *x.shape[1:]), index)

    def _spread_rows(self, name: str, x: jax.Array) -> None:
        """Adds numbers of query rows, [V, n, C], to spread to lanes when a tile begins."""
        self.rows(name, x)
        self.scratch(f"{name}_by_lane", x.shape[1], self.plan.compact_rows, LANES, dtype=x.dtype)
        self._spread.append(name)

    def lanes(self, name: str, *statistics: jax.Array) -> None:
        """Adds statistics of query rows, each [V, R], as a ref [n, C, 128]."""
        plan = self.plan
        if plan.compact:
            # A lane of the compact logits has the number of its column's head.
            self.rows(name, jnp.stack([by_lane(plan, x) for x in statistics], axis=1))
            self._compact.append(name)
        else:
            self._spread_rows(name, jnp.stack(statistics, axis=1))

    @property
    def _pages(self) -> int:
        """Pages of a block, of which each is copied by itself."""
        return self.plan.blocks.T // self.sizes.page if self.sizes.page else 0

    def _read(self, core: Any, step: Any, *scalars: Any) -> tuple[Any, Any]:
        """The row and the block that a step reads."""
        return self.walk.read(core, step, WorkList(*scalars[:SCALARS]))

    def _stored(self, core: Any, step: Any, *scalars: Any) -> tuple[Any, Any]:
        """The row of a view, and the block in it, of a step whose block is no more than a page."""
        row, block = self._read(core, step, *scalars)
        if self._table is None:
            return row, block
        if self.sizes.page is None:
            return scalars[SCALARS][row], block
        parts = self.sizes.page // self.plan.blocks.T
        page = row * self.sizes.pages + quotient(block, parts)
        return scalars[SCALARS][page], remainder(block, parts)

    def cache(
        self, name: str, x: jax.Array, layout: CacheForm, scale: jax.Array | None = None
    ) -> None:
        """Adds an operand like a cache, in the order of `RaggedAttentionParams.cache_layout`."""
        if scale is not None:
            self._scale(f"{name}_scale", scale)
        block = layout.block_shape(self.plan.blocks.T)
        view = layout.view(self.sizes.positions_first(x))
        # Else XLA may fetch all of a small cache to VMEM ahead of the kernel, windows or not.
        view = pltpu.with_memory_space_constraint(view, pltpu.HBM)
        self._caches[name] = layout
        if self._pages > 1:
            self._by_page(name, view, block, layout.tokens_at)
            return

        def index(*place: Any) -> tuple[Any, ...]:
            return layout.block_index(*self._stored(*place))

        self._inputs[name] = view, pl.BlockSpec(block, index)

    def _scale(self, name: str, x: jax.Array) -> None:
        """Adds the scale of a cache, with 1 for a dimension that shares it.

        XLA keeps positions in the lanes, [B, heads, S] or [P, heads, T], so blocks of it are read
        in place. Pages that are no multiple of the lanes are in the lanes themselves: of those the
        scales, not the values, are gathered.
        """
        sizes, table, T = self.sizes, self._table, self.plan.blocks.T
        x = sizes.positions_first(x) if x.shape[sizes.axis] > 1 else sizes.in_order(x)
        x = x.swapaxes(1, 2)
        rows, heads, stored = x.shape
        pooled = table is not None and (rows, stored) != (1, 1)
        if table is not None and pooled and (rows == 1 or stored % LANES):
            pages = x[table if rows > 1 else jnp.zeros_like(table)]
            pages = jnp.broadcast_to(pages, (*pages.shape[:3], sizes.stored)).swapaxes(1, 2)
            x = pages.reshape(sizes.B, heads, sizes.S)
            rows, stored, pooled = sizes.B, sizes.S, False
        if stored == 1:
            x = jnp.broadcast_to(x, (rows, heads, LANES))
        x = pltpu.with_memory_space_constraint(x, pltpu.HBM)
        block = (1, heads, T if stored > 1 else LANES)
        if pooled and self._pages > 1:
            self._by_page(name, x, block, tokens_in_lanes)
            return

        def index(*place: Any) -> tuple[Any, ...]:
            row, block = (self._stored if pooled else self._read)(*place)
            return (row if rows > 1 else 0, 0, block if stored > 1 else 0)

        self._inputs[name] = x, pl.BlockSpec(block, index)

    def _by_page(
        self, name: str, x: jax.Array, block: tuple[int, ...], tokens_at: Callable[..., Any]
    ) -> None:
        """Adds a pool of which a block is several pages, and two buffers for them.

        `tokens_at` is the place in a block of its i-th T positions, as `CacheForm.tokens_at`.
        """
        self._inputs[name] = x, pl.BlockSpec(memory_space=pltpu.HBM)
        self.scratch(f"{name}_pages", 2, *block[1:], dtype=x.dtype)
        self._scratch[f"{name}_copied"] = pltpu.SemaphoreType.DMA((2,))
        self._copied[name] = tokens_at

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
        self.by_core(
            name, *((plan.compact_rows, LANES) if plan.compact else (1, plan.rows)), dtype=dtype
        )
        self.scratch(f"{name}_lanes", plan.compact_rows, LANES, dtype=dtype)

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
            scalars, arrays = refs[: len(self._scalars)], refs[len(self._scalars) :]
            named = dict(zip(names, arrays, strict=True))
            step = Step(self.walk, WorkList(*scalars[:SCALARS]))
            named = self._blocks(scalars, self._by_lane(step, named))
            kernel(step, self._refs(**named), self.plan)

        results = pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self._scalars),
                grid=(self.walk.cores, self.walk.steps(self.work)),
                in_specs=[spec for _, spec in self._inputs.values()],
                out_specs=[spec for _, spec in self._outputs.values()],
                scratch_shapes=[*self._scratch.values()],
            ),
            out_shape=[shape for shape, _ in self._outputs.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=self.plan.blocks.vmem_limit,
                # Every index is in range by construction: blocks come from the work list, and the
                # primitive clamps the entries of the page table. The checks of one copy take 12
                # bundles, which no other code hides; the interpreter of the tests makes them.
                disable_bounds_checks=True,
            ),
            name=name,
        )(*self._scalars, *(x for x, _ in self._inputs.values()))
        return dict(zip(self._outputs, results, strict=True))

    def _by_lane(self, step: Step, named: dict[str, Any]) -> dict[str, Any]:
        """The refs by name, with numbers of query rows spread to lanes when a tile begins."""
        for name in self._spread:
            ref, spread = named[name], named.pop(f"{name}_by_lane")

            @pl.when(step.first)
            def _(ref: Any = ref, spread: Any = spread) -> None:
                for i in range(ref.shape[1]):
                    spread[i] = jnp.broadcast_to(
                        ref[0, i : i + 1], (LANES, self.plan.compact_rows)
                    ).T

            named[name] = spread
        return named | {name: named[name].at[0] for name in self._compact}

    def _blocks(self, scalars: Any, named: dict[str, Any]) -> dict[str, Any]:
        """The refs by name, with the blocks of caches, after the copies of pages."""
        if self._copied:
            here = self._copy_pages(scalars, named)
            for name in self._copied:
                named[name] = named.pop(f"{name}_pages").at[here]
                del named[f"{name}_copied"]
        blocks = {
            name: CacheBlock(
                named[name], layout, self.sizes.dtype, named.pop(f"{name}_scale", None)
            )
            for name, layout in self._caches.items()
        }
        return named | blocks

    def _copy_pages(self, scalars: Any, named: dict[str, Any]) -> Any:
        """Starts the copies of the next step's pages, and waits for this step's pages.

        Returns:
          The index of this step's half of the buffers.
        """
        core, step = pl.program_id(0), pl.program_id(1)
        work, table = WorkList(*scalars[:SCALARS]), scalars[SCALARS]
        pools = [
            (named[name], named[f"{name}_pages"], named[f"{name}_copied"], tokens_at)
            for name, tokens_at in self._copied.items()
        ]

        def start(step: Any, _: None) -> None:
            row, block = self.walk.read(core, step, work)
            half = remainder(step, 2)

            def copy(i: Any, _: None) -> None:
                page = block * self._pages + i
                if self.sizes.pages % self._pages:
                    # The last block of a row is longer than the rest of the row.
                    page = jnp.minimum(page, self.sizes.pages - 1)
                page = table[row * self.sizes.pages + page]
                for pool, buffer, copied, tokens_at in pools:
                    to = buffer.at[half].at[tokens_at(i, self.sizes.page)]
                    pltpu.make_async_copy(pool.at[page], to, copied.at[half]).start()

            lax.fori_loop(0, self._pages, copy, None, unroll=self._pages <= MOST_UNROLLED)

        # The first step starts its own copies too.
        first, end = jnp.where(step == 0, 0, step + 1), self.walk.steps(work)
        lax.fori_loop(first, jnp.minimum(step + 2, end), start, None)
        here = remainder(step, 2)
        for _, buffer, copied, _ in pools:
            # Waiting is for a number of bytes: all pages together.
            pltpu.make_async_copy(buffer.at[here], buffer.at[here], copied.at[here]).wait()
        return pl.ds(here, 1)

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
