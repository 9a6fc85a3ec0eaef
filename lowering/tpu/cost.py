"""How many positions of the cache one grid step reads: a model of DMA, compute and VMEM.

The DMA of a step of x MiB of cache takes `dma_cycles x`. Its compute takes about
`STEP_CYCLES + c x`, where for r registers [8, 128] of logits in the products of 1 MiB

    c = mib_cycles + register_cycles r + stride_cycles stride (+ byte_cycles)

and stride is the largest power of two in the stride of loads that separate the heads, 0 if none do;
byte_cycles count where they separate bytes. The smallest block whose
compute is TARGET of its DMA wastes the least at the ends of windows:

    x = STEP_CYCLES / (TARGET dma_cycles - c)

It is bounded by VMEM, which holds two of each block beside queries, results and accumulators, and
from below by the work list, which must fit in SMEM.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_ragged.lowering.contract import Unsupported
from jax_ragged.lowering.tpu.chips import MIB, Chip
from jax_ragged.lowering.tpu.layout import LANES, SUBLANES, CacheForm, alike, round_up

# Scalar code of the pipeline, and latencies that nothing hides, read from the schedules.
STEP_CYCLES = 400
TARGET = 0.75
# A product of float32 is made of several.
EXACT = 4
# More for registers of logits that are masked and exponentiated for all heads (`is_compact`).
UNCOMPACT = 2
# The share of a core's VMEM for declared arrays; the rest is for the compiler's spills. By default
# that is plenty; the forward compiles with less.
VMEM_SHARE = 0.6
VMEM_MOST = 0.9
SMEM_BYTES = 768 * 1024
# Registers [8, 128] that the logits of one chunk take: enough work to hide the latency of the
# matrix units, few enough to be spilled little.
CHUNK_REGISTERS = 32
MIN_COLUMNS = 512
MAX_COLUMNS = 2048
# Where heads are separated: the columns of two of them stay in registers.
STRIDED_COLUMNS = 256
MAX_MIB = 4.0
# Numbers for each logit of a chunk that the compiler spills in derivatives, and where blocks are
# widened: up to 20 in compiled kernels, and up to 90 of products of float32.
SPILLS = 32
# Keys and values of a step of a derivative, which has more latency to hide: of up to five products.
DERIVATIVE_BYTES = MIB


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one kernel, as the model sees it.

    Attributes:
      key: layout of the keys.
      value: layout of the values.
      dtype: of queries.
      rows: R, query rows (head, query) in one step.
      tiles: V, tiles of queries in the call.
      S: positions of a row of the cache.
      page: positions of a page, of which a block is a part, or a number; None if a row's positions
        lie in one place.
      table: entries of the page table.
      key_arrays: arrays of the size of the keys that are read or written; float32 of bfloat16
        counts as two.
      value_arrays: arrays of the size of the values, likewise.
      products: products of matrices with blocks of these arrays.
      summed: whether blocks that are written are summed over tiles of queries in VMEM.
      least_bytes: bytes of keys and values below which a larger block hides more latency.
    """

    key: CacheForm
    value: CacheForm
    dtype: DTypeLike
    rows: int
    tiles: int
    S: int
    page: int | None = None
    table: int = 0
    key_arrays: int = 1
    value_arrays: int = 1
    products: int = 2
    summed: bool = False
    least_bytes: int = 0

    @property
    def granule(self) -> int:
        """The fewest positions of a chunk: whole registers of 128 columns, and of scales."""
        layouts = (self.key, self.value)
        if any(x.packing == 4 for x in layouts):
            return LANES
        return math.lcm(*(LANES // math.gcd(LANES, x.columns) for x in layouts))

    def block_of(self, T: int) -> int:
        """The smallest block of T positions or more."""
        if self.page is None:
            return round_up(T, self.granule)
        parts = range(self.granule, self.page + 1, self.granule)
        fitting = [n for n in parts if n >= T and self.page % n == 0]
        return min(fitting, default=round_up(T, math.lcm(self.page, self.granule)))

    @property
    def registers(self) -> float:
        """Registers of logits for 1 MiB that is moved, in the two products of the forward.

        They have 128 lanes of queries each. Other numbers of products count in proportion.
        """
        columns = self.key.columns * MIB * LANES / self.moved_bytes(LANES)
        passes = -(-self.key.head_dim // LANES)
        return columns * passes * self.rows / (SUBLANES * LANES) * self.products / 2

    @property
    def is_compact(self) -> bool:
        """Whether the logits of a column are selected before the softmax, or of one head alone."""
        return not self.key.interleaved or LANES % self.key.columns == 0

    def moved_bytes(self, T: int) -> int:
        """Bytes that a step of T positions reads and writes of arrays like the cache."""
        key, value = (x.block_bytes(T) for x in (self.key, self.value))
        return self.key_arrays * key + self.value_arrays * value

    def is_short(self, T: int) -> bool:
        """Whether a block of T positions can be larger and is smaller than `least_bytes`."""
        key, value = (x.block_bytes(T) for x in (self.key, self.value))
        return T < self.S and key + value < self.least_bytes

    def vmem_bytes(self, T: int, chunk: int) -> int:
        """Declared bytes: double buffers, accumulators, and the logits of two chunks."""
        wide = [round_up(x.head_dim, LANES) for x in (self.key, self.value)]
        double_buffered = self.moved_bytes(T) + 4 * self.rows * sum(wide)
        accumulators = 4 * self.rows * (wide[1] + 4 * LANES)
        columns = chunk * max(self.key.columns, self.value.columns)
        pieces = max(self.key.stacked, self.value.stacked)
        logits = 2 * 4 * self.rows * pieces * columns
        narrow = [x for x in (self.key, self.value) if x.packing == 4]
        scales = sum(2 * 4 * T * round_up(x.heads, SUBLANES) for x in narrow)
        # Between different columns (derivatives) stands a 0/1 matrix, three times if exact.
        selection = 0 if alike(self.key, self.value) else 3 * 4 * chunk * columns
        layouts = (self.key, self.value)
        sums = sum(x.block_bytes(T, jnp.float32) for x in layouts) if self.summed else 0
        return 2 * double_buffered + accumulators + logits + scales + selection + sums

    def spilled_bytes(self, chunk: int) -> int:
        """Room for what the compiler spills beside the declared bytes."""
        widened = any(x.packing == 4 for x in (self.key, self.value))
        if self.products == 2 and not widened:
            return 0
        columns = chunk * max(self.key.columns, self.value.columns)
        exact = EXACT if self.dtype == jnp.float32 else 1
        return SPILLS * exact * 4 * self.rows * columns

    def smem_bytes(self, T: int) -> int:
        """Bytes of the work list and of the page table."""
        return 4 * (self.tiles * (-(-self.S // T) + 6) + 8 + self.table)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The block of a grid step and the chunks in which it computes.

    Attributes:
      T: positions of a block.
      chunk: positions of a chunk; T is a multiple of it.
      vmem_limit: bytes that the compiler may use.
    """

    T: int
    chunk: int
    vmem_limit: int


def blocks_for(
    work: Work, chip: Chip, block_size: int | None, vmem_most: float = VMEM_SHARE
) -> Blocks:
    """The blocks for work that declares vmem_most of VMEM.

    Raises:
      Unsupported: if there are none, or none of block_size positions.
    """
    blocks = _blocks_of(work, chip, block_size, vmem_most)
    while block_size is None and work.is_short(blocks.T):
        try:
            blocks = _blocks_of(work, chip, 2 * blocks.T, vmem_most)
        except Unsupported:
            break
    return blocks


def _blocks_of(work: Work, chip: Chip, block_size: int | None, vmem_most: float) -> Blocks:
    most = work.block_of(work.S)
    if block_size is None:
        T = min(_model(work, chip), most)
        while work.smem_bytes(T) > SMEM_BYTES and T < most:
            T = min(work.block_of(2 * T), most)
    elif work.block_of(block_size) != block_size < work.S:
        pages = "" if work.page is None else f", and pages of {work.page} positions"
        raise Unsupported(
            f"block_size={block_size} is no multiple of {work.granule}, which these head counts "
            f"and head dimensions{pages} need"
        )
    else:
        T = min(block_size, most)
    if work.smem_bytes(T) > SMEM_BYTES:
        raise Unsupported(
            f"the work list of {work.tiles} tiles of queries in blocks of {T} positions"
            f"{f' and the {work.table} entries of the page table do' if work.table else ' does'} "
            f"not fit in the {SMEM_BYTES} bytes of SMEM kept for them"
        )
    chunk = _chunk(work, T)
    declared = work.vmem_bytes(T, chunk)
    if declared > vmem_most * chip.vmem:
        raise Unsupported(
            f"blocks of {T} positions take {declared / MIB:.1f} of the {chip.vmem // MIB} MiB of "
            f"VMEM of a {chip.name}, of which the compiler needs a part"
        )
    limit = max(2 * declared + MIB, declared + work.spilled_bytes(chunk), 16 * MIB)
    return Blocks(T, chunk, min(limit, chip.vmem))


def compute_cycles(work: Work, chip: Chip) -> float:
    """Cycles of compute for 1 MiB of cache."""
    # A quantised cache has more positions in 1 MiB.
    widened = jnp.dtype(work.dtype).itemsize / jnp.dtype(work.key.dtype).itemsize
    register_cycles = chip.register_cycles * (1 if work.is_compact else UNCOMPACT)
    products = widened * chip.mib_cycles + register_cycles * work.registers
    exact = EXACT if work.dtype == jnp.float32 else 1
    # In the schedules a load takes the longer the larger the power of two is, as if by banks.
    stride = sum(x.stride & -x.stride for x in (work.key, work.value) if x.strided) / 2
    separated = any(x.strided and x.packing == 4 for x in (work.key, work.value))
    return exact * products + chip.stride_cycles * stride + chip.byte_cycles * separated


def _model(work: Work, chip: Chip) -> int:
    """The smallest block, by powers of two, that hides its compute, as VMEM allows."""
    slack = TARGET * chip.dma_cycles - compute_cycles(work, chip)
    mib = min(STEP_CYCLES / slack, MAX_MIB) if slack > 0 else MAX_MIB
    blocks = [work.block_of(work.granule)]
    while work.moved_bytes(blocks[-1]) < mib * MIB:
        blocks.append(work.block_of(2 * blocks[-1]))
    while len(blocks) > 1 and not _fits(work, chip, blocks[-1]):
        blocks.pop()
    return blocks[-1]


def _fits(work: Work, chip: Chip, T: int) -> bool:
    return work.vmem_bytes(T, _chunk(work, T)) <= VMEM_SHARE * chip.vmem


def _chunk(work: Work, T: int) -> int:
    """The largest divisor of T, in granules, whose logits take CHUNK_REGISTERS at most."""
    columns = max(CHUNK_REGISTERS * SUBLANES * LANES // work.rows, MIN_COLUMNS)
    most = STRIDED_COLUMNS if work.key.strided or work.value.strided else MAX_COLUMNS
    wanted = min(columns, most) // work.key.columns // work.granule
    granules = T // work.granule
    return work.granule * max(n for n in range(1, max(wanted, 1) + 1) if granules % n == 0)
