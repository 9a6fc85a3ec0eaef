"""The readers of programs can find their patterns: twins of the tests that look for an absence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # no public reader of races
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import sharded
from cases import Case, covering, tiered
from jax_ragged.lowering._compat import CPU_THREADS_DOTS
from lowerings import gpus
from programs import (
    COLLECTIVES,
    MOVES,
    cache_sized,
    collectives,
    compile_call,
    compiled_text,
    devices,
    emitted,
    largest_made,
    made,
    op,
    temporary_bytes,
)

pytestmark = pytest.mark.optimized

B, S, Hkv, D = 4, 2048, 8, 128
CACHE = B * S * Hkv * D

_COLLECTIVE: dict[str, Any] = {
    "all-gather": lambda x: jax.lax.all_gather(x, "x", tiled=True),
    "all-reduce": lambda x: jax.lax.psum(x, "x"),
    "all-to-all": lambda x: jax.lax.all_to_all(x, "x", 1, 0, tiled=True),
    "collective-permute": lambda x: jax.lax.ppermute(x, "x", [(0, 1), (1, 0)]),
    "reduce-scatter": lambda x: jax.lax.psum_scatter(x, "x", tiled=True),
}


def _two(platform: str) -> Any:
    if platform == "gpu":
        return gpus()[:2]
    return devices("v5e")[:2] if platform == "tpu" else jax.devices("cpu")[:2]


@pytest.mark.parametrize("platform", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu(2)), "tpu"])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_are_found(name: str, platform: str) -> None:
    mesh = Mesh(np.array(_two(platform)), ("x",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        _COLLECTIVE[name], mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False
    )
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    # Every platform may make one of another, as a CPU makes reduce-scatter of all-reduce.
    assert collectives(compiled_text(run, x)) != {}
    if platform == "cpu" and name != "reduce-scatter":
        assert set(collectives(compiled_text(run, x))) == {name}


def test_a_gathered_cache_is_found() -> None:
    """A sequence over devices, of which no part is attended to by itself."""
    mesh = sharded.make_mesh(AxisType.Auto)
    case = sharded.MQA

    def local(query: Any, key: Any, value: Any, *windows: Any) -> Any:
        key, value = (jax.lax.all_gather(x, "model", axis=1, tiled=True) for x in (key, value))
        return op(case)(query, key, value, *windows)

    cache = P(None, "model")
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), cache, cache, P()), out_specs=P(), check_vma=False
    )
    assert "all-gather" in collectives(compiled_text(run, *sharded.operands(case)))


@pytest.mark.parametrize("generation", tiered(["v5e", "7x"], ["v5e"]))
def test_a_copy_of_the_cache_is_found(generation: str) -> None:
    def transposed(call: Any) -> Any:
        """A cache by heads, as many keep it, brought into our order for the kernel."""
        return lambda query, key, value, *windows: call(
            query, key.reshape(B, Hkv, S, D).swapaxes(1, 2), value, *windows
        )

    def converted(call: Any) -> Any:
        return lambda query, key, value, *windows: call(query, key, value * 2, *windows)

    for change in (transposed, converted):
        program = compile_call(generation, Hq=32, Hkv=Hkv, D=D, B=B, S=S, transform=change)
        assert "tpu_custom_call" in program.as_text()
        assert cache_sized(program, CACHE) != []
        assert program.memory_analysis().temp_size_in_bytes >= CACHE * 2


def test_a_transposed_shard_is_found() -> None:
    sharding = jax.sharding.SingleDeviceSharding(devices("v5e")[0])
    x = jax.ShapeDtypeStruct((B, S, Hkv, D), jnp.bfloat16, sharding=sharding)
    text = compiled_text(lambda x: (x.swapaxes(1, 2), x), x)
    sizes = [size for size, _ in made(text, "copy", "transpose")]
    assert CACHE in sizes


@pytest.mark.parametrize("operation", ["copy", "convert", "fusion"])
def test_what_a_cpu_makes_is_found(operation: str) -> None:
    x = jnp.zeros((512, 64))
    run = {
        "copy": lambda x: (x, jnp.flip(x.T)),
        "convert": lambda x: x.astype(jnp.bfloat16),
        "fusion": lambda x: jnp.sin(x) * 2,
    }[operation]
    # A conversion by itself may be a fusion of one operation.
    names = (operation,) if operation != "convert" else ("convert", "fusion")
    assert x.size in [size for size, _ in made(compiled_text(run, x), *names)]


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["copy", "transpose"])
def test_what_a_gpu_makes_is_found(operation: str) -> None:
    with jax.default_device(gpus()[0]):
        x = jnp.zeros((512, 64))
        text = compiled_text(lambda x: (x, x.T), x)
    assert x.size in [size for size, _ in made(text, operation, *MOVES)]


@pytest.mark.skipif(not CPU_THREADS_DOTS, reason="this XLA runs small products on its own thread")
def test_products_in_parallel_are_found() -> None:
    x = jnp.zeros((512, 512))
    assert "kind=kCustom" in compiled_text(lambda x: x @ x, x)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pad", lambda key: jnp.pad(key, ((0, 0), (0, 24), (0, 0), (0, 0)))),
        ("concatenate", lambda key: jnp.concatenate([key, key], 1)),
        ("convert", lambda key: key.astype(jnp.float32).astype(key.dtype)),
        (
            "dynamic_slice",
            lambda key: jax.lax.dynamic_slice_in_dim(key, key[0, 0, 0, 0].astype(int), 1000, 1),
        ),
        ("slice", lambda key: key[:, :1000]),
        ("transpose", lambda key: key.swapaxes(0, 2)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_moves_in_stablehlo_are_found(name: str, change: Any) -> None:
    """As a lowering for a GPU may emit them."""
    key = jax.ShapeDtypeStruct((2, 1008, 2, 64), jnp.bfloat16)
    text = jax.jit(change).trace(key).lower(lowering_platforms=("cuda",)).as_text()
    found = emitted(text, name)
    assert found
    assert max(size for size, _ in found) >= 2 * 1000 * 2 * 64


def test_what_is_made_of_a_cache_is_found() -> None:
    """As a vmap without a rule of its own would copy a shared cache for every query."""
    key = np.zeros((2, 64, 1, 16), np.float32)
    assert largest_made(lambda x: jnp.broadcast_to(x, (8, *x.shape)) * 2, key) == 8 * key.size


def test_temporary_bytes_of_dense_logits_are_found() -> None:
    def of(S: int, implementation: Any) -> int:
        case = Case("dense", (S, S // 2), Hq=8, Hkv=4, S=S, D=32, Dv=32)
        run = op(case, implementation=implementation)
        return temporary_bytes(run, *case.operands()[:4])

    logits = 2 * 8 * (4096 - 1024) * 4
    assert of(4096, "reference") - of(1024, "reference") >= logits
    assert of(4096, None) - of(1024, None) < logits // 8


def test_races_are_found() -> None:
    """A block that is read while it is still on its way."""

    def kernel(x_ref: Any, out_ref: Any, block_ref: Any, semaphore: Any) -> None:
        copy = pltpu.make_async_copy(x_ref, block_ref, semaphore)
        copy.start()
        out_ref[...] = block_ref[...]
        copy.wait()

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        run = pl.pallas_call(
            kernel,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        )
        try:
            jax.block_until_ready(run(jnp.ones((8, 128))))
            races = interpret_pallas_call.races
            found = races is not None and races.races_found
        except jax.errors.JaxRuntimeError as error:  # in newer versions of JAX
            found = "RACE DETECTED" in str(error)
        finally:
            pltpu.reset_tpu_interpret_mode_state()
    assert found


def test_covering_has_every_pair() -> None:
    rows = [(a, b, c) for a in range(3) for b in "xyz" for c in (True, False)]
    few = covering(rows)
    assert len(few) < len(rows)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(r[i], r[j]) for r in few} == {(r[i], r[j]) for r in rows}
