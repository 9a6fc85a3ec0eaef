"""Right values where narrow types, large logits, infinities and garbage make wrong ones likely.

Each test runs over the ways that compute on their own: the definition, the reference, which is also
the dense form of small calls on CPUs, and the CPU's loop over blocks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import oracle
import sharded
from cases import BY_NAME, Case, assert_close, poison, tiered
from jax_ragged import RaggedAttention, ragged_attention, reference_ragged_attention
from programs import op, pullback, pushforward

WAYS: dict[str, Callable[..., RaggedAttention]] = {
    "definition": reference_ragged_attention,
    "reference": lambda *x, **p: ragged_attention(*x, implementation="reference", **p),
    "blocks": lambda *x, **p: ragged_attention(*x, block_size=2, **p),
}
ways = pytest.mark.parametrize("way", WAYS)
narrow_dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
RESULTS = RaggedAttention._fields


def _array(*values: Any, shape: tuple[int, ...], dtype: Any = "float32") -> jax.Array:
    return jnp.asarray(np.array(values, np.float64).reshape(shape), dtype)


def _all_derivatives(run: Callable[..., Any], primals: tuple[Any, ...]) -> tuple[Any, ...]:
    """Results, gradients of each result's sum, and tangents for tangents of ones."""

    def derive(*primals: Any) -> tuple[Any, ...]:
        results, pull = jax.vjp(run, *primals)
        grads = []
        for i in range(3):
            bars = [jnp.full_like(x, float(i == j)) for j, x in enumerate(results)]
            grads.append(pull(RaggedAttention(*bars)))
        dots = jax.jvp(run, primals, tuple(map(jnp.ones_like, primals)))[1]
        return results, grads, dots

    derived: tuple[Any, ...] = jax.jit(derive)(*primals)
    return derived


# Strict promotion, where the loops run.


@pytest.mark.parametrize(
    "name", ["queries", "soft_cap_scale", "bfloat16_queries", "float16", "head_dim_odd"]
)
def test_strict_promotion_in_blocks(name: str) -> None:
    case = BY_NAME[name]
    operands = case.operands()
    fun = op(case, block_size=8)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.jit(fun).lower(*operands)
        jax.jit(pullback(fun)).lower(operands, case.cotangents())
        jax.jit(pushforward(fun)).lower(operands, operands[:3])
        mapped = jax.vmap(fun, (0, None, None, None, None))
        jax.jit(mapped).lower(operands.query[None], *operands[1:])


# Cotangents of logits in a narrow type.


@ways
def test_large_cotangents_of_float16(way: str) -> None:
    query = jnp.zeros((1, 1, 1), "float16")
    key = _array(2**-6, -(2**-6), shape=(1, 2, 1, 1), dtype="float16")
    value = _array(64, -64, shape=(1, 2, 1, 1), dtype="float16")

    def out(query: Any, key: Any) -> Any:
        return WAYS[way](query, key, value, jnp.array([2])).out

    query_bar, key_bar = jax.vjp(out, query, key)[1](jnp.full((1, 1, 1), 4096, "float16"))
    # p = 1/2, p_bar = 4096 * +-64, z_bar = +-2**17, beyond float16; times 2**-6, twice, is 4096.
    np.testing.assert_array_equal(query_bar, 4096)
    np.testing.assert_array_equal(key_bar, 0)


@narrow_dtypes
@ways
def test_small_cotangents(way: str, dtype: str) -> None:
    case = Case("small_bars", (64,), Hq=2, Hkv=1, S=64, D=32, Dv=32, dtype=dtype)
    operands = case.operands()
    out_bar = (1e-4 * case.cotangents()[0]).astype(dtype)
    bars = out_bar, np.zeros((1, 2), "float32"), np.zeros((1, 2), "float32")

    def run(*operands: Any) -> Any:
        return tuple(WAYS[way](*operands))

    # Of the key's and value's gradients much is below the least float16, so that the query's tells.
    (query_bar,) = jax.jit(pullback(run, (0,)))(operands, bars)
    expected = oracle.vjp(*operands, bars).query
    # Half a unit in the last place of the result, and of a few products that are not exact.
    assert_close(query_bar, expected, 2 * 2.0**-8 if dtype == "bfloat16" else 2e-3)


@narrow_dtypes
@ways
def test_cotangents_in_float32_are_not_rounded(way: str, dtype: str) -> None:
    """With out_dtype, cotangents of out are float32, and 1 + 2**-12 minus 1 is not 0."""
    query = jnp.zeros((1, 1, 1), dtype)
    key = _array(1, -1, shape=(1, 2, 1, 1), dtype=dtype)
    value = _array(1, 1, -1, -1, shape=(1, 2, 1, 2), dtype=dtype)

    def out(query: Any) -> Any:
        return WAYS[way](query, key, value, jnp.array([2]), out_dtype="float32").out

    (query_bar,) = jax.vjp(out, query)[1](_array(1 + 2.0**-12, -1, shape=(1, 1, 2)))
    # p_bar = +-2**-12, z_bar = +-2**-13, times +-1 and summed.
    np.testing.assert_array_equal(query_bar, 2.0**-12)


# Sums of gradients.


def _ones(dtype: str, queries: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    cache = jnp.ones((1, 1, 1, 1), dtype)
    return jnp.ones((1, queries, 1, 1), dtype), cache, cache, jnp.array([1])


@narrow_dtypes
@ways
def test_sums_over_queries(way: str, dtype: str) -> None:
    query, key, value, lengths = _ones(dtype, 3000)

    def max_logits(key: Any) -> Any:
        return WAYS[way](query, key, value, lengths).max_logits.sum()

    def out(value: Any) -> Any:
        return WAYS[way](query, key, value, lengths).out.sum(dtype="float32")

    expected = np.float32(jnp.asarray(3000, dtype))  # 3008 in bfloat16
    np.testing.assert_array_equal(np.float32(jax.jit(jax.grad(max_logits))(key)), expected)
    np.testing.assert_array_equal(np.float32(jax.jit(jax.grad(out))(value)), expected)


@narrow_dtypes
@pytest.mark.parametrize("way", ["reference", "blocks"])
def test_sums_over_mapped_examples(way: str, dtype: str) -> None:
    query, key, value, lengths = _ones(dtype, 3)
    queries = jnp.broadcast_to(query, (1000, *query.shape))

    def results(key: Any, value: Any) -> Any:
        return jax.vmap(lambda q: WAYS[way](q, key, value, lengths))(queries)

    def loss(key: Any, value: Any) -> Any:
        found = results(key, value)
        return found.max_logits.sum() + found.out.sum(dtype="float32")

    expected = np.float32(jnp.asarray(3000, dtype))
    for grad in jax.jit(jax.grad(loss, (0, 1)))(key, value):
        np.testing.assert_array_equal(np.float32(grad), expected)

    # A key that is mapped, and a value shared over the same dimension: rows, not queries.
    def rows(value: Any) -> Any:
        keys = jnp.broadcast_to(key, (3000, *key.shape))
        attend: Any = jax.vmap(lambda k: WAYS[way](query[:, :1], k, value, lengths).out)
        return attend(keys).sum(dtype="float32")

    np.testing.assert_array_equal(np.float32(jax.jit(jax.grad(rows))(value)), expected)


@narrow_dtypes
@pytest.mark.parametrize("way", ["reference", "blocks"])
def test_sums_over_heads(way: str, dtype: str) -> None:
    query, key, value, lengths = _ones(dtype, 1)
    query = jnp.broadcast_to(query, (1, 3, 1000, 1))

    def loss(key: Any, value: Any) -> Any:
        found = WAYS[way](query, key, value, lengths)
        return found.max_logits.sum() + found.out.sum(dtype="float32")

    for grad in jax.jit(jax.grad(loss, (0, 1)))(key, value):
        np.testing.assert_array_equal(np.float32(grad), np.float32(jnp.asarray(3000, dtype)))


@pytest.mark.parametrize("order", [1, 2])
def test_sums_over_shards(order: int) -> None:
    """The gradient of one key head, whose query heads are split over eight shards.

    Seven shards have a gradient of 256 + 1, which is 256 in bfloat16, and one has 5. In float32 the
    sum is 1804, which is 1808 in bfloat16; the sum of rounded parts is 1797, which is 1800.
    """
    mesh = sharded.make_mesh(AxisType.Explicit, (1, 8))
    weights = np.array(7 * [256.0, 1.0] + [5.0, 0.0], np.float32)
    query = np.ones((1, 16, 1), jnp.bfloat16)
    cache = jnp.ones((1, 1, 1, 1), jnp.bfloat16)

    def run(query: Any, value: Any) -> Any:
        out = ragged_attention(query, cache, value, jnp.array([1]), block_size=1).out
        return (out[0, :, 0].astype(jnp.float32) * weights).sum()

    with jax.set_mesh(mesh):
        placed = sharded.place(mesh, query, None, "model")
        if order == 1:
            got = jax.jit(jax.grad(run, 1))(placed, cache)
            np.testing.assert_array_equal(np.float32(got), 1808)
            return

        def key_gradient(query: Any, key: Any) -> Any:
            found = ragged_attention(query, key, cache, jnp.array([1]), block_size=1)
            logits = found.max_logits[0] * weights
            return logits.sum()

        # d/dq of the key's gradient, along q: the derivative of a gradient that sums shards.
        def along(query: Any) -> Any:
            return jax.grad(key_gradient, 1)(query, cache)

        dot = jax.jit(lambda q: jax.jvp(along, (q,), (q,))[1])(placed)
        np.testing.assert_array_equal(np.float32(dot), 1808)


# One order of operations for logits.


@pytest.mark.parametrize(
    ("Q", "Hq", "Hkv", "block_size", "cap"),
    [
        (None, 4, 2, None, None),
        (None, 8, 2, 2, None),
        (None, 16, 1, 3, 1e5),
        (3, 8, 2, 4, None),
        (5, 4, 2, 2, 1e5),
    ],
)
@pytest.mark.parametrize("dtype", tiered(["float32", "bfloat16"], ["float32"]))
def test_weights_of_large_logits_sum_to_one(
    dtype: str, Q: int | None, Hq: int, Hkv: int, block_size: int | None, cap: float | None
) -> None:
    B, S, D = 3, 5, 128
    rng = np.random.default_rng(0)
    rows = (B,) if Q is None else (B, Q)
    query, key = (
        jnp.asarray(100 * rng.standard_normal(shape), dtype)
        for shape in ((*rows, Hq, D), (B, S, Hkv, D))
    )
    value = jnp.ones((B, S, Hkv, 1), "float32").astype(dtype)
    lengths = jnp.array([1, 5, 1])  # a window of one position, and one with a clear maximum

    def out(value: Any) -> Any:
        return ragged_attention(
            query,
            key,
            value,
            lengths,
            softmax_scale=D**-0.5,
            logits_soft_cap=cap,
            block_size=block_size,
            out_dtype="float32",
        ).out

    dot = jax.jit(lambda v: jax.jvp(out, (v,), (v,))[1])(value)
    # A few units in the last place of float32, for the division by the sum.
    np.testing.assert_allclose(dot, 1, rtol=5e-7)
    bar = jax.jit(jax.grad(lambda v: out(v).sum()))(value)
    summed = np.asarray(bar, np.float64).sum((1, 3))
    # A bfloat16 gradient of several positions is rounded at each.
    tol = 5e-7 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(summed, (Q or 1) * Hq // Hkv, rtol=tol)


# Keys that are much alike.


@narrow_dtypes
@ways
def test_equal_keys_have_no_gradient(way: str, dtype: str) -> None:
    query = jnp.zeros((1, 1, 1), dtype)
    key = jnp.full((1, 2, 1, 1), 256, dtype)
    value = _array(1, 1.0078125, shape=(1, 2, 1, 1), dtype=dtype)

    def out(query: Any) -> Any:
        return WAYS[way](query, key, value, jnp.array([2])).out.astype("float32").sum()

    np.testing.assert_array_equal(np.float32(jax.jit(jax.grad(out))(query)), 0)
    second = jax.jit(jax.grad(lambda q: jax.grad(out)(q).astype("float32").sum()))(query)
    np.testing.assert_array_equal(np.float32(second), 0)


@pytest.mark.parametrize("offset", [5.0, 20.0, 50.0])
@ways
def test_offset_keys(way: str, offset: float) -> None:
    case = Case("offset", (64, 50), Hq=4, Hkv=2, S=64, D=64, Dv=64, dtype="bfloat16")
    operands = case.operands()
    operands = operands._replace(key=(operands.key.astype(np.float32) + offset).astype("bfloat16"))
    # Logits of unit size around the common part, which the softmax does not see.
    query = operands.query.astype(np.float32)
    query -= query.mean(axis=-1, keepdims=True)
    operands = operands._replace(query=query.astype("bfloat16"))
    bars = case.cotangents()[0], np.zeros((2, 4), "float32"), np.zeros((2, 4), "float32")

    def run(*operands: Any) -> Any:
        return tuple(WAYS[way](*operands))

    (query_bar,) = jax.jit(pullback(run, (0,)))(operands, bars)
    expected = oracle.vjp(*operands, bars).query
    error = np.linalg.norm(np.asarray(query_bar, np.float64) - expected)
    # Half a unit in the last place of a bfloat16 result is 0.2 % of it, and no more comes in.
    assert error <= 4e-3 * np.linalg.norm(expected)


# Garbage in the queries of empty windows.


@pytest.mark.parametrize("garbage", tiered([np.nan, np.inf, -np.inf], [np.nan]))
@pytest.mark.parametrize("way", tiered(WAYS, ["blocks"]))
def test_garbage_in_queries_of_empty_windows(way: str, garbage: float) -> None:
    """As two queries of one row, and as a row of its own."""
    cache = jnp.ones((1, 3, 1, 1))
    for query, lengths, starts in (
        (_array(garbage, 1, shape=(1, 2, 1, 1)), [[0, 2]], [[0, 0]]),
        (_array(1, garbage, shape=(1, 2, 1, 1)), [[3, 2]], [[1, 2]]),
        (_array(1, garbage, shape=(2, 1, 1)), [2, 0], [0, 0]),
    ):
        clean = jnp.where(jnp.isfinite(query), query, 0)
        caches = jnp.broadcast_to(cache, (query.shape[0], *cache.shape[1:]))

        def run(query: Any, key: Any, value: Any, windows: Any = (lengths, starts)) -> Any:
            return WAYS[way](query, key, value, *map(jnp.array, windows))

        got = _all_derivatives(run, (query, caches, caches))
        want = _all_derivatives(run, (clean, caches, caches))
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize("way", ["reference", "blocks"])
def test_garbage_in_derivatives_of_empty_windows(way: str) -> None:
    """NaN as the tangent of a query, or as a cotangent, of an empty window."""
    query, cache = jnp.ones((1, 2, 1, 1)), jnp.ones((1, 3, 1, 1))
    first = jnp.array([True, False])[None, :, None]

    def run(query: Any, key: Any, value: Any) -> Any:
        return WAYS[way](query, key, value, jnp.array([[0, 2]]))

    _, pull = jax.vjp(run, query, cache, cache)
    bars = RaggedAttention(
        jnp.where(first[..., None], jnp.nan, jnp.ones((1, 2, 1, 1))),
        *(jnp.where(first, jnp.nan, jnp.ones((1, 2, 1))) for _ in range(2)),
    )
    for grad in pull(bars):
        assert np.isfinite(grad).all()
    query_dot = jnp.where(first[..., None], jnp.nan, query)
    _, dots = jax.jvp(run, (query, cache, cache), (query_dot, cache, cache))
    for dot in dots:
        np.testing.assert_array_equal(dot[:, 0], 0)
        assert np.isfinite(dot).all()


# Windows as numpy holds them.


@pytest.mark.parametrize("fun", [ragged_attention, reference_ragged_attention])
@pytest.mark.parametrize("dtype", ["int64", "uint64", "uint32"])
def test_windows_beyond_int32(fun: Any, dtype: str) -> None:
    query, cache = jnp.ones((1, 1, 4)), jnp.ones((1, 4, 1, 4))
    most = np.iinfo(dtype).max
    for length in (2**31, 2**31 + 2, 2**32 - 1, most):
        assert fun(query, cache, cache, np.array([length], dtype)).denominator == 4
        outside = fun(query, cache, cache, np.array([4], dtype), np.array([length], dtype))
        assert outside.denominator == 0
    if dtype == "int64":
        for start in (-(2**31) - 1, -(2**32), np.iinfo(dtype).min):
            window = np.array([3]), np.array([start])
            assert fun(query, cache, cache, *window).denominator == 3
            assert fun(query, cache, cache, window[1]).denominator == 0


# Manual axes that vmap adds.


@pytest.mark.full
@pytest.mark.parametrize("way", ["reference", "blocks"])
def test_spmd_axis_over_shard_map(way: str) -> None:
    """The mapped query varies over the mesh, the cache does not; so do their derivatives."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    rng = np.random.default_rng(0)
    queries = jnp.asarray(rng.standard_normal((2, 1, 2, 4)), "float32")
    cache = jnp.asarray(rng.standard_normal((1, 6, 1, 4)), "float32")

    def plain(query: Any, key: Any, value: Any) -> Any:
        return tuple(WAYS[way](query, key, value, jnp.array([5])))

    mapped = jax.shard_map(plain, mesh=mesh, in_specs=P(), out_specs=P())

    def gradients(fun: Any) -> Any:
        def loss(*operands: Any) -> Any:
            return sum((x**2).sum() for x in fun(*operands))

        return jax.grad(loss, (0, 1, 2))

    def tangents(fun: Any) -> Any:
        return lambda *operands: jax.jvp(fun, operands, operands)[1]

    def curvature(fun: Any) -> Any:
        """Forward over reverse, through both derivative primitives and their transposes."""

        def of_query(query: Any, key: Any, value: Any) -> Any:
            return jax.jvp(lambda q: gradients(fun)(q, key, value), (query,), (query,))[1]

        return of_query

    def reversed_tangents(fun: Any) -> Any:
        def loss(*operands: Any) -> Any:
            return sum((x**2).sum() for x in tangents(fun)(*operands))

        return jax.grad(loss, (0, 1, 2))

    transforms: tuple[Any, ...] = (
        lambda fun: fun,
        gradients,
        tangents,
        curvature,
        reversed_tangents,
    )
    for transform in transforms:
        axes = (0, None, None)
        run = jax.vmap(transform(mapped), axes, spmd_axis_name="x")
        got = jax.jit(run)(queries, cache, cache)
        want = jax.jit(jax.vmap(transform(plain), axes))(queries, cache, cache)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_close(x, y, 1e-5)


# Windows whose logits are all -inf.


@pytest.mark.parametrize("sizes", [(1e30, -1e30), (-np.inf, 1.0)])
@pytest.mark.parametrize("way", WAYS)
def test_windows_of_minus_infinity_are_empty(way: str, sizes: tuple[float, float]) -> None:
    """In values and in derivatives, beside a query of the same row whose window is not empty."""
    query = _array(sizes[0], 0.5, shape=(1, 2, 1, 1))
    cache = _array(*[sizes[1]] * 3, 2.0, shape=(1, 4, 1, 1))

    def run(query: Any, key: Any, value: Any) -> Any:
        return WAYS[way](query, key, value, jnp.array([[3, 4]]), mask_value=-7.0)

    results, grads, dots = _all_derivatives(run, (query, cache, jnp.ones_like(cache)))
    np.testing.assert_array_equal(results.out[0, :, 0, 0], [0, 1])
    assert results.max_logits[0, 0, 0] == -7.0
    assert results.denominator[0, 0, 0] == 0
    if way == "definition" and np.isinf(sizes[0]):
        return  # JAX's own rules multiply an infinite query by cotangents of 0.
    for query_bar, key_bar, value_bar in grads:
        assert query_bar[0, 0, 0, 0] == 0
        assert np.isfinite(key_bar).all()
        assert np.isfinite(value_bar).all()
    for dot in dots:
        np.testing.assert_array_equal(dot[0, 0], 0)


@pytest.mark.parametrize("block_size", [None, 1, 2, 3, 8])
def test_minus_infinity_for_every_block_size(block_size: int | None) -> None:
    query = jnp.full((1, 1, 1), 1e30)
    key = _array(-1e30, -1e30, 1e-30, -1e30, shape=(1, 4, 1, 1))
    value = _array(1, 2, 3, 4, shape=(1, 4, 1, 1))
    for lengths, expected in (([2], (0, -5, 0)), ([3], (3, 1, 1)), ([4], (3, 1, 1))):
        results = ragged_attention(
            query, key, value, jnp.array(lengths), block_size=block_size, mask_value=-5.0
        )
        for got, want in zip(results, expected, strict=True):
            np.testing.assert_allclose(np.asarray(got).ravel(), want, rtol=1e-6)


# Sizes of 0.


EMPTY = {
    "B": ((0, 2, 4, 3), (0, 5, 2, 3), 2),
    "Q": ((2, 0, 4, 3), (2, 5, 2, 3), 2),
    "Hq": ((2, 2, 0, 3), (2, 5, 2, 3), 2),
    "S": ((2, 2, 4, 3), (2, 0, 2, 3), 2),
    "D": ((2, 2, 4, 0), (2, 5, 2, 0), 2),
    "Dv": ((2, 2, 4, 3), (2, 5, 2, 3), 0),
    "D and Dv": ((2, 2, 4, 0), (2, 5, 2, 0), 0),
}


@pytest.mark.parametrize("size", EMPTY)
@pytest.mark.parametrize("block_size", tiered([None, 2], [None]))
def test_sizes_of_zero(size: str, block_size: int | None) -> None:
    query_shape, key_shape, Dv = EMPTY[size]
    query, key = jnp.ones(query_shape), jnp.ones(key_shape)
    value = jnp.full((*key_shape[:3], Dv), 2.0)
    lengths = jnp.full(query_shape[:2], 3)

    def run(query: Any, key: Any, value: Any) -> Any:
        return ragged_attention(query, key, value, lengths, block_size=block_size)

    def curved(query: Any, key: Any, value: Any) -> Any:
        loss = jax.grad(lambda *x: sum((y**2).sum() for y in run(*x)), (0, 1, 2))
        return sum((x**2).sum() for x in loss(query, key, value))

    operands = query, key, value
    results, grads, dots = _all_derivatives(run, operands)
    window = min(3, key_shape[1])
    np.testing.assert_array_equal(results.out, 2.0 if window else 0.0)
    np.testing.assert_array_equal(results.denominator, window)
    if window:
        np.testing.assert_array_equal(results.max_logits, query_shape[3])
    for bars in (*grads, jax.jit(jax.grad(curved, (0, 1, 2)))(*operands)):
        for bar, x in zip(bars, operands, strict=True):
            assert bar.shape == x.shape
            assert np.isfinite(bar).all()
    for dot, x in zip(dots, results, strict=True):
        assert dot.shape == x.shape
        assert np.isfinite(dot).all()
    with pytest.raises(NotImplementedError, match="there is nothing to compute"):
        ragged_attention(*operands, lengths, implementation="kernel")


# A position in the window of another query.


@pytest.mark.parametrize("way", tiered(WAYS, ["blocks"]))
def test_positions_outside_of_every_window_that_shares_them(way: str) -> None:
    """Positions that no query sharing the row attends to may hold anything."""
    case = BY_NAME["queries_gap"]
    operands = case.operands()

    def run(query: Any, key: Any, value: Any) -> Any:
        return WAYS[way](query, key, value, *operands[3:])

    got = _all_derivatives(run, tuple(map(jnp.asarray, poison(operands)[:3])))
    want = _all_derivatives(run, tuple(map(jnp.asarray, operands[:3])))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("way", WAYS)
def test_a_window_with_nan_beside_others(way: str) -> None:
    """Rows of their own, and empty windows of the same row, know nothing of it."""
    cache = _array(1, 2, np.nan, 3, shape=(1, 4, 1, 1))
    caches = jnp.concatenate([cache, cache])
    query = jnp.ones((2, 2, 1, 1))
    lengths, starts = jnp.array([[3, 2], [2, 1]]), jnp.array([[0, 2], [0, 0]])

    def run(query: Any, key: Any, value: Any) -> Any:
        return WAYS[way](query, key, value, lengths, starts, mask_value=-7.0)

    results, grads, dots = _all_derivatives(run, (query, caches, caches))
    for result, empty in zip(results, (0, -7, 0), strict=True):
        assert np.isnan(result[0, 0]).all()
        np.testing.assert_array_equal(result[0, 1], empty)
        assert np.isfinite(result[1]).all()
    for dot in dots:
        assert np.isfinite(dot[1]).all()
    for query_bar, key_bar, value_bar in grads:
        assert np.isfinite(query_bar[1]).all()
        assert np.isfinite(key_bar[1]).all()
        assert np.isfinite(value_bar[1]).all()
    if way != "definition":  # JAX's own rules multiply NaN by 0.
        for dot in dots:
            np.testing.assert_array_equal(dot[0, 1], 0)
        for query_bar, _, _ in grads:
            np.testing.assert_array_equal(query_bar[0, 1], 0)
