"""The public functions: they check, insert dimensions and bind."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jax_ragged._caches import (
    CacheArguments,
    canonical,
    check_dtypes,
    check_shapes,
    saturated_int32,
)
from jax_ragged._merge import with_sinks
from jax_ragged._results import RaggedAttention
from jax_ragged.lowering import reference
from jax_ragged.lowering._compat import INLINE_EQUATIONS
from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.params import (
    DEFAULT_MASK_VALUE,
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


def _check_sinks(query: Any, sinks: Any) -> None:
    Hq = query.shape[-2]
    if sinks.shape != (Hq,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            "ragged_attention: sinks must have shape [Hq] and a float dtype, one logit for each "
            f"query head; got {sinks.dtype}{list(sinks.shape)} for Hq = {Hq}."
        )


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
                f"ragged_attention: {name} must have an integer dtype; got {arrays[name].dtype}. "
                f"Pass positions of the cache, {name}.astype(jnp.int32)."
            )
    if query.ndim not in (3, 4):
        raise ValueError(
            "ragged_attention: query must have shape [B, Hq, D] or [B, Q, Hq, D]; "
            f"got {query.shape}. Map further dimensions with jax.vmap."
        )
    check_shapes(query, cache, params.cache_layout)
    rows = query.shape[:-2]
    for name in ("lengths", "starts"):
        if name in arrays and arrays[name].shape not in (rows, rows[:1]):
            raise ValueError(
                f"ragged_attention: {name} must have shape {_either(rows[:1], rows)}, "
                f"one window a row or a query; got {arrays[name].shape} for query {query.shape}."
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
    wide = statistics_dtype(query.dtype).name
    if name not in (query.dtype.name, wide):
        raise TypeError(
            f"ragged_attention: out_dtype must be the dtype of query, {query.dtype}, or that of "
            f"the statistics, {wide}; got {name}. Cast out with .astype."
        )
    return None if name == query.dtype.name else name


def _saturated(x: Any) -> Any:
    """Windows and page tables as JAX can take them: wide integers of numpy saturate.

    They do so at the limits of int32. Without x64, JAX would take the low 32 bits of such an array
    as it enters a program.
    """
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "iu" or x.dtype.itemsize <= 4:
        return x
    limits = np.iinfo(np.int32)
    low = limits.min if x.dtype.kind == "i" else 0
    return np.clip(x, low, limits.max).astype(np.int32)


def _window_bound(x: jax.Array, rank: int) -> jax.Array:
    """Casts to int32 [B] or [B, 1 or Q]; a number that int32 cannot hold saturates."""
    x = saturated_int32(x)
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


def _require_arrays(**arrays: Any) -> None:
    for name, x in arrays.items():
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(
                f"ragged_attention: {name} must be a jax.Array or numpy.ndarray; "
                f"got {type(x).__name__}. Convert it with jnp.asarray."
            )


def ragged_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    starts: jax.Array | None = None,
    *,
    softmax_scale: float = 1.0,
    logits_soft_cap: float | None = None,
    block_size: int | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    implementation: Implementation | None = None,
    partition: PartitionSpec | None = None,
    out_dtype: DTypeLike | None = None,
    page_table: jax.Array | None = None,
    key_scale: jax.typing.ArrayLike | None = None,
    value_scale: jax.typing.ArrayLike | None = None,
    cache_layout: CacheLayout = "BSHD",
    sinks: jax.Array | None = None,
) -> RaggedAttention:
    """Attention of every row of a batch to its own window of a key/value cache.

    The window of a row is `max(starts, 0) <= t < min(lengths, S)`. Over it,

        logit_t = softmax_scale * <query, key_t>, then cap * tanh(logit_t / cap) with a soft cap,
        out = sum_t softmax(logit)_t value_t.

    An empty window gives `out = 0`, `max_logits = mask_value`, `denominator = 0`, and all of its
    derivatives are 0, even where its query is NaN. A window is empty if it has no position, or if
    all of its logits are -inf.

    A position of the cache outside of every window that shares it is never used: NaN there
    changes nothing. The Q queries of a row share its positions, and so do all examples of a vmap
    that maps neither key nor value. NaN or infinity inside of one query's window may reach the
    results and gradients of the other queries that share the position, except those of empty
    windows.

    Query head h attends to key head `h // (Hq // Hkv)`: MHA is `Hq == Hkv`, MQA is `Hkv == 1`,
    GQA all between. Products accumulate in float32 (float64 for float64), and so do sums of
    gradients over queries, heads and shards, which are rounded once.

    It binds one equation of `jax_ragged.primitives.ragged_attention_p`, which has every rule of
    JAX: jit, vmap, grad, shard_map and export compose.

    Args:
      query: [B, Hq, D], or [B, Q, Hq, D] for Q query tokens a row, in float32, bfloat16,
        float16 or (with x64 enabled) float64.
      key: [B, S, Hkv, D], the cache, in the dtype of query or quantised; Hq is a multiple of Hkv.
        A pool of pages [P, T, Hkv, D] with page_table.
      value: [B, S, Hkv, Dv] or [P, T, Hkv, Dv], likewise; Dv may differ from D.
      lengths: integers [B] or [B, Q]: the end of the window, exclusive, in positions of the
        cache; [B] with Q queries is one window for all of them. A number that int32 cannot hold
        saturates. That includes numpy arrays of int64, but not where they pass through a
        transformation of JAX first, which without x64 takes their low 32 bits.
      starts: integers as lengths: the first position of the window; None is 0.
      softmax_scale: factor of the logits, 0 or of a size that float32 holds; no scale is applied
        unless given.
      logits_soft_cap: c > 0 of the soft cap, at most 1e30; or None for none.
      block_size: positions of the cache that a kernel reads at a time; None lets the lowering
        choose. It changes speed, not the answer, and need not divide S.
      mask_value: `max_logits` of an empty window.
      implementation: "reference" or "kernel" forces one; None takes the kernel of the platform
        where it has one for the call.
      partition: mesh axes of (B, [Q,] heads) under jit on a mesh of automatic axes, where a
        kernel cannot be partitioned by the compiler.
      out_dtype: the dtype of `out`: the dtype of query, which is the default, or the dtype of the
        statistics, so that partial results of narrow operands merge without being rounded first.
      page_table: integers [B, W]. Position t of row b lies in page `page_table[b, t // T]` at
        `t % T`, and S is W * T. Rows may share pages. Entries outside of the windows may be
        anything; one inside that is not in [0, P) is clamped.
      key_scale: floats, a scalar, [Hkv], or what broadcasts against the first three dimensions of
        key, for a key in int8, float8_e4m3fn or float8_e5m2: the keys are `key_scale * key`. int8
        needs one. See `quantize_cache`.
      value_scale: as key_scale, for value.
      cache_layout: "BSHD", or "BHSD" for heads before positions in key, value and their scales:
        [B, Hkv, S, D], or [P, Hkv, T, D] for a pool.
      sinks: floats [Hq], one more logit for each head, with the value 0, that takes part in the
        softmax; None for none.

    Returns:
      The named tuple `RaggedAttention(out, max_logits, denominator)`.

    Raises:
      TypeError, ValueError: while tracing, for an argument that is not as said above.
      NotImplementedError: while lowering, where `implementation="kernel"` cannot be honoured.

    The streaming softmax of the kernels is that of Milakov and Gimelshein, "Online normalizer
    calculation for softmax" (2018), over blocks as in FlashAttention (Dao et al., 2022).
    """
    optional = {
        "page_table": _saturated(page_table),
        "key_scale": key_scale,
        "value_scale": value_scale,
    }
    optional = {name: x for name, x in optional.items() if x is not None}
    given = {"starts": starts, "page_table": page_table, "sinks": sinks}
    _require_arrays(query=query, key=key, value=value, lengths=lengths)
    _require_arrays(**{name: x for name, x in given.items() if x is not None})
    optional |= {n: jnp.asarray(x) for n, x in optional.items() if n.endswith("_scale")}
    params = RaggedAttentionParams(
        softmax_scale=softmax_scale,
        logits_soft_cap=logits_soft_cap,
        block_size=block_size,
        mask_value=mask_value,
        implementation=implementation,
        partition=partition,
        out_dtype=_out_dtype(out_dtype, query),
        cache_layout=cache_layout,
        optional=tuple(optional),
    )
    cache = CacheArguments(key, value, **optional)
    results: RaggedAttention = _ragged_attention(
        query, cache, _saturated(lengths), _saturated(starts), sinks, params=params
    )
    return results


def reference_ragged_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    starts: jax.Array | None = None,
    *,
    softmax_scale: float = 1.0,
    logits_soft_cap: float | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    out_dtype: DTypeLike | None = None,
) -> RaggedAttention:
    """`ragged_attention` by its definition: dense, in plain `jax.numpy`, at the cost of S.

    Its arguments mean the same as in `ragged_attention`, and it takes dense caches. It is
    differentiated by JAX's own rules. It computes in float32 (float64 for float64) and rounds the
    results once. At a tie of the maximum, the first position carries the derivative. A window
    without a position, or one whose logits are all -inf, is empty.
    """
    _require_arrays(query=query, key=key, value=value, lengths=lengths)
    if starts is not None:
        _require_arrays(starts=starts)
    params = RaggedAttentionParams(
        softmax_scale=softmax_scale,
        logits_soft_cap=logits_soft_cap,
        mask_value=mask_value,
        out_dtype=_out_dtype(out_dtype, query),
    )
    results: RaggedAttention = _reference_ragged_attention(
        query, CacheArguments(key, value), _saturated(lengths), _saturated(starts), params=params
    )
    return results
