"""The blocks of the cache that windows touch, and the loops over them.

The blocks of all rows stand in one line, row after row, each row's from its first window's start
to its last one's end. The line is cut into PARTS of equal length whose loops do not depend on
each other, so that XLA runs them at the same time, whether there are many rows or one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jax_ragged.lowering._compat import pcast_to_varying, varying_axes
from jax_ragged.lowering.reference import statistics_dtype

PARTS = 2

_State = TypeVar("_State")
_RowState = TypeVar("_RowState")


def block_size(S: int, D: int, asked: int | None) -> int:
    """Positions of a block: as asked, or such that one head's keys stay in a core's L2 cache."""
    T = max(64, min(512, 32768 // max(D, 1))) if asked is None else asked
    return min(T, S)


class Block(NamedTuple):
    """One block of one row.

    Attributes:
      row: of the cache.
      start: its first position, such that it lies within the cache.
      inside: bool [Q, T]: which positions lie in the block and in each query's window.
    """

    row: jax.Array
    start: jax.Array
    inside: jax.Array


class Work(NamedTuple):
    """What there is to read: windows lo <= t < hi [B, Q], and the line of blocks.

    Attributes:
      lo, hi: the windows, within the cache.
      start: [B], the first position of any window of the row.
      first: [B], the place of the row's first block in the line.
      count: [B], the number of the row's blocks.
      items: the number of all blocks.
    """

    lo: jax.Array
    hi: jax.Array
    start: jax.Array
    first: jax.Array
    count: jax.Array
    items: jax.Array

    @classmethod
    def of(cls, lengths: jax.Array, starts: jax.Array, S: int, T: int) -> "Work":
        lo, hi = jnp.maximum(starts, 0), jnp.minimum(lengths, S)
        empty = lo >= hi
        start = jnp.where(empty, S, lo).min(axis=1)
        end = jnp.where(empty, 0, hi).max(axis=1)
        count = lax.div(jnp.maximum(end - start, 0) + (T - 1), jnp.int32(T))
        ends = jnp.cumsum(count, dtype=jnp.int32)
        return cls(lo, hi, start, ends - count, count, ends[-1])

    def fold(
        self,
        part: int,
        T: int,
        S: int,
        state: _State,
        begin_row: Callable[[jax.Array, _State], _RowState],
        block: Callable[[Block, _RowState], _RowState],
        end_row: Callable[[jax.Array, _State, _RowState], _State],
    ) -> _State:
        """Runs through one part of the line, row by row and within it block by block."""
        begin, end = (lax.div(self.items * p, jnp.int32(PARTS)) for p in (part, part + 1))
        rows = self.start.size
        first_row = (self.first + self.count <= begin).sum(dtype=jnp.int32)
        last_row = rows - (self.first >= end).sum(dtype=jnp.int32)

        def one_row(b: jax.Array, state: _State) -> _State:
            first, count, start = self.first[b], self.count[b], self.start[b]
            lo, hi = self.lo[b][:, None], self.hi[b][:, None]

            def one_block(j: jax.Array, row_state: _RowState) -> _RowState:
                at = start + j * T
                within = jnp.minimum(at, S - T)
                position = within + lax.iota(jnp.int32, T)
                inside = (position >= jnp.maximum(lo, at)) & (position < hi)
                return block(Block(b, within, inside), row_state)

            row_state = lax.fori_loop(
                jnp.maximum(begin - first, 0),
                jnp.minimum(end - first, count),
                one_block,
                begin_row(b, state),
            )
            return end_row(b, state, row_state)

        return lax.fori_loop(first_row, last_row, one_row, state)


def take(x: jax.Array, block: Block, h: jax.Array, T: int) -> jax.Array:
    """The block of one head of a cache [B, S, Hkv, D], widened: [T, D].

    XLA would rather widen a bfloat16 cache as a whole, ahead of the loops. It cannot if it is
    the bits that are read, by way of a value that changes with every step.
    """
    wide = statistics_dtype(x.dtype)
    zero = jnp.zeros((), jnp.int32)
    at = (block.row, block.start, h, zero)
    sizes = (1, T, 1, x.shape[-1])
    if x.dtype == jnp.bfloat16:
        x, at = lax.optimization_barrier((x, at))
        bits = lax.dynamic_slice(lax.bitcast_convert_type(x, jnp.uint16), at, sizes)
        bits = bits.reshape(T, x.shape[-1]).astype(jnp.uint32) << 16
        return lax.bitcast_convert_type(bits, jnp.float32)
    return lax.dynamic_slice(x, at, sizes).reshape(T, x.shape[-1]).astype(wide)


def varying_like(like: jax.Array, x: jax.Array) -> jax.Array:
    """X as the initial value of a loop whose body gives what varies as `like` does."""
    return pcast_to_varying(x, varying_axes(like))


def by_key_head(x: jax.Array, Hkv: int) -> jax.Array:
    """[B, Q, Hq, ...] to [B, Hkv, Q * G, ...]: the rows that share a key head."""
    B, Q, Hq = x.shape[:3]
    x = x.reshape(B, Q, Hkv, Hq // Hkv, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(B, Hkv, Q * (Hq // Hkv), *x.shape[4:])


def by_query(x: jax.Array, Q: int) -> jax.Array:
    """[B, Hkv, Q * G, ...] to [B, Q, Hq, ...]: the inverse of by_key_head."""
    B, Hkv, R = x.shape[:3]
    x = x.reshape(B, Hkv, Q, R // Q, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(B, Q, Hkv * (R // Q), *x.shape[4:])


def for_rows(inside: jax.Array, R: int) -> jax.Array:
    """[Q, T] to [R, T], R = Q * G, or to [1, T] where one serves all."""
    Q, T = inside.shape
    if Q == 1:
        return inside
    return jnp.broadcast_to(inside[:, None], (Q, R // Q, T)).reshape(R, T)


def over_heads(Hkv: int, body: Callable[[jax.Array, _State], _State], state: _State) -> _State:
    """A loop over key heads: unrolled it would be no faster and longer to compile."""
    return lax.fori_loop(jnp.int32(0), jnp.int32(Hkv), body, state)


def pick(x: jax.Array, i: jax.Array) -> jax.Array:
    """x[i], i within bounds."""
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def put(x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
    """X with x[i] replaced."""
    return lax.dynamic_update_index_in_dim(x, part, i, 0)


dot = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)
