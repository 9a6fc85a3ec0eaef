"""The kernel for many queries: teams of tiles that share the blocks of keys and values.

A CTA has three warpgroups. One copies; two compute, a tile [64 rows] each. CTAs stay for the
whole run and take one team after another; copies for the next team run while the last is
finished.

    copying     | K0 V0 K1 V1 ...   | K0 V0 ...             as far ahead as there is room
    computing 0 | QK.T  softmax  PV    QK.T  softmax  PV
    computing 1 |       QK.T  softmax  PV    QK.T  softmax  one step behind: while one warpgroup
                                                            uses the matrix unit, the other
                                                            computes exponentials

The blocks of a tile fall into three runs: those at the lower edge of its windows, those that lie
in all of its windows, and those at the upper edge. Only edge blocks are masked.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.gpu.chip import SWIZZLE_ROWS, WGMMA_ROWS
from jax_ragged.lowering.gpu.forms import Pages, Place
from jax_ragged.lowering.gpu.launch import Refs, launch, padded, shared_rows
from jax_ragged.lowering.gpu.softmax import (
    ROWS,
    TILE,
    Softmax,
    along,
    inverse,
    logits,
    masked,
    update,
)
from jax_ragged.lowering.gpu.team_plan import (
    Inner,
    Team,
    TeamBlocks,
    TeamPlan,
    blocks_of,
    count_of_teams,
    inner_of,
    make_tables,
    team_of,
)

# Registers of a thread. The sum over warpgroups is what a multiprocessor has.
_COPYING_REGISTERS, _COMPUTING_REGISTERS = 24, 240

# What a warpgroup carries from block to block: the sum [64, Dv] of weighted values, and Softmax.
_State = tuple[jax.Array, Softmax]


def attend_in_teams(
    plan: TeamPlan,
    operands: Operands,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes out [B, Q, Hq, Dv], max_logits and denominator [B, Q, Hq].

    Args:
      plan: the plan.
      operands: of the forward.
      interpret: the parameters of JAX's interpreter, or None to run on a GPU.
    """
    Q = operands.query.shape[1]
    statistic = jax.ShapeDtypeStruct(
        (plan.B, plan.head_groups, plan.row_tiles, WGMMA_ROWS), jnp.float32
    )
    results = launch(
        functools.partial(_kernel, plan),
        name="ragged_attention_teams",
        ctas=plan.ctas,
        warpgroups=plan.tiles + 1,
        inputs={
            **make_tables(plan, operands.lengths, operands.starts),
            "query": padded(operands.query, 1, plan.Q),
            **plan.form.inputs(operands),
        },
        results={
            "out": jax.ShapeDtypeStruct((plan.B, plan.Q, plan.Hq, plan.Dv), plan.out_dtype),
            "max_logits": statistic,
            "denominator": statistic,
        },
        scratch=_scratch_types(plan),
        interpret=interpret,
    )

    def by_query(x: jax.Array) -> jax.Array:
        x = x.reshape(plan.B, plan.head_groups, plan.row_tiles, plan.heads, plan.queries)
        x = x.transpose(0, 2, 4, 1, 3)
        return x.reshape(plan.B, plan.row_tiles * plan.queries, plan.Hq)[:, :Q]

    max_logits, denominator = (by_query(results[name]) for name in ("max_logits", "denominator"))
    out = results["out"] if plan.Q == Q else results["out"][:, :Q]
    return out, max_logits, denominator


def _scratch_types(plan: TeamPlan) -> dict[str, Any]:
    per_tile = functools.partial(plgpu.Barrier, num_barriers=plan.tiles)
    full = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
    return {
        "query_tiles": shared_rows((plan.tiles, WGMMA_ROWS, plan.D), plan.dtype),
        "key_blocks": shared_rows((plan.stages, plan.T, plan.D), plan.dtype),
        "value_blocks": shared_rows((plan.stages, plan.T, plan.Dv), plan.dtype),
        "out_tiles": shared_rows((plan.tiles, WGMMA_ROWS, plan.out_columns), plan.out_dtype),
        "statistics": plgpu.SMEM((plan.tiles, 2, WGMMA_ROWS), jnp.float32),
        "query_full": per_tile(num_arrivals=plan.heads),
        "query_free": per_tile(),
        "key_full": full(num_arrivals=plan.T // plan.piece),
        "value_full": full(num_arrivals=plan.T // plan.piece),
        "key_free": full(num_arrivals=plan.tiles),
        "value_free": full(num_arrivals=plan.tiles),
        "turn": plgpu.Barrier(num_arrivals=plan.tiles),
    }


def _kernel(plan: TeamPlan, refs: Refs) -> None:
    """The kernel.

    Refs:
      teams: [B * levels, fields], starts, lengths: [B, row_tiles, 64]: `make_tables`.
      query: [B, Q, Hq, D].
      key, value: the cache as `forms` has it: [B * S, Hkv, D] and [B * S, Hkv, Dv] if dense.
      page_table: int32 [B, W], if there is one.
      out: [B, Q, Hq, Dv].
      max_logits, denominator: [B, head_groups, row_tiles, 64].
      the others: `_scratch_types`.
    """
    wg = lax.axis_index("wg")

    @pl.when(wg == plan.tiles)
    def _() -> None:
        plgpu.set_max_registers(_COPYING_REGISTERS, action="decrease")
        _copy(plan, refs)

    @pl.when(wg < plan.tiles)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTING_REGISTERS, action="increase")
        _Warpgroup(plan, refs, wg).run()


def _copy(plan: TeamPlan, refs: Refs) -> None:
    """Starts all copies to shared memory, as far ahead as there is room."""

    def copy_queries(at: Team) -> None:
        for tile in range(plan.tiles):
            plgpu.barrier_wait(refs.query_free.at[tile])
            first = _first_query(plan, at, tile)
            for head in range(plan.heads):
                plgpu.copy_gmem_to_smem(
                    refs.query.at[at.row, pl.ds(first, plan.queries), at.group * plan.heads + head],
                    refs.query_tiles.at[tile, pl.ds(head * plan.queries, plan.queries)],
                    refs.query_full.at[tile],
                )

    def team(n: Any, step: Any) -> Any:
        at = team_of(plan, n)
        blocks = blocks_of(refs.teams, at.row * plan.levels + at.level)
        kv_head = lax.div(at.group * plan.heads, plan.G)
        base = at.row * plan.form.stride
        first = base + blocks.first
        place = Place(at.row, kv_head, base + blocks.high, plan.piece)

        def block(i: Any, pages: Pages) -> Pages:
            slot = lax.rem(step + i, plan.stages)
            begin = first + i * plan.T
            following = plan.form.pages(refs, place, begin + plan.T, plan.T)
            for name in ("key", "value"):
                plgpu.barrier_wait(refs[f"{name}_free"].at[slot])
                plan.form.copy_block(refs, name, slot, place, begin, pages)
            # Behind the first block, which need not wait until the last queries are used.
            pl.when(i == 0)(lambda: copy_queries(at))
            return following

        lax.fori_loop(0, blocks.count, block, plan.form.pages(refs, place, first, plan.T))
        pl.when(blocks.count == 0)(lambda: copy_queries(at))
        return step + blocks.count

    lax.fori_loop(0, count_of_teams(plan), team, jnp.int32(0))
    # The last arrivals at each barrier are waited for, so that none is left when the CTA ends.
    for tile in range(plan.tiles):
        plgpu.barrier_wait(refs.query_free.at[tile])
    for slot in range(plan.stages):
        plgpu.barrier_wait(refs.key_free.at[slot])
        plgpu.barrier_wait(refs.value_free.at[slot])


def _first_query(plan: TeamPlan, at: Team, tile: Any) -> Any:
    return pl.multiple_of((at.level * plan.tiles + tile) * plan.queries, SWIZZLE_ROWS)


def _add_product(total: jax.Array, p: jax.Array, values_ref: Any) -> jax.Array:
    """Adds p [64, T] in registers times values [T, Dv] in shared memory to total [64, Dv]."""

    def run(total_ref: Any) -> None:
        plgpu.wgmma(total_ref, p, values_ref)

    summed: Any = pl.run_state(run)(plgpu.WGMMAAccumulatorRef.init(total))
    added: jax.Array = summed
    return added


class _Task(NamedTuple):
    """What a warpgroup has to do for a team.

    Attributes:
      at: the team's place.
      blocks: the team's blocks.
      windows: the first position and the end of each row's window, [64] each, clipped to the cache.
      inner: bounds of the tile's blocks.
    """

    at: Team
    blocks: TeamBlocks
    windows: tuple[jax.Array, jax.Array]
    inner: Inner


@dataclasses.dataclass(frozen=True)
class _Warpgroup:
    """A computing warpgroup; `tile` is its number, and its tile's in each team."""

    plan: TeamPlan
    refs: Refs
    tile: Any

    def run(self) -> None:
        """Computes this CTA's teams."""
        plan, refs = self.plan, self.refs
        # All shared memory is free at first.
        plgpu.barrier_arrive(refs.query_free.at[self.tile])
        for slot in range(plan.stages):
            plgpu.barrier_arrive(refs.key_free.at[slot])
            plgpu.barrier_arrive(refs.value_free.at[slot])
        # Both pass on the turn twice in a block and once in a team. Warpgroup 1 goes half a block
        # behind: it takes one turn more at the start, and the other one more at the end.
        pl.when(self.tile == 1)(self._take_turns)
        lax.fori_loop(0, count_of_teams(plan), self._team, (jnp.int32(0), self._look_up(0)))
        pl.when(self.tile == 0)(self._take_turns)
        plgpu.wait_smem_to_gmem(0)

    def _free_query(self) -> None:
        plgpu.barrier_arrive(self.refs.query_free.at[self.tile])

    def _take_turns(self) -> None:
        """Lets the other warpgroup go on, and waits until it lets this one go on."""
        plgpu.barrier_arrive(self.refs.turn)
        plgpu.barrier_wait(self.refs.turn)

    def _look_up(self, n: Any) -> _Task:
        """Loads a team's table entries and its tile's windows."""
        plan, refs = self.plan, self.refs
        at = team_of(plan, n)
        index = at.row * plan.levels + at.level
        row_tile = at.level * plan.tiles + self.tile
        start, length = (
            mosaic_gpu_load(ref.at[at.row, row_tile], layout=ROWS, optimized=False)
            for ref in (refs.starts, refs.lengths)
        )
        windows = jnp.maximum(start, 0), jnp.minimum(length, plan.S)
        inner = inner_of(refs.teams, index, self.tile)
        return _Task(at, blocks_of(refs.teams, index), windows, inner)

    def _team(self, n: Any, carry: tuple[Any, _Task]) -> tuple[Any, _Task]:
        """Computes one team's tile; the count of blocks that this CTA read before it is carried."""
        plan, refs = self.plan, self.refs
        step, task = carry
        # Already now, so that the next team need not wait for it.
        following = self._look_up(n + 1)
        blocks, inner = task.blocks, task.inner
        plgpu.barrier_wait(refs.query_full.at[self.tile])
        # Blocks [0, lower) and [upper, count) are at edges; the others lie in all windows. Of the
        # last one only half may touch the tile's windows, as in every other tile of causal windows.
        lower = lax.div(inner.low - blocks.first + (plan.T - 1), plan.T)
        lower = jnp.clip(lower, 0, blocks.count)
        upper = lax.div(jnp.maximum(inner.high - blocks.first, 0), plan.T)
        upper = jnp.clip(upper, lower, blocks.count)
        whole, half = blocks.count, plan.T // 2
        if plan.halves:
            is_half = inner.end <= blocks.first + (blocks.count - 1) * plan.T + half
            whole = jnp.maximum(blocks.count - jnp.where(is_half, 1, 0), upper)
        zeros = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, plan.Dv), jnp.float32), TILE)
        state: _State = (zeros, Softmax.empty(WGMMA_ROWS))
        for begin, end, edge, positions in (
            (0, lower, True, plan.T),
            (lower, upper, False, plan.T),
            (upper, whole, True, plan.T),
            *([(whole, blocks.count, True, half)] if plan.halves else []),
        ):
            block = functools.partial(self._block, task, step, edge, positions)
            state = lax.fori_loop(begin, end, block, state)
        pl.when(blocks.count == 0)(self._free_query)
        # The other warpgroup goes on meanwhile.
        plgpu.barrier_arrive(refs.turn)
        self._store(task.at, state)
        plgpu.barrier_wait(refs.turn)
        return step + blocks.count, following

    def _block(
        self, task: _Task, step: Any, edge: bool, positions: int, i: Any, state: _State
    ) -> _State:
        """Takes the first positions of block i into the state: a step of the streaming softmax."""
        plan, refs = self.plan, self.refs
        blocks = task.blocks
        total, softmax = state
        slot = lax.rem(step + i, plan.stages)
        first = blocks.first + i * plan.T

        keys_ref, values_ref = refs.key_blocks.at[slot], refs.value_blocks.at[slot]
        if positions < plan.T:
            keys_ref = refs.key_blocks.at[slot, pl.ds(0, positions)]
            values_ref = refs.value_blocks.at[slot, pl.ds(0, positions)]

        plgpu.barrier_wait(refs.key_full.at[slot])

        def dots(product_ref: Any) -> jax.Array:
            keys = keys_ref.transpose((1, 0))
            plgpu.wgmma(product_ref, refs.query_tiles.at[self.tile], keys)
            self._take_turns()
            product: jax.Array = product_ref[...]
            return product

        x = pl.run_scoped(dots, plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, positions), jnp.float32))
        plgpu.barrier_arrive(refs.key_free.at[slot])
        # Not later: the next queries and keys are copied after this, and in its last block of a
        # team warpgroup 1 waits for warpgroup 0, which waits for them.
        pl.when(i == blocks.count - 1)(self._free_query)

        if plan.scaled:
            x = logits(plan.params, x)
        if edge:
            x = masked(x, first, *task.windows)
        softmax, correction, p = update(plan.params, softmax, x, plan.scaled)
        p = p.astype(plan.dtype)
        total *= along(correction, total.shape, 0)
        # The turn passes on when the softmax is finished, and not before.
        total, softmax, p = lax.optimization_barrier((total, softmax, p))
        plgpu.barrier_arrive(refs.turn)
        plgpu.barrier_wait(refs.value_full.at[slot])
        if edge:
            self._zero_outside(task.at, blocks, first, slot, positions)
        plgpu.barrier_wait(refs.turn)
        total = _add_product(total, p, values_ref)
        plgpu.barrier_arrive(refs.value_free.at[slot])
        return total, softmax

    def _zero_outside(
        self, at: Team, blocks: TeamBlocks, first: Any, slot: Any, positions: int
    ) -> None:
        """Zeros the values of an edge block that lie in no window of the team: 0 * NaN is NaN.

        Those of its first positions, since no others are read. Both warpgroups write the same, so
        that neither need wait for the other.
        """
        outside = (first < blocks.low) | (first + positions > blocks.high) | (blocks.gap != 0)

        def zero(inside: Callable[[Any], jax.Array]) -> None:
            # A warpgroup holds values in its registers by 64 positions.
            for offset in range(0, positions, WGMMA_ROWS):
                values_ref = self.refs.value_blocks.at[slot, pl.ds(offset, WGMMA_ROWS)]
                position = first + offset
                position += plgpu.broadcasted_iota(jnp.int32, (WGMMA_ROWS,), 0, layout=ROWS)
                values = mosaic_gpu_load(values_ref, layout=TILE)
                keep = along(inside(position), values.shape, 0) != 0
                values_ref[...] = jnp.where(keep, values, jnp.zeros((), values.dtype))

        def in_hull(position: Any) -> jax.Array:
            return jnp.where((position >= blocks.low) & (position < blocks.high), 1, 0)

        @pl.when(outside)
        def _() -> None:
            pl.when(blocks.gap == 0)(lambda: zero(in_hull))
            pl.when(blocks.gap != 0)(lambda: zero(functools.partial(self._windows_with, at)))
            plgpu.commit_smem()

    def _windows_with(self, at: Team, position: jax.Array) -> jax.Array:
        """The number of the team's windows that hold each position."""
        plan, refs = self.plan, self.refs

        def query(i: Any, count: jax.Array) -> jax.Array:
            row_tile = at.level * plan.tiles + lax.div(i, plan.queries)
            place = (at.row, row_tile, lax.rem(i, plan.queries))
            start, end = (
                jnp.maximum(refs.starts[place], 0),
                jnp.minimum(refs.lengths[place], plan.S),
            )
            inside = (position >= start) & (position < end)
            return count + jnp.where(inside, 1, 0)

        none = plgpu.layout_cast(jnp.zeros(position.shape, jnp.int32), ROWS)
        total: jax.Array = lax.fori_loop(0, plan.tiles * plan.queries, query, none)
        return total

    def _store(self, at: Team, state: _State) -> None:
        """Normalises and copies a tile's results to global memory."""
        plan, refs = self.plan, self.refs
        total, softmax = state
        out = total * along(inverse(softmax.denominator), total.shape, 0)
        first = _first_query(plan, at, self.tile)
        row_tile = at.level * plan.tiles + self.tile
        # Copies of the tile before may still read the shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.statistics[self.tile, 0] = softmax.max_logits(plan.params.mask_value)
        refs.statistics[self.tile, 1] = softmax.denominator
        for column in range(0, plan.Dv, plan.out_columns):
            if column > 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            columns = out[:, column : column + plan.out_columns]
            refs.out_tiles[self.tile] = columns.astype(plan.out_dtype)
            plgpu.commit_smem()
            for head in range(plan.heads):
                plgpu.copy_smem_to_gmem(
                    refs.out_tiles.at[self.tile, pl.ds(head * plan.queries, plan.queries)],
                    refs.out.at[
                        at.row,
                        pl.ds(first, plan.queries),
                        at.group * plan.heads + head,
                        pl.ds(column, plan.out_columns),
                    ],
                )
        for i, ref in enumerate((refs.max_logits, refs.denominator)):
            plgpu.copy_smem_to_gmem(
                refs.statistics.at[self.tile, i], ref.at[at.row, at.group, row_tile]
            )
