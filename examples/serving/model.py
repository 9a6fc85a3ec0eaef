"""The Llama architecture: what a chunk of tokens does to the cache, and the logits after it.

Letters: B rows, Q tokens of a row, E width, F hidden width, H query heads, K key heads, D the
dimension of a head, L layers, V tokens of the vocabulary, P pages, T positions of a page, W pages
of a row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ragged import quantize_cache, ragged_attention

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    layers: int
    width: int
    hidden: int
    query_heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float


class Layer(NamedTuple):
    """The weights of a layer; of all layers, with L in front, as they are scanned."""

    attention_norm: Array  # [E]
    query: Array  # [E, H * D]
    key: Array  # [E, K * D]
    value: Array  # [E, K * D]
    out: Array  # [H * D, E]
    hidden_norm: Array  # [E]
    gate: Array  # [E, F]
    up: Array  # [E, F]
    down: Array  # [F, E]


class Weights(NamedTuple):
    """The weights of a model; `unembedding` is None where the two are tied."""

    embedding: Array  # [V, E]
    layers: Layer
    norm: Array  # [E]
    unembedding: Array | None  # [V, E]
    frequencies: Array  # [D / 2], radians a position, of the pairs (x[i], x[i + D / 2])


class Cache(NamedTuple):
    """The pages of all layers in one stack: layer l's page p is page l * P + p.

    A scale is None where the cache is not quantised.
    """

    key: Array  # [L * P, T, K, D]
    value: Array  # [L * P, T, K, D]
    key_scale: Array | None  # [L * P, T, K]
    value_scale: Array | None  # [L * P, T, K]


def empty_cache(config: Config, pages: int, page_size: int, dtype: str) -> Cache:
    """Zeros; int8 and 8-bit floats come with a scale for each token and head.

    XLA for CPUs widens a whole pool of bfloat16 or of 8-bit floats to write to it. There they are
    kept as integers of the same bits, and `step` reads them a layer at a time.
    """
    shape = (config.layers * pages, page_size, config.key_heads, config.head_dim)
    stored = kept = jnp.dtype(dtype)
    if jax.default_backend() == "cpu" and dtype not in ("float32", "int8"):
        kept = jnp.dtype(f"uint{8 * stored.itemsize}")
    key, value = jnp.zeros(shape, kept), jnp.zeros(shape, kept)
    narrow = stored.itemsize == 1
    scales = (jnp.zeros(shape[:-1]), jnp.zeros(shape[:-1])) if narrow else (None, None)
    return Cache(key, value, *scales)


def layer_of(cache: Cache, i: Array, layers: int, dtype: str) -> Cache:
    """The pages of layer i, copied, as what their bits stand for."""
    pages = cache.key.shape[0] // layers

    def own(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, i * pages, pages)

    scales = (None if x is None else own(x) for x in cache[2:])
    return Cache(own(cache.key).view(dtype), own(cache.value).view(dtype), *scales)


@functools.partial(jax.jit, static_argnames="layers", donate_argnames="cache")
def copy_page(cache: Cache, source: Any, target: Any, *, layers: int) -> Cache:
    """Copies one page to another in all layers; the cache is donated, and changed in place."""
    first = jnp.arange(layers) * (cache.key.shape[0] // layers)

    def copied(x: Array) -> Array:
        return x.at[first + target].set(x[first + source])

    whole: Cache = jax.tree.map(copied, cache)
    return whole


# (query [B, Q, H, D], cache, page_table [B, W] of this layer, lengths [B, Q]) to [B, Q, H, D].
Attention = Callable[[Array, Cache, Array, Array], Array]


def ragged(query: Array, cache: Cache, page_table: Array, lengths: Array) -> Array:
    """Reads the pages of the windows where they lie."""
    wide = query if cache.key_scale is not None else query.astype(cache.key.dtype)
    result = ragged_attention(
        wide,
        cache.key,
        cache.value,
        lengths,
        page_table=page_table,
        key_scale=cache.key_scale,
        value_scale=cache.value_scale,
        softmax_scale=query.shape[-1] ** -0.5,
        out_dtype="float32",
    )
    return result.out


def dense(query: Array, cache: Cache, page_table: Array, lengths: Array) -> Array:
    """Takes the rows' caches out of the stack, whole, and masks."""
    key, value = (x[page_table].reshape(len(x[page_table]), -1, *x.shape[2:]) for x in cache[:2])
    mask = jnp.arange(key.shape[1]) < lengths[:, None, :, None]
    out: Array = jax.nn.dot_product_attention(query, key, value, mask=mask)
    return out


def normalise(x: Array, weight: Array, epsilon: float) -> Array:
    """RMS norm over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def rotate(x: Array, positions: Array, frequencies: Array) -> Array:
    """RoPE of x [B, Q, heads, D] at positions [B, Q]."""
    angle = positions[..., None, None] * frequencies
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def block(
    x: Array,
    layer: Layer,
    attend: Callable[[Array, Array, Array], Array],
    positions: Array,
    frequencies: Array,
    config: Config,
) -> Array:
    """One layer's work on x [B, Q, E]; `attend` takes query, key and value [B, Q, heads, D]."""
    heads = (*x.shape[:2], -1, config.head_dim)
    h = normalise(x, layer.attention_norm, config.epsilon)
    query, key, value = ((h @ w).reshape(heads) for w in (layer.query, layer.key, layer.value))
    query, key = (rotate(y, positions, frequencies) for y in (query, key))
    x += attend(query, key, value).reshape(*x.shape[:2], -1) @ layer.out
    h = normalise(x, layer.hidden_norm, config.epsilon)
    return x + (jax.nn.silu(h @ layer.gate) * (h @ layer.up)) @ layer.down


def logits_of(x: Array, weights: Weights, config: Config) -> Array:
    """Logits [..., V] of x [..., E] after the last layer."""
    table = weights.embedding if weights.unembedding is None else weights.unembedding
    return normalise(x, weights.norm, config.epsilon) @ table.T


@functools.partial(
    jax.jit, static_argnames=("config", "dtype", "attention", "every"), donate_argnames="cache"
)
def step(
    weights: Weights,
    cache: Cache,
    tokens: Array,
    first: Array,
    counts: Array,
    page_table: Array,
    *,
    config: Config,
    dtype: str,
    attention: Attention = ragged,
    every: bool = False,
) -> tuple[Cache, Array]:
    """Appends tokens to the cache of each row, and returns the logits after the last of each.

    A row without tokens writes nothing and its logits mean nothing.

    Args:
      weights: of the model.
      cache: donated, and changed in place.
      tokens: [B, Q], of which the first `counts` [B] of each row are there.
      first: [B], the position of a row's first token.
      counts: see `tokens`.
      page_table: [B, W], the pages of each row.
      config: sizes of the model.
      dtype: of the cache, as `empty_cache` was given it.
      attention: `ragged` or `dense`.
      every: whether the logits after each token are wanted, not after the last alone.

    Returns:
      The cache and logits [B, V]; [B, Q, V] for every token.
    """
    Q, T, pages = tokens.shape[1], cache.key.shape[1], cache.key.shape[0] // config.layers
    there = jnp.arange(Q) < counts[:, None]
    positions = jnp.where(there, first[:, None] + jnp.arange(Q), 0)
    lengths = jnp.where(there, positions + 1, 0)
    # A token that is not there is written to a page behind the last: the update is dropped.
    page = jnp.take_along_axis(page_table, positions // T, axis=1)
    page = jnp.where(there, page, config.layers * pages)

    def body(carry: tuple[Array, Cache], xs: tuple[Layer, Array]) -> Any:
        (x, cache), (layer, i) = carry, xs

        def attend(query: Array, key: Array, value: Array) -> Array:
            nonlocal cache
            cache = write(cache, (page + i * pages, positions % T), key, value, dtype)
            if cache.key.dtype == dtype:
                return attention(query, cache, page_table + i * pages, lengths)
            own = layer_of(cache, i, config.layers, dtype)
            return attention(query, own, page_table, lengths)

        x = block(x, layer, attend, positions, weights.frequencies, config)
        return (x, cache), None

    x = weights.embedding[tokens]
    (x, cache), _ = jax.lax.scan(body, (x, cache), (weights.layers, jnp.arange(config.layers)))
    if every:
        return cache, logits_of(x, weights, config)
    last = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return cache, logits_of(last, weights, config)


def write(cache: Cache, at: tuple[Array, Array], key: Array, value: Array, dtype: str) -> Cache:
    """Puts key and value [B, Q, K, D] at (page, offset) [B, Q]; a page behind the last is none."""

    def put(pool: Array, x: Array) -> Array:
        return pool.at[at].set(x.view(pool.dtype), mode="drop")

    if cache.key_scale is None or cache.value_scale is None:
        key, value = key.astype(dtype), value.astype(dtype)
        return Cache(put(cache.key, key), put(cache.value, value), None, None)
    key, key_scale = quantize_cache(key, dtype)
    value, value_scale = quantize_cache(value, dtype)
    return Cache(
        put(cache.key, key),
        put(cache.value, value),
        put(cache.key_scale, key_scale),
        put(cache.value_scale, value_scale),
    )


@functools.partial(jax.jit, static_argnames="config")
def whole_sequence(weights: Weights, tokens: Array, *, config: Config) -> Array:
    """Logits [N, V] after each of tokens [N], without a cache and without this library."""
    positions = jnp.arange(tokens.shape[0])[None]

    def attend(query: Array, key: Array, value: Array) -> Array:
        out: Array = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return out

    def body(x: Array, layer: Layer) -> tuple[Array, None]:
        return block(x, layer, attend, positions, weights.frequencies, config), None

    x, _ = jax.lax.scan(body, weights.embedding[tokens][None], weights.layers)
    return logits_of(x[0], weights, config)
