"""Compiled for four TPU devices: one kernel on local shapes, and the cache stays where it is."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from cases import tiered
from jax_ragged import merge_partials, ragged_attention
from programs import collectives, devices, made

pytest.importorskip("libtpu")
pytestmark = pytest.mark.optimized

B, Hq, S, D = 4, 16, 1024, 128


@functools.cache
def _devices() -> Any:
    return np.array(devices("v5e")).reshape(2, 2)


def _mesh(kind: AxisType) -> Mesh:
    return Mesh(_devices(), ("data", "model"), axis_types=(kind, kind))


def _specs(Hkv: int) -> tuple[P, P, P, P]:
    cache = P("data", None, None if Hkv == 1 else "model", None)
    return P("data", "model", None), cache, cache, P("data")


def _operands(mesh: Mesh, Hkv: int, specs: tuple[P, ...]) -> list[Any]:
    shapes = ((B, Hq, D), (B, S, Hkv, D), (B, S, Hkv, D), (B,))
    dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, jnp.int32)
    return [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(shapes, dtypes, specs, strict=True)
    ]


def _text(mesh: Mesh, fun: Any, operands: list[Any]) -> str:
    with jax.set_mesh(mesh):
        compiled = jax.jit(fun).lower(*operands).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    # Less than a quarter of one shard of the keys: no copy of the cache hides in it.
    assert analysis.temp_size_in_bytes < B * S * D * 2 // 4
    return str(compiled.as_text())


def _kernels(text: str) -> int:
    return text.count('custom_call_target="tpu_custom_call"')


def _assert_cache_stays(text: str, Hkv: int) -> None:
    """No copy or transpose makes anything of the size of a shard of the cache."""
    shard = B // 2 * S * max(Hkv // 2, 1) * D
    assert [line for size, line in made(text, "copy", "transpose") if size >= shard] == []


def _attend(kind: str, mesh: Mesh, Hkv: int) -> Any:
    if kind == "explicit":
        return ragged_attention
    if kind == "auto":
        return functools.partial(ragged_attention, partition=P("data", "model"))
    return jax.shard_map(
        ragged_attention, mesh=mesh, in_specs=_specs(Hkv), out_specs=P("data", "model")
    )


KINDS = list(itertools.product(("explicit", "auto", "shard_map"), (4, 1)))


@pytest.mark.parametrize(("kind", "Hkv"), tiered(KINDS, KINDS[1::4]))
def test_forward(kind: str, Hkv: int) -> None:
    mesh = _mesh(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    text = _text(mesh, _attend(kind, mesh, Hkv), _operands(mesh, Hkv, _specs(Hkv)))
    assert _kernels(text) == 1
    assert f"bf16[2,1024,{2 if Hkv == 4 else 1},128]" in text
    _assert_cache_stays(text, Hkv)
    assert collectives(text) == {}


@pytest.mark.parametrize(("kind", "Hkv"), tiered(KINDS, [*KINDS[::4], KINDS[3]]))
def test_reverse(kind: str, Hkv: int) -> None:
    """Two kernels; only the gradient of the one key head of MQA is summed over devices."""
    mesh = _mesh(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    attend = _attend(kind, mesh, Hkv)

    def pull(query: Any, key: Any, value: Any, lengths: Any, bar: Any) -> Any:
        _, pullback = jax.vjp(lambda *x: attend(*x, lengths).out, query, key, value)
        return pullback(bar)

    operands = _operands(mesh, Hkv, _specs(Hkv))
    text = _text(mesh, pull, [*operands, operands[0]])
    assert _kernels(text) == 2
    assert set(collectives(text)) == ({"all-reduce"} if Hkv == 1 else set())


def test_without_partition() -> None:
    mesh = _mesh(AxisType.Auto)
    operands = _operands(mesh, 4, _specs(4))
    with pytest.warns(UserWarning, match="partition="), jax.set_mesh(mesh):
        compiled = jax.jit(lambda *x: ragged_attention(*x)).lower(*operands).compile()
    assert _kernels(str(compiled.as_text())) == 0


def test_sequence_over_devices() -> None:
    """Merging moves statistics and out, and nothing of the cache."""
    mesh = _mesh(AxisType.Auto)
    axes = ("data", "model")

    def local(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        first = jax.lax.axis_index(axes) * key.shape[1]
        return merge_partials(ragged_attention(query, key, value, lengths - first), axis=axes)

    specs = (P(), P(None, axes), P(None, axes), P())
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    text = _text(mesh, run, _operands(mesh, 4, specs))
    assert _kernels(text) == 1
    found = collectives(text)
    assert 1 <= found.pop("all-reduce") <= 3
    assert found == {}
