"""How many positions of the cache one grid step reads: a model of DMA, compute and VMEM.

The DMA of a step of x MiB of cache takes `dma_cycles x`. Its compute takes about
`STEP_CYCLES + c x`, where for r registers [8, 128] of logits in the products of 1 MiB

    c = mib_cycles + register_cycles r + stride_cycles stride

and the stride is that of loads which separate the heads, if they do. The smallest block whose
compute is TARGET of its DMA wastes the least at the ends of windows:

    x = STEP_CYCLES / (TARGET dma_cycles - c)

It is bounded by VMEM, which holds two of each block beside queries, results and accumulators, and
from below by the work list, which must fit in SMEM.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_ragged.lowering.tpu.chips import MIB, Chip
from jax_ragged.lowering.tpu.layout import LANES, SUBLANES, CacheLayout, round_up

# Scalar code of the pipeline, and latencies that nothing hides, read from the schedules.
STEP_CYCLES = 400
TARGET = 0.75
# A product of float32 is made of several.
EXACT = 4
# Of the VMEM of a core, for what is declared; the rest is for what the compiler spills. By default
# that is plenty; the forward compiles with less.
VMEM_SHARE = 0.6
VMEM_MOST = 0.9
SMEM_BYTES = 768 * 1024
# Registers [8, 128] that the logits of one chunk take: enough work to hide the latency of the
# matrix units, few enough to be spilled little.
CHUNK_REGISTERS = 32
MIN_COLUMNS = 512
MAX_COLUMNS = 2048
# Where heads are separated: what two of them need stays in registers.
STRIDED_COLUMNS = 256
MAX_MIB = 4.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the model depends on.

    Attributes:
      key: layout of the keys.
      value: layout of the values.
      dtype: of queries and cache.
      rows: R, rows of queries and heads in one step.
      V: rows of the work list.
      S: positions of the cache.
    """

    key: CacheLayout
    value: CacheLayout
    dtype: DTypeLike
    rows: int
    V: int
    S: int

    @property
    def granule(self) -> int:
        """The fewest positions of a chunk: whole registers of 128 columns in both products."""
        return math.lcm(*(LANES // math.gcd(LANES, c.columns) for c in (self.key, self.value)))

    @property
    def registers(self) -> float:
        """Registers of logits in the products of 1 MiB of cache, of 128 lanes of queries each."""
        columns = self.key.columns * MIB * LANES / self.cache_bytes(LANES)
        passes = -(-self.key.head_dim // LANES)
        return columns * passes * self.rows / (SUBLANES * LANES)

    def cache_bytes(self, T: int) -> int:
        """Bytes of the keys and values of T positions."""
        return self.key.block_bytes(T, self.dtype) + self.value.block_bytes(T, self.dtype)

    def vmem_bytes(self, T: int, chunk: int) -> int:
        """Declared bytes: double buffers, accumulators, and the logits of two chunks."""
        wide = [round_up(x.head_dim, LANES) for x in (self.key, self.value)]
        double_buffered = self.cache_bytes(T) + 4 * self.rows * sum(wide)
        accumulators = 4 * self.rows * (wide[1] + 4 * LANES)
        columns = chunk * max(self.key.columns, self.value.columns)
        tiles = max(self.key.stacked, self.value.stacked)
        logits = 2 * 4 * self.rows * tiles * columns
        # Between different columns stands a 0/1 matrix, in three parts if exact (derivatives).
        differ = (self.key.columns, self.key.interleaved) != (
            self.value.columns,
            self.value.interleaved,
        )
        selection = 3 * 4 * chunk * columns if differ else 0
        return 2 * double_buffered + accumulators + logits + selection

    def smem_bytes(self, T: int) -> int:
        """Bytes of the work list."""
        return 4 * (self.V * (-(-self.S // T) + 6) + 8)


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


def choose(
    problem: Problem, chip: Chip, block_size: int | None, vmem_most: float = VMEM_SHARE
) -> Blocks | str:
    """The blocks for a problem that declares vmem_most of VMEM, or why there are none."""
    granule = problem.granule
    most = round_up(problem.S, granule)
    if block_size is None:
        T = min(_model(problem, chip), most)
        while problem.smem_bytes(T) > SMEM_BYTES and T < most:
            T = min(2 * T, most)
    elif block_size % granule != 0 and block_size < problem.S:
        return (
            f"block_size={block_size} is no multiple of {granule}, which these head counts and "
            "head dimensions need"
        )
    else:
        T = min(block_size, most)
    if problem.smem_bytes(T) > SMEM_BYTES:
        return (
            f"the work list of {problem.V} rows in blocks of {T} positions does not fit in the "
            f"{SMEM_BYTES} bytes of SMEM kept for it"
        )
    chunk = _chunk(problem, T)
    declared = problem.vmem_bytes(T, chunk)
    if declared > vmem_most * chip.vmem:
        return (
            f"blocks of {T} positions take {declared / MIB:.1f} of the {chip.vmem // MIB} MiB of "
            f"VMEM of a {chip.name}, of which the compiler needs a part"
        )
    return Blocks(T, chunk, min(max(2 * declared + MIB, 16 * MIB), chip.vmem))


def compute_cycles(problem: Problem, chip: Chip) -> float:
    """Cycles of compute for 1 MiB of cache."""
    products = chip.mib_cycles + chip.register_cycles * problem.registers
    exact = EXACT if problem.dtype == jnp.float32 else 1
    stride = sum(x.stride for x in (problem.key, problem.value) if x.strided) / 2
    return exact * products + chip.stride_cycles * stride


def _model(problem: Problem, chip: Chip) -> int:
    """The smallest power-of-two multiple of the granule that hides its compute, as VMEM allows."""
    slack = TARGET * chip.dma_cycles - compute_cycles(problem, chip)
    mib = min(STEP_CYCLES / slack, MAX_MIB) if slack > 0 else MAX_MIB
    T = problem.granule
    while problem.cache_bytes(T) < mib * MIB:
        T *= 2
    while T > problem.granule and not _fits(problem, chip, T):
        T //= 2
    return T


def _fits(problem: Problem, chip: Chip, T: int) -> bool:
    return problem.vmem_bytes(T, _chunk(problem, T)) <= VMEM_SHARE * chip.vmem


def _chunk(problem: Problem, T: int) -> int:
    """The largest divisor of T, in granules, whose logits take CHUNK_REGISTERS at most."""
    columns = max(CHUNK_REGISTERS * SUBLANES * LANES // problem.rows, MIN_COLUMNS)
    most = STRIDED_COLUMNS if problem.key.strided or problem.value.strided else MAX_COLUMNS
    wanted = min(columns, most) // problem.key.columns // problem.granule
    granules = T // problem.granule
    return problem.granule * max(n for n in range(1, max(wanted, 1) + 1) if granules % n == 0)
