"""Logits and the streaming softmax in registers.

Logits are kept in units of log 2, z = log2(e) * logit, since the hardware's exponential is 2^x.
The maximum m and the denominator l of a row of logits, and the sum a of its weighted values, are
kept over the blocks that a warpgroup has seen:

    m' = max(m, max_t z_t)        c = 2^(m - m')        p_t = 2^(z_t - m')
    l' = c l + sum_t p_t          a' = c a + sum_t p_t v_t

A row without a position yet has m = -inf; then 0 stands for m' in the differences.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering.params import RaggedAttentionParams

LOG2_E = math.log2(math.e)

# Registers of a warpgroup: a tile [rows, columns] as a matrix product leaves it, and a value for
# each of its rows [rows] or columns [columns].
TILE = plgpu.Layout.WGMMA
ROWS = TILE.reduce(1)
COLUMNS = TILE.reduce(0)


class Softmax(NamedTuple):
    """The statistics of a tile's rows: the maximum in units of log 2 and the denominator, [64]."""

    maximum: jax.Array
    denominator: jax.Array

    @classmethod
    def empty(cls, rows: int) -> "Softmax":
        """The statistics before the first block."""
        return cls(
            plgpu.layout_cast(jnp.full((rows,), -jnp.inf, jnp.float32), ROWS),
            plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), ROWS),
        )

    def max_logits(self, mask_value: float) -> jax.Array:
        """The maximum in natural units, mask_value for rows without a position."""
        return max_logits(self.maximum, mask_value)


def max_logits(maximum: jax.Array, mask_value: float) -> jax.Array:
    """Converts a maximum in units of log 2 to natural units; mask_value stands for -inf."""
    return jnp.where(maximum == -jnp.inf, jnp.float32(mask_value), maximum * math.log(2))


def inverse(denominator: jax.Array) -> jax.Array:
    """Computes 1 / l, or 1 for rows without a position, whose sums are 0."""
    return 1 / jnp.where(denominator == 0, 1.0, denominator)


def along(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Repeats values of rows along a tile's columns (axis 0), or of columns along its rows (1)."""
    return lax.broadcast_in_dim(x, shape, [axis])


def logits(params: RaggedAttentionParams, dots: jax.Array, unit: Any = None) -> jax.Array:
    """Computes logits in units of log 2 from products <q, k>.

    `unit` is the scale of quantised keys, a number, or one for each position [T] of products
    [T, rows]; or None.
    """
    if params.logits_soft_cap is None:
        return _in_units(dots, unit, params.softmax_scale * LOG2_E)
    return capped(params.logits_soft_cap, cap_remainder(params, _in_units(dots, unit, 1.0)))


def _in_units(dots: jax.Array, unit: Any, factor: float) -> jax.Array:
    """Multiplies products by a factor, and by the keys' unit as `logits` has it."""
    if unit is None:
        return dots * factor
    units = unit * factor
    if units.ndim == 1:
        units = along(units, dots.shape, 0)
    product: jax.Array = dots * units
    return product


def cap_remainder(params: RaggedAttentionParams, dots: jax.Array) -> jax.Array:
    """Computes r = 1 / (exp(2 x) + 1) for x = scale <q, k> / cap; tanh x = 1 - 2 r."""
    assert params.logits_soft_cap is not None
    twice = 2 * params.softmax_scale / params.logits_soft_cap * LOG2_E
    return 1 / (jnp.exp2(dots * twice) + 1)


def capped(cap: float, remainder: jax.Array) -> jax.Array:
    """Computes logits cap tanh x in units of log 2 from `cap_remainder`."""
    return cap * LOG2_E - (2 * cap * LOG2_E) * remainder


def masked(x: jax.Array, first: Any, low: jax.Array, high: jax.Array, axis: int = 0) -> jax.Array:
    """Replaces logits outside of the rows' windows by -inf.

    Args:
      x: [rows, T], or [T, rows], of the positions from `first` on.
      first: a position.
      low: the first position of each row's window, [rows]; a scalar if all have the same.
      high: the end of each row's window, exclusive, like low.
      axis: of x along which the rows lie.
    """
    position = first + plgpu.broadcasted_iota(jnp.int32, x.shape, 1 - axis, layout=TILE)
    if jnp.ndim(low) == 1:
        low, high = (along(limit, x.shape, axis) for limit in (low, high))
    return jnp.where((position >= low) & (position < high), x, -jnp.inf)


def raised(maximum: jax.Array, highest: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes the highest logits of a block into the maximum m.

    Returns:
      m', the number that stands for it in differences, and the factor c, in the rows' shape.
    """
    following = jnp.maximum(maximum, highest)
    shift = jnp.where(following == -jnp.inf, 0.0, following)
    return following, shift, jnp.exp2(maximum - shift)


def update(
    params: RaggedAttentionParams, state: Softmax, x: jax.Array, scaled: bool
) -> tuple[Softmax, jax.Array, jax.Array]:
    """Takes a block of logits into the statistics.

    Args:
      params: the static parameters.
      state: the statistics before.
      x: [rows, T]: logits, or the products <q, k> of a scale that is positive and has no cap.
      scaled: whether they are logits. Products save a multiplication for each: the hardware
        multiplies by the scale and subtracts the maximum in one instruction.

    Returns:
      The statistics after, the factor c [rows] for what was summed before, and p [rows, T].
    """
    scale = 1.0 if scaled else params.softmax_scale * LOG2_E
    highest = x.max(axis=1)
    highest = highest if scaled else highest * scale
    maximum, shift, correction = raised(state.maximum, highest)
    shifts = along(shift, x.shape, 0)
    p = jnp.exp2(x - shifts if scaled else x * scale - shifts)
    denominator = state.denominator * correction + p.sum(axis=1)
    return Softmax(maximum, denominator), correction, p
