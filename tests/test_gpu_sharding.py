"""On two GPUs: each runs the kernel on its shard, and the cache stays where it is."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import oracle
from cases import Case, Operands, assert_close, tolerance
from jax_ragged import merge_partials, ragged_attention
from lowerings import gpus
from programs import collectives, made

CASE = Case("", (128, 0, 65, 9), (3, 0, 0, -4), Hq=8, Hkv=2, S=128, D=64, Dv=64, dtype="bfloat16")
# So many queries that the gradients of the cache have a kernel of their own. A shard of the cache
# is larger than one of the queries, whose transposes are no error.
ENDS = (tuple(range(1, 97)),) * 4
MANY = Case("", ENDS, Q=96, Hq=4, Hkv=2, S=512, D=64, Dv=64, dtype="bfloat16")
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
@pytest.mark.parametrize("kind", ["explicit", "automatic", "shard_map"])
@pytest.mark.parametrize("case", [CASE, MANY], ids=["few", "many"])
def test_gradients(case: Case, kind: str, shape: tuple[int, int]) -> None:
    """Kernels for each shard, and nothing of the cache or of its gradients is moved."""
    mesh = _mesh(AxisType.Explicit if kind == "explicit" else AxisType.Auto, shape)
    rows = (None,) if case.Q else ()
    results = P("data", *rows, "model")
    specs = (results, *ROWS_AND_HEADS[1:])
    call: Any = attend
    if kind == "automatic":
        call = functools.partial(attend, partition=results)
    elif kind == "shard_map":
        call = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=results)

    def gradients(out_bar: Any, operands: Operands) -> Any:
        return jax.vjp(lambda *x: call(*x, *operands[3:]).out, *operands[:3])[1](out_bar)

    operands, out_bar = case.operands(), case.cotangents()[0]
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    with jax.set_mesh(mesh):
        placed = Operands(*map(jax.device_put, operands, shardings))
        program = jax.jit(gradients).lower(jax.device_put(out_bar, shardings[0]), placed).compile()
        actual = program(jax.device_put(out_bar, shardings[0]), placed)
    text = str(program.as_text())
    assert collectives(text) == {}
    # The forward's, which may be two, and those of the gradients.
    assert text.count('custom_call_target="mosaic_gpu_v2"') >= 2
    shard = operands.key.size // 2
    assert [line for size, line in made(text, *MOVES) if size >= shard] == []
    expected = oracle.vjp(*operands, (out_bar, None, None), **case.definition)
    for got, want in zip(actual, expected, strict=True):
        # As in test_gpu_derivatives.
        assert_close(got, want, 2 * tolerance(case), scale=np.abs(want).max(), name="gradient")
