"""The kernel of t*, the first position of each query's maximum, which cotangents of it need.

    keys, block after block -> z [C, 128] -> by lane: m = max z, and the first t with z = m

Lanes see their columns in order, so the first position is kept by moving on larger logits only.
XLA combines the lanes and the cores.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jax_ragged.lowering.contract import Residuals
from jax_ragged.lowering.tpu.choice import Choice, KernelPlan, Sizes
from jax_ragged.lowering.tpu.chunks import CacheBlock, Slices, WindowMask
from jax_ragged.lowering.tpu.cost import DERIVATIVE_BYTES, Work
from jax_ragged.lowering.tpu.grid import Step
from jax_ragged.lowering.tpu.launch import NOWHERE, Launch, from_rows
from jax_ragged.lowering.tpu.layout import LANES
from jax_ragged.lowering.tpu.logits import Logits


@dataclasses.dataclass(frozen=True)
class MaximumRefs:
    """The refs of the kernel."""

    query: Any  # [1, R, D]
    key: CacheBlock  # a block of keys
    m: Any  # float32 [1, 1, C, 128] if logits are compact, else [1, 1, 1, R]
    at: Any  # int32, likewise
    m_lanes: Any  # float32 [C, 128], the running maximum of each lane
    at_lanes: Any  # int32 [C, 128], its first position
    bounds: Any = None  # int32 [2, C, 128], the windows where queries have their own


class RunningMaximum:
    """The running maximum of each lane, its first position, and its tangent if asked for.

    Its refs are [C, 128]; the refs of the results are as in `MaximumRefs`.
    """

    def __init__(self, m_ref: Any, at_ref: Any, dot_ref: Any = None) -> None:
        self.m_ref, self.at_ref, self.dot_ref = m_ref, at_ref, dot_ref

    def reset(self) -> None:
        """Begins a tile."""
        self.m_ref[...] = jnp.full(self.m_ref.shape, -jnp.inf, jnp.float32)
        self.at_ref[...] = jnp.full(self.at_ref.shape, NOWHERE, jnp.int32)
        if self.dot_ref is not None:
            self.dot_ref[...] = jnp.zeros(self.dot_ref.shape, jnp.float32)

    def update(self, logits: list[Logits], start: Any, z_dot: list[Slices] | None = None) -> None:
        """Takes more chunks, in the order of positions, of a block that begins at start."""
        m, at = self.m_ref[...], self.at_ref[...]
        tangent = None if z_dot is None else self.dot_ref[...]
        z = [x for chunk in logits for x in chunk.z]
        position = [x for chunk in logits for x in chunk.positions(start)]
        tangents = [None] * len(z) if z_dot is None else [x for chunk in z_dot for x in chunk]
        for x, t, x_dot in zip(z, position, tangents, strict=True):
            moved = x > m
            m, at = jnp.where(moved, x, m), jnp.where(moved, t, at)
            if x_dot is not None and tangent is not None:
                tangent = jnp.where(moved, x_dot, tangent)
        self.m_ref[...], self.at_ref[...] = m, at
        if tangent is not None:
            self.dot_ref[...] = tangent

    def finish(self, plan: KernelPlan, m_out: Any, at_out: Any, dot_out: Any = None) -> None:
        """Writes the results by lane, or by query row, if a row has a row of lanes to itself."""
        m, at = self.m_ref[...], self.at_ref[...]
        tangent = None if dot_out is None else self.dot_ref[...]
        if not plan.compact:
            largest = m.max(axis=1, keepdims=True)
            first = jnp.where(m == largest, at, NOWHERE).min(axis=1, keepdims=True)
            if tangent is not None:
                tangent = as_row(jnp.where(at == first, tangent, 0).sum(axis=1, keepdims=True))
            m, at = as_row(largest), as_row(first)
        m_out[0, 0], at_out[0, 0] = m, at
        if dot_out is not None:
            dot_out[0, 0] = tangent


def as_row(x: jax.Array) -> jax.Array:
    """[C, 1] to [1, C]."""
    return jnp.broadcast_to(x, (x.shape[0], LANES)).T[:1]


def _kernel(step: Step, refs: MaximumRefs, plan: KernelPlan) -> None:
    maximum = RunningMaximum(refs.m_lanes, refs.at_lanes)
    pl.when(step.first)(maximum.reset)

    def compute(chunks: list[Any], mask: WindowMask | None) -> None:
        logits = [Logits.of(refs.query[0], refs.key, plan, j, mask) for j in chunks]
        maximum.update(logits, step.start)

    step.chunks(refs.bounds, compute)
    pl.when(step.last)(lambda: maximum.finish(plan, refs.m, refs.at))


def maximum_work(sizes: Sizes) -> Work:
    """The work of the kernel."""
    return sizes.work(value_arrays=0, products=1, least_bytes=DERIVATIVE_BYTES)


def first_maximum(residuals: Residuals, choice: Choice) -> jax.Array:
    """The positions t*: int32 [B, Q, Hq]."""
    launch = Launch(choice, residuals, MaximumRefs)
    sizes = launch.sizes
    launch.rows("query", sizes.to_rows(residuals.query))
    launch.cache("key", residuals.key, sizes.key, residuals.key_scale)
    launch.lanes_by_core("m")
    launch.lanes_by_core("at", jnp.int32)
    found = launch.run(_kernel, "ragged_attention_maximum")
    return from_rows(sizes, launch.first_maximum(found["m"], found["at"])[1])
