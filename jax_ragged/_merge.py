"""Merging of partial results: those of the parts of one window, into those of the whole."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ragged._attention import RaggedAttention
from jax_ragged.lowering.params import statistics_dtype

AxisNames = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Reductions over the parts, along an array axis (the result keeps it as 1) or mesh axes."""

    axis: int | AxisNames

    def sum(self, x: jax.Array) -> jax.Array:
        if isinstance(self.axis, int):
            return x.sum(self.axis, keepdims=True)
        total: jax.Array = lax.psum(x, self.axis)
        return total

    def max(self, *arrays: jax.Array) -> list[jax.Array]:
        if isinstance(self.axis, int):
            return [x.max(self.axis, keepdims=True) for x in arrays]
        return list(lax.pmax(arrays, self.axis))

    def index(self, x: jax.Array) -> jax.Array:
        """The number of the part that each element of x belongs to."""
        if isinstance(self.axis, int):
            return lax.broadcasted_iota(jnp.int32, x.shape, self.axis)
        return jnp.broadcast_to(lax.axis_index(self.axis), x.shape)


# m = max of the parts' m_p that are not empty, or mask_value, which all have, if all are empty.
# m. is m_p. of the first p that attains the maximum, as it is of the first such position within
# a part.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _joint_max(parts: _Parts, max_logits: jax.Array, denominator: jax.Array) -> jax.Array:
    nonempty = jnp.where(denominator > 0, max_logits, -jnp.inf)
    m, fallback = parts.max(nonempty, max_logits)
    return jnp.where(m > -jnp.inf, m, fallback)


@_joint_max.defjvp
def _joint_max_jvp(
    parts: _Parts, primals: Sequence[jax.Array], tangents: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    max_logits, denominator = primals
    m = _joint_max(parts, max_logits, denominator)
    before = -parts.index(max_logits)
    attains = (denominator > 0) & (max_logits == m)
    (first,) = parts.max(jnp.where(attains, before, np.iinfo(np.int32).min))
    return m, parts.sum(jnp.where(attains & (before == first), tangents[0], 0))


def _check(parts: RaggedAttention) -> None:
    out, max_logits, denominator = parts
    if not out.shape[:-1] == max_logits.shape == denominator.shape:
        raise ValueError(
            "merge_partials: out must have shape [..., Dv] and max_logits and denominator [...]; "
            f"got {out.shape}, {max_logits.shape} and {denominator.shape}. "
            "Stack each of the three along the same axis."
        )
    expected = statistics_dtype(out.dtype)
    if not max_logits.dtype == denominator.dtype == expected:
        raise TypeError(
            f"merge_partials: max_logits and denominator must be {expected} for out in "
            f"{out.dtype}; got {max_logits.dtype} and {denominator.dtype}. "
            "Pass them as ragged_attention returns them."
        )


def _array_axis(parts: RaggedAttention, axis: int) -> int:
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise TypeError(
            "merge_partials: axis must be an int, or the name of a mesh axis or a tuple of them; "
            f"got {axis!r} of type {type(axis).__name__}."
        )
    rank = parts.max_logits.ndim
    if not -rank <= axis < rank:
        raise ValueError(
            f"merge_partials: axis must be one of the {rank} of max_logits; got {axis} for "
            f"{parts.max_logits.shape}. The last axis of out, Dv, is not among them."
        )
    if parts.max_logits.shape[axis] == 0:
        raise ValueError(
            "merge_partials: there must be at least one part; "
            f"got max_logits {parts.max_logits.shape} with axis {axis}."
        )
    return axis % rank


def _merge(parts: RaggedAttention, over: _Parts) -> RaggedAttention:
    """Merges, keeping an array axis as 1. With w_p = exp(m_p - m), and 0 for an empty part.

        m = max m_p        l = sum w_p l_p        o = sum (w_p l_p / l) o_p

    The share of a part whose others are empty is l / l = 1, so these change no bit of it.
    """
    out, max_logits, denominator = parts
    m = _joint_max(over, max_logits, denominator)
    nonempty = denominator > 0
    weight = jnp.exp(jnp.where(nonempty, max_logits - m, -jnp.inf)) * denominator
    total = over.sum(weight)
    share = weight / jnp.where(total > 0, total, 1)
    # A division by a broadcast number may be a product with its inverse, and l / l not quite 1.
    share += lax.stop_gradient(jnp.where((weight == total) & nonempty, 1 - share, 0))
    merged = over.sum(share[..., None] * out.astype(share.dtype))
    return RaggedAttention(merged.astype(out.dtype), m, total)


def merge_partials(
    parts: Sequence[jax.Array],
    axis: int | str | tuple[str, ...] = 0,
) -> RaggedAttention:
    """Merges attention to the parts of a window into attention to the whole window.

    The parts may be any disjoint pieces of the window, each with its own `(out, max_logits,
    denominator)`: the shards of a cache split by sequence over devices, or a shared prefix and
    what follows it. Empty parts change no bit of the result; if all are empty, it is that of an
    empty window. It is differentiable through all three, to any order.

    Args:
      parts: `(out, max_logits, denominator)` as `ragged_attention` returns them, stacked:
        out [..., Dv] with max_logits and denominator [...].
      axis: the axis of max_logits along which the parts are stacked, which the result lacks
        (negative counts from the end of max_logits, not of out); or the name, or names, of mesh
        axes inside `jax.shard_map` (of `jax.vmap` and `jax.pmap` too) over which they are spread.
        The result is then the same on every device.

    Returns:
      `RaggedAttention(out, max_logits, denominator)` with the dtypes of parts.

    Raises:
      TypeError, ValueError: while tracing, for parts or an axis that are not as said above.

    Over a mesh it takes three all-reduces: two of the size of max_logits and one of that of out,
    in the dtype of max_logits. The rule is that of the online softmax (Milakov and Gimelshein,
    2018).
    """
    if len(parts) != 3:
        raise ValueError(
            "merge_partials: parts must be (out, max_logits, denominator), each stacked; "
            f"got {len(parts)} items. Stack several results with "
            "jax.tree.map(lambda *x: jnp.stack(x), *results)."
        )
    parts = RaggedAttention(*map(jnp.asarray, parts))
    _check(parts)
    if isinstance(axis, str | tuple):
        return _merge(parts, _Parts((axis,) if isinstance(axis, str) else axis))
    axis = _array_axis(parts, axis)
    return RaggedAttention(*(x.squeeze(axis) for x in _merge(parts, _Parts(axis))))
