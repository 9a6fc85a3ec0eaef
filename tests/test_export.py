"""jax.export: three platforms from a CPU-only host, gradients, serialisation, symbolic shapes."""

import dataclasses
import importlib.util
import pathlib
import re
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec as P

import sharded
from cases import FLOAT32_SUMMED, Case, assert_results, ids, tiered
from jax_ragged import RaggedAttention, ragged_attention
from programs import op, pullback

PLATFORMS = ("cpu", "tpu", "cuda")
DATA = pathlib.Path(__file__).with_name("data")
CASES = (
    Case("exported", (40, 0, 55), (3, 0, -2), Hq=4, Hkv=2, S=40, D=128, Dv=128),
    Case("exported_queries", (40, 0, 55), Q=2, Hq=4, Hkv=1, S=40, D=128, Dv=128),
)
every_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))


def _roundtrip(fun: Any, *args: Any, platforms: Any = PLATFORMS, vjp_order: int = 1) -> Any:
    exported = export.export(jax.jit(fun), platforms=platforms)(*args)
    return export.deserialize(exported.serialize(vjp_order=vjp_order))


@every_case
def test_call(case: Case) -> None:
    """Serialised, read back and called: the result is the same named tuple."""
    operands = sharded.operands(case)
    read = _roundtrip(lambda *x: ragged_attention(*x, **case.params), *operands)
    results = jax.jit(read.call)(*operands)
    assert isinstance(results, RaggedAttention)
    assert_results(results, case)
    assert read.platforms == PLATFORMS


@every_case
def test_differentiated(case: Case) -> None:
    operands = sharded.operands(case)
    read = _roundtrip(op(case), *operands)
    grads = pullback(read.call)(operands, case.cotangents())
    sharded.assert_gradients(grads, case)


@pytest.mark.full
def test_second_order() -> None:
    case = CASES[0]
    operands = sharded.operands(case)
    read = _roundtrip(op(case), *operands, vjp_order=2)

    def product(fun: Any) -> Any:
        def loss(query: Any) -> Any:
            return (fun(query, *operands[1:])[0] ** 2).sum()

        return jax.grad(lambda q: (jax.grad(loss)(q) * operands[0]).sum())(operands[0])

    want = product(op(case))
    np.testing.assert_allclose(product(read.call), want, atol=FLOAT32_SUMMED * np.abs(want).max())


def test_kernels_are_in_it() -> None:
    """The TPU's kernels, forward and backward, and no call into the host but those."""
    operands = sharded.operands(CASES[0])
    exported = export.export(jax.jit(op(CASES[0])), platforms=PLATFORMS)(*operands)
    for module in (exported.mlir_module(), exported.vjp().mlir_module()):
        assert "tpu_custom_call" in module
        assert set(re.findall(r"custom_call @(\w+)", module)) <= {"tpu_custom_call", "Sharding"}
    for platform, marker in (("cpu", "cpu_kernel"), ("tpu", "tpu_kernel")):
        lowered = jax.jit(op(CASES[0])).trace(*operands).lower(lowering_platforms=(platform,))
        assert f"ragged_attention_forward_{marker}" in lowered.as_text(debug_info=True)


def test_block_size_that_one_platform_refuses() -> None:
    """Other platforms keep their kernels; that one gets the reference, and a warning says so."""
    case = dataclasses.replace(CASES[0], S=300, lengths=(300, 0, 129), block_size=100)
    operands = sharded.operands(case)
    advice = r"on tpu: block_size=100 is no multiple of 64.* Pass block_size=64 or 128"
    with pytest.warns(UserWarning, match=advice):
        exported = export.export(jax.jit(op(case)), platforms=("cpu", "tpu"))(*operands)
    assert "tpu_custom_call" not in exported.mlir_module()
    for platform, ran in (("cpu", "cpu_kernel"), ("tpu", "reference")):
        with pytest.warns(UserWarning, match=advice) if ran == "reference" else nullcontext():
            lowered = jax.jit(op(case)).trace(*operands).lower(lowering_platforms=(platform,))
        assert f"ragged_attention_forward_{ran}" in lowered.as_text(debug_info=True)
    assert_results(jax.jit(exported.call)(*operands), case)
    asked = export.export(jax.jit(op(case, implementation="kernel")), platforms=("cpu", "tpu"))
    with pytest.raises(NotImplementedError, match=advice):
        asked(*operands)


@pytest.mark.parametrize("partitioned", [False, True])
def test_hopper_kernel_where_asked_for(partitioned: bool) -> None:
    """Without a device the kind of GPU is not known: the kernel is in the module on request.

    JAX gives no promise of stability for it, and wants to be told that this is known.
    """
    query = jax.ShapeDtypeStruct((4, 16, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((4, 256, 4, 128), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32)
    partition = P("data", "model") if partitioned else None
    run = jax.jit(lambda *x: ragged_attention(*x, implementation="kernel", partition=partition))
    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    mesh = sharded.make_mesh(AxisType.Auto) if partitioned else None
    with jax.set_mesh(mesh) if mesh else nullcontext():
        exported = export.export(run, platforms=("cuda",), disabled_checks=checks)(
            query, cache, cache, lengths
        )
    assert "custom_call @mosaic_gpu_v2" in exported.mlir_module()
    assert exported.nr_devices == (8 if partitioned else 1)


# Dimension variables must be solvable from the shapes of the arguments, so that the query heads
# are a multiple of the key heads by a known factor, or the key heads are known.
SYMBOLIC = {
    "batch": ("b, 8, 16", "b, 20, 4, 16", "b"),
    "sequence": ("3, 8, 16", "3, s, 4, 16", "3"),
    "queries": ("3, q, 8, 16", "3, 20, 4, 16", "3, q"),
    "heads_mha": ("3, h, 16", "3, 20, h, 16", "3"),
    "heads_gqa": ("3, 4*h, 16", "3, 20, h, 16", "3"),
    "heads_mqa": ("3, h, 16", "3, 20, 1, 16", "3"),
    "all": ("b, q, 2*h, d", "b, s, h, d", "b, q"),
}


@pytest.mark.parametrize("name", tiered(SYMBOLIC, ["all"]))
def test_symbolic_shapes(name: str) -> None:
    """One module for every size: called and differentiated at two."""
    query, cache, windows = SYMBOLIC[name]
    scope = export.SymbolicScope()
    shapes = [export.symbolic_shape(s, scope=scope) for s in (query, cache, cache, windows)]
    dtypes = (jnp.float32, jnp.float32, jnp.float32, jnp.int32)
    structs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    read = _roundtrip(lambda *x: tuple(ragged_attention(*x)), *structs)
    for sizes in ({"b": 3, "s": 20, "q": 2, "h": 2, "d": 16}, dict.fromkeys("bsqhd", 1)):
        rng = np.random.default_rng(0)
        q, k, v, lengths = (
            tuple(int(eval(n, {}, sizes)) for n in shape.split(","))
            for shape in (query, cache, cache, windows)
        )
        operands: list[Any] = [rng.standard_normal(shape, np.float32) for shape in (q, k, v)]
        operands.append(rng.integers(0, k[1] + 2, lengths, np.int32))
        expected = tuple(ragged_attention(*operands))
        for got, want in zip(read.call(*operands), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=FLOAT32_SUMMED)
        bars = tuple(map(np.ones_like, expected))
        grads, wants = (
            pullback(f)(operands, bars) for f in (read.call, lambda *x: tuple(ragged_attention(*x)))
        )
        for got, want in zip(grads, wants, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4)


def test_symbolic_heads_that_do_not_divide() -> None:
    scope = export.SymbolicScope()
    query, cache, lengths = (
        jax.ShapeDtypeStruct(export.symbolic_shape(s, scope=scope), d)
        for s, d in (("3, g, 16", "f4"), ("3, 20, h, 16", "f4"), ("3", "i4"))
    )
    with pytest.raises(ValueError, match="heads of query must be a multiple of the heads of key"):
        export.export(jax.jit(ragged_attention))(query, cache, cache, lengths)


def test_sharded() -> None:
    """A module for eight devices: the kernel of each shard is in it."""
    case = sharded.GQA
    mesh = sharded.make_mesh(AxisType.Auto)
    operands = sharded.put(mesh, case)
    with jax.set_mesh(mesh):
        run = op(case, partition=sharded.partition(case))
        read = _roundtrip(run, *operands)
        results = jax.jit(read.call)(*operands)
    assert read.nr_devices == 8
    assert_results(results, case)


def _script() -> Any:
    path = DATA / "export_with_oldest_jax.py"
    spec = importlib.util.spec_from_file_location("export_with_oldest_jax", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_exported_with_the_oldest_jax() -> None:
    """A module of the oldest supported JAX runs here, and its gradient too."""
    script = _script()
    read = export.deserialize(bytearray(script.FILE.read_bytes()))
    operands = script.operands()
    assert read.platforms == PLATFORMS
    assert "tpu_custom_call" in read.mlir_module()
    results = read.call(*operands)
    assert isinstance(results, RaggedAttention)
    expected = script.attend(*operands)
    for got, want in zip(results, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=FLOAT32_SUMMED)
    bars = tuple(np.cos(np.arange(x.size, dtype=np.float32).reshape(x.shape)) for x in expected)
    grads = pullback(lambda *x: tuple(read.call(*x)))(operands, bars)
    wants = pullback(lambda *x: tuple(script.attend(*x)))(operands, bars)
    for got, want in zip(grads, wants, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
