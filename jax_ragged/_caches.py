"""The forms of caches as users pass them: checks, canonical operands, and quantisation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_ragged._arguments import ArrayLike, array, saturated_int32
from jax_ragged.lowering.cache import NARROW
from jax_ragged.lowering.params import CacheLayout, statistics_dtype
from jax_ragged.lowering.sharding import split_as

_NARROW_NAMES = ", ".join(dtype.name for dtype in NARROW)


class CacheArguments(NamedTuple):
    """The operands that make up a cache; the last three may be None.

    Attributes:
      key: [B, S, Hkv, D] or [B, Hkv, S, D]; [P, T, Hkv, D] or [P, Hkv, T, D] with a page table.
      value: as key, with Dv.
      page_table: integers [B, W].
      key_scale: broadcasts against key without its last dimension.
      value_scale: broadcasts against value without its last dimension.
    """

    key: Any
    value: Any
    page_table: Any = None
    key_scale: Any = None
    value_scale: Any = None


def letters(layout: CacheLayout, paged: bool, head_dim: str) -> str:
    """The shape of key or value, in letters."""
    pages, position = ("P", "T") if paged else ("B", "S")
    heads = (position, "Hkv") if layout == "BSHD" else ("Hkv", position)
    return f"[{', '.join((pages, *heads, head_dim))}]"


def sizes(cache: CacheArguments, layout: CacheLayout) -> tuple[int, int]:
    """Positions of a row (or of a page), and key heads."""
    position, heads = cache.key.shape[1:3]
    return (position, heads) if layout == "BSHD" else (heads, position)


def check_dtypes(query: Any, cache: CacheArguments) -> None:
    """Raises unless key and value have the dtype of query, or are quantised with their scales."""
    for name in ("key", "value"):
        dtype, scale = getattr(cache, name).dtype, getattr(cache, f"{name}_scale")
        narrow = dtype in NARROW
        if dtype != query.dtype and not narrow:
            raise TypeError(
                f"ragged_attention: {name} must have the dtype of query or, quantised, one of "
                f"{_NARROW_NAMES}; got {dtype} for query in {query.dtype}. "
                f"{_dtype_advice(name, dtype)}"
            )
        if dtype == jnp.int8 and scale is None:
            raise TypeError(
                f"ragged_attention: {name} in int8 must come with {name}_scale, the number that 1 "
                "stands for; got none. jax_ragged.quantize_cache(x, 'int8') returns both."
            )
        if scale is not None and not narrow:
            raise TypeError(
                f"ragged_attention: {name}_scale must come with a quantised {name}, in one of "
                f"{_NARROW_NAMES}; got {name} in {dtype}. Leave {name}_scale out, or multiply "
                f"{'softmax_scale' if name == 'key' else 'out'} by it."
            )
        if scale is not None and not jnp.issubdtype(scale.dtype, jnp.floating):
            raise TypeError(
                f"ragged_attention: {name}_scale must have a float dtype; got {scale.dtype}. "
                f"Pass jnp.asarray({name}_scale, jnp.float32)."
            )
    table = cache.page_table
    if table is not None and not jnp.issubdtype(table.dtype, jnp.integer):
        raise TypeError(
            f"ragged_attention: page_table must have an integer dtype; got {table.dtype}. "
            "Pass the numbers of pages, page_table.astype(jnp.int32)."
        )


def check_shapes(query: Any, cache: CacheArguments, layout: CacheLayout) -> None:
    """Raises unless the cache fits query [B, (Q,) Hq, D]."""
    paged = cache.page_table is not None
    B, D = query.shape[0], query.shape[-1]
    for name, head_dim in (("key", "D"), ("value", "Dv")):
        x = getattr(cache, name)
        if x.ndim != 4:
            raise ValueError(
                f"ragged_attention: {name} must have shape {letters(layout, paged, head_dim)}; "
                f"got {name} {x.shape} for query {query.shape}. {_rank_advice(name, x, query)}"
            )
    if paged and (cache.page_table.ndim != 2 or cache.page_table.shape[0] != B):
        raise ValueError(
            "ragged_attention: page_table must have shape [B, W], the pages of each row, with B "
            f"of query; got {cache.page_table.shape} for query {query.shape}. Reshape a flat table "
            "with page_table.reshape(B, -1)."
        )
    if (not paged and cache.key.shape[0] != B) or cache.key.shape[3] != D:
        raise ValueError(
            f"ragged_attention: key must have shape {letters(layout, paged, 'D')} with "
            f"{'D' if paged else 'B and D'} of query; got key {cache.key.shape} for query "
            f"{query.shape}.{_layout_advice(query, cache, layout)}"
        )
    counted, _ = sizes(cache, layout)
    if paged and 0 in (cache.key.shape[0], counted):
        raise ValueError(
            "ragged_attention: key must have at least one page, of at least one position; got a "
            f"pool {letters(layout, paged, 'D')} = {cache.key.shape}."
        )
    rows_of = cache.page_table.shape[1] if paged else 1
    if isinstance(counted, int) and isinstance(rows_of, int) and counted * rows_of >= 2**31:
        raise ValueError(
            "ragged_attention: key must have fewer than 2**31 positions, which int32 counts; "
            f"got {cache.key.shape}. Attend to parts of it and merge the results with "
            "merge_partials."
        )
    if cache.value.shape[:3] != cache.key.shape[:3]:
        raise ValueError(
            f"ragged_attention: value must have shape {letters(layout, paged, 'Dv')} with "
            f"{'P, T' if paged else 'B, S'} and Hkv of key; got value {cache.value.shape} for key "
            f"{cache.key.shape}. Keep both in one layout and of one size."
        )
    _, Hkv = sizes(cache, layout)
    Hq = query.shape[-2]
    if Hkv == 0 or Hq % Hkv != 0:
        raise ValueError(
            "ragged_attention: the heads of query must be a multiple of the heads of key; got "
            f"Hq = {Hq} in query {_query_letters(query)} = {query.shape} for Hkv = {Hkv} in key "
            f"{letters(layout, paged, 'D')} = {cache.key.shape}."
            f"{_layout_advice(query, cache, layout)}"
        )
    for name in ("key_scale", "value_scale"):
        scale = getattr(cache, name)
        if scale is None:
            continue
        shape = (*scale.shape, 1) if layout == "BHSD" and scale.ndim == 1 else scale.shape
        if not _broadcasts(shape, cache.key.shape[:3]):
            raise ValueError(
                f"ragged_attention: {name} must broadcast against "
                f"{letters(layout, paged, '')[:-3]}] = {cache.key.shape[:3]}; got {scale.shape}. "
                "Pass a scalar, one scale for each head [Hkv], or one for each token and head; "
                f"a dimension of 1 shares a scale, as in {name}[:, None] for each row and head."
            )


def _query_letters(query: Any) -> str:
    return "[B, Hq, D]" if query.ndim == 3 else "[B, Q, Hq, D]"


def _dtype_advice(name: str, dtype: Any) -> str:
    if dtype == jnp.uint8:
        return (
            f"Bits of an 8-bit float are jax.lax.bitcast_convert_type({name}, jnp.float8_e4m3fn)."
        )
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16:
        return "Cast query to the dtype of the cache: casting the cache copies it."
    return "Quantise the cache with jax_ragged.quantize_cache."


def _rank_advice(name: str, x: Any, query: Any) -> str:
    if x.ndim == 5 and x.shape[-1] == query.shape[-1]:
        return (
            "Map further dimensions with jax.vmap; read a stack of layers [L, B, S, Hkv, D] as "
            f"L * B pages of S positions, {name}.reshape(L * B, S, Hkv, D), with page_table=."
        )
    if x.ndim == 3 and x.shape[0] == query.shape[0]:
        return f"Insert the dimension of one head, {name}[:, :, None]."
    if x.ndim == 3:
        return (
            "Packed sequences [tokens, Hkv, D] are not taken: give each row a cache of its own, or "
            "keep the tokens in pages and pass page_table=."
        )
    return "Map further dimensions with jax.vmap."


def _layout_advice(query: Any, cache: CacheArguments, layout: CacheLayout) -> str:
    """Advice where key fits query in another order of dimensions, or as a pool of pages."""
    paged, shape = cache.page_table is not None, cache.key.shape
    B, Hq, D = query.shape[0], query.shape[-2], query.shape[-1]

    def fits(order: CacheLayout, heads: int = Hq) -> bool:
        _, Hkv = sizes(cache, order)
        return isinstance(Hkv, int) and Hkv > 0 and heads % Hkv == 0 and shape[3] == D

    other: CacheLayout = "BSHD" if layout == "BHSD" else "BHSD"
    of_other = letters(other, paged, "D")
    if not paged and shape[0] != B and (fits(layout) or fits(other)):
        also = "" if fits(layout) else f" and cache_layout={other!r}"
        pool = letters(layout if fits(layout) else other, True, "D")
        swapped = (
            " Keep a cache [S, B, Hkv, D] as [B, S, Hkv, D]: a transpose copies it at every step."
            if shape[1] == B and fits(layout) and layout == "BSHD"
            else ""
        )
        return (
            f" For a pool of pages {pool}, pass page_table=, integers [B, W],{also} too.{swapped}"
        )
    if fits(other) and not fits(layout):
        return f" For a cache {of_other}, pass cache_layout={other!r}."
    if query.ndim == 4 and (fits(layout, query.shape[1]) or fits(other, query.shape[1])):
        also = "" if fits(layout, query.shape[1]) else f", and cache_layout={other!r}"
        return f" For a query [B, Hq, Q, D], pass jnp.swapaxes(query, 1, 2){also}."
    if shape[2] == D and shape[3] != D:
        return " The head dimension D comes last in every layout."
    return ""


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    padded = (1,) * (len(to) - len(shape)) + shape
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(padded, to, strict=True))


def canonical(
    cache: CacheArguments, rank: int, dtype: DTypeLike, layout: CacheLayout
) -> dict[str, jax.Array]:
    """The operands of the primitive with rank leading dimensions, by name; None is left out."""
    paged = cache.page_table is not None
    operands = {}
    for name, x in cache._asdict().items():
        if x is None:
            continue
        if name.endswith("_scale"):
            wide = statistics_dtype(dtype)
            x = x if x.dtype == wide else x.astype(wide)
            if layout == "BHSD" and x.ndim == 1:
                x = x[:, None]  # one for each head, which comes before the positions
            x = x.reshape((1,) * (3 - x.ndim) + x.shape)
        elif name == "page_table":
            x = saturated_int32(x)
        # A pool, which all rows share, has 1 for every leading dimension; a cache has B, and 1
        # for the queries of a row.
        pool = paged and name != "page_table"
        ones = tuple(range(rank)) if pool else tuple(range(1, rank))
        # Nothing is done to a cache that is canonical: debug_nans would report it for its padding.
        operands[name] = jnp.expand_dims(x, ones) if ones else x
    heads = -2 if layout == "BSHD" else -3  # of key; a scale lacks the dimension behind them
    for name in ("key_scale", "value_scale"):
        if name in operands:
            key = operands["key"]
            operands[name] = split_as(operands[name], key, key.ndim + heads)
    return operands


def quantize_cache(x: ArrayLike, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Quantises keys or values with a scale for each token and head.

    The scale brings the largest element of a head to the largest number of dtype: with M for that
    number, scale = max_d |x_d| / M, and the values are x / scale, rounded to nearest. Pass the two
    results as `key` and `key_scale`, or as `value` and `value_scale`.

    Args:
      x: [..., D] in a float dtype, such as the keys of new tokens [B, Hkv, D] or a whole cache
        [B, S, Hkv, D].
      dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
      The values [..., D] in dtype, and the scale [...] in float32 (float64 for float64), such
      that `values * scale[..., None]` is near x. A head of zeros has the scale 0.

    Raises:
      TypeError: if x has no float dtype, or dtype is none of the three.
      ValueError: if x has no dimension D, or D is 0.

    Examples:
      >>> import jax
      >>> from jax_ragged import quantize_cache, ragged_attention
      >>> query = jax.random.normal(jax.random.key(0), (2, 4, 16))
      >>> cache = jax.random.normal(jax.random.key(1), (2, 8, 2, 16))
      >>> values, scale = quantize_cache(cache, "int8")
      >>> values.dtype, scale.shape
      (dtype('int8'), (2, 8, 2))
      >>> results = ragged_attention(
      ...     query, values, values, lengths=[3, 5], key_scale=scale, value_scale=scale
      ... )
      >>> results.out.dtype
      dtype('float32')
    """
    x = array("quantize_cache", "x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"quantize_cache: x must have shape [..., D] with D of 1 or more; got {x.shape}."
        )
    try:
        narrow = dtype is not None and jnp.dtype(dtype) in NARROW
    except TypeError:
        narrow = False
    if not narrow:
        raise TypeError(f"quantize_cache: dtype must be one of {_NARROW_NAMES}; got {dtype!r}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"quantize_cache: x must have a float dtype; got {x.dtype}. Quantise the keys or "
            "values themselves."
        )
    wide = jnp.asarray(x, jax.dtypes.canonicalize_dtype(statistics_dtype(x.dtype)))
    integer = jnp.issubdtype(dtype, jnp.integer)
    most = jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max
    largest = jnp.abs(wide).max(axis=-1)
    # Numbers below the least normal one are 0 on most hardware, and a scale of 0 would lose a head.
    least = jnp.finfo(wide.dtype).tiny
    scale = jnp.maximum(largest / jnp.asarray(most, wide.dtype), least)
    scale = jnp.where(largest > 0, scale, largest)
    safe = jnp.where(scale > 0, scale, 1)
    scaled = wide / safe[..., None]
    return (jnp.round(scaled) if integer else scaled).astype(dtype), scale
