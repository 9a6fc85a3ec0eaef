"""The public functions: they check, insert dimensions and bind."""

# Annotations stay text, so that `help` shows `ArrayLike` and not the union that it stands for.
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_ragged._arguments import (
    ArrayLike,
    ScalarLike,
    array,
    factors,
    mesh_of,
    partition_spec,
    positions,
    saturated_int32,
    scale_or_default,
)
from jax_ragged._caches import CacheArguments, canonical, check_dtypes, check_shapes, sizes
from jax_ragged._keywords import teaches
from jax_ragged._merge import with_sinks
from jax_ragged._results import RaggedAttention
from jax_ragged.lowering import reference
from jax_ragged.lowering._compat import INLINE_EQUATIONS
from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.params import (
    DEFAULT_MASK_VALUE,
    OPTIONAL,
    CacheLayout,
    Implementation,
    RaggedAttentionParams,
    statistics_dtype,
)
from jax_ragged.lowering.sharding import split_alike
from jax_ragged.primitives import ragged_attention_p
from jax_ragged.primitives._primitive import bind
from jax_ragged.primitives._signature import names, primals

_FLOATS = ("float32", "bfloat16", "float16", "float64")


def _either(*shapes: tuple[int, ...]) -> str:
    return " or ".join(dict.fromkeys(map(str, shapes)))


def _of_mask(name: str, rank: int) -> str:
    """Advice for a mask [..., S] where windows are wanted."""
    windows = "mask.sum(axis=-1)" if name == "lengths" else "mask.argmax(axis=-1)"
    shape = ", reshaped to [B] or [B, Q]" if rank > 2 else ""
    return (
        f"Of a mask over the S positions of the cache, pass {windows}{shape}; "
        "jax_ragged.windows_from_mask(mask) returns lengths and starts."
    )


def _window_dtype_advice(name: str, x: Any) -> str:
    if x.dtype == bool:
        return _of_mask(name, x.ndim)
    if x.ndim > 2:
        return f"The argument {name} is no bias: a bias of the logits is not taken."
    return f"Pass positions of the cache, {name}.astype(jnp.int32)."


def _window_shape_advice(name: str, x: Any, rows: tuple[int, ...], S: int) -> str:
    """Advice for windows of a shape that users have from elsewhere."""
    if x.ndim > 1 and x.shape[-1] == S and x.shape[0] == rows[0]:
        return f" {_of_mask(name, x.ndim)}"
    if x.shape == (rows[0], 1):
        return f" Pass {name}[:, 0]."
    if x.shape == (1,):
        return f" Pass {name}[0], a scalar, for one window in all rows."
    if x.shape == (rows[0] + 1,):
        return (
            " Of cumulative lengths, as cu_seqlens is, pass jnp.diff(cu_seqlens); each row has a "
            "cache of its own."
        )
    return ""


def _check_sinks(query: Any, sinks: Any) -> None:
    Hq = query.shape[-2]
    if sinks.shape != (Hq,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        advice = "jnp.full(Hq, sink) for one sink"
        if sinks.size == Hq:
            advice = "jnp.ravel(sinks).astype(jnp.float32)"
        raise ValueError(
            "ragged_attention: sinks must have shape [Hq] and a float dtype, one logit for each "
            f"query head; got {sinks.dtype}{list(sinks.shape)} for Hq = {Hq}. Pass {advice}."
        )


def _rank_advice(rank: int) -> str:
    few = "Insert the dimension that is missing, query[None] for one row."
    return few if rank < 3 else "Map further dimensions with jax.vmap."


def _check(
    query: Any, cache: CacheArguments, lengths: Any, starts: Any, params: RaggedAttentionParams
) -> None:
    """Raises for the first argument that is not as the docstring of ragged_attention says."""
    arrays = {"lengths": lengths} if starts is None else {"lengths": lengths, "starts": starts}
    if str(query.dtype) not in _FLOATS:
        raise TypeError(
            f"ragged_attention: query must be one of {', '.join(_FLOATS)}; "
            f"got {query.dtype}. Cast it with .astype."
        )
    check_dtypes(query, cache)
    for name in ("lengths", "starts"):
        if name in arrays and not jnp.issubdtype(arrays[name].dtype, jnp.integer):
            raise TypeError(
                f"ragged_attention: {name} must have an integer dtype; got {arrays[name].dtype}"
                f"{[*arrays[name].shape]}. {_window_dtype_advice(name, arrays[name])}"
            )
    if query.ndim not in (3, 4):
        raise ValueError(
            "ragged_attention: query must have shape [B, Hq, D] or [B, Q, Hq, D]; "
            f"got {query.shape}. {_rank_advice(query.ndim)}"
        )
    check_shapes(query, cache, params.cache_layout)
    rows, (S, _) = query.shape[:-2], sizes(cache, params.cache_layout)
    S *= cache.page_table.shape[1] if params.paged else 1
    for name, x in arrays.items():
        if x.shape not in (rows, rows[:1], ()):
            raise ValueError(
                f"ragged_attention: {name} must have shape {_either(rows[:1], rows)}, one window "
                f"a row or a query, or be a scalar; got {x.shape} for query {query.shape}."
                f"{_window_shape_advice(name, x, rows, S)}"
            )


def _out_dtype(out_dtype: DTypeLike | None, query: Any) -> str | None:
    """The name of out_dtype, None for the dtype of query."""
    if out_dtype is None:
        return None
    try:
        name = jnp.dtype(out_dtype).name
    except TypeError as error:
        raise TypeError(
            f"ragged_attention: out_dtype must be a dtype or None; got {out_dtype!r} of type "
            f"{type(out_dtype).__name__}. Pass 'float32' for results that are merged."
        ) from error
    own = jax.dtypes.canonicalize_dtype(query.dtype)  # numpy's float64 enters JAX as float32
    wide = statistics_dtype(own).name
    if name not in (own.name, wide):
        statistics = "" if wide == own.name else f", or the dtype of the statistics, {wide}"
        raise TypeError(
            f"ragged_attention: out_dtype must be the dtype of query, {own}{statistics}; "
            f"got {name}. Cast out with .astype."
        )
    return None if name == own.name else name


def _window_bound(x: jax.Array, rank: int) -> jax.Array:
    """Casts to int32 [B or 1] or [B or 1, Q or 1]; a number that int32 cannot hold saturates."""
    x = saturated_int32(x)
    if x.ndim == 0:
        return jnp.expand_dims(x, tuple(range(rank)))
    return x if x.ndim == rank else jnp.expand_dims(x, 1)


def _canonical(
    query: jax.Array,
    cache: CacheArguments,
    lengths: jax.Array,
    starts: jax.Array | None,
    params: RaggedAttentionParams,
) -> tuple[jax.Array, ...]:
    """The canonical operands: checked, with a 1 where a row's queries share its cache."""
    _check(query, cache, lengths, starts, params)
    rank = query.ndim - 2
    if starts is None:
        starts = jnp.zeros((1,) * rank, jnp.int32)
    operands = canonical(cache, rank, query.dtype, params.cache_layout) | {
        "query": query,
        "lengths": _window_bound(lengths, rank),
        "starts": _window_bound(starts, rank),
    }
    return split_alike([operands[name] for name in names(primals(params))], rank)


# inline: in a jaxpr the equation stands by itself. jit: an eager call is one cached program,
# with no copy of the cache for the inserted dimension.
@functools.partial(jax.jit, static_argnames="params", inline=INLINE_EQUATIONS)
def _ragged_attention(
    query: jax.Array,
    cache: CacheArguments,
    lengths: jax.Array,
    starts: jax.Array | None,
    sinks: jax.Array | None,
    *,
    params: RaggedAttentionParams,
) -> RaggedAttention:
    operands = _canonical(query, cache, lengths, starts, params)
    if sinks is None:
        return RaggedAttention(*bind(ragged_attention_p, *operands, params=params))
    _check_sinks(query, sinks)
    unrounded = params.with_unrounded_out(query.dtype)
    results = RaggedAttention(*bind(ragged_attention_p, *operands, params=unrounded))
    results = with_sinks(results, sinks, params.mask_value)
    return results._replace(out=results.out.astype(params.result_dtype(query.dtype)))


@functools.partial(jax.jit, static_argnames="params", inline=INLINE_EQUATIONS)
def _reference_ragged_attention(
    query: jax.Array,
    cache: CacheArguments,
    lengths: jax.Array,
    starts: jax.Array | None,
    *,
    params: RaggedAttentionParams,
) -> RaggedAttention:
    _check(query, cache, lengths, starts, params)
    rows = query.shape[:-2]
    rank = len(rows)
    if starts is None:
        starts = jnp.zeros_like(lengths)
    lengths, starts = (jnp.broadcast_to(_window_bound(x, rank), rows) for x in (lengths, starts))
    if rank == 1:
        query, lengths, starts = query[:, None], lengths[:, None], starts[:, None]
    results = reference.definition(Operands(query, cache.key, cache.value, lengths, starts), params)
    return RaggedAttention(*(x[:, 0] if rank == 1 else x for x in results))


_OPERATION = "ragged_attention"


def _optional(convert: Callable[..., Any], name: str, x: Any) -> Any:
    return None if x is None else convert(_OPERATION, name, x)


def _definition(
    query: Any, softmax_scale: Any, logits_soft_cap: Any, mask_value: Any, out_dtype: Any
) -> dict[str, Any]:
    """The static parameters that the definition has too."""
    return {
        "softmax_scale": scale_or_default(softmax_scale, query),
        "logits_soft_cap": logits_soft_cap,
        "mask_value": mask_value,
        "out_dtype": _out_dtype(out_dtype, query),
    }


@teaches()
def ragged_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    lengths: ArrayLike,
    starts: ArrayLike | None = None,
    *,
    softmax_scale: ScalarLike | None = 1.0,
    logits_soft_cap: ScalarLike | None = None,
    block_size: int | None = None,
    mask_value: ScalarLike = DEFAULT_MASK_VALUE,
    implementation: Implementation | None = None,
    partition: PartitionSpec | NamedSharding | None = None,
    out_dtype: DTypeLike | None = None,
    page_table: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    value_scale: ArrayLike | None = None,
    cache_layout: CacheLayout = "BSHD",
    sinks: ArrayLike | None = None,
) -> RaggedAttention:
    """Attention of every row of a batch to its own window of a key/value cache.

    The window of a row is `max(starts, 0) <= t < min(lengths, S)`. Over it,

        logit_t = softmax_scale * <query, key_t>, then cap * tanh(logit_t / cap) with a soft cap,
        out = sum_t softmax(logit)_t value_t.

    An empty window gives `out = 0`, `max_logits = mask_value`, `denominator = 0`, and all of its
    derivatives are 0, even where its query is NaN. A window is empty if it has no position, or if
    all of its logits are -inf. With `sinks`, the sink is one more logit: `max_logits` is then the
    sink and `denominator` 1.

    A position of the cache outside of every window that shares it is never used: NaN there
    changes nothing. The Q queries of a row share its positions, and so do all examples of a vmap
    that maps neither key nor value. NaN or infinity inside of one query's window may reach the
    results and gradients of the other queries that share the position, except those of empty
    windows.

    Query head h attends to key head `h // (Hq // Hkv)`. MHA is `Hq == Hkv`, MQA is `Hkv == 1`, and
    GQA is everything between. Products accumulate in float32 (float64 for float64), and so do sums
    of gradients over queries, heads and shards, which are rounded once.

    A call binds one equation of `jax_ragged.primitives.ragged_attention_p`, which has every rule
    of JAX: jit, vmap, grad, shard_map and export compose. Arrays may be anything that
    `jnp.asarray` takes: arrays of JAX or numpy, numbers, lists, and objects with `__jax_array__`
    such as variables of flax.

    Args:
      query: [B, Hq, D], or [B, Q, Hq, D] for Q query tokens a row, in float32, bfloat16,
        float16 or (with x64 enabled) float64.
      key: [B, S, Hkv, D], the cache, in the dtype of query or quantised; Hq is a multiple of Hkv.
        A pool of pages [P, T, Hkv, D] with page_table.
      value: [B, S, Hkv, Dv] or [P, T, Hkv, Dv], likewise; Dv may differ from D.
      lengths: integers [B] or [B, Q]: the end of the window, exclusive, in positions of the
        cache. [B] with Q queries is one window for all of them, and a scalar is one window for
        all rows. A number that int32 cannot hold saturates. That includes numpy arrays of int64,
        but not where they pass through a transformation of JAX first, which without x64 takes
        their low 32 bits. Lengths past S are no error: the window ends with the cache. Use
        `check_windows` to find them.
      starts: integers as lengths: the first position of the window; None is 0.
      softmax_scale: factor of the logits: 0, or of a size that float32 holds. The default of 1
        leaves the logits as they are, for models that scale the query themselves. None is
        `D ** -0.5`, the default of most other attention functions. It is a number that is known
        while tracing: multiply query by a traced factor.
      logits_soft_cap: c > 0 of the soft cap, in units of the logits, at most 1e30; None for none.
      block_size: positions of the cache that a kernel reads at a time; None lets the lowering
        choose. It changes speed, not the answer, and need not divide S.
      mask_value: `max_logits` of an empty window.
      implementation: "reference" or "kernel" forces one; None takes the kernel of the platform
        where it has one for the call.
      partition: mesh axes of (B, [Q,] heads) under jit on a mesh of automatic axes, where a
        kernel cannot be partitioned by the compiler. Entries left out at the end are None. A
        `NamedSharding` also says which mesh: the mesh of the context or of the operands must be
        the same, and none need be set. A `PartitionSpec` takes the mesh of the context or of the
        operands.
      out_dtype: the dtype of `out`: the dtype of query, which is the default, or the dtype of the
        statistics, so that partial results of narrow operands merge without being rounded first.
      page_table: integers [B, W]. Position t of row b lies in page `page_table[b, t // T]` at
        `t % T`, and S is W * T. Rows may share pages. Entries outside of the windows may be
        anything; one inside that is not in [0, P) is clamped.
      key_scale: floats, a scalar, [Hkv], or an array that broadcasts against the first three
        dimensions of key, for a key in int8, float8_e4m3fn or float8_e5m2: the keys are
        `key_scale * key`. int8 needs one. See `quantize_cache`.
      value_scale: as key_scale, for value.
      cache_layout: "BSHD", or "BHSD" for heads before positions in key, value and their scales:
        [B, Hkv, S, D], or [P, Hkv, T, D] for a pool.
      sinks: floats [Hq], one more logit for each head, with the value 0, that takes part in the
        softmax; None for none.

    Returns:
      The named tuple `RaggedAttention(out, max_logits, denominator)`: out [B, (Q,) Hq, Dv] in
      out_dtype, and the statistics [B, (Q,) Hq] in float32 (float64 for float64).

    Raises:
      TypeError, ValueError: while tracing, for an argument that does not fit the descriptions
        above, and for keywords that other libraries use, with the name that this one has.
      NotImplementedError: while lowering, where `implementation="kernel"` cannot be honoured.

    Examples:
      Two rows, one with three positions and one with five:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_ragged import ragged_attention
      >>> query = jax.random.normal(jax.random.key(0), (2, 4, 16))  # [B, Hq, D]
      >>> key, value = jax.random.normal(jax.random.key(1), (2, 2, 8, 2, 16))  # [B, S, Hkv, D]
      >>> results = ragged_attention(query, key, value, lengths=[3, 5], softmax_scale=None)
      >>> results.out.shape, results.max_logits.shape
      ((2, 4, 16), (2, 4))

      A sliding window of two positions:

      >>> lengths = jnp.array([3, 5])
      >>> ragged_attention(query, key, value, lengths, starts=lengths - 2).out.shape
      (2, 4, 16)

    The kernels use the streaming softmax of Milakov and Gimelshein, "Online normalizer
    calculation for softmax" (2018), over blocks as in FlashAttention (Dao et al., 2022).
    """
    query = array(_OPERATION, "query", query)
    cache = CacheArguments(
        key=array(_OPERATION, "key", key),
        value=array(_OPERATION, "value", value),
        page_table=_optional(positions, "page_table", page_table),
        key_scale=_optional(factors, "key_scale", key_scale),
        value_scale=_optional(factors, "value_scale", value_scale),
    )
    params = RaggedAttentionParams(
        **_definition(query, softmax_scale, logits_soft_cap, mask_value, out_dtype),
        block_size=block_size,
        implementation=implementation,
        partition=partition_spec(partition, query),
        cache_layout=cache_layout,
        optional=tuple(name for name in OPTIONAL if getattr(cache, name) is not None),
    )
    windows = positions(_OPERATION, "lengths", lengths), _optional(positions, "starts", starts)
    with mesh_of(partition, query, *cache):
        results: RaggedAttention = _ragged_attention(
            query, cache, *windows, _optional(factors, "sinks", sinks), params=params
        )
    return results


@teaches(
    beyond={
        name: f"ragged_attention(..., implementation='reference') takes {name}."
        for name in (*OPTIONAL, "cache_layout", "sinks", "partition")
    }
    | {
        "block_size": "The definition reads all positions at once; leave it out.",
        "implementation": "This is the definition itself; leave it out.",
    }
)
def reference_ragged_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    lengths: ArrayLike,
    starts: ArrayLike | None = None,
    *,
    softmax_scale: ScalarLike | None = 1.0,
    logits_soft_cap: ScalarLike | None = None,
    mask_value: ScalarLike = DEFAULT_MASK_VALUE,
    out_dtype: DTypeLike | None = None,
) -> RaggedAttention:
    """`ragged_attention` by its definition: dense, in plain `jax.numpy`, at the cost of S.

    It is differentiated by JAX's own rules. It computes in float32 (float64 for float64) and rounds
    the results once. At a tie of the maximum, the first position carries the derivative. A window
    without a position, or one whose logits are all -inf, is empty.

    Use it to test a lowering, or to read the definition. For other forms of caches, and for the
    primitive with its rules, call `ragged_attention` with `implementation="reference"`.

    Args:
      query: [B, Hq, D] or [B, Q, Hq, D].
      key: [B, S, Hkv, D], in the dtype of query.
      value: [B, S, Hkv, Dv], in the dtype of query.
      lengths: integers [B] or [B, Q], or a scalar.
      starts: integers as lengths; None is 0.
      softmax_scale: factor of the logits; None is `D ** -0.5`.
      logits_soft_cap: c of the soft cap, or None.
      mask_value: `max_logits` of an empty window.
      out_dtype: the dtype of `out`: the dtype of query, or the dtype of the statistics.

    Returns:
      The results, as `ragged_attention` returns them.

    Raises:
      TypeError, ValueError: as `ragged_attention`.
    """
    query = array(_OPERATION, "query", query)
    params = RaggedAttentionParams(
        **_definition(query, softmax_scale, logits_soft_cap, mask_value, out_dtype)
    )
    cache = CacheArguments(array(_OPERATION, "key", key), array(_OPERATION, "value", value))
    windows = positions(_OPERATION, "lengths", lengths), _optional(positions, "starts", starts)
    results: RaggedAttention = _reference_ragged_attention(query, cache, *windows, params=params)
    return results
