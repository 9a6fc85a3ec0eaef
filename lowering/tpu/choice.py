"""How a kernel runs a call: sizes, the reading of the cache, and blocks, chosen once for each.

A *reading* is a way to read the cache in place: all heads of a block together, or each by itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jax_ragged.lowering.cache import positions, positions_axis
from jax_ragged.lowering.contract import Operands, Residuals, Unsupported
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.tpu.chips import Chip
from jax_ragged.lowering.tpu.cost import VMEM_SHARE, Blocks, Work, blocks_for, compute_cycles
from jax_ragged.lowering.tpu.layout import LANES, SUBLANES, CacheForm, alike, round_up

Found = TypeVar("Found")
LOG2_E = math.log2(math.e)

# Query rows (head, query) of a tile; more queries are cut in tiles, each of which reads the cache.
MAX_ROWS = 512


class Sizes:
    """The sizes of one call, and how its queries become rows of the kernel.

    Rows are (key head, query, head of the group), so that the rows of one key head stand together.
    With `by_head` each head of the cache is read by itself, in any form. `pages` is the number of a
    row's pages, 0 without a page table; `page` the positions of one, None if a row has just one.

    Raises:
      Unsupported: for pages that no kernel reads.
    """

    def __init__(
        self,
        operands: Operands | Residuals,
        params: RaggedAttentionParams,
        *,
        by_head: bool = False,
    ) -> None:
        key, value = operands.key, operands.value
        self.B, self.Q, self.Hq, self.D = operands.query.shape
        axis = self.axis = positions_axis(params)
        self.Hkv, self.Dv = key.shape[3 - axis], value.shape[3]
        self.G = self.Hq // self.Hkv
        self.dtype = operands.query.dtype
        self.positions = positions(operands, params)
        # XLA gives caches shorter than the lanes other layouts: they are padded, a small copy.
        self.S = self.positions if params.paged else max(self.positions, LANES)
        stored = self.stored = key.shape[axis] if params.paged else self.S
        if params.paged and stored % LANES and (self.D % LANES or self.Dv % LANES):
            raise Unsupported(
                f"XLA keeps the pages of {stored} positions side by side in the lanes for head "
                f"dimensions {self.D} and {self.Dv}, of which one is no multiple of {LANES}",
                f"Use pages of a multiple of {LANES} positions.",
            )
        # A row that is one page is read as a row of a dense cache is.
        self.page = stored if stored < self.S else None
        if self.page is not None and self.page % SUBLANES:
            raise Unsupported(
                f"its kernels read pages of a multiple of {SUBLANES} positions, which XLA keeps as "
                f"they are, and these have {self.page}",
                f"Use pages of a multiple of {SUBLANES} positions.",
            )
        self.pages = self.positions // stored if params.paged else 0
        layout_of = functools.partial(
            CacheForm.of, stored, self.Hkv, heads_first=params.cache_layout == "BHSD"
        )
        layouts = (layout_of(x.shape[3], x.dtype) for x in (key, value))
        self.key, self.value = (x.by_head() if by_head else x for x in layouts)
        self.tiles = -(-self.Q * self.Hq // MAX_ROWS)
        self.queries = -(-self.Q // self.tiles)
        self.tiles = -(-self.Q // self.queries)
        interleaved = self.key.interleaved and self.value.interleaved
        rows = self.queries * self.G
        # A product of one head reads whole registers of its rows.
        self.head_rows = rows if interleaved else round_up(rows, SUBLANES)
        self.rows = round_up(self.Hkv * self.head_rows, SUBLANES)
        self.V = self.B * self.tiles

    def work(self, **arrays: Any) -> Work:
        """The work of a kernel; without arguments, of the forward."""
        table = self.B * self.pages
        sizes = self.rows, self.V, self.S, self.page, table
        return Work(self.key, self.value, self.dtype, *sizes, **arrays)

    def positions_first(self, x: jax.Array) -> jax.Array:
        """A cache or scale [B, S, Hkv, ...] of 128 positions or more, from one of the call."""
        x = self.in_order(x)
        missing = self.S - self.positions
        padding = ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))
        return jnp.pad(x, padding) if missing else x

    def from_positions_first(self, x: jax.Array) -> jax.Array:
        """The inverse of `positions_first`."""
        return self.in_order(x[:, : self.positions])

    def in_order(self, x: jax.Array) -> jax.Array:
        """Exchanges heads and positions where the call has heads first."""
        return x.swapaxes(1, 2) if self.axis == 2 else x

    def tile_windows(self, x: jax.Array) -> jax.Array:
        """[B, Q] to [V, queries]; padding queries repeat the last window."""
        missing = self.tiles * self.queries - self.Q
        x = jnp.pad(x, ((0, 0), (0, missing)), mode="edge") if missing else x
        return x.reshape(self.V, self.queries)

    def window_rows(self, x: jax.Array) -> jax.Array:
        """[V, queries] to the bound of each row, [V, R]."""
        x = jnp.broadcast_to(x[:, None, :, None], (self.V, self.Hkv, self.queries, self.G)).reshape(
            self.V, self.Hkv, -1
        )
        return self._pad_rows(x[..., None])[..., 0]

    def to_rows(self, x: jax.Array) -> jax.Array:
        """[B, Q, Hq, n] to [V, R, n]."""
        missing = self.tiles * self.queries - self.Q
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x
        n = x.shape[3]
        x = x.reshape(self.V, self.queries, self.Hkv, self.G, n)
        x = x.transpose(0, 2, 1, 3, 4)
        return self._pad_rows(x.reshape(self.V, self.Hkv, self.queries * self.G, n))

    def _pad_rows(self, x: jax.Array) -> jax.Array:
        """[V, Hkv, queries * G, n] to [V, R, n]."""
        rows = x.shape[2]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.head_rows - rows), (0, 0)))
        x = x.reshape(self.V, self.Hkv * self.head_rows, x.shape[3])
        return jnp.pad(x, ((0, 0), (0, self.rows - x.shape[1]), (0, 0)))

    def from_rows(self, x: jax.Array) -> jax.Array:
        """[V, R, n] to [B, Q, Hq, n]."""
        n = x.shape[2]
        x = x[:, : self.Hkv * self.head_rows].reshape(self.V, self.Hkv, self.head_rows, n)
        x = x[:, :, : self.queries * self.G]
        x = x.reshape(self.B, self.tiles, self.Hkv, self.queries, self.G, n)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(self.B, self.tiles * self.queries, self.Hq, n)[:, : self.Q]


@dataclasses.dataclass(frozen=True)
class KernelPlan:
    """The static sizes of a kernel.

    Attributes:
      key: layout of the keys.
      value: layout of the values; in the forward it has the same columns as the keys.
      blocks: T and the chunk.
      rows: R, query rows (head, query), a multiple of 8.
      head_rows: query rows of one key head, (query, head of its group).
      queries: queries of a tile.
      tiles: tiles of one row of the cache.
      cores: between which the work list is split.
      params: of the operation.
    """

    key: CacheForm
    value: CacheForm
    blocks: Blocks
    rows: int
    head_rows: int
    queries: int
    tiles: int
    cores: int
    params: RaggedAttentionParams

    @functools.cached_property
    def compact(self) -> bool:
        """Whether logits of several heads are brought together in one row (`compact_heads`)."""
        heads_fit = self.key.interleaved and LANES % self.key.columns == 0
        return heads_fit and self.rows % self._whole_rows == 0

    @functools.cached_property
    def _whole_rows(self) -> int:
        """The fewest query rows that are whole registers and whole heads."""
        return math.lcm(SUBLANES, self.head_rows)

    @functools.cached_property
    def compact_rows(self) -> int:
        """C, the rows of logits after `compact_heads`."""
        return self._whole_rows if self.compact else self.rows

    @functools.cached_property
    def unit(self) -> float:
        """The factor of z that gives the logit, so that no step multiplies by it."""
        p = self.params
        return p.softmax_scale if p.logits_soft_cap is None and p.softmax_scale > 0 else 1.0

    def in_units(self, max_logits: jax.Array) -> jax.Array:
        """Maxima of logits as maxima of z: the same float32 in every kernel."""
        return max_logits if self.unit == 1 else max_logits * (1 / self.unit)

    @property
    def chunks(self) -> int:
        """Chunks of a block."""
        return self.blocks.T // self.blocks.chunk

    @functools.cached_property
    def softmaxes(self) -> list[range]:
        """The heads of each softmax: all, where they share columns, else those that share words.

        One softmax hides under the products of the next.
        """
        heads = self.key.heads
        if self.key.interleaved:
            return [range(heads)]
        together = max(x.packing if x.strided else 1 for x in (self.key, self.value))
        return [range(h, h + together) for h in range(0, heads, together)]

    def rows_of(self, heads: range) -> slice:
        """The query rows of the heads of a softmax."""
        if len(heads) == self.key.heads:
            return slice(None)
        return slice(heads.start * self.head_rows, heads.stop * self.head_rows)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one kernel runs a call.

    Attributes:
      sizes: of the call, with the reading of the cache.
      work: of the kernel.
      blocks: that a step reads.
      chip: that they are for.
      params: of the operation.
    """

    sizes: Sizes
    work: Work
    blocks: Blocks
    chip: Chip
    params: RaggedAttentionParams

    @property
    def plan(self) -> KernelPlan:
        """The static sizes of the kernel."""
        sizes = self.sizes
        return KernelPlan(
            key=sizes.key,
            value=sizes.value,
            blocks=self.blocks,
            rows=sizes.rows,
            head_rows=sizes.head_rows,
            queries=sizes.queries,
            tiles=sizes.tiles,
            cores=self.chip.cores,
            params=self.params,
        )


def readings(
    operands: Operands | Residuals, params: RaggedAttentionParams, *, alike_columns: bool = False
) -> list[Sizes]:
    """The sizes of a call for each reading; the forward needs columns that are alike."""
    together, by_head = (Sizes(operands, params, by_head=x) for x in (False, True))
    if alike_columns and not alike(together.key, together.value):
        return [by_head]
    separable = by_head.key.strided and by_head.value.strided
    return [together, by_head] if separable else [together]


def choose(
    sizes: list[Sizes],
    work_of: Callable[[Sizes], Work],
    chip: Chip,
    params: RaggedAttentionParams,
    vmem_most: float = VMEM_SHARE,
) -> Choice:
    """The choice for one kernel: the reading that computes least in the forward.

    Raises:
      Unsupported: the first reading's refusal, if there is no choice.
    """
    choices, refusals = [], []
    for i, x in enumerate(sizes):
        work = work_of(x)
        # Heads that are read by themselves are not summed over tiles of queries.
        if i > 0 and work.summed:
            continue
        try:
            _check(x, chip)
            blocks = blocks_for(work, chip, params.block_size, vmem_most)
            choices.append(Choice(x, work, blocks, chip, params))
        except Unsupported as refusal:
            refusals.append(refusal)
    if not choices:
        raise refusals[0]
    return min(choices, key=lambda x: compute_cycles(x.sizes.work(), chip))


def _check(sizes: Sizes, chip: Chip) -> None:
    """Refuses a reading of the cache that has no kernel.

    Raises:
      Unsupported: with the reason.
    """
    reason = sizes.key.reason or sizes.value.reason
    if reason is not None:
        advice = 'Keep heads first, cache_layout="BHSD", and a multiple of 8 positions.'
        raise Unsupported(reason, advice)
    for x in (sizes.key, sizes.value):
        # Of several registers of lanes, the compiler copies whole tiles, or parts of one.
        tile = SUBLANES * (x.packing if x.packing == 4 or chip.tall_tiles else 1)
        page = sizes.page
        if page is not None and x.head_dim > LANES and page % tile and tile % page:
            raise Unsupported(
                f"the compiler copies {tile} positions of head dimension {x.head_dim} in {x.dtype} "
                f"together, and pages of {page} would cut them",
                f"Use pages of a multiple of {tile} positions.",
            )


def with_advice(
    params: RaggedAttentionParams, S: int, plan: Callable[[RaggedAttentionParams], Found]
) -> Found:
    """Returns plan(params); a refusal names the block sizes next to the one that was asked for.

    Raises:
      Unsupported: from plan, with advice if another block size works.
    """
    try:
        return plan(params)
    except Unsupported as refusal:
        asked = params.block_size
        if asked is None or not _works(plan, params, None):
            raise
        nearest = _nearest(asked, S, lambda n: _works(plan, params, n))
        sizes = " or ".join(map(str, nearest))
        advice = f"Pass block_size={sizes}, or None to let the lowering choose."
        raise Unsupported(refusal.reason, advice) from refusal


def _works(
    plan: Callable[[RaggedAttentionParams], Any], params: RaggedAttentionParams, n: int | None
) -> bool:
    try:
        plan(dataclasses.replace(params, block_size=n))
    except Unsupported:
        return False
    return True


def _nearest(size: int, S: int, works: Callable[[int], bool]) -> list[int]:
    """The next smaller and the next larger block size that work, of multiples of powers of two."""
    multiples = [2**i for i in range(LANES.bit_length())]
    while multiples[-1] < S:
        multiples.append(2 * multiples[-1])
    sizes = sorted({n for m in multiples for n in (size // m * m, round_up(size, m))} - {0})
    working = [n for n in sizes if works(n)]
    below = [n for n in working if n < size][-1:]
    return below + [n for n in working if n > size][:1]
