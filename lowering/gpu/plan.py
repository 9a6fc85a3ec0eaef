"""Everything static about one call of the schedule for few queries, `line`."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jax_ragged.lowering.cache import heads_axis
from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.gpu.forms import Form
from jax_ragged.lowering.gpu.launch import swizzle_columns
from jax_ragged.lowering.params import RaggedAttentionParams

# Rows of a wgmma, the matrix product of a warpgroup.
WGMMA_ROWS = 64
# The rows whose bytes in shared memory are permuted together ("swizzled").
SWIZZLE_ROWS = 8
# Columns of the values that one matrix product takes.
_CHUNK = 128
# Positions of a piece: those that are past the end of the window are not copied.
COPIED = 16
# Multiprocessors of an H100 or H200. The kernels are right for any number.
MULTIPROCESSORS = 132
SHARED_MEMORY = 227 * 1024
# Of shared memory, for the tables, if they fit.
_TABLES_BYTES = 16 * 1024
# Bytes of keys and values that a stream has in flight. More make it slower: 16 rows of S = 16384
# with 16/1 heads take 25.2 us with 128 KiB, 23.9 with 64.
_IN_FLIGHT = 64 * 1024


def ceil_to(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call.

    Attributes:
      form: how the cache lies in memory.
      T: positions in a block.
      pieces: pieces in which a chunk of results is copied out. More save shared memory.
      streams: streams of a CTA.
      stages: blocks of keys and of values that a stream has in flight.
      parts: parts of the line of blocks.
    """

    B: int
    Q: int
    Hq: int
    Hkv: int
    D: int
    Dv: int
    dtype: Any
    out_dtype: Any
    params: RaggedAttentionParams
    form: Form
    T: int
    pieces: int
    streams: int
    stages: int
    parts: int

    @property
    def S(self) -> int:
        """Positions of a row."""
        return self.form.S

    @property
    def unit(self) -> int:
        """The first position of a block is a multiple of this."""
        return self.form.unit(COPIED)

    @property
    def G(self) -> int:
        return self.Hq // self.Hkv

    @property
    def rows(self) -> int:
        """Rows of logits, a query and a head each, that share a KV head."""
        return self.Q * self.G

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // WGMMA_ROWS)

    @property
    def tile_rows(self) -> int:
        """The rows of a tile that are copied: all of them, in whole swizzle tiles."""
        return min(ceil_to(self.rows, SWIZZLE_ROWS), WGMMA_ROWS)

    @property
    def columns(self) -> int:
        """What is done for each row of the cache: KV heads, by tiles of their queries."""
        return self.Hkv * self.row_tiles

    @property
    def ctas(self) -> int:
        return -(-self.parts * self.columns // self.streams)

    @property
    def partials(self) -> int:
        """At most: a segment starts with a row or with a part."""
        return self.columns * (self.B + self.parts)

    @property
    def result_rows(self) -> int:
        """The rows of a tile in global memory: those of up to 8 are not padded there."""
        return self.rows if self.rows <= SWIZZLE_ROWS else self.tile_rows

    @property
    def accumulator_columns(self) -> int:
        """Dv, rounded up to a multiple of the merging kernel's threads."""
        return ceil_to(self.Dv, 128)

    @property
    def bounds(self) -> int:
        """How many tables of the bounds of windows there are."""
        return 2 if self.Q == 1 else 4

    @property
    def tables(self) -> int:
        """The tables of bounds, that of blocks, and one for making it."""
        return self.bounds + 2

    @property
    def lines(self) -> int:
        """Different lines of blocks; with one query, the tiles of a row have the same window."""
        return 1 if self.Q == 1 else self.row_tiles

    @property
    def line_size(self) -> int:
        """Rows, in whole units of what the copy engine moves."""
        return ceil_to(self.B, 4)

    @property
    def table_columns(self) -> int:
        """The rows of a table in shared memory, in whole units of a warpgroup's threads."""
        return ceil_to(self.line_size, 128)

    @property
    def tables_in_shared_memory(self) -> bool:
        size = self.tables * self.lines * self.table_columns * 4
        return size <= _TABLES_BYTES and self.lines <= 8

    @property
    def chunk(self) -> int:
        """Columns of the accumulator that one matrix product makes."""
        return chunk(self.Dv, self.dtype)

    @property
    def narrow_out(self) -> bool:
        """Whether results have 16 bits. Then they have shared memory of their own."""
        return bool(self.out_dtype.itemsize == 2)

    @property
    def out_columns(self) -> int:
        """Columns of results that are copied out at once."""
        return self.chunk // self.pieces

    @property
    def sum_columns(self) -> int:
        """Columns of partial results that are copied out at once: as many bytes, in float32."""
        return self.out_columns // 2 if self.narrow_out else self.out_columns

    @property
    def query_step(self) -> int:
        """Rows r of a tile with the same r // query_step are of one query."""
        return self.G if self.row_tiles == 1 else math.gcd(self.G, WGMMA_ROWS)


def chunk(columns: int, dtype: Any) -> int:
    """The most columns up to `_CHUNK` in which all chunks are equal and swizzled whole."""
    units = columns // swizzle_columns(columns, dtype)
    sizes = (columns // n for n in range(1, units + 1) if units % n == 0)
    return next(size for size in sizes if size <= _CHUNK)


def make_plan(operands: Operands, params: RaggedAttentionParams, out_dtype: Any) -> Plan:
    """Returns the plan of a call."""
    query, key, value = operands[:3]
    B, Q, Hq, D = query.shape
    Hkv, Dv = key.shape[heads_axis(params)], value.shape[3]
    T = 64
    columns = Hkv * -(-Q * (Hq // Hkv) // WGMMA_ROWS)
    form = Form.of(operands, params)
    itemsize = jnp.dtype(query.dtype).itemsize
    result_columns = chunk(Dv, query.dtype)

    def stages(streams: int, pieces: int) -> int:
        """The blocks of keys and values that fit into a stream's shared memory."""
        left = (SHARED_MEMORY - _TABLES_BYTES - 4 * 1024) // streams
        # A query, and 32 bits for each column of a piece: half of them for partial results.
        left -= WGMMA_ROWS * (D * itemsize + result_columns // pieces * 4)
        left -= T * form.widened_bytes(D, Dv, itemsize)
        block = T * form.position_bytes(D, Dv, itemsize)
        return min(left // block, max(2, _IN_FLIGHT // block))

    # Several pieces wait for one another; they are worth it for a second block in flight.
    most = (1, 2, 4) if form.narrow else (1, 2)
    possible = [n for n in most if result_columns % (16 * n) == 0]
    # Two streams hide each other's latencies, if registers hold their sums and each has room for a
    # block, but they make twice the parts. With many short segments that is worth it, and with
    # small heads: their logits take as long as the copies (B32 S8192 with 64/8/64 heads: 75 us for
    # 104 on an H200). So do quantised blocks, which are widened first (B16 S8192 with 32/8/128
    # heads in int8: 91 us for 122).
    short = columns > 4 and B * columns >= 4 * MULTIPROCESSORS
    wanted = Dv <= _CHUNK and (short or D + Dv <= _CHUNK or form.narrow)
    streams = 2 if wanted and stages(2, possible[-1]) > 0 else 1
    enough = min(2, stages(streams, possible[-1]))
    pieces = next(n for n in possible if stages(streams, n) >= enough)
    return Plan(
        B, Q, Hq, Hkv, D, Dv, jnp.dtype(query.dtype), jnp.dtype(out_dtype), params,
        form, T, pieces, streams, stages(streams, pieces),
        _parts(columns, streams * MULTIPROCESSORS),
    )  # fmt: skip


def _parts(columns: int, streams: int) -> int:
    """How many parts, with a stream for each column, fill all the streams that run at once best."""

    def filled(waves: int) -> float:
        parts = waves * streams // columns
        # Fewer waves are better: each begins and ends with an idle memory.
        return parts * columns / (waves * streams) - 0.1 * waves

    fewest = -(-columns // streams)
    waves = max(range(fewest, fewest + 4), key=filled)
    return waves * streams // columns
