"""Meshes of explicit axes: types of results and gradients, values, errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import sharded
from cases import FLOAT32_SUMMED, Case, assert_results, ids, tiered
from jax_ragged import ragged_attention
from programs import collectives, compiled_text, op, pullback, pushforward
from sharded import CASES, GQA, MQA, place

every_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))


@pytest.fixture
def mesh() -> Any:
    return sharded.make_mesh(AxisType.Explicit)


def _same_types(actual: Any, expected: Any) -> None:
    assert [jax.typeof(x) for x in actual] == [jax.typeof(x) for x in expected]


@pytest.mark.parametrize("jit", [True, False])
@every_case
def test_forward(mesh: Any, case: Case, jit: bool) -> None:
    with jax.set_mesh(mesh):
        results = (jax.jit(op(case)) if jit else op(case))(*sharded.put(mesh, case))
    assert_results(results, case)
    heads = P("data", None, "model") if case.Q else P("data", "model")
    for x, spec in zip(results, (P(*heads, None), heads, heads), strict=True):
        assert x.sharding.spec == spec


@every_case
def test_reverse(mesh: Any, case: Case) -> None:
    with jax.set_mesh(mesh):
        operands = sharded.put(mesh, case)
        bars = sharded.put_results(mesh, case, case.cotangents())
        grads = jax.jit(pullback(op(case)))(operands, bars)
    sharded.assert_gradients(grads, case)
    _same_types(grads, operands[:3])


@every_case
def test_forward_mode(mesh: Any, case: Case) -> None:
    tangents = tuple(np.cos(x) for x in case.operands()[:3])
    with jax.set_mesh(mesh):
        operands = sharded.put(mesh, case)
        moved = [jax.device_put(t, x.sharding) for t, x in zip(tangents, operands, strict=False)]
        actual = jax.jit(pushforward(op(case)))(operands, moved)
    sharded.assert_tangents(actual, case, tangents)


@pytest.mark.parametrize("case", tiered(CASES, [MQA]), ids=ids(CASES))
def test_second_order(mesh: Any, case: Case) -> None:
    """The plain form of higher orders is split as the kernels are."""

    def loss(query: Any, key: Any, value: Any, *windows: Any) -> Any:
        out, _, denominator = op(case)(query, key, value, *windows)
        return (out**2).sum() + denominator.sum()

    def product(operands: Any) -> Any:
        first = jax.grad(lambda *x: loss(*x, *operands[3:]), (0, 1, 2))
        return jax.jvp(first, operands[:3], operands[:3])[1]

    expected = jax.jit(product)(sharded.operands(case))
    with jax.set_mesh(mesh):
        operands = sharded.put(mesh, case)
        actual = jax.jit(product)(operands)
    for got, want in zip(actual, expected, strict=True):
        # Sums over shards are in another order.
        np.testing.assert_allclose(got, want, atol=2 * FLOAT32_SUMMED * (1 + np.abs(want).max()))
    _same_types(actual, operands[:3])


def test_shared_cache_has_one_gradient(mesh: Any) -> None:
    """A cache shared by a mapped axis over the mesh: its gradient is the sum over the shards."""
    case = Case("shared", (19, 3, 7, 0), Hq=4, Hkv=4, S=20, D=8, Dv=8)
    queries = np.stack([case.operands().query * s for s in (1.0, -0.5)])

    def loss(query: Any, key: Any, value: Any) -> Any:
        lengths = jnp.asarray(case.operands().lengths)
        many: Any = jax.vmap(lambda q: ragged_attention(q, key, value, lengths).out)
        return (many(query) ** 2).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    expected = gradient(queries, *case.operands()[1:3])
    with jax.set_mesh(mesh):
        caches = [place(mesh, x, None, None, "model") for x in case.operands()[1:3]]
        operands = (place(mesh, queries, "data", None, "model"), *caches)
        actual = gradient(*operands)
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=FLOAT32_SUMMED)
    _same_types(actual, operands)


def test_replicated_operands_are_split_like_the_others(mesh: Any) -> None:
    """And their gradients have their own types."""
    query, key, value, lengths = sharded.operands(GQA)
    with jax.set_mesh(mesh):
        operands = (
            place(mesh, query, "data"),
            place(mesh, key),
            place(mesh, value),
            place(mesh, lengths),
        )
        bars = tuple(place(mesh, x, "data") for x in GQA.cotangents())
        grads = jax.jit(pullback(op(GQA)))(operands, bars)
    sharded.assert_gradients(grads, GQA)
    _same_types(grads, operands[:3])


def test_operands_made_outside_of_the_mesh() -> None:
    mesh = sharded.make_mesh(AxisType.Explicit)
    query, key, value, lengths = sharded.operands(GQA)
    with jax.set_mesh(mesh):
        query = jax.device_put(query, NamedSharding(mesh, P("data", None, "model")))
        key, value = (
            jax.device_put(x, NamedSharding(mesh, P("data", None, "model"))) for x in (key, value)
        )
        results = jax.jit(lambda q, k, v: op(GQA)(q, k, v, lengths))(query, key, value)
    assert_results(results, GQA)


def test_mapped_axis_of_the_mesh(mesh: Any) -> None:
    """An explicit axis that vmap maps over stays split."""
    case = Case("mapped", (19, 3, 7, 0), Hq=4, Hkv=4, S=20, D=8, Dv=8)
    operands = sharded.operands(case)
    stacked = [np.stack([x, x]) for x in operands]
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in stacked]
        results = jax.jit(jax.vmap(op(case)))(*split)
    assert results[0].sharding.spec[0] == "data"
    for i in range(2):
        assert_results([np.asarray(x)[i] for x in results], case)


@pytest.mark.parametrize(
    ("which", "spec", "message"),
    [
        (1, P(None, "data"), "the sequence dimension S of key must not be sharded"),
        (2, P(None, "data"), "merge_partials"),
        (1, P(None, None, None, "data"), "the head_dim dimension D of key must not be sharded"),
        (0, P(None, None, None, "model"), "the head_dim dimension D of query must not be"),
        (2, P(None, None, None, "data"), "the head_dim dimension Dv of value must not be"),
        (1, P(None, None, "model"), "Hkv must be sharded alike in every operand"),
        (0, P(None, None, "model"), "query heads and key heads must be sharded alike"),
    ],
    ids=str,
)
def test_errors(mesh: Any, which: int, spec: P, message: str) -> None:
    operands = list(sharded.operands(GQA))
    with jax.set_mesh(mesh):
        operands = [jax.device_put(x, NamedSharding(mesh, P())) for x in operands]
        operands[which] = jax.device_put(operands[which], NamedSharding(mesh, spec))
        with pytest.raises(TypeError, match=message):
            jax.jit(op(GQA))(*operands)


@pytest.mark.parametrize("which", [1, 3])
def test_rows_and_heads_over_one_axis(mesh: Any, which: int) -> None:
    """The query's heads and another operand's rows, which the types of the results would join."""
    operands = list(sharded.operands(MQA))
    with jax.set_mesh(mesh):
        operands[0] = sharded.place(mesh, operands[0], None, None, "model")
        operands[which] = sharded.place(mesh, operands[which], "model")
        with pytest.raises(TypeError, match="must be sharded over different axes of the mesh; got"):
            jax.jit(op(MQA))(*operands)


def test_rows_split_over_different_axes(mesh: Any) -> None:
    query, key, value, lengths = sharded.operands(MQA)
    with jax.set_mesh(mesh):
        query = jax.device_put(query, NamedSharding(mesh, P("data")))
        key = jax.device_put(key, NamedSharding(mesh, P("model")))
        with pytest.raises(TypeError, match="leading dimension 0 must be sharded alike"):
            jax.jit(op(MQA))(query, key, value, lengths)


def test_reduced(mesh: Any) -> None:
    query, key, value, lengths = sharded.operands(GQA)
    with jax.set_mesh(mesh):
        query = jax.sharding.reshard(query, P(reduced=frozenset({"data"})))
        with pytest.raises(TypeError, match="query must be neither unreduced nor reduced"):
            jax.jit(op(GQA))(query, key, value, lengths)


def test_no_communication_but_for_shared_sums(mesh: Any) -> None:
    """Rows and heads are independent; only the one key head of MQA sums over its queries'."""
    for case, all_reduces in ((GQA, 0), (MQA, 2)):
        with jax.set_mesh(mesh):
            operands = sharded.put(mesh, case)
            bars = sharded.put_results(mesh, case, case.cotangents())
            text = compiled_text(pullback(op(case)), operands, bars)
        found = collectives(text)
        assert found.pop("all-reduce", 0) in range(min(1, all_reduces), all_reduces + 1)
        assert found == {}
