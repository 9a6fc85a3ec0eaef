"""Arguments of every kind that JAX users pass: lists, numbers, numpy, variables, shardings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import sharded
from cases import SMALL, SMALL_QUERIES, Case, assert_results
from jax_ragged import (
    merge_partials,
    quantize_cache,
    ragged_attention,
    reference_ragged_attention,
)
from programs import op

BOTH: list[Any] = [ragged_attention, reference_ragged_attention]
NAMES = ("query", "key", "value", "lengths", "starts")


class Variable:
    """An object that stands for an array, as variables of flax do."""

    def __init__(self, value: Any) -> None:
        self.value = jnp.asarray(value)

    def __jax_array__(self) -> jax.Array:
        """Returns the array."""
        return self.value


KINDS: dict[str, Any] = {
    "list": lambda x: x.tolist(),
    "numpy": np.asarray,
    "jax": jnp.asarray,
    "object": Variable,
}


def _assert_same(got: Any, want: Any) -> None:
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


@pytest.mark.parametrize("fun", BOTH)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [SMALL, SMALL_QUERIES], ids=lambda c: c.name)
def test_arrays(fun: Any, kind: str, case: Case) -> None:
    operands = [None if x is None else KINDS[kind](x) for x in case.operands()]
    assert_results(fun(*operands, **case.definition), case)


@pytest.mark.parametrize("kind", KINDS)
def test_optional_arrays(kind: str) -> None:
    rng = np.random.default_rng(0)
    query, cache = (rng.standard_normal(s).astype(np.float32) for s in ((2, 4, 8), (6, 4, 2, 8)))
    (key, key_scale), (value, value_scale) = (quantize_cache(x, "int8") for x in (cache, -cache))
    optional: dict[str, Any] = {
        "page_table": np.array([[5, 1], [0, -1]], np.int32),
        "key_scale": np.asarray(key_scale),
        "value_scale": np.asarray(value_scale),
        "sinks": rng.standard_normal(4).astype(np.float32),
    }
    call: list[Any] = [query, key, value, np.array([7, 3], np.int32)]
    want = ragged_attention(*call, **optional)
    got = ragged_attention(*call, **{name: KINDS[kind](x) for name, x in optional.items()})
    _assert_same(got, want)


def test_python_numbers_as_scales() -> None:
    query, cache = jnp.ones((1, 4, 8)), jnp.ones((1, 4, 2, 8), jnp.int8)
    want = ragged_attention(query, cache, cache, 3, key_scale=2.0, value_scale=1.0)
    _assert_same(ragged_attention(query, cache, cache, 3, key_scale=2, value_scale=1), want)


@pytest.mark.parametrize("kind", KINDS)
def test_partial_results_and_caches(kind: str) -> None:
    operands = SMALL.operands()
    part = op(SMALL)(*operands)
    parts = [[KINDS[kind](np.asarray(x)) for x in part]] * 2
    _assert_same(merge_partials(*parts), merge_partials(part, part))
    _assert_same(
        quantize_cache(KINDS[kind](operands.key), "int8"), quantize_cache(operands.key, "int8")
    )


@pytest.mark.parametrize("fun", BOTH)
@pytest.mark.parametrize("case", [SMALL, SMALL_QUERIES], ids=lambda c: c.name)
def test_a_scalar_is_one_window_for_all(fun: Any, case: Case) -> None:
    query, key, value, *_ = case.operands()
    B = query.shape[0]
    want = fun(query, key, value, np.full(B, 5), np.full(B, 2))
    for five, two in ((5, 2), (np.int64(5), np.int8(2)), (jnp.array(5), jnp.array(2))):
        _assert_same(fun(query, key, value, five, two), want)
        _assert_same(jax.jit(fun)(query, key, value, five, two), want)


def test_a_scalar_window_of_mapped_rows() -> None:
    """A vmap over rows, with the length of each row as a scalar."""
    query, key, value, lengths, starts = map(jnp.asarray, SMALL.operands())

    def row(query: Any, key: Any, value: Any, length: Any, start: Any) -> Any:
        return op(SMALL)(query[None], key[None], value[None], length, start)

    results = jax.vmap(row)(query, key, value, lengths, starts)
    assert_results(jax.tree.map(lambda x: x[:, 0], results), SMALL)


@pytest.mark.parametrize("fun", BOTH)
def test_wide_python_integers_saturate(fun: Any) -> None:
    query, key, value, *_ = SMALL.operands()
    want = fun(query, key, value, np.full(3, 6), np.zeros(3, int))
    _assert_same(fun(query, key, value, 2**40, -(2**40)), want)
    _assert_same(fun(query, key, value, [2**40, 2**32, 6], [-(2**33)] * 3), want)
    _assert_same(fun(query, key, value, 2**70, [np.int64(-(2**40)), jnp.int32(0), -(2**64)]), want)


@pytest.mark.parametrize("fun", BOTH)
def test_narrow_integers(fun: Any) -> None:
    query, key, value, *_ = SMALL.operands()
    want = fun(query, key, value, np.full(3, 6))
    for dtype in ("int4", "uint4", "int8", "uint16"):
        _assert_same(fun(query, key, value, np.full(3, 6, dtype)), want)


def test_lists_of_traced_numbers() -> None:
    operands = SMALL.operands()

    def run(a: Any, b: Any, c: Any) -> Any:
        return op(SMALL)(*operands[:3], [a, b, c], operands.starts)

    assert_results(jax.jit(run)(*operands.lengths), SMALL)


@pytest.mark.parametrize("fun", BOTH)
@pytest.mark.parametrize(
    "number",
    [np.float32, np.array, jnp.float32, jnp.bfloat16, lambda x: Variable(jnp.float32(x))],
    ids=["numpy scalar", "numpy array", "jax array", "bfloat16", "object"],
)
def test_concrete_numbers(fun: Any, number: Any) -> None:
    operands = SMALL.operands()
    names = ("softmax_scale", "logits_soft_cap", "mask_value")
    want = fun(*operands, **dict(zip(names, (0.5, 4.0, -64.0), strict=True)))
    numbers = dict(zip(names, map(number, (0.5, 4.0, -64.0)), strict=True))
    _assert_same(fun(*operands, **numbers), want)
    _assert_same(jax.jit(lambda *x: fun(*x, **numbers))(*operands), want)


@pytest.mark.parametrize("fun", BOTH)
@pytest.mark.parametrize("case", [SMALL, SMALL_QUERIES], ids=lambda c: c.name)
def test_no_scale_is_that_of_the_head_dimension(fun: Any, case: Case) -> None:
    operands = case.operands()
    want = fun(*operands, softmax_scale=operands.query.shape[-1] ** -0.5)
    _assert_same(fun(*operands, softmax_scale=None), want)
    # The default is another.
    assert not np.array_equal(fun(*operands).out, want.out)


def test_no_scale_of_a_symbolic_dimension() -> None:
    (D,) = jax.export.symbolic_shape("D")
    query, cache = (jax.ShapeDtypeStruct(s, np.float32) for s in ((1, 2, D), (1, 4, 2, D)))

    def run(query: Any, cache: Any) -> Any:
        return ragged_attention(query, cache, cache, 3, softmax_scale=None).out

    with pytest.raises(ValueError, match="softmax_scale must be a number where the head dimension"):
        jax.export.export(jax.jit(run))(query, cache)


def test_out_dtype_of_float64_without_x64() -> None:
    """numpy's default dtype enters JAX as float32."""
    query, key, value = (x.astype(np.float64) for x in SMALL.operands()[:3])
    assert ragged_attention(query, key, value, 3, out_dtype="float32").out.dtype == jnp.float32


# partition: entries left out, and shardings.

CASE = Case("partition", ((7, 3), (5, 0), (1, 9), (6, 6)), Q=2, Hq=8, Hkv=4, S=9, D=8, Dv=4)
ROWS = Case("partition_rows", (7, 3, 0, 9), Hq=8, Hkv=4, S=9, D=8, Dv=4)


@pytest.fixture
def mesh() -> Any:
    return sharded.make_mesh(AxisType.Auto)


@pytest.mark.parametrize(
    ("case", "short", "whole"),
    [
        (CASE, P("data"), P("data", None, None)),
        (CASE, P(), P(None, None, None)),
        (CASE, P("data", None, "model", None), P("data", None, "model")),
        (ROWS, P("data"), P("data", None)),
        (ROWS, P("data", "model", None), P("data", "model")),
    ],
    ids=str,
)
def test_trailing_entries(mesh: Any, case: Case, short: P, whole: P) -> None:
    def equations(partition: P) -> str:
        run = op(case, partition=partition, implementation="kernel")
        return str(jax.make_jaxpr(run)(*sharded.operands(case)))

    with jax.set_mesh(mesh):
        assert equations(short) == equations(whole)
        results = jax.jit(op(case, partition=short))(*sharded.operands(case))
    assert_results(results, case)


def _shardings(mesh: Any) -> tuple[NamedSharding, ...]:
    cache = NamedSharding(mesh, P("data", None, "model"))
    rows = NamedSharding(mesh, P("data"))
    return NamedSharding(mesh, P("data", "model")), cache, cache, rows


def test_a_named_sharding_brings_its_mesh(mesh: Any) -> None:
    """No mesh is set, and shardings of the arguments of jit are enough for a kernel."""
    run = op(ROWS, partition=NamedSharding(mesh, P("data", "model")), implementation="kernel")
    operands = sharded.operands(ROWS)
    program = jax.jit(run, in_shardings=_shardings(mesh))
    results = program(*operands)
    assert_results(results, ROWS)
    assert results[0].sharding.spec == P("data", "model")
    # The twin: the spec alone finds no mesh.
    alone = jax.jit(op(ROWS, partition=P("data", "model")), in_shardings=_shardings(mesh))
    with pytest.raises(ValueError, match=r"partition names axes of a mesh.*where there is none"):
        alone(*operands)


def test_the_sharding_of_query(mesh: Any) -> None:
    operands = [jax.device_put(x, s) for x, s in zip(
        sharded.operands(ROWS), _shardings(mesh), strict=True
    )]  # fmt: skip
    partition = operands[0].sharding
    assert_results(op(ROWS, partition=partition)(*operands), ROWS)

    def loss(query: Any) -> Any:
        return op(ROWS, partition=partition)(query, *operands[1:])[0].sum()

    plain = jax.grad(lambda q: op(ROWS)(q, *sharded.operands(ROWS)[1:])[0].sum())
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss))(operands[0]), plain(sharded.operands(ROWS)[0]), atol=1e-5
    )


def test_a_named_sharding_of_the_same_mesh(mesh: Any) -> None:
    partition = NamedSharding(mesh, P("data", "model"))
    with jax.set_mesh(mesh):
        results = jax.jit(op(ROWS, partition=partition))(*sharded.operands(ROWS))
    assert_results(results, ROWS)


def test_a_named_sharding_of_another_mesh(mesh: Any) -> None:
    other = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    partition = NamedSharding(other, P("data"))
    message = "the mesh of partition must be the mesh of the context.*Pass the PartitionSpec alone"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.jit(op(ROWS, partition=partition))(*sharded.operands(ROWS))


def test_operands_on_fewer_devices_than_the_mesh(mesh: Any) -> None:
    partition = NamedSharding(mesh, P("data", "model"))
    with pytest.raises(ValueError, match=r"mesh of 8 devices; got a program for 1\. Put the oper"):
        jax.jit(op(ROWS, partition=partition))(*map(jnp.asarray, sharded.operands(ROWS)))
