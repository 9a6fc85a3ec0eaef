"""The schedule for many queries: which tiles a CTA computes together, and their tables.

A *tile* is 64 rows of logits: some consecutive queries for some query heads of one KV head. Its
row r belongs to head r // queries and query r % queries, since the copy engine brings the queries
of one head at a time. A *team* is the tiles that the computing warpgroups of a CTA work on at the
same time: the same heads and consecutive queries. They share each block of keys and values, which
another warpgroup copies for them.

    queries of row b     |---- tile 0 ----|---- tile 1 ----|---- tile 2 ----|---- tile 3 ----|
    levels               |------------- team 0 ------------|------------- team 1 ------------|
    blocks of team 0     [first, first + T) ... while they touch the hull of the team's windows

The *level* of a team counts the teams of one row and one group of heads. CTAs take teams from the
last level to the first: where windows are causal these have the most blocks, and the short ones
at the end even out. CTA c takes the teams c, 2 n - 1 - c, 2 n + c, ... of n CTAs, so that no CTA
gets the longer one every time.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.gpu.call import Call
from jax_ragged.lowering.gpu.chip import (
    MULTIPROCESSORS,
    SHARED_MEMORY,
    SWIZZLE_ROWS,
    WGMMA_ROWS,
    ceil_to,
)
from jax_ragged.lowering.gpu.launch import padded, swizzle_columns
from jax_ragged.lowering.params import RaggedAttentionParams

# Bytes of a tile's results that are copied out at once: all of 128 columns of 16 bits; less of
# more columns, whose queries, keys and values take more shared memory.
_OUT_BYTES = {False: 16 * 1024, True: 8 * 1024}
_BLOCK_SIZES = (128, 64)
_STAGES = 4
# The fewest teams for which teams are worth while: fewer leave many multiprocessors idle, while
# the other schedule splits the cache among all of them.
_FEWEST_TEAMS = 96


@dataclasses.dataclass(frozen=True)
class TeamPlan(Call):
    """Everything static about one call; Q is rounded up to what the copy engine moves.

    Attributes:
      out_dtype: of the results that the kernel writes.
      T: positions in a block.
      tiles: tiles of a team, each computed by a warpgroup of its own.
      heads: query heads in a tile.
      stages: blocks of keys and of values in flight.
      ctas: CTAs that run at once.
    """

    out_dtype: Any
    T: int
    heads: int
    stages: int
    tiles: int = 2
    ctas: int = MULTIPROCESSORS

    @property
    def piece(self) -> int:
        """Positions that are copied at once: the whole block, if no page ends in it."""
        return self.form.piece(self.T)

    @property
    def queries(self) -> int:
        """The queries of a tile."""
        return WGMMA_ROWS // self.heads

    @property
    def head_groups(self) -> int:
        """Groups of query heads that a tile takes together."""
        return self.Hq // self.heads

    @property
    def levels(self) -> int:
        return -(-self.Q // (self.tiles * self.queries))

    @property
    def row_tiles(self) -> int:
        """Tiles of one row and one group of heads."""
        return self.levels * self.tiles

    @property
    def teams(self) -> int:
        return self.B * self.head_groups * self.levels

    @property
    def out_columns(self) -> int:
        """Columns of the results that are copied out at once."""
        return out_columns(self.Dv, self.out_dtype)

    @property
    def halves(self) -> bool:
        """Whether half a block can be computed: values are masked by 64 positions."""
        return self.T == 2 * WGMMA_ROWS

    @property
    def scaled(self) -> bool:
        """Whether the softmax gets logits; else it gets products, and scales them itself."""
        return self.params.logits_soft_cap is not None or self.params.softmax_scale <= 0


class Team(NamedTuple):
    """A team's place.

    Attributes:
      row: of the cache.
      group: of query heads.
      level: of the team.
    """

    row: Any
    group: Any
    level: Any


class TeamBlocks(NamedTuple):
    """The blocks of a team, positions counted from the start of its row.

    Attributes:
      first: the first position of the first block, down to -7: where the row starts in the joined
        cache need not be a multiple of 8, and a block does.
      count: the number of blocks, 0 if all windows are empty.
      low, high: the hull of the team's windows.
      gap: whether positions of the hull may lie in no window, as 0 or 1.
    """

    first: Any
    count: Any
    low: Any
    high: Any
    gap: Any


class Inner(NamedTuple):
    """Bounds of a tile's blocks, positions counted as in `TeamBlocks`.

    Attributes:
      low: the first position that lies in all of the tile's windows.
      high: the end of the positions that do.
      end: the end of the hull of the tile's windows.
    """

    low: Any
    high: Any
    end: Any


# The columns of the table: `TeamBlocks`, then `Inner` of each tile.
_FIELDS, _TILE_FIELDS = len(TeamBlocks._fields), len(Inner._fields)


def out_columns(columns: int, dtype: Any) -> int:
    """How many of a result's columns fit into the shared memory for them."""
    unit = swizzle_columns(columns, dtype)
    most = _OUT_BYTES[columns > 128] // (WGMMA_ROWS * jnp.dtype(dtype).itemsize)
    units = columns // unit
    return unit * max(n for n in range(1, units + 1) if units % n == 0 and n * unit <= most)


def make_team_plan(
    operands: Operands, params: RaggedAttentionParams, out_dtype: Any
) -> TeamPlan | None:
    """Returns the plan, or None for a call that the other schedule serves better."""
    call = Call.of(operands, params)
    Q, D, Dv, G, form = call.Q, call.D, call.Dv, call.G, call.form
    itemsize: int = call.dtype.itemsize
    whole = ceil_to(Q, SWIZZLE_ROWS)
    if Q * G <= WGMMA_ROWS:
        return None  # one tile of the other schedule holds all rows that share a KV head
    if whole == SWIZZLE_ROWS:
        # A tile would hold all queries, and the next lie past them. JAX drops dimensions of one
        # swizzle tile from the places of copies, so the next would write to the first one's place.
        return None
    if form.narrow:
        return None  # the other schedule's kernel alone widens quantised blocks

    def blocks(T: int) -> int:
        """How many blocks of keys and values fit into shared memory."""
        tiles = 2 * WGMMA_ROWS * (D * itemsize + 2 * 4)
        out_size: int = jnp.dtype(out_dtype).itemsize
        out = 2 * WGMMA_ROWS * out_columns(Dv, out_dtype) * out_size
        return min((SHARED_MEMORY - tiles - out) // (T * (D + Dv) * itemsize), _STAGES)

    # Registers hold the logits of 128 positions beside up to 128 columns of the sum.
    sizes = [T for T in _BLOCK_SIZES if params.block_size in (None, T)]
    sizes = [
        T
        for T in sizes
        if blocks(T) > 1 and (T == 64 or Dv <= 128) and form.piece(T) <= form.joins(call.B)
    ]
    heads = [n for n in (1, 2, 4, 8) if G % n == 0 and WGMMA_ROWS // n <= whole]
    if not sizes or not heads:
        return None

    def wasted(n: int) -> int:
        """Rows of padding; of those that waste none, few heads give long runs to copy."""
        return ceil_to(Q, 2 * WGMMA_ROWS // n)

    plan = TeamPlan(
        **vars(dataclasses.replace(call, Q=whole)),
        out_dtype=jnp.dtype(out_dtype),
        T=sizes[0],
        heads=min(heads, key=wasted),
        stages=blocks(sizes[0]),
    )
    return plan if plan.teams >= _FEWEST_TEAMS else None


def team_of(plan: TeamPlan, n: Any) -> Team:
    """The n-th team of this CTA; past its last one, any team."""
    number = jnp.minimum(n * plan.ctas + _place(plan, n), plan.teams - 1)
    of_level = plan.B * plan.head_groups
    level = plan.levels - 1 - lax.div(number, of_level)
    index = lax.rem(number, of_level)
    return Team(lax.div(index, plan.head_groups), lax.rem(index, plan.head_groups), level)


def _place(plan: TeamPlan, n: Any) -> Any:
    """The place of this CTA's n-th team among all n-th teams, which run backwards for odd n."""
    cta = lax.axis_index("cta")
    return jnp.where(lax.rem(n, 2) == 0, cta, plan.ctas - 1 - cta)


def count_of_teams(plan: TeamPlan) -> Any:
    """The number of teams that this CTA computes."""
    whole, rest = divmod(plan.teams, plan.ctas)
    return whole + jnp.where(_place(plan, jnp.int32(whole)) < rest, 1, 0)


def blocks_of(table_ref: Any, index: Any) -> TeamBlocks:
    """A team's blocks, from its row of the table."""
    return TeamBlocks(*(table_ref[index, field] for field in range(_FIELDS)))


def inner_of(table_ref: Any, index: Any, tile: Any) -> Inner:
    """The bounds of a team's tile, from its row of the table."""
    first = _FIELDS + _TILE_FIELDS * tile
    return Inner(*(table_ref[index, first + field] for field in range(_TILE_FIELDS)))


def make_tables(plan: TeamPlan, lengths: jax.Array, starts: jax.Array) -> dict[str, jax.Array]:
    """Tables of the windows, in positions counted from the start of a row.

    Args:
      plan: the plan.
      lengths: int32 [B, queries of the call].
      starts: int32 [B, queries of the call].

    Returns:
      teams: int32 [B * levels, fields]: `TeamBlocks`, then `Inner` of each tile.
      starts, lengths: int32 [B, row_tiles, 64], of the rows of each tile, as the caller gave them;
        the rows past the last query repeat it.
    """
    queries = plan.row_tiles * plan.queries
    starts, lengths = (padded(x, 1, queries, mode="edge") for x in (starts, lengths))
    start, end = jnp.maximum(starts, 0), jnp.minimum(lengths, plan.S)
    filled = end > start
    start, end = jnp.where(filled, start, 0), jnp.where(filled, end, 0)

    def following(x: jax.Array) -> jax.Array:
        """The next query's entry."""
        return lax.pad(x, jnp.int32(0), ((0, 0, 0), (-1, 1, 0)))

    # Windows that each touch the next have no gap between them. A team's last query has no next.
    apart = (following(start) > end) | (start > following(end))
    of_team = plan.tiles * plan.queries
    apart &= jnp.arange(queries) % of_team != of_team - 1
    gap = (apart | ~filled).astype(jnp.int32)
    by_tile = (plan.B, plan.row_tiles, plan.queries)
    least = jnp.where(filled, start, plan.S)
    # One reduction with several results is one kernel.
    high, low, inner_low, inner_high, gap = lax.reduce(
        tuple(x.reshape(by_tile) for x in (end, least, start, end, gap)),
        tuple(map(jnp.int32, (0, plan.S, 0, plan.S, 0))),
        lambda x, y: (
            jnp.maximum(x[0], y[0]),
            jnp.minimum(x[1], y[1]),
            jnp.maximum(x[2], y[2]),
            jnp.minimum(x[3], y[3]),
            jnp.maximum(x[4], y[4]),
        ),
        (2,),
    )
    high, low, inner_low, inner_high, gap = (
        x.reshape(plan.B, plan.levels, plan.tiles) for x in (high, low, inner_low, inner_high, gap)
    )
    ends, tiles = high, range(plan.tiles)
    high = functools.reduce(jnp.maximum, (ends[..., i] for i in tiles))
    low = jnp.minimum(functools.reduce(jnp.minimum, (low[..., i] for i in tiles)), high)
    gap = functools.reduce(jnp.maximum, (gap[..., i] for i in tiles))
    base = plan.form.stride * jnp.arange(plan.B, dtype=jnp.int32)[:, None]
    unit = plan.form.unit(plan.piece)
    first = (base + low) // unit * unit - base
    count = jnp.where(high > 0, (high - first + (plan.T - 1)) // plan.T, 0)
    fields = [*TeamBlocks(first, count, low, high, gap)]
    for i in tiles:
        fields += Inner(inner_low[..., i], inner_high[..., i], ends[..., i])

    def of_rows(x: jax.Array) -> jax.Array:
        x = x.reshape(plan.B, plan.row_tiles, 1, plan.queries)
        shape = (plan.B, plan.row_tiles, plan.heads, plan.queries)
        return jnp.broadcast_to(x, shape).reshape(plan.B, plan.row_tiles, WGMMA_ROWS)

    teams = jnp.stack(fields, axis=-1).reshape(plan.B * plan.levels, len(fields))
    return {"teams": teams, "starts": of_rows(starts), "lengths": of_rows(lengths)}
