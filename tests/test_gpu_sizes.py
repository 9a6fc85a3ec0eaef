"""Sizes at which the GPU's kernels meet a limit of the hardware: lowered without a GPU."""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged import ragged_attention
from jax_ragged.lowering.gpu import (
    cache_kernels,
    line,
    one_tile,
    row_kernels,
    team_plan,
    teams,
)
from jax_ragged.lowering.gpu.chip import SHARED_MEMORY
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


def _bytes(scratch: Mapping[str, Any]) -> int:
    """The shared memory of a kernel's arrays, each of which stands at a multiple of 1024 bytes."""
    arrays = [x for x in scratch.values() if not isinstance(x, plgpu.Barrier)]
    sizes = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays]
    assert 0 not in sizes
    return sum(-(-size // 1024) * 1024 for size in sizes)


def _lower(D: int, Dv: int, Q: int, dtype: Any) -> None:
    """Lowers all operations on caches of 8 heads; those of quantised caches that have kernels."""
    query, cache = Array((8, Q, 32, D), jnp.bfloat16), _cache(8, 512, 8, D, dtype)
    operands = query, cache, _cache(8, 512, 8, Dv, dtype)
    lengths, scale = Array((8, Q), jnp.int32), Array((8, 512, 8), jnp.float32)
    narrow = dtype == jnp.int8
    scales = {"key_scale": scale, "value_scale": scale} if narrow else {}
    function: Any = functools.partial(ragged_attention, implementation="kernel")

    def forward(operands: Any, scales: Any, lengths: Any, **params: Any) -> Any:
        return tuple(function(*operands, lengths, **scales, **params))

    def pullback(operands: Any, scales: Any, lengths: Any) -> Any:
        moving, fixed = (operands[:1], operands[1:]) if narrow else (operands, ())
        results, pull = jax.vjp(lambda *x: forward((*x, *fixed), scales, lengths), *moving)
        return pull(results)

    def pushforward(operands: Any, scales: Any, lengths: Any) -> Any:
        return jax.jvp(lambda *x: forward(x, scales, lengths), operands, operands)

    wide = functools.partial(forward, out_dtype="float32")
    operations: list[Any] = [wide, pullback] if narrow else [wide, pullback, pushforward]
    for run in operations:
        jax.jit(run).trace(operands, scales, lengths).lower(lowering_platforms=("cuda",))


_HEAD_DIMS = range(32, 257, 32)


@pytest.mark.full
def test_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over head dimensions: that of every kernel fits, with a block at least."""
    seen = set()

    def launch(
        body: Any,
        *,
        name: str,
        results: Any = None,
        updated: Any = None,
        scratch: Any = None,
        **arguments: Any,
    ) -> Any:
        seen.add(name)
        assert _bytes(scratch or {}) <= SHARED_MEMORY
        shapes = {**(results or {}), **(updated or {})}
        return {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}

    for module in (cache_kernels, line, one_tile, row_kernels, teams):
        monkeypatch.setattr(module, "launch", launch)
    for D, Dv in itertools.product(_HEAD_DIMS, _HEAD_DIMS):
        for Q, dtype in itertools.product((1, 128), (jnp.bfloat16, jnp.int8)):
            _lower(D, Dv, Q, dtype)
    kernels = ("", "_merge", "_teams", "_peaks", "_cotangent", "_tangents", "_all_cotangents",
               "_cache_cotangents")  # fmt: skip
    assert seen == {f"ragged_attention{kernel}" for kernel in kernels}


def test_more_shared_memory_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin, and the reason for the constant."""
    query, cache = Array((8, 512, 32, 112), jnp.bfloat16), _cache(8, 512, 8, 112, jnp.bfloat16)
    assert _lowered(query, cache, cache).count("@mosaic_gpu_v2") == 1
    jax.clear_caches()
    monkeypatch.setattr(team_plan, "SHARED_MEMORY", SHARED_MEMORY + 1024)
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        _lowered(query, cache, cache)
