"""How a cache lies in memory, and where the copying warpgroups find its positions.

Positions are counted in the *joined cache*, in every form: position t of row b is b * stride + t,
where the stride is S, or S rounded up to a multiple of 8 where the heads come first. A block is
copied in *pieces*, which lie in one page each; neighbours in a page by one operation of the copy
engine, where `Form.span` allows it.

    cache                  array that the kernels read    first position of a piece
    [B, S, Hkv, D]         [B * S, Hkv, D]                b * stride + t
    [B, Hkv, S, D]         the same                       (b, t)
    pool [P, T, Hkv, D]    [P * T, Hkv, D]                page * T + t % T
    pool [P, Hkv, T, D]    the same                       (page, t % T)

The pages of a pool stand in a table [B, W]. A copying warpgroup looks up the pages of a block while
the copies of the block before it run, so that it does not wait for the table.

A quantised cache comes with scales. One scale for all positions of a row and head is a number.
Scales of their own for positions stand beside them in an array [positions, heads], whose pieces are
copied with the pieces of the cache, 8 heads wide. Heads are padded to 4, or to a multiple of 8, as
the copy engine needs.
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

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.cache import positions, positions_axis
from jax_ragged.lowering.contract import Operands, Residuals
from jax_ragged.lowering.gpu.chip import SWIZZLE_ROWS, ceil_to
from jax_ragged.lowering.gpu.launch import Refs, overhanging, padded, swizzle_columns
from jax_ragged.lowering.gpu.softmax import TILE
from jax_ragged.lowering.params import RaggedAttentionParams

# Heads whose scales are copied together. Fewer in memory are a multiple of the other number.
_SCALED_HEADS, _FEWER_HEADS = 8, 4

# The page of each piece of a block.
Pages = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """How key or value is stored.

    Attributes:
      narrow: the dtype of the quantised values, or None for the dtype of query.
      scale: "row" if all positions of a row and head share a scale, "position" if they have their
        own; or None.
    """

    narrow: Any = None
    scale: str | None = None

    @classmethod
    def of(
        cls, x: jax.Array, scale: jax.Array | None, dtype: Any, params: RaggedAttentionParams
    ) -> "Stored":
        """How x and its scale are stored, beside a query of a dtype."""
        kind = None
        if scale is not None:
            shared = scale.shape[positions_axis(params)] == 1
            # The pages of a row may have different ones.
            by_row = shared and (scale.shape[0] == 1 or not params.paged)
            kind = "row" if by_row else "position"
        return cls(None if x.dtype == dtype else jnp.dtype(x.dtype), kind)

    def position_bytes(self, columns: int, itemsize: int) -> int:
        """Bytes of shared memory for a position of a block, with its scales as they are copied."""
        scales = 4 * _SCALED_HEADS if self.scale == "position" else 0
        return columns * (self.narrow.itemsize if self.narrow else itemsize) + scales


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of a call's cache.

    Attributes:
      key, value: how each is stored.
      S: positions of a row.
      stride: the positions from one row's first to the next row's first, in the joined cache.
      page_size: positions of a page, or the stride where heads come first and there is no table.
        None for a dense cache, whose rows are joined.
      heads_first: whether a page is [Hkv, T, D].
      paged: whether a table says which page a row's positions are in; else page b is row b.
    """

    key: Stored
    value: Stored
    S: int
    stride: int
    page_size: int | None = None
    heads_first: bool = False
    paged: bool = False

    @classmethod
    def of(cls, operands: Operands | Residuals, params: RaggedAttentionParams) -> "Form":
        """The form of the cache among the operands."""
        S = positions(operands, params)
        query, key, value = operands[:3]
        stored = (
            Stored.of(key, operands.key_scale, query.dtype, params),
            Stored.of(value, operands.value_scale, query.dtype, params),
        )
        heads_first = params.cache_layout == "BHSD"
        if params.paged:
            page_size = operands.key.shape[positions_axis(params)]
            return cls(*stored, S, S, page_size, heads_first, paged=True)
        if heads_first:
            stride = ceil_to(S, SWIZZLE_ROWS)
            return cls(*stored, S, stride, stride, heads_first)
        return cls(*stored, S, S)

    @property
    def narrow(self) -> bool:
        """Whether key or value is quantised."""
        return self.key.narrow is not None or self.value.narrow is not None

    def stored(self, name: str) -> Stored:
        """How key, value or the tangent of one is stored, by name."""
        return self.key if name.startswith("key") else self.value

    def position_bytes(self, D: int, Dv: int, itemsize: int) -> int:
        """Bytes of shared memory for a position of a block, with its scales as they are copied."""
        return self.key.position_bytes(D, itemsize) + self.value.position_bytes(Dv, itemsize)

    def joins(self, B: int) -> int:
        """How many positions of one head stand in a row in memory, of a cache of B rows."""
        return self.page_size or B * self.S

    def inputs(self, operands: Operands) -> dict[str, jax.Array]:
        """The cache's arrays as the kernels read them, by the names of their refs."""
        arrays = {"key": self.array(operands.key), "value": self.array(operands.value)}
        if operands.page_table is not None:
            arrays["page_table"] = operands.page_table
        for name in ("key", "value"):
            scale = getattr(operands, f"{name}_scale")
            if scale is not None:
                if self.stored(name).scale == "row":
                    heads = operands.key.shape[1 if self.heads_first else 2]
                    scale = self._scale_of_rows(scale, operands.query.shape[0], heads)
                else:
                    scale = self._scale_of_positions(scale, getattr(operands, name))
                arrays[f"{name}_scale"] = scale
        return arrays

    def _scale_of_rows(self, scale: jax.Array, B: int, heads: int) -> jax.Array:
        """One number for each row and head, [B, heads]."""
        scale = scale.squeeze(2 if self.heads_first else 1)
        return jnp.broadcast_to(scale, (B, heads))

    def _scale_of_positions(self, scale: jax.Array, x: jax.Array) -> jax.Array:
        """One number for each position and head, [positions of `array`, heads].

        A bitcast of scales [B, S, Hkv] or [P, T, Hkv] if the positions are a multiple of 8, and Hkv
        is, or is 4; else the scales are copied.
        """
        scale = jnp.broadcast_to(scale, x.shape[:3])
        if self.heads_first:
            scale = scale.swapaxes(1, 2)
            scale = padded(scale, 1, ceil_to(scale.shape[1], SWIZZLE_ROWS))
        scale = scale.reshape(-1, scale.shape[2])
        scale = padded(scale, 0, ceil_to(scale.shape[0], SWIZZLE_ROWS))
        heads = scale.shape[1]
        unit = _FEWER_HEADS if heads <= _SCALED_HEADS else _SCALED_HEADS
        return padded(scale, 1, ceil_to(heads, unit))

    def array(self, x: jax.Array) -> jax.Array:
        """Views key or value as the kernels read it.

        The copy engine moves 8 positions at a time and takes arrays of no other length. Only where
        B * S, or S if heads come first, is no multiple of 8 is the cache copied for that.
        """
        if self.heads_first:
            return padded(x, 2, ceil_to(x.shape[2], SWIZZLE_ROWS))
        x = x.reshape(-1, *x.shape[2:])
        return padded(x, 0, ceil_to(x.shape[0], SWIZZLE_ROWS))

    def piece(self, most: int) -> int:
        """The most positions, up to a power of two, that a piece can have: it lies in one page."""
        return math.gcd(self.page_size, most) if self.paged and self.page_size else most

    def span(self, T: int, piece: int) -> int:
        """The positions of a block that are copied in one operation where they lie in one page.

        Spans of the greatest size that divides block and page lie in one where the block begins
        with one. If that is no more than a piece, the whole block may still lie in a larger page.
        """
        span = self.piece(T)
        in_larger = self.page_size is not None and self.page_size >= T
        return T if span == piece and in_larger else span

    def unit(self, piece: int) -> int:
        """The first position of a block is a multiple of this, so that its pieces lie in pages."""
        return piece if self.paged else SWIZZLE_ROWS

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

    def arrivals(self, name: str, pieces: int) -> int:
        """The arrivals that make a block of key or value full: for each piece and its scales."""
        return pieces * (2 if self.stored(name).scale == "position" else 1)

    def scale_of_row(self, refs: Refs, name: str, row: Any, head: Any) -> Any:
        """The scale of a row and head of key or value, or None if there is not one."""
        if self.stored(name).scale != "row":
            return None
        return refs[f"{name}_scale"][row, head]

    def scales_scratch(self, name: str, slots: int, T: int) -> dict[str, Any]:
        """Shared memory for the scales of blocks of T positions, if positions have their own."""
        if self.stored(name).scale != "position":
            return {}
        return {f"{name}_scales": plgpu.SMEM((slots, T, _SCALED_HEADS), jnp.float32)}

    def copy_block(
        self, refs: Refs, name: str, slot: Any, place: "Place", first: Any, pages: Pages
    ) -> None:
        """Starts the copies of a block's pieces; positions past the end keep their old values.

        Args:
          refs: the kernel's refs.
          name: of key, value or the tangent of one.
          slot: the block's slot in shared memory.
          place: where the block is.
          first: its first position, which is before the end.
          pages: the page of each piece.
        """
        full = refs[f"{name}_full"].at[slot]
        T = len(pages) * place.piece

        def copy(offset: int, size: int, page: Any) -> None:
            """Copies positions of one page, from an offset in the block on."""
            rows, at = pl.ds(offset, size), first + offset
            source = self._source(refs[name], place, at, page, size)
            block = refs[f"{name}_blocks"].at[slot, rows]
            columns, D = block.shape[1], source.shape[1]
            if columns > D:
                unit = swizzle_columns(D, refs[name].dtype)
                source = source.at[:, overhanging(0, columns, unit, place.head)]
            plgpu.copy_gmem_to_smem(source, block, full)
            if self.stored(name).scale == "position":
                source = self._scale_source(refs[f"{name}_scale"], place, at, page, size)
                plgpu.copy_gmem_to_smem(source, refs[f"{name}_scales"].at[slot, rows], full)

        def arrive(pieces: int) -> None:
            for _ in range(self.arrivals(name, pieces)):
                plgpu.barrier_arrive(full)

        def copy_pieces(start: int) -> None:
            for offset in range(start, start + span, place.piece):
                piece = functools.partial(copy, offset, place.piece, pages[offset // place.piece])
                if offset == 0:
                    piece()
                else:
                    lax.cond(first + offset < place.end, piece, functools.partial(arrive, 1))

        def copy_whole(start: int) -> None:
            copy(start, span, pages[start // place.piece])
            arrive(span // place.piece - 1)

        # An operation of the copy engine takes time of its own: positions that can lie in one page
        # are copied together if they do, and if none is past the end.
        span = self.span(T, place.piece)
        for start in range(0, T, span):
            if span == place.piece:
                copy_pieces(start)
                continue
            whole = first + start + span <= place.end
            if self.paged:
                whole &= self._offset(place, first + start) + span <= self.page_size
            lax.cond(
                whole,
                functools.partial(copy_whole, start),
                functools.partial(copy_pieces, start),
            )

    def _offset(self, place: "Place", at: Any) -> Any:
        """The position in its page, or in its row where there is no page table."""
        offset = at - place.row * self.stride
        return lax.rem(offset, jnp.int32(self.page_size)) if self.paged else offset

    def _scale_source(self, ref: Any, place: "Place", at: Any, page: Any, size: int) -> Any:
        """The scales of positions of one page, [size, 8], in global memory."""
        if self.paged:
            at = page * self.page_size + self._offset(place, at)
        heads = lax.div(place.head, _SCALED_HEADS) * _SCALED_HEADS
        positions = pl.ds(pl.multiple_of(at, SWIZZLE_ROWS), size)
        return ref.at[positions, pl.ds(pl.multiple_of(heads, _SCALED_HEADS), _SCALED_HEADS)]

    def _source(self, ref: Any, place: "Place", at: Any, page: Any, size: int) -> Any:
        """Positions of one page of key or value, [size, D], in global memory."""
        if self.page_size is None:
            return ref.at[pl.ds(pl.multiple_of(at, SWIZZLE_ROWS), size), place.head]
        offset = self._offset(place, at)
        if self.heads_first:
            return ref.at[page, place.head, pl.ds(pl.multiple_of(offset, SWIZZLE_ROWS), size)]
        first = pl.multiple_of(page * self.page_size + offset, SWIZZLE_ROWS)
        return ref.at[pl.ds(first, size), place.head]


def widened(x: jax.Array, dtype: Any) -> jax.Array:
    """Quantised numbers in a dtype of 16 bits, exactly."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)  # the hardware has no conversion to bfloat16
    return x.astype(dtype)


def scales_of_positions(refs: Refs, name: str, slot: Any, head: Any) -> jax.Array:
    """The scales of a head of a block's positions, [T] in registers: of [T, 8 heads] in memory."""
    scales = mosaic_gpu_load(refs[f"{name}_scales"].at[slot], layout=TILE, optimized=False)
    column = plgpu.broadcasted_iota(jnp.int32, scales.shape, 1, layout=TILE)
    own = column == lax.rem(head, _SCALED_HEADS)
    return jnp.where(own, scales, 0.0).sum(axis=1)


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
