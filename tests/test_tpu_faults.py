"""Faults that public bug reports of neighbours describe, each as a test of the TPU kernels."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jax_ragged import ragged_attention


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


def _shapes(Q: int, Hq: int, Hkv: int, D: int, Dv: int, dtype: str) -> list[Any]:
    B, S = 3, 512
    shape = jax.ShapeDtypeStruct
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
        traced = jax.jit(lambda *x: operation(*x, **params)).trace(*_shapes(*sizes, dtype))
        traced.lower(lowering_platforms=("tpu",))
