"""What the derivative kernels do with a block of logits, in either orientation.

Logits s [64 query rows, positions] or [positions, 64 query rows] lie in registers in the layout
of a matrix product; `axis` is the one along which query rows run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import mosaic_gpu_load
from jax_ragged.lowering.gpu import softmax
from jax_ragged.lowering.gpu.chip import WGMMA_ROWS
from jax_ragged.lowering.gpu.derivative_plan import DerivativePlan
from jax_ragged.lowering.gpu.softmax import ROWS, TILE, along


def copy_and_compute(
    warpgroups: int, busy: Any, copy: Callable[[], None], compute: Callable[[Any], None]
) -> None:
    """Runs `compute` in so many warpgroups of a CTA, and `copy`, if there is work, in one more."""
    wg = lax.axis_index("wg")

    @pl.when(wg == warpgroups)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        pl.when(busy)(copy)

    @pl.when(wg < warpgroups)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        compute(wg)


def zeros(shape: tuple[int, ...]) -> jax.Array:
    """float32 zeros [rows, columns] or [rows] in registers."""
    layout = TILE if len(shape) == 2 else ROWS
    x: jax.Array = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
    return x


def accumulators(columns: int, chunk: int) -> tuple[jax.Array, ...]:
    """Zeros [64, columns], in chunks of columns."""
    return (zeros((WGMMA_ROWS, chunk)),) * (columns // chunk)


def dots(*pairs: tuple[Any, Any]) -> list[jax.Array]:
    """x @ y.T in float32 for pairs of refs x [64, D] and y [n, D] in shared memory."""

    def run(*accumulator_refs: Any) -> list[jax.Array]:
        for accumulator_ref, (x_ref, y_ref) in zip(accumulator_refs, pairs, strict=True):
            plgpu.wgmma(accumulator_ref, x_ref, y_ref.transpose((1, 0)))
        return [accumulator_ref[...] for accumulator_ref in accumulator_refs]

    types = [plgpu.WGMMAAccumulatorRef((x.shape[0], y.shape[0]), jnp.float32) for x, y in pairs]
    products: list[jax.Array] = pl.run_scoped(run, *types)
    return products


def accumulate(*terms: tuple[tuple[jax.Array, ...], jax.Array, Any]) -> list[tuple[Any, ...]]:
    """a + x @ y for terms (a, x, y).

    a [64, columns] is in chunks in registers, x [64, n] in registers, the ref y [n, columns] in
    shared memory.
    """
    chunks = [
        (chunk, x, y_ref.at[:, pl.ds(i * chunk.shape[1], chunk.shape[1])])
        for a, x, y_ref in terms
        for i, chunk in enumerate(a)
    ]

    def run(accumulator_refs: Any) -> None:
        for accumulator_ref, (_, x, y_ref) in zip(accumulator_refs, chunks, strict=True):
            plgpu.wgmma(accumulator_ref, x, y_ref)

    sums = list(pl.run_state(run)(tuple(plgpu.WGMMAAccumulatorRef.init(a) for a, _, _ in chunks)))
    return [tuple(sums.pop(0) for _ in a) for a, _, _ in terms]


def positions(first: Any, shape: tuple[int, ...], axis: int) -> jax.Array:
    """The position of each logit, if the first is at `first`; query rows run along axis."""
    position: jax.Array = first + plgpu.broadcasted_iota(jnp.int32, shape, 1 - axis, layout=TILE)
    return position


def logits(plan: DerivativePlan, s: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """z / log 2 from s = <q, k>, as the forward's up to rounding, and dz/ds; None stands for 1."""
    cap = plan.params.logits_soft_cap
    if cap is None:
        return softmax.logits(plan.params, s), None
    # tanh x = 1 - 2 r, so 1 - tanh^2 x = 4 r (1 - r).
    r = softmax.cap_remainder(plan.params, s)
    return softmax.capped(cap, r), 4 * r * (1 - r)


def probabilities(
    plan: DerivativePlan, s: jax.Array, log_sum: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array | None]:
    """exp(z - m) / l and dz/ds."""
    z, dz_ds = logits(plan, s)
    return jnp.exp2(z - along(log_sum, s.shape, axis)), dz_ds


def logit_cotangents(
    p: jax.Array,
    dz_ds: jax.Array | None,
    p_bar: jax.Array,
    delta: jax.Array,
    at_max: tuple[jax.Array, jax.Array] | None,
    first: Any,
    axis: int,
) -> jax.Array:
    """s_bar / scale.

    With p normalised, p_bar = <o_bar, v_t>, delta = <o_bar, o> - l_bar l, and at_max the pair of
    t* and c = m_bar - l_bar l:

        z_bar = p_t (<o_bar, v_t> - <o_bar, o>) + l_bar l p_t + c [t = t*]
              = p_t (p_bar - delta) + c [t = t*]
    """
    z_bar = p * (p_bar - along(delta, p.shape, axis))
    if at_max is not None:
        t_star, c = (along(x, p.shape, axis) for x in at_max)
        z_bar += jnp.where(positions(first, p.shape, axis) == t_star, c, 0.0)
    return z_bar if dz_ds is None else z_bar * dz_ds


def masked(
    edge: Any,
    first: Any,
    low: Callable[[], jax.Array],
    high: Callable[[], jax.Array],
    axis: int,
    *arrays: tuple[jax.Array, float],
) -> list[jax.Array]:
    """Pairs of an array of logits' shape and a fill, filled outside the windows in an edge block.

    Selecting is necessary, also where p is 0: 0 * NaN is NaN.
    """

    def mask(*xs: jax.Array) -> list[jax.Array]:
        shape = xs[0].shape
        position = positions(first, shape, axis)
        inside = (position >= along(low(), shape, axis)) & (position < along(high(), shape, axis))
        return [jnp.where(inside, x, fill) for x, (_, fill) in zip(xs, arrays, strict=True)]

    values: list[jax.Array] = lax.cond(edge, mask, lambda *xs: list(xs), *(x for x, _ in arrays))
    return values


def zero_outside(
    ref: Any,
    first: Any,
    hull: tuple[Any, Any, Any],
    rows: int,
    window: Callable[[Any], tuple[Any, Any]],
) -> None:
    """Zeros the positions of a block that lie outside every window of some query rows.

    Warpgroups that share a block write the same bytes, so that none waits for another.

    Args:
      ref: [T, columns] in shared memory.
      first: the first position.
      hull: its low and high end, and whether it is solid.
      rows: how many query rows there are.
      window: the low and high end of the window of each.
    """
    low, high, solid = hull
    shape = (ref.shape[0],)

    def zero(inside: jax.Array) -> None:
        x = mosaic_gpu_load(ref, layout=TILE)
        keep = along(inside, x.shape, 0)
        ref[...] = jnp.where(keep, x, jnp.zeros((), x.dtype))
        plgpu.commit_smem()

    def position() -> jax.Array:
        at: jax.Array = first + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ROWS)
        return at

    def of_hull() -> None:
        at = position()
        zero((at >= low) & (at < high))

    def of_windows() -> None:
        at = position()

        def windows_with(i: Any, count: jax.Array) -> jax.Array:
            begin, end = window(i)
            return count + jnp.where((at >= begin) & (at < end), 1.0, 0.0)

        zero(lax.fori_loop(0, rows, windows_with, zeros(shape)) > 0.0)

    inside_hull = (first >= low) & (first + shape[0] <= high)
    pl.when((solid != 0) & jnp.logical_not(inside_hull))(of_hull)
    pl.when(solid == 0)(of_windows)


def store(staging_ref: Any, chunks: Sequence[jax.Array], ref: Any) -> None:
    """Copies [64, columns], in chunks in registers, to global memory through shared memory."""
    for i, chunk in enumerate(chunks):
        columns = chunk.shape[1]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging_ref[...] = chunk.astype(staging_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging_ref, ref.at[:, pl.ds(i * columns, columns)])


def copy_ahead(
    count: Any,
    stages: int,
    free: Sequence[Any],
    start: Callable[[Any, Any, Any], None],
    look_up: Callable[[Any], Any] = lambda i: None,
) -> None:
    """Starts copies 0 to count - 1, each into slot i % stages once its last use is over.

    Args:
      count: of copies.
      stages: how many slots there are.
      free: barriers [stages] at which the users of a slot arrive. All that arrives is waited for,
        as the interpreter demands.
      start: starts copy i into a slot, given what was looked up for it.
      look_up: reads what copy i needs from memory, before its slot is waited for.
    """

    def wait(i: Any, _: None) -> None:
        for barrier in free:
            plgpu.barrier_wait(barrier.at[lax.rem(i, stages)])

    def step(i: Any, _: None) -> None:
        found = look_up(i)
        pl.when(i >= stages)(lambda: wait(i, None))
        start(i, lax.rem(i, stages), found)

    lax.fori_loop(0, count, step, None)
    lax.fori_loop(jnp.maximum(count - stages, 0), count, wait, None)
