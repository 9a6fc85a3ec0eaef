"""Faults that public bug reports of neighbours describe, each as a test of the TPU kernels."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from cases import tiered
from jax_ragged import ragged_attention
from jax_ragged.lowering import tpu
from jax_ragged.lowering.contract import ByOperand, ByResult, Operands, Residuals
from jax_ragged.lowering.params import RaggedAttentionParams


@pytest.fixture
def interpreted() -> Iterator[None]:
    params = pltpu.InterpretParams(uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        yield


def _call(*operands: Any, **params: Any) -> Any:
    return ragged_attention(*operands, implementation="kernel", **params)


def _vjp(query: Any, key: Any, value: Any, *windows: Any, **params: Any) -> Any:
    results, pull = jax.vjp(lambda *x: _call(*x, *windows, **params), query, key, value)
    return pull(results)


def _jvp(query: Any, key: Any, value: Any, *windows: Any, **params: Any) -> Any:
    operands = (query, key, value)
    return jax.jvp(lambda *x: _call(*x, *windows, **params), operands, operands)[1]


OPERATIONS = (_call, _vjp, _jvp)


def _shapes(sizes: tuple[int, ...], dtype: str) -> list[Any]:
    """Operands [3, Q, Hq, D], and a cache of 512 positions, for sizes (Q, Hq, Hkv, D, Dv)."""
    B, S = 3, 512
    Q, Hq, Hkv, D, Dv = sizes
    shape: Any = jax.ShapeDtypeStruct
    return [
        shape((B, Q, Hq, D), dtype),
        shape((B, S, Hkv, D), dtype),
        shape((B, S, Hkv, Dv), dtype),
        shape((B, Q), "int32"),
        shape((B, Q), "int32"),
    ]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("sizes", "dtype", "params"),
    [
        ((1, 8, 2, 128, 128), "bfloat16", {}),
        ((3, 8, 2, 128, 128), "float32", {"softmax_scale": -0.3}),
        ((3, 4, 2, 64, 64), "bfloat16", {"logits_soft_cap": 2.0}),
        ((1, 4, 4, 256, 128), "float32", {}),
        ((8, 32, 8, 128, 128), "bfloat16", {}),
        ((80, 16, 2, 128, 64), "bfloat16", {}),
    ],
)
def test_strict_promotion(
    operation: Callable[..., Any], sizes: Any, dtype: str, params: dict[str, Any]
) -> None:
    """No operation promotes dtypes or ranks in silence."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        traced = jax.jit(lambda *x: operation(*x, **params)).trace(*_shapes(sizes, dtype))
        traced.lower(lowering_platforms=("tpu",))


def _arrays(*sizes: int, dtype: str = "float32", seed: int = 0) -> list[Any]:
    """Query [B, Q, Hq, D], key and value [B, S, Hkv, D] of normal numbers."""
    B, Q, Hq, Hkv, S, D = sizes
    rng = np.random.default_rng(seed)
    shapes = ((B, Q, Hq, D), (B, S, Hkv, D), (B, S, Hkv, D))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("length", tiered([1, 100], [100]))
def test_weights_sum_to_one(length: int, interpreted: None) -> None:
    """The derivatives' weights are the forward's to the bit, at logits of 1e4 too.

    Where all values are equal, `out` is that value and its derivative by them is 1. Each weight
    is rounded to 2**-24 of itself, as is 1 / l.
    With one block size the products have one shape in all kernels: the CPU that interprets them
    adds up products of other shapes in another order, which a matrix unit does not.
    """
    query, key, value = _arrays(1, 1, 4, 2, 160, 128)
    query, key, value = 100 * query, 100 * key, jnp.ones_like(value)

    def out(value: jax.Array) -> jax.Array:
        results = _call(query, key, value, jnp.array([[length]]), softmax_scale=128**-0.5)
        assert isinstance(results.out, jax.Array)
        return results.out

    _, moved = jax.jvp(out, (value,), (value,))
    np.testing.assert_allclose(moved, 1.0, rtol=4 * 2.0**-24)
    (back,) = jax.vjp(out, value)[1](jnp.ones_like(query))
    np.testing.assert_allclose(back.sum(axis=1), 2.0, rtol=4 * 2.0**-24)


@pytest.mark.parametrize("D", tiered([64, 128], [64]))
def test_equal_keys_with_an_offset(D: int, interpreted: None) -> None:
    """<o_bar, out> is taken from an out that is not rounded."""
    query = jnp.zeros((1, 1, 2, D), jnp.bfloat16)
    key = jnp.full((1, 130, 2, D), 256, jnp.bfloat16)
    value = jnp.where(jnp.arange(130)[None, :, None, None] == 0, 1, 1.0078125)
    value = jnp.broadcast_to(value, key.shape).astype(jnp.bfloat16)
    gradient = jax.grad(lambda q: _call(q, key, value, jnp.array([[2]])).out[..., 0].sum())
    np.testing.assert_array_equal(np.asarray(gradient(query), np.float32), 0)


def test_unrounded_out(interpreted: None) -> None:
    """out_dtype="float32" reaches the kernel: results are exact to float32, not to bfloat16."""
    query, key, value = _arrays(3, 1, 8, 2, 200, 128, dtype="bfloat16")
    value = jnp.ones_like(value)
    value = value.at[:, :1].add(1)
    windows = jnp.full((3, 1), 200)
    query = jnp.zeros_like(query)
    params = RaggedAttentionParams(out_dtype="float32", block_size=64, implementation="kernel")
    operands = Operands(query, key, value, windows, jnp.zeros_like(windows))
    out = jax.jit(lambda x: tpu.LOWERING.forward(x, params, None).out)(operands)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, 1 + 1 / 200, rtol=2e-7)


@pytest.mark.full
@pytest.mark.parametrize("Q", [1, 8])
def test_gradients_in_float32(Q: int, interpreted: None) -> None:
    """Gradients that are summed later are not rounded to bfloat16 by the kernel."""
    B, S = 1, 70
    query, key, value = _arrays(B, Q, 16, 8, S, 128, dtype="bfloat16")
    ends = jnp.full((B, Q), S)
    params = RaggedAttentionParams(out_dtype="float32")
    operands = Operands(query, key, value, ends, jnp.zeros_like(ends))
    results = jax.jit(lambda x: tpu.LOWERING.forward(x, params, None))(operands)
    bars = ByResult(jnp.ones((B, Q, 16, 128), jnp.float32), None, None)
    residuals = Residuals(*operands[:5], results.out, results.max_logits, results.denominator)
    narrow, wide = (
        jax.jit(lambda r, b, d=dtype: tpu.LOWERING.vjp(r, b, ByOperand(d, d, d), params, None))(
            residuals, bars
        )
        for dtype in (jnp.dtype("bfloat16"), jnp.dtype("float32"))
    )
    for x, y in zip(narrow[:3], wide[:3], strict=True):
        assert x is not None
        assert y is not None
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(
            np.asarray(x, np.float32), np.asarray(y.astype(jnp.bfloat16), np.float32)
        )
        assert (np.asarray(y) != np.asarray(y.astype(jnp.bfloat16), np.float32)).any()


def test_sums_are_rounded_once(interpreted: None) -> None:
    """A key's gradient is the sum of 600 ones: in bfloat16, ones stop adding up at 256."""
    Q = 600
    query = jnp.ones((1, Q, 1, 8), jnp.bfloat16)
    key = value = jnp.ones((1, 128, 1, 8), jnp.bfloat16)
    gradient = jax.grad(lambda k: _call(query, k, value, jnp.ones((1, Q), int)).max_logits.sum())
    expected = np.zeros(key.shape)
    expected[:, 0] = Q
    np.testing.assert_array_equal(np.asarray(gradient(key), np.float32), expected)


@pytest.mark.parametrize("garbage", tiered([np.nan, np.inf], [np.inf]))
@pytest.mark.parametrize(("Hkv", "D"), tiered([(2, 128), (1, 64)], [(1, 64)]))
def test_garbage_in_queries_without_a_window(
    Hkv: int, D: int, garbage: float, interpreted: None
) -> None:
    """It reaches no gradient: neither the cache's nor those of other queries."""
    operands = _arrays(1, 2, 2, Hkv, 150, D)
    windows = jnp.array([[0, 150]])

    def gradients(query: jax.Array) -> Any:
        results, pull = jax.vjp(lambda *x: _call(*x, windows), query, *operands[1:])
        return [*results, *pull(results)]

    clean = gradients(operands[0].at[:, 0].set(0))
    dirty = gradients(operands[0].at[:, 0].set(garbage))
    for x, y in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(x, y)
    bars = _call(*operands, windows)
    pull = jax.vjp(lambda *x: _call(*x, windows), *operands)[1]
    zeros, noise = (
        pull(jax.tree.map(lambda x, y=y: x.at[:, 0].set(y), bars)) for y in (0.0, garbage)
    )
    for x, y in zip(zeros, noise, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("length", tiered([100, 128], [128]))
@pytest.mark.parametrize("D", tiered([64, 128], [128]))
def test_logits_of_minus_infinity_are_an_empty_window(
    D: int, length: int, interpreted: None
) -> None:
    query = jnp.full((1, 1, 2, D), 1e30)
    key, value = jnp.full((1, 150, 2, D), -1e30), jnp.ones((1, 150, 2, D))
    windows = jnp.array([[length]])
    results, pull = jax.vjp(lambda *x: _call(*x, windows, mask_value=-7.0), query, key, value)
    for x, expected in zip(results, (0, -7, 0), strict=True):
        np.testing.assert_array_equal(x, expected)
    for x in pull(jax.tree.map(jnp.ones_like, results)):
        np.testing.assert_array_equal(x, 0)
    tangents = jax.jvp(lambda *x: _call(*x, windows), (query, key, value), (query, key, value))[1]
    for x in tangents:
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (4, 128), (128, 2)])
def test_tiny_head_dims_in_bfloat16(operation: Callable[..., Any], D: int, Dv: int) -> None:
    """They follow the policy for calls that a kernel does not take, in an export too."""

    def run(*operands: jax.Array) -> Any:
        query, key, value, *windows = operands
        if operation is _call:
            return ragged_attention(*operands)
        results, pull = jax.vjp(lambda *x: ragged_attention(*x, *windows), query, key, value)
        return pull(results)

    shapes = _shapes((1, 4, 2, D, Dv), "bfloat16")
    with pytest.raises(NotImplementedError, match="head dimensions from 5 on in bfloat16"):
        jax.jit(operation).trace(*shapes).lower(lowering_platforms=("tpu",))
    exported = jax.export.export(jax.jit(run), platforms=("cpu", "tpu"))(*shapes)
    assert exported.platforms == ("cpu", "tpu")
