"""A lowering of your own: a forward that reads no further than the longest window.

It is the example of docs/add_a_lowering.md, in plain JAX, so that it runs everywhere:

    import jax_ragged
    from examples.lowering import LOWERING

    jax_ragged.register_lowering("cpu", LOWERING)

It takes float32 and has no derivatives: the reference runs for the calls that it refuses.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jax_ragged import Lowering, Unsupported
from jax_ragged.lowering.contract import ByResult, Operands
from jax_ragged.lowering.params import RaggedAttentionParams


class LongestWindow(Lowering):
    """A loop over blocks of T positions, from the first to the last one in any window."""

    def forward(
        self, operands: Operands, params: RaggedAttentionParams, device_kind: str | None
    ) -> ByResult[jax.Array]:
        """See `jax_ragged.Lowering.forward`; `device_kind` does not matter on a CPU."""
        query, key, value, lengths, starts, *_ = operands
        if query.dtype != jnp.float32:
            raise Unsupported(f"it takes float32, and this is {query.dtype}")
        B, Q, Hq, D = query.shape
        S, Hkv, Dv = key.shape[1], key.shape[2], value.shape[3]
        T = min(params.block_size or 128, S)
        q = query.reshape(B, Q, Hkv, Hq // Hkv, D)
        lo, hi = jnp.maximum(starts, 0), jnp.minimum(lengths, S)  # [B, Q]

        def block(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, acc = state
            # The last block would pass the end of the cache. It starts earlier, and the positions
            # that the block before it has taken count as outside.
            first = jnp.minimum(i * T, S - T)
            t = first + lax.iota(jnp.int32, T)
            inside = (t >= jnp.maximum(lo, i * T)[..., None]) & (t < hi[..., None])  # [B, Q, T]
            k = lax.dynamic_slice_in_dim(key, first, T, axis=1)
            v = lax.dynamic_slice_in_dim(value, first, T, axis=1)
            # A weight of 0 does not remove a NaN, so values outside every window become 0.
            v = jnp.where(inside.any(axis=1)[:, :, None, None], v, 0)
            z = params.softmax_scale * jnp.einsum("bqhgd,bthd->bqhgt", q, k, precision="highest")
            if params.logits_soft_cap is not None:
                z = params.logits_soft_cap * jnp.tanh(z / params.logits_soft_cap)
            z = jnp.where(inside[:, :, None, None], z, -jnp.inf)
            new = jnp.maximum(highest, z.max(axis=-1))
            p, factor = jnp.exp(z - new[..., None]), jnp.exp(highest - new)
            pv = jnp.einsum("bqhgt,bthe->bqhge", p, v, precision="highest")
            return new, total * factor + p.sum(axis=-1), acc * factor[..., None] + pv

        begin = jnp.where(lo < hi, lo, S).min() // T
        end = -(-jnp.where(lo < hi, hi, 0).max() // T)
        # Made from q, so that they vary over the mesh axes of shard_map that q varies over.
        highest = jnp.full_like(q[..., 0], jnp.finfo(q.dtype).min)
        nothing = jnp.zeros_like(highest)
        acc = jnp.broadcast_to(nothing[..., None], (*nothing.shape, Dv))
        highest, total, acc = lax.fori_loop(begin, end, block, (highest, nothing, acc))
        empty = total == 0
        out = jnp.where(empty[..., None], 0, acc / jnp.where(empty, 1, total)[..., None])
        highest = jnp.where(empty, jnp.float32(params.mask_value), highest)
        return ByResult(
            out.reshape(B, Q, Hq, Dv).astype(params.result_dtype(query.dtype)),
            highest.reshape(B, Q, Hq),
            total.reshape(B, Q, Hq),
        )


LOWERING = LongestWindow()
