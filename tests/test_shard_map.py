"""Inside shard_map, checked: all axes manual, some of them, and the axes over which values vary."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import sharded
from cases import FLOAT32_SUMMED, Case, assert_results, ids, tiered
from jax_ragged import ragged_attention
from jax_ragged.lowering._compat import varying_axes
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.primitives import ragged_attention_p
from programs import collectives, compiled_text, equations, op, pullback, pushforward
from sharded import CASES, GQA, MQA

every_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))


@pytest.fixture
def mesh() -> Any:
    return sharded.make_mesh(AxisType.Auto)


def _mapped(fun: Any, mesh: Any, case: Case, **options: Any) -> Any:
    specs = sharded.specs(case)
    return jax.shard_map(fun, mesh=mesh, in_specs=specs, out_specs=specs[0], **options)


@every_case
def test_forward(mesh: Any, case: Case) -> None:
    run = jax.jit(_mapped(op(case), mesh, case))
    assert_results(run(*sharded.operands(case)), case)


@every_case
def test_derivatives_of_it(mesh: Any, case: Case) -> None:
    run, operands = _mapped(op(case), mesh, case), sharded.operands(case)
    sharded.assert_gradients(jax.jit(pullback(run))(operands, case.cotangents()), case)
    tangents = tuple(np.cos(x) for x in operands[:3])
    actual = jax.jit(pushforward(run))(operands, tangents)
    sharded.assert_tangents(actual, case, tangents)


@every_case
def test_derivatives_inside_of_it(mesh: Any, case: Case) -> None:
    """The gradient of a replicated operand (the one key head of MQA) is summed over the mesh."""
    specs = sharded.specs(case)
    run = jax.shard_map(
        lambda operands, bars: pullback(op(case))(operands, bars),
        mesh=mesh,
        in_specs=(specs, specs[0]),
        out_specs=specs[:3],
    )
    actual = jax.jit(run)(sharded.operands(case), case.cotangents())
    sharded.assert_gradients(actual, case)


@pytest.mark.parametrize("case", tiered(CASES, [MQA]), ids=ids(CASES))
def test_second_order(mesh: Any, case: Case) -> None:
    operands = sharded.operands(case)

    def hessian(run: Any) -> Any:
        def loss(scale: Any) -> Any:
            out, max_logits, denominator = run(operands[0] * scale, *operands[1:])
            return (out**2).sum() + denominator.sum() + jnp.where(max_logits > -1e9, 1, 0).sum()

        return jax.jit(jax.hessian(loss))(1.0)

    expected = hessian(op(case))
    np.testing.assert_allclose(hessian(_mapped(op(case), mesh, case)), expected, rtol=1e-4)


@pytest.mark.parametrize("axis", ["data", "model"])
@pytest.mark.parametrize("case", tiered(CASES, [GQA]), ids=ids(CASES))
def test_partly_manual(mesh: Any, case: Case, axis: str) -> None:
    """The other axis stays automatic: its part of `partition` gives kernels of each shard."""
    manual, automatic = (
        tuple(
            P(*(a if (a == axis) == wanted else None for a in spec)) for spec in sharded.specs(case)
        )
        for wanted in (True, False)
    )
    run = jax.shard_map(
        op(case, partition=automatic[0]),
        mesh=mesh,
        in_specs=manual,
        out_specs=manual[0],
        axis_names={axis},
    )
    operands = sharded.operands(case)
    with jax.set_mesh(mesh):
        assert_results(jax.jit(run)(*operands), case)
        grads = jax.jit(pullback(run))(operands, case.cotangents())
        text = compiled_text(run, *sharded.put(mesh, case))
    sharded.assert_gradients(grads, case)
    assert "ragged_attention_forward_cpu_kernel" in text
    assert collectives(text) == {}


def test_partly_manual_without_partition(mesh: Any) -> None:
    specs = tuple(P(*spec[:1]) for spec in sharded.specs(GQA))
    run = jax.shard_map(op(GQA), mesh=mesh, in_specs=specs, out_specs=specs[0], axis_names={"data"})
    with pytest.warns(UserWarning, match="partitioned over 4 devices"):
        results = jax.jit(run)(*sharded.operands(GQA))
    assert_results(results, GQA)


def test_partly_manual_partly_explicit() -> None:
    mesh = sharded.make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        manual = tuple(P(*spec[:1]) for spec in sharded.specs(GQA))
        run = jax.shard_map(op(GQA), in_specs=manual, out_specs=manual[0], axis_names={"data"})
        results = jax.jit(run)(*sharded.put(mesh, GQA))
    assert_results(results, GQA)


def test_results_vary_as_the_operands_do(mesh: Any) -> None:
    """Else a replicated result would be accepted, and be one shard's answer."""
    specs = sharded.specs(GQA)
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(jax.shard_map(op(GQA), mesh=mesh, in_specs=specs, out_specs=P()))(
            *sharded.operands(GQA)
        )


def test_operands_that_vary_differently_are_joined(mesh: Any) -> None:
    """Rows of query split and the cache replicated: the equation's operands vary alike."""
    query, key, value, lengths = sharded.operands(GQA)

    def local(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        return tuple(ragged_attention(query, key[:2], value[:2], lengths))

    run = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P(), P()), out_specs=P("data"))
    twice = np.concatenate([query[:2], query[:2] * 0.5])
    operands = (twice, key, value, lengths[:2])
    out, max_logits, denominator = jax.jit(run)(*operands)
    for i, scale in ((0, 1.0), (1, 0.5)):
        expected = ragged_attention(query[:2] * scale, key[:2], value[:2], lengths[:2])
        rows = slice(2 * i, 2 * i + 2)
        for got, want in zip((out, max_logits, denominator), expected, strict=True):
            np.testing.assert_allclose(got[rows], want, atol=FLOAT32_SUMMED)
    (eqn,) = [e for e in equations(run, *operands) if e.primitive is ragged_attention_p]
    assert len({varying_axes(x.aval) for x in eqn.invars}) == 1


def test_primitive_rejects_operands_that_vary_differently(mesh: Any) -> None:
    def local(query: Any, key: Any, value: Any, *windows: Any) -> Any:
        operands = (query, key[:2], value[:2], *windows)
        return ragged_attention_p.bind(*operands, params=RaggedAttentionParams())

    specs = (P("data"), P(), P(), P("data"), P("data"))
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))
    with pytest.raises(ValueError, match="must vary over the same manual axes"):
        jax.jit(run)(*sharded.operands(CASES[0]))


@pytest.mark.parametrize("case", tiered(CASES, [GQA]), ids=ids(CASES))
def test_tpu_kernels(mesh: Any, case: Case) -> None:
    """Unchecked: JAX's interpreter has no rules for index maps of values that vary.

    test_tpu_sharding compiles the kernels inside a checked shard_map.
    """
    run = _mapped(op(case, implementation="kernel"), mesh, case, check_vma=False)
    with pltpu.force_tpu_interpret_mode():
        results = jax.jit(run)(*sharded.operands(case))
    assert_results(results, case)


def test_mapped(mesh: Any) -> None:
    """vmap over a shard_map, which has an axis of its own then."""
    specs = sharded.specs(GQA)
    run = jax.vmap(_mapped(op(GQA), mesh, GQA))
    operands = [np.stack([x, x]) for x in sharded.operands(GQA)]
    results = jax.jit(run)(*operands)
    for i in range(2):
        assert_results([x[i] for x in results], GQA)
    placed = [
        jax.device_put(x, NamedSharding(mesh, P(None, *spec)))
        for x, spec in zip(operands, specs, strict=True)
    ]
    assert collectives(compiled_text(run, *placed)) == {}
