"""Merges the results of the parts of a window into the results of the whole window."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_ragged._arguments import ArrayLike, array
from jax_ragged._keywords import teaches
from jax_ragged._results import RaggedAttention
from jax_ragged.lowering.params import statistics_dtype
from jax_ragged.lowering.sharding import axes_of_type

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


# m is the maximum of m_p over the parts p that are not empty, or mask_value, which all have, if all
# are empty. m_dot is m_dot_p of the first p that attains the maximum, as within one part it is of
# the first such position.
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


def _results(parts: Sequence[Any]) -> list[RaggedAttention]:
    """The results of ragged_attention among the arguments, each checked to be one."""
    results = []
    for x in parts:
        if not isinstance(x, tuple | list) or len(x) != 3:
            raise _no_result(x)
        try:
            arrays = [jnp.asarray(array("merge_partials", "parts", item)) for item in x]
        except TypeError as error:
            raise _no_result(x) from error
        results.append(RaggedAttention(*arrays))
    return results


def _no_result(x: Any) -> TypeError:
    items = f" of {len(x)} items" if isinstance(x, tuple | list) else ""
    return TypeError(
        "merge_partials: each of parts must be (out, max_logits, denominator), as "
        f"ragged_attention returns them; got {type(x).__name__}{items}. Pass several results as "
        "merge_partials(a, b), or merge_partials(*parts) for a list of them; pass one stacked "
        "result and its axis as merge_partials(stacked, axis=0)."
    )


def _stacked(results: Sequence[RaggedAttention]) -> RaggedAttention:
    """Several results of one shape and dtype, stacked along a new first axis."""
    for name, arrays in zip(RaggedAttention._fields, zip(*results, strict=True), strict=True):
        types = dict.fromkeys(f"{x.dtype}{list(x.shape)}" for x in arrays)
        if len(types) > 1:
            raise ValueError(
                f"merge_partials: {name} must have one shape and dtype in all parts; "
                f"got {' and '.join(types)}. Give all parts the same rows, queries and out_dtype."
            )
    return RaggedAttention(*map(jnp.stack, zip(*results, strict=True)))


@teaches()
def merge_partials(
    *parts: Sequence[ArrayLike],
    axis: int | str | tuple[str, ...] | None = None,
) -> RaggedAttention:
    """Merges attention to the parts of a window into attention to the whole window.

    The parts may be any disjoint pieces of the window, each with its own `(out, max_logits,
    denominator)`: the shards of a cache split by sequence over devices, or a shared prefix and
    the rest of each row. Part p has max_logits m_p, denominator l_p and out o_p. With
    w_p = exp(m_p - m), or 0 for an empty part, the whole window has

        m = max m_p        l = sum w_p l_p        o = sum (w_p l_p / l) o_p.

    Empty parts change no bit of the result; if all are empty, so is the result. It is
    differentiable through all three, to any order.

        merge_partials(prefix, rest)               # several results, of one shape
        merge_partials(*parts)                     # a list of them
        merge_partials(stacked, axis=0)            # one whose arrays have an axis of parts
        merge_partials(result, axis="sequence")    # one on each device of a mesh axis

    For parts of narrow operands, call `ragged_attention` with `out_dtype="float32"`: their `out`
    is then not rounded before it is merged.

    Args:
      *parts: results of `ragged_attention`, `(out, max_logits, denominator)` with out [..., Dv]
        in float32, bfloat16, float16 or float64, and max_logits and denominator [...] in float32
        (float64 for float64). Several have one shape, which is the shape of the result.
      axis: for one argument: the axis of max_logits along which the parts are stacked, which the
        result lacks (a negative one counts from the end of max_logits, not of out); or the name,
        or names, of mesh axes inside `jax.shard_map` (of `jax.vmap` and `jax.pmap` too) over which
        the parts are spread. The result is then the same on every device. None for several.

    Returns:
      `RaggedAttention(out, max_logits, denominator)` with the dtypes of parts.

    Raises:
      TypeError, ValueError: while tracing, for parts or an axis that do not fit the descriptions
        above. One argument needs an axis: the first axis of an unstacked result is the batch,
        which is never merged unasked.

    Examples:
      >>> import jax
      >>> from jax_ragged import merge_partials, ragged_attention
      >>> query = jax.random.normal(jax.random.key(0), (2, 4, 16))
      >>> key, value = jax.random.normal(jax.random.key(1), (2, 2, 8, 2, 16))
      >>> first = ragged_attention(query, key, value, lengths=3)
      >>> rest = ragged_attention(query, key, value, lengths=[5, 8], starts=3)
      >>> merged = merge_partials(first, rest)
      >>> whole = ragged_attention(query, key, value, lengths=[5, 8])
      >>> bool(abs(merged.out - whole.out).max() < 1e-5)
      True

    Over a mesh it takes three all-reduces: two of the size of max_logits and one of the size of
    out, in the dtype of max_logits. The online softmax merges in this way (Milakov and
    Gimelshein, "Online normalizer calculation for softmax", 2018).
    """
    results = _results(parts)
    if len(results) != 1:
        if not results:
            raise ValueError("merge_partials: there must be at least one part; got none.")
        if axis is not None:
            raise TypeError(
                "merge_partials: axis must be left out for several results; "
                f"got {len(results)} results and axis {axis!r}. Merge the results along the axis "
                "first, then with each other."
            )
        results, axis = [_stacked(results)], 0
    if axis is None:
        raise TypeError(
            "merge_partials: axis must be given for one argument; got None for max_logits "
            f"{results[0].max_logits.shape}. Pass the axis of a stacked result, the name of a mesh "
            "axis, or several results. The axes of one unstacked result are rows, queries and "
            "heads, and none of them is merged unasked."
        )
    (stacked,) = results
    _check(stacked)
    if isinstance(axis, str | tuple):
        return _merge(stacked, _Parts((axis,) if isinstance(axis, str) else axis))
    axis = _array_axis(stacked, axis)
    return RaggedAttention(*(x.squeeze(axis) for x in _merge(stacked, _Parts(axis))))


def with_sinks(results: RaggedAttention, sinks: jax.Array, mask_value: float) -> RaggedAttention:
    """Merges results with a sink for each head, the partial result (0, sink, 1).

    Args:
      results: the results, out not rounded.
      sinks: [Hq]; -inf for a head without a sink.
      mask_value: `max_logits` of an empty window.

    Returns:
      The merged results, as results.
    """
    out, max_logits, _ = results
    wide = _like(sinks.astype(max_logits.dtype), max_logits)
    exists = wide > -jnp.inf
    m = jnp.where(exists, wide, jnp.asarray(mask_value, wide.dtype))
    sink = RaggedAttention(jnp.zeros_like(out), m, exists.astype(m.dtype))
    return merge_partials(results, sink)


def _like(sinks: jax.Array, statistic: jax.Array) -> jax.Array:
    """Sinks [Hq] in the shape of a statistic [..., Hq], and split over a mesh as that is."""
    sharding = jax.typeof(statistic).sharding
    if axes_of_type(sharding.mesh, AxisType.Explicit):
        heads = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[-1]))
        sinks = jax.sharding.reshard(sinks, heads)
        shape, last = statistic.shape, statistic.ndim - 1
        return lax.broadcast_in_dim(sinks, shape, (last,), out_sharding=sharding)
    return lax.broadcast_in_dim(sinks, statistic.shape, (statistic.ndim - 1,))
