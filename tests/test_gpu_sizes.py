"""Sizes at which the GPU's kernels meet a limit of the hardware: lowered without a GPU."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_ragged import ragged_attention
from programs import emitted

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


@pytest.mark.parametrize("Hkv", [1, 3, 4, 8, 9, 12, 16, 20])
def test_heads_of_scales(Hkv: int) -> None:
    """Scales of heads of any number: padded where the copy engine needs it, the cache never."""
    query, cache = Array((4, Hkv, 64), jnp.bfloat16), _cache(4, 512, Hkv, 64, jnp.int8)
    scale = Array(cache.shape[:3], jnp.float32)
    text = _lowered(query, cache, cache, key_scale=scale, value_scale=scale)
    assert text.count("@mosaic_gpu_v2") == 2
    pads = [size for size, _ in emitted(text, "pad")]
    assert bool(pads) == (Hkv not in (4, 8, 16))
    assert max(pads, default=0) < math.prod(cache.shape) // 4


@pytest.mark.parametrize("shape", [(), (2,), (4, 1, 2), (4, 1, 1), (1, 512, 1)], ids=str)
def test_scales_that_positions_share_are_not_repeated(shape: tuple[int, ...]) -> None:
    query, cache = Array((4, 8, 64), jnp.bfloat16), _cache(4, 512, 2, 64, jnp.int8)
    scale = Array(shape, jnp.float32)
    text = _lowered(query, cache, cache, key_scale=scale, value_scale=scale)
    repeated = [size for size, _ in emitted(text, "broadcast_in_dim") if size >= 4 * 512 * 2]
    # The twin: one scale for each position is copied for all heads.
    assert len(repeated) == (2 if shape == (1, 512, 1) else 0)
