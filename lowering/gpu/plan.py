"""Everything static about one call of the schedule for few queries, `line`."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.gpu.call import Call
from jax_ragged.lowering.gpu.chip import (
    MULTIPROCESSORS,
    SHARED_MEMORY,
    SWIZZLE_ROWS,
    WGMMA_ROWS,
    ceil_to,
)
from jax_ragged.lowering.gpu.launch import swizzle_columns
from jax_ragged.lowering.params import RaggedAttentionParams

# Columns of the values that one matrix product takes.
_CHUNK = 128
# Positions of a piece: those that are past the end of the window are not copied.
COPIED = 16
# Of shared memory, for the tables, if they fit.
_TABLES_BYTES = 16 * 1024
# The most rows of a dense tile whose logits have the positions down.
_FEW_ROWS = 16
# The most results of a tile that a stream copies out at once where positions are down.
_STAGED = 4 * 1024
# Two streams need so many blocks for each multiprocessor, counted with all rows full.
_BLOCKS_OF_TWO_STREAMS = 8
# Bytes of keys and values that a stream has in flight. More make it slower: 16 rows of S = 16384
# with 16/1 heads take 25.2 us with 128 KiB, 23.9 with 64.
_IN_FLIGHT = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Plan(Call):
    """Everything static about one call.

    Attributes:
      out_dtype: of the results that the kernels write.
      T: positions in a block.
      streams: streams of a CTA.
      stages: blocks of keys and of values that a stream has in flight.
      parts: parts of the line of blocks.
    """

    out_dtype: Any
    T: int
    streams: int
    stages: int
    parts: int

    @property
    def unit(self) -> int:
        """The first position of a block is a multiple of this."""
        return self.form.unit(COPIED)

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
    def positions_down(self) -> bool:
        """Whether a tile's logits have the positions down and the rows across: see `down`.

        Quantised blocks are always computed so. Others of many rows take longer: all in us on an
        H200, B16 S8192 32/8/128 with 8 queries, 32 rows, 82.8 for 74.5, and with 16 queries 160.9
        for 83.9.
        """
        return self.form.narrow or self.tile_rows <= _FEW_ROWS

    @property
    def padded_rows(self) -> int:
        """The rows of a tile in shared memory: 64 where they are a matrix product's rows."""
        return self.tile_rows if self.positions_down else WGMMA_ROWS

    @property
    def value_columns(self) -> int:
        """Columns of a block of values in shared memory, which matrix products take whole."""
        return ceil_to(self.Dv, WGMMA_ROWS) if self.positions_down else self.Dv

    @property
    def chunk(self) -> int:
        """Columns of values whose weighted sum one matrix product makes."""
        if not self.positions_down:
            return chunk(self.Dv, self.dtype)
        return _CHUNK if self.value_columns % _CHUNK == 0 else WGMMA_ROWS

    @property
    def integer_products(self) -> bool:
        """Whether int8 keys are multiplied as they are: in small tiles; see `down.prepare`."""
        return self.form.key.narrow == jnp.int8 and self.tile_rows == SWIZZLE_ROWS

    @property
    def keys_in_registers(self) -> bool:
        """Whether keys are widened in registers."""
        return self.form.key.narrow is not None and not self.integer_products

    @property
    def value_dtype(self) -> Any:
        """The dtype of values and weights in products.

        Weights times scales of positions may be too small for float16. bfloat16 has their range.
        """
        scaled = self.form.value.scale == "position"
        return jnp.dtype(jnp.bfloat16) if scaled else self.dtype

    @property
    def weight_parts(self) -> int:
        """The sum of how many numbers of `value_dtype` a weight is: it has 11 bits or more."""
        return 1 if self.value_dtype == self.dtype else 2

    @property
    def narrow_out(self) -> bool:
        """Whether results have 16 bits. Then they have shared memory of their own."""
        return bool(self.out_dtype.itemsize == 2)

    @property
    def staged(self) -> int:
        """Columns of results that are copied out at once: all, or as many as have room."""
        if self.positions_down and self.value_columns * self.tile_rows <= _STAGED:
            return self.value_columns
        if self.positions_down:
            return WGMMA_ROWS
        half = self.chunk // 2
        return half if half % 16 == 0 else self.chunk

    @property
    def staged_unit(self) -> int:
        """Columns of which the staged ones and all results are multiples."""
        return math.gcd(self.Dv, self.staged)

    def stages_of(self, streams: int) -> int:
        """The blocks of keys and values that fit into the shared memory of one of so many streams.

        Beside them it has a query, results of 16 and of 32 bits, and where positions are down
        logits, weights, and the digits of queries.
        """
        itemsize: int = self.dtype.itemsize
        of_row = self.D * itemsize + self.staged * 6
        if self.positions_down:
            of_row += WGMMA_ROWS * 4 + self.T * itemsize * self.weight_parts
        if self.integer_products:
            of_row += 3 * self.D
        left = (SHARED_MEMORY - _TABLES_BYTES - 5 * 1024) // streams - self.padded_rows * of_row
        block = self.T * self.form.position_bytes(self.D, self.value_columns, itemsize)
        return min(left // block, max(2, _IN_FLIGHT // block))

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
    dtype = jnp.dtype(out_dtype)
    call = Call.of(operands, params)
    plan = Plan(**vars(call), out_dtype=dtype, T=64, streams=1, stages=1, parts=1)
    # Blocks of 128 positions save time between products where a block has few bytes, if registers
    # hold the logits: all in us on an H200, 54.1 for 58.5 with B16 S8192 32/8/128 in int8, and 73.4
    # for 75.1 with B32 S8192 64/8/64.
    narrow, small = plan.form.narrow, plan.D + plan.Dv <= _CHUNK
    if plan.tile_rows <= _FEW_ROWS and plan.Dv <= _CHUNK and (small or narrow):
        plan = dataclasses.replace(plan, T=128)
    if params.block_size is not None:
        plan = dataclasses.replace(plan, T=params.block_size)
    # Two streams hide each other's latencies, if each has room for a block, but they make twice the
    # parts. With many short segments that is worth it, and with small heads and quantised blocks,
    # which are widened first, if every stream has several blocks: B128 S2048 32/8/128 with an
    # eighth of the positions 26.5 us for 29.1, B32 S8192 64/8/64 73.4 for 88.2, but in int8 B8
    # S1024 32/8/128 14.3 for 12.8. Small heads in 16 bits were not timed with few blocks.
    columns = plan.columns
    short = columns > 4 and plan.B * columns >= 4 * MULTIPROCESSORS
    blocks = plan.B * -(-plan.S // plan.T) * columns
    many = (small or narrow) and blocks >= _BLOCKS_OF_TWO_STREAMS * MULTIPROCESSORS
    wanted = plan.Dv <= _CHUNK and (short or many)
    streams = 2 if wanted and plan.stages_of(2) > 0 else 1
    return dataclasses.replace(
        plan,
        streams=streams,
        stages=plan.stages_of(streams),
        parts=_parts(columns, streams * MULTIPROCESSORS),
    )


def _parts(columns: int, streams: int) -> int:
    """How many parts, with a stream for each column, fill all the streams that run at once best."""

    def filled(waves: int) -> float:
        parts = waves * streams // columns
        # Fewer waves are better: each begins and ends with an idle memory.
        return parts * columns / (waves * streams) - 0.1 * waves

    fewest = -(-columns // streams)
    waves = max(range(fewest, fewest + 4), key=filled)
    return waves * streams // columns
