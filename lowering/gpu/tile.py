"""A tile's windows, blocks and matrix products, which both ways of computing it share."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.gpu.launch import Refs
from jax_ragged.lowering.gpu.plan import Plan
from jax_ragged.lowering.gpu.softmax import ROWS, TILE, along


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a tile.

    Attributes:
      low: the first position of each row's window, [tile_rows]; a scalar if all have the same.
      high: the end of each row's window, like low.
      inner_low, inner_high: the positions that lie in all of them.
      low_ref, high_ref: [tile_rows], low and high in memory, if they are not scalars.
    """

    low: Any
    high: Any
    inner_low: Any
    inner_high: Any
    low_ref: Any = None
    high_ref: Any = None

    def cut(self, first: Any, T: int) -> Any:
        """Whether some window does not hold all of the T positions from `first` on."""
        return (first < self.inner_low) | (first + T > self.inner_high)


class BlockPlace(NamedTuple):
    """Where a block is.

    Attributes:
      stream: that computes it.
      slot: in shared memory.
      head: of the cache.
      first: its first position.
      last: whether it is the segment's last.
    """

    stream: Any
    slot: Any
    head: Any
    first: Any
    last: Any


class State(NamedTuple):
    """The streaming softmax of a tile, see `softmax`.

    Attributes:
      sums: the sums of weighted values in chunks of columns.
      maximum: of each row of logits, in units of log 2.
      denominators: whose sum is each row's denominator.
    """

    sums: tuple[jax.Array, ...]
    maximum: jax.Array
    denominators: jax.Array


def product(
    shape: tuple[int, int],
    *terms: tuple[Any, Any],
    dtype: Any = jnp.float32,
    meanwhile: Callable[[], Any] = lambda: None,
) -> tuple[jax.Array, Any]:
    """The sum of matrix products, and the result of a function that runs meanwhile.

    Args:
      shape: of the products.
      terms: the factors of each, in shared memory; the first may be in registers.
      dtype: of the sum.
      meanwhile: the function.
    """

    def run(accumulator_ref: Any) -> tuple[jax.Array, Any]:
        for a, b in terms:
            plgpu.wgmma(accumulator_ref, a, b)
        done = meanwhile()
        return accumulator_ref[...], done

    both: tuple[jax.Array, Any] = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, dtype))
    return both


def windows_around(plan: Plan, windows: Windows, first: Any, layout: Any) -> jax.Array:
    """How many windows each position of a block lies in, [T] in a layout."""
    position = first + plgpu.broadcasted_iota(jnp.int32, (plan.T,), 0, layout=layout)
    if plan.Q == 1:
        inside = (position >= windows.low) & (position < windows.high)
        return jnp.where(inside, 1, 0)

    def windows_with(i: Any, count: jax.Array) -> jax.Array:
        r = i * plan.query_step
        inside = (position >= windows.low_ref[r]) & (position < windows.high_ref[r])
        return count + jnp.where(inside, 1, 0)

    count = plgpu.layout_cast(jnp.zeros((plan.T,), jnp.int32), layout)
    counted: jax.Array = lax.fori_loop(0, plan.tile_rows // plan.query_step, windows_with, count)
    return counted


def zero_outside(plan: Plan, refs: Refs, windows: Windows, slot: Any, first: Any) -> None:
    """Zeros the values of a block that lie in no window: 0 * NaN is NaN."""
    values = mosaic_gpu_load(refs.value_blocks.at[slot], layout=TILE)
    valid = along(windows_around(plan, windows, first, ROWS), values.shape, 0) > 0
    refs.value_blocks[slot] = jnp.where(valid, values, jnp.zeros((), values.dtype))
    plgpu.commit_smem()
