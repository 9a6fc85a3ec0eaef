"""Sizes at which the GPU's kernels meet a limit of the hardware: lowered without a GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_ragged import ragged_attention

Array = jax.ShapeDtypeStruct


def _cache(rows: int, S: int, Hkv: int, D: int, dtype: Any) -> Array:
    return Array((rows, S, Hkv, D), dtype)


def _lowered(query: Array, key: Array, value: Array, **optional: Array) -> str:
    lengths = Array(query.shape[:1], jnp.int32)
    function = functools.partial(ragged_attention, implementation="kernel")
    traced = jax.jit(function).trace(query, key, value, lengths, **optional)
    return str(traced.lower(lowering_platforms=("cuda",)).as_text())


@pytest.mark.parametrize("Q", [None, 3])
@pytest.mark.parametrize("B", [256, 257, 1000, 5000])
def test_rows(B: int, Q: int | None) -> None:
    """The windows of more rows than one copy takes; of the most, the table is not copied."""
    query = Array((B, *(() if Q is None else (Q,)), 8, 64), jnp.bfloat16)
    cache = _cache(B, 64, 2, 64, jnp.bfloat16)
    assert _lowered(query, cache, cache).count("@mosaic_gpu_v2") == 2
