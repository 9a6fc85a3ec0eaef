"""Meshes of automatic axes: `partition` gives kernels for each shard, else the reference runs."""

import contextlib
import warnings
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import sharded
from cases import Case, assert_results, ids
from jax_ragged import ragged_attention
from programs import collectives, compiled_text, op, pullback, pushforward
from sharded import CASES, GQA, MQA

every_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))
KERNEL = "ragged_attention_forward_cpu_kernel"
REFERENCE = "ragged_attention_forward_reference"


@pytest.fixture
def mesh() -> Any:
    return sharded.make_mesh(AxisType.Auto)


def _partitioned(case: Case, **params: Any) -> Any:
    return op(case, partition=sharded.partition(case), **params)


@pytest.mark.parametrize("context", [True, False], ids=["set_mesh", "operands"])
@every_case
def test_forward(mesh: Any, case: Case, context: bool) -> None:
    """The mesh is the context's, or that which the operands are on."""
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        results = jax.jit(_partitioned(case))(*sharded.put(mesh, case))
    assert_results(results, case)


@every_case
def test_reverse(mesh: Any, case: Case) -> None:
    operands = sharded.put(mesh, case)
    bars = sharded.put_results(mesh, case, case.cotangents())
    with jax.set_mesh(mesh):
        grads = jax.jit(pullback(_partitioned(case)))(operands, bars)
    sharded.assert_gradients(grads, case)


@every_case
def test_forward_mode(mesh: Any, case: Case) -> None:
    tangents = tuple(np.cos(x) for x in case.operands()[:3])
    with jax.set_mesh(mesh):
        operands = sharded.put(mesh, case)
        actual = jax.jit(pushforward(_partitioned(case)))(operands, tangents)
    sharded.assert_tangents(actual, case, tangents)


@pytest.mark.full  # tests/test_shard_map.py has the kernels on a mesh in the default tier
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_tpu_kernels(mesh: Any, case: Case) -> None:
    """All three kernels of the TPU, interpreted, on each shard."""
    tangents = tuple(np.cos(x) for x in case.operands()[:3])
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        operands = sharded.put(mesh, case)
        run = _partitioned(case, implementation="kernel")
        results = jax.jit(run)(*operands)
        tangents_out = jax.jit(pushforward(run))(operands, tangents)
        grads = jax.jit(pullback(run))(operands, case.cotangents())
    assert_results(results, case)
    sharded.assert_tangents(tangents_out, case, tangents)
    sharded.assert_gradients(grads, case)


def test_eager(mesh: Any) -> None:
    assert_results(_partitioned(GQA)(*sharded.put(mesh, GQA)), GQA)


def test_kernel_of_each_shard(mesh: Any) -> None:
    """The kernel sees local shapes, and nothing is gathered."""
    with jax.set_mesh(mesh):
        text = compiled_text(_partitioned(GQA), *sharded.put(mesh, GQA))
    assert KERNEL in text
    assert REFERENCE not in text
    assert "f32[2,20,1,8]" in text  # key of 2 of the 4 rows and 1 of the 4 heads
    assert collectives(text) == {}


def test_without_partition(mesh: Any) -> None:
    """The reference, which the compiler partitions, and a warning that tells how."""
    operands = sharded.put(mesh, GQA)
    with jax.set_mesh(mesh):
        with pytest.warns(UserWarning, match=r"partition=PartitionSpec\(batch axes, head axes\)"):
            text = compiled_text(op(GQA), *operands)
        with pytest.warns(UserWarning, match="partitioned over 8 devices"):
            results = jax.jit(lambda *x: op(GQA)(*x))(*operands)
    assert REFERENCE in text
    assert KERNEL not in text
    assert_results(results, GQA)


def test_asked_for_reference_does_not_warn(mesh: Any) -> None:
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("error")
        results = jax.jit(op(GQA, implementation="reference"))(*sharded.put(mesh, GQA))
    assert_results(results, GQA)


def test_asked_for_kernel_says_what_to_do(mesh: Any) -> None:
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="partition=PartitionSpec"):
        jax.jit(op(GQA, implementation="kernel"))(*sharded.put(mesh, GQA))


def test_shardings_of_jit_alone(mesh: Any) -> None:
    """No mesh is in any type: the number of devices is still known."""
    shardings = tuple(NamedSharding(mesh, spec) for spec in sharded.specs(GQA))
    with pytest.warns(UserWarning, match="partition="):
        results = jax.jit(op(GQA), in_shardings=shardings)(*sharded.operands(GQA))
    assert_results(results, GQA)


def test_one_device_needs_no_partition() -> None:
    mesh = jax.make_mesh(
        (1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )
    with jax.set_mesh(mesh):
        text = compiled_text(op(GQA), *sharded.put(mesh, GQA))
    assert KERNEL in text


@pytest.mark.parametrize("spmd", ["data", None])
def test_mapped(mesh: Any, spmd: str | None) -> None:
    """Each vmap gives `partition` an entry in front: spmd_axis_name, or none."""
    case = Case("mapped", (20, 3), Hq=4, Hkv=4, S=20, D=8, Dv=8)
    operands = sharded.operands(case)
    scales = np.array([1.0, -0.5], np.float32)

    def run(scale: Any, query: Any) -> Any:
        many: Any = jax.vmap(
            lambda s: tuple(ragged_attention(query * s, *operands[1:], partition=P(None, "model"))),
            spmd_axis_name=spmd,
        )
        return many(scale)

    with jax.set_mesh(mesh):
        results = jax.jit(run)(scales, operands[0])
        text = compiled_text(run, scales, operands[0])
    for i, scale in enumerate(scales):
        moved = case.operands()._replace(query=case.operands().query * scale)
        assert_results([x[i] for x in results], case, moved)
    assert KERNEL in text
    assert results[0].sharding.spec[:1] == (P("data") if spmd else P(None))[:1]


def test_partition_of_replicated_rows(mesh: Any) -> None:
    """An entry of None is the whole dimension on every device, whatever the operand's layout."""
    with jax.set_mesh(mesh):
        results = jax.jit(op(MQA, partition=P(None, None, "model")))(*sharded.put(mesh, MQA))
    assert_results(results, MQA)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (P("data", None, None, "model"), "partition must have 3 entries"),
        (P("data", None, "tensor"), "partition must name automatic axes of the mesh"),
        (P("data", None, "data"), "each at most once"),
        (P(("data", "model"), None, None), "leading dimension 0 of size 4 over"),
        (P(None, "model", None), "leading dimension 1 of size 2 over model, 4 shards"),
        (P(None, None, ("data", "model")), "heads of key of size 4 over"),
    ],
    ids=str,
)
def test_errors(mesh: Any, partition: P, message: str) -> None:
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.jit(op(GQA, partition=partition))(*sharded.operands(GQA))


def test_partition_without_a_mesh() -> None:
    with pytest.raises(ValueError, match=r"jax\.set_mesh"):
        op(GQA, partition=P("data", None, None))(*sharded.operands(GQA))


def test_partition_of_other_axes(mesh: Any) -> None:
    """Explicit axes are in the types, manual ones are split already."""
    explicit = sharded.make_mesh(AxisType.Explicit)
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="Leave out explicit axes"):
        jax.jit(_partitioned(GQA))(*sharded.put(explicit, GQA))
    specs = sharded.specs(GQA)
    local = jax.shard_map(
        _partitioned(GQA), mesh=mesh, in_specs=specs, out_specs=sharded.partition(GQA)
    )
    with pytest.raises(ValueError, match="manual ones, over which shard_map has split"):
        jax.jit(local)(*sharded.operands(GQA))
