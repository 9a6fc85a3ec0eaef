"""The logits of a chunk, computed by one order of operations in all kernels.

    s = <q, k>        z = s                          logit = softmax_scale z      (unit = scale)
                      z = scale s                    logit = z       (scale <= 0: order matters)
                      z = cap tanh(scale s / cap)    logit = z

so that no step multiplies by a positive scale: exp(logit - m unit) = exp2((z - m) unit log2(e)).
The derivatives recompute z to the bit, so their weights are the forward's.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_ragged.lowering.tpu.choice import LOG2_E, KernelPlan
from jax_ragged.lowering.tpu.chunks import (
    CacheBlock,
    Slices,
    WindowMask,
    mask_logits,
    products,
    token_by_lane,
)
from jax_ragged.lowering.tpu.layout import LANES


@dataclasses.dataclass(frozen=True)
class Logits:
    """The logits of a chunk, [C, 128] for each 128 columns.

    Attributes:
      plan: of the kernel.
      j: the chunk.
      z: the logits over `KernelPlan.unit`, -inf where masked.
      tanh: of scale s / cap, or None without a cap.
    """

    plan: KernelPlan
    j: Any
    z: Slices
    tanh: Slices | None

    @classmethod
    def of(
        cls,
        q: jax.Array,
        key: CacheBlock,
        plan: KernelPlan,
        j: Any,
        mask: WindowMask | None,
        heads: range | None = None,
    ) -> "Logits":
        """The logits of query rows [R, D] with chunk j of a block of keys."""
        p = plan.params
        z = products(q, key, plan, j, mask, heads)
        tanh = None
        if p.logits_soft_cap is not None:
            tanh = [jnp.tanh(x * (p.softmax_scale / p.logits_soft_cap)) for x in z]
            z = [p.logits_soft_cap * x for x in tanh]
        elif p.softmax_scale <= 0:
            z = [x * p.softmax_scale for x in z]
        z = [mask_logits(x, plan, j, index, mask) for index, x in enumerate(z)]
        return cls(plan, j, z, tanh)

    def weights(self, m: jax.Array) -> Slices:
        """Returns exp(z - m) for a maximum m over `KernelPlan.unit`, as in the forward.

        Rows and sums are divided by the denominator l outside of the kernels. exp(z - (m + log l))
        would lose the digits that log l has below the last one of m.
        """
        return [jnp.exp2((z - m) * (self.plan.unit * LOG2_E)) for z in self.z]

    def times_dz(self, x: Slices) -> Slices:
        """Multiplies by dz/ds = scale (1 - tanh^2)."""
        scale = self.plan.params.softmax_scale
        if self.tanh is not None:
            return [y * (scale * (1 - t * t)) for y, t in zip(x, self.tanh, strict=True)]
        return x if scale == 1 else [y * scale for y in x]

    def positions(self, start: Any) -> Slices:
        """The positions in the row of the columns of a block that begins at start."""
        plan = self.plan
        base = start + self.j * plan.blocks.chunk
        return [
            token_by_lane(plan.compact_rows, index * LANES, plan.key.columns) + base
            for index in range(len(self.z))
        ]


def where_any(p: Slices, x: Slices, mask: WindowMask | None) -> Slices:
    """Returns x where p > 0, else 0: columns outside of the windows hold garbage there."""
    if mask is None:
        return x
    return [jnp.where(y > 0, z, 0.0) for y, z in zip(p, x, strict=True)]
