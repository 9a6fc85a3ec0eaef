"""On two GPUs: each runs the kernel on its shard, and the cache stays where it is."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from cases import Case, Operands, assert_close, tolerance
from jax_ragged import merge_partials, ragged_attention
from lowerings import gpus
from programs import collectives, made

CASE = Case("", (128, 0, 65, 9), (3, 0, 0, -4), Hq=8, Hkv=2, S=128, D=64, Dv=64, dtype="bfloat16")
MOVES = ("all-gather", "all-to-all", "collective-permute", "dynamic-slice", "copy", "transpose")


pytestmark = [pytest.mark.gpu(2), pytest.mark.optimized]


def _mesh(kind: AxisType, shape: tuple[int, int]) -> Mesh:
    devices = np.array(gpus()[:2]).reshape(shape)
    return Mesh(devices, ("data", "model"), axis_types=(kind, kind))


def _specs(*cache: str | None) -> tuple[P, ...]:
    batch, sequence, heads = cache
    keys = P(batch, sequence, heads)
    return P(batch, heads), keys, keys, P(batch), P(batch)


ROWS_AND_HEADS = _specs("data", None, "model")
attend = functools.partial(ragged_attention, implementation="kernel")


def _check(mesh: Mesh, specs: tuple[P, ...], function: Callable[..., Any]) -> str:
    """Compares the output with the oracle's; returns the compiled program."""
    operands: Operands = CASE.operands()
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, specs, strict=True)
        ]
        compiled = jax.jit(function).lower(*placed).compile()
        out = compiled(*placed).out
    assert_close(out, CASE.expected(operands).out, tolerance(CASE), name="out")
    text = str(compiled.as_text())
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 2
    shard = operands.key.size // 2
    assert [line for size, line in made(text, *MOVES) if size >= shard] == []
    return text


over = pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=["rows", "heads"])


@over
def test_explicit_axes(shape: tuple[int, int]) -> None:
    text = _check(_mesh(AxisType.Explicit, shape), ROWS_AND_HEADS, attend)
    assert collectives(text) == {}


@over
def test_automatic_axes(shape: tuple[int, int]) -> None:
    split = functools.partial(attend, partition=P("data", "model"))
    assert collectives(_check(_mesh(AxisType.Auto, shape), ROWS_AND_HEADS, split)) == {}


@over
def test_shard_map(shape: tuple[int, int]) -> None:
    mesh = _mesh(AxisType.Auto, shape)
    results = P("data", "model")
    split = jax.shard_map(attend, mesh=mesh, in_specs=ROWS_AND_HEADS, out_specs=results)
    assert collectives(_check(mesh, ROWS_AND_HEADS, split)) == {}


def test_cache_split_by_sequence() -> None:
    mesh = _mesh(AxisType.Auto, (1, 2))
    specs = _specs(None, "model", None)

    def part(query: Any, key: Any, value: Any, lengths: Any, starts: Any) -> Any:
        first = jax.lax.axis_index("model") * key.shape[1]
        parts = attend(query, key, value, lengths - first, starts - first)
        return merge_partials(parts, axis="model")

    split = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())
    assert collectives(_check(mesh, specs, split)).keys() == {"all-reduce"}


@over
def test_gradients(shape: tuple[int, int]) -> None:
    """The plain form, split as the call is; compared with those on one device."""

    def loss(query: Any, key: Any, value: Any, *windows: Any) -> Any:
        return (ragged_attention(query, key, value, *windows).out.astype("float32") ** 2).sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    operands = CASE.operands()
    expected = grad(*(jax.device_put(x, gpus()[0]) for x in operands))
    mesh = _mesh(AxisType.Explicit, shape)
    with jax.set_mesh(mesh):
        shardings = [NamedSharding(mesh, s) for s in ROWS_AND_HEADS]
        actual = grad(*map(jax.device_put, operands, shardings))
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, np.asarray(want, np.float64), 2 * tolerance(CASE), name="gradient")
