"""How a cache lies in memory, and where the copying warpgroups find its positions.

Positions are counted in the *joined cache*, in every form: position t of row b is b * stride + t,
where the stride is S, or S rounded up to a multiple of 8 where the heads come first. A block is
copied in *pieces*, each by one operation of the copy engine. A piece lies in one page.

    cache                  array that the kernels read    first position of a piece
    [B, S, Hkv, D]         [B * S, Hkv, D]                b * stride + t
    [B, Hkv, S, D]         the same                       (b, t)
    pool [P, T, Hkv, D]    [P * T, Hkv, D]                page * T + t % T
    pool [P, Hkv, T, D]    the same                       (page, t % T)

The pages of a pool stand in a table [B, W]. A copying warpgroup looks up the pages of a block while
the copies of the block before it run, so that it does not wait for the table.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering.cache import positions, positions_axis
from jax_ragged.lowering.contract import Operands, Residuals
from jax_ragged.lowering.gpu.launch import Refs, padded
from jax_ragged.lowering.params import RaggedAttentionParams

# The copy engine moves whole swizzle tiles: positions start at a multiple of this many.
_ROWS = 8

# The page of each piece of a block.
Pages = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of a call's cache.

    Attributes:
      S: positions of a row.
      stride: from the first position of a row to that of the next one, in the joined cache.
      page_size: positions of a page, or the stride where heads come first and there is no table.
        None for a dense cache, whose rows are joined.
      heads_first: whether a page is [Hkv, T, D].
      paged: whether a table says which page a row's positions are in; else page b is row b.
    """

    S: int
    stride: int
    page_size: int | None = None
    heads_first: bool = False
    paged: bool = False

    @classmethod
    def of(cls, operands: Operands | Residuals, params: RaggedAttentionParams) -> "Form":
        """The form of the cache among the operands."""
        S = positions(operands, params)
        heads_first = params.cache_layout == "BHSD"
        if params.paged:
            page_size = operands.key.shape[positions_axis(params)]
            return cls(S, S, page_size, heads_first, paged=True)
        if heads_first:
            stride = -(-S // _ROWS) * _ROWS
            return cls(S, stride, stride, heads_first)
        return cls(S, S)

    def joins(self, B: int) -> int:
        """How many positions of one head stand in a row in memory, of a cache of B rows."""
        return self.page_size or B * self.S

    def inputs(self, operands: Operands) -> dict[str, jax.Array]:
        """The cache's arrays as the kernels read them, by the names of their refs."""
        arrays = {"key": self.array(operands.key), "value": self.array(operands.value)}
        if operands.page_table is not None:
            arrays["page_table"] = operands.page_table
        return arrays

    def array(self, x: jax.Array) -> jax.Array:
        """Views key or value as the kernels read it.

        The copy engine moves 8 positions at a time and takes arrays of no other length. Only where
        B * S, or S if heads come first, is no multiple of 8 is the cache copied for that.
        """
        if self.heads_first:
            return padded(x, 2, -(-x.shape[2] // _ROWS) * _ROWS)
        x = x.reshape(-1, *x.shape[2:])
        return padded(x, 0, -(-x.shape[0] // _ROWS) * _ROWS)

    def piece(self, most: int) -> int:
        """The most positions, up to a power of two, that a piece can have: it lies in one page."""
        return math.gcd(self.page_size, most) if self.paged and self.page_size else most

    def unit(self, piece: int) -> int:
        """The first position of a block is a multiple of this, so that its pieces lie in pages."""
        return piece if self.paged else _ROWS

    def pages(self, refs: Refs, place: "Place", first: Any, T: int) -> Pages:
        """Looks up the page of each piece of the block of T positions from `first` on.

        For pieces past the end it looks up the page of the last position instead: no entry outside
        of the hull of the windows is read.
        """
        if not self.paged:
            return (place.row,) * (T // place.piece)
        last = place.end - 1
        of_row = (
            jnp.minimum(first + offset, last) - place.row * self.stride
            for offset in range(0, T, place.piece)
        )
        page_size = jnp.int32(self.page_size)
        return tuple(refs.page_table[place.row, lax.div(t, page_size)] for t in of_row)

    def copy_block(
        self, ref: Any, to: Any, full: Any, place: "Place", first: Any, pages: Pages
    ) -> None:
        """Starts the copies of a block's pieces; what is past the end stays as it was.

        Args:
          ref: key or value in global memory.
          to: the block in shared memory, [T, D].
          full: the barrier at which each piece arrives.
          place: where the block is.
          first: its first position, which is before the end.
          pages: the page of each piece.
        """
        for i, page in enumerate(pages):
            offset = i * place.piece
            source = self._source(ref, place, first + offset, page)
            copy = functools.partial(
                plgpu.copy_gmem_to_smem, source, to.at[pl.ds(offset, place.piece)], full
            )
            if i == 0:
                copy()
            else:
                lax.cond(
                    first + offset < place.end,
                    copy,
                    functools.partial(plgpu.barrier_arrive, full),
                )

    def _source(self, ref: Any, place: "Place", at: Any, page: Any) -> Any:
        """The piece of key or value at a position, [piece, D], in global memory."""
        if self.page_size is None:
            return ref.at[pl.ds(pl.multiple_of(at, _ROWS), place.piece), place.head]
        offset = at - place.row * self.stride
        if self.paged:
            offset = lax.rem(offset, jnp.int32(self.page_size))
        if self.heads_first:
            return ref.at[page, place.head, pl.ds(pl.multiple_of(offset, _ROWS), place.piece)]
        first = pl.multiple_of(page * self.page_size + offset, _ROWS)
        return ref.at[pl.ds(first, place.piece), place.head]


class Place(NamedTuple):
    """Where a copying warpgroup reads.

    Attributes:
      row: of the cache.
      head: of the cache.
      end: of the hull of the windows there, a position of the joined cache.
      piece: positions of a piece.
    """

    row: Any
    head: Any
    end: Any
    piece: int
